//! Connections. Within a direction order holds; what is under way when a connection breaks is lost; a silent one is given up after
//! two heartbeats, by each side for itself.

use std::collections::VecDeque;
use std::rc::Rc;

use crate::state::Position;
use crate::world::{MS, NodeId, RankId, SECOND, Time, What, World};

pub(crate) type LineId = usize;

/// Silence after which a connection counts as broken.
const SILENCE: Time = 3 * SECOND;
/// Time between two tries to connect.
const AGAIN: Time = 250 * MS;

/// The worker's side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum End {
    Node(NodeId),
    Rank(RankId),
}

/// A connection between a worker's process and a coordinator.
pub(crate) struct Line {
    pub(crate) end: End,
    pub(crate) coordinator: usize,
    /// Whether the worker, the coordinator still hold it.
    pub(crate) client: bool,
    pub(crate) server: bool,
    /// Reset: nothing gets through any more.
    pub(crate) broken: bool,
    last_up: Time,
    last_down: Time,
    /// Not through yet: the way is cut.
    stuck_up: VecDeque<Up>,
    stuck_down: VecDeque<Down>,
}

/// To the coordinator.
#[derive(Clone, Debug)]
pub(crate) enum Up {
    NodeHello {
        ranks: Vec<(u32, u32)>,
    },
    Exited {
        local: u32,
        attempt: u32,
        code: i32,
    },
    Preempting,
    /// Generation, rank and world where it is in one.
    RankHello {
        member: Option<(u64, u32, u32)>,
    },
    Said {
        generation: u64,
        what: Say,
    },
    Closed,
}

/// What a rank says.
#[derive(Clone, Debug)]
pub(crate) enum Say {
    Ready { broken: bool },
    Store { port: u32 },
    AskCommit,
    Reunited { step: u64, from_commit: Option<u64> },
    Progress { step: u64 },
    Parts(Parts),
    Finished { stopped: bool },
}

/// A rank's part of a checkpoint; rank 0's tells what was reached.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    pub(crate) step: u64,
    pub(crate) position: Option<Rc<Position>>,
    pub(crate) done: bool,
    pub(crate) shards: u32,
}

/// To a worker.
#[derive(Clone, Debug)]
pub(crate) enum Down {
    Start { local: u32, attempt: u32 },
    Kill { local: u32, attempt: u32 },
    Leave { code: i32 },
    Welcome,
    Assignment { generation: u64, rank: u32, nodes: Rc<Vec<u32>> },
    Rendezvous { host: String, port: u32 },
    Stop,
    Pause { generation: u64, leaving: Rc<Vec<u32>>, commit: bool },
    Regroup { generation: u64 },
    Committed { step: u64 },
    Newest(Option<u64>),
    Closed,
}

impl World {
    /// The machine that a worker's process runs on.
    pub(crate) fn host(&self, end: End) -> NodeId {
        match end {
            End::Node(node) => node,
            End::Rank(rank) => self.ranks[rank].node,
        }
    }

    fn latency(&mut self) -> Time {
        // Now and then a message is late.
        if self.dice.percent(2) { self.dice.between(5, 500) * MS } else { self.dice.between(200, 3000) }
    }

    /// A process tries to reach whoever coordinates.
    pub(crate) fn connect(&mut self, end: End) {
        let node = &self.nodes[self.host(end)];
        let cut = node.cut_up || node.cut_down || node.gone;
        let up = self.address.filter(|&coordinator| {
            let coordinator = &self.coordinators[coordinator];
            coordinator.alive && !coordinator.paused
        });
        let Some(coordinator) = up.filter(|_| !cut) else {
            let wait = AGAIN + self.dice.between(0, 50) * MS;
            self.after(wait, What::Connect(end));
            return;
        };
        let id = self.lines.len();
        self.lines.push(Line {
            end,
            coordinator,
            client: true,
            server: true,
            broken: false,
            last_up: self.now,
            last_down: self.now,
            stuck_up: VecDeque::new(),
            stuck_down: VecDeque::new(),
        });
        match end {
            End::Node(node) => self.node_connected(node, id),
            End::Rank(rank) => self.rank_connected(rank, id),
        }
    }

    pub(crate) fn send_up(&mut self, line: LineId, message: Up) {
        let late = self.now + self.latency();
        let line_ = &mut self.lines[line];
        line_.last_up = late.max(line_.last_up + 1);
        let at = line_.last_up;
        self.at(at, What::Up(line, message));
    }

    pub(crate) fn send_down(&mut self, line: LineId, message: Down) {
        let late = self.now + self.latency();
        let line_ = &mut self.lines[line];
        line_.last_down = late.max(line_.last_down + 1);
        let at = line_.last_down;
        self.at(at, What::Down(line, message));
    }

    pub(crate) fn arrive_up(&mut self, id: LineId, message: Up) {
        let host = self.host(self.lines[id].end);
        if self.lines[id].broken {
            return;
        }
        if self.nodes[host].cut_up || self.nodes[host].gone {
            self.lines[id].stuck_up.push_back(message);
        } else if self.lines[id].server {
            self.hear(id, message);
        }
    }

    pub(crate) fn arrive_down(&mut self, id: LineId, message: Down) {
        let host = self.host(self.lines[id].end);
        if self.lines[id].broken {
            return;
        }
        if self.nodes[host].cut_down || self.nodes[host].gone {
            self.lines[id].stuck_down.push_back(message);
        } else if let (true, Down::Closed) = (self.lines[id].client, &message) {
            self.arrive_closed(id);
        } else if self.lines[id].client {
            let end = self.lines[id].end;
            if self.sleeps(end) {
                let Some(backlog) = self.backlog(end) else { return };
                backlog.push(What::Down(id, message));
                return;
            }
            match end {
                End::Node(node) => self.node_ordered(node, id, message),
                End::Rank(rank) => self.rank_ordered(rank, id, message),
            }
        }
    }

    /// The worker's side closes: the coordinator hears of it, unless the way is cut.
    pub(crate) fn close_client(&mut self, id: LineId) {
        if std::mem::take(&mut self.lines[id].client) && self.lines[id].server {
            self.send_up(id, Up::Closed);
        }
    }

    pub(crate) fn close_server(&mut self, id: LineId) {
        if std::mem::take(&mut self.lines[id].server) && self.lines[id].client {
            self.send_down(id, Down::Closed);
        }
    }

    /// Reset: what was under way is lost, both sides notice soon.
    pub(crate) fn reset(&mut self, id: LineId) {
        if !self.lines[id].server && !self.lines[id].client {
            return;
        }
        let (up, down) = (self.dice.between(1, 150) * MS, self.dice.between(1, 150) * MS);
        self.after(up, What::Break { line: id, server: true });
        self.after(down, What::Break { line: id, server: false });
        self.lines[id].last_up = self.now + up;
        self.lines[id].last_down = self.now + down;
        self.lines[id].broken = true;
    }

    /// One side of a connection gives it up.
    pub(crate) fn give_up(&mut self, id: LineId, server: bool) {
        if server {
            if std::mem::take(&mut self.lines[id].server) {
                self.hear(id, Up::Closed);
                let host = self.host(self.lines[id].end);
                if self.lines[id].client && !self.nodes[host].gone && !self.lines[id].broken {
                    self.send_down(id, Down::Closed);
                }
            }
        } else if self.lines[id].client {
            // Taken as closed by the other side.
            self.arrive_closed(id);
            if self.lines[id].server && !self.lines[id].broken {
                self.send_up(id, Up::Closed);
            }
        }
    }

    /// The worker's process learns that its connection is gone.
    fn arrive_closed(&mut self, id: LineId) {
        let end = self.lines[id].end;
        if self.sleeps(end) {
            if let Some(backlog) = self.backlog(end) {
                backlog.push(What::Down(id, Down::Closed));
            }
            return;
        }
        self.lines[id].client = false;
        match end {
            End::Node(node) => self.node_cut_off(node, id),
            End::Rank(rank) => self.rank_cut_off(rank, id),
        }
    }

    /// Both sides of a node's lines fall silent from now on: they notice, should it last.
    pub(crate) fn fall_silent(&mut self, ends: &[End], server: bool, client: bool) {
        for id in 0..self.lines.len() {
            if !ends.contains(&self.lines[id].end) || !self.lines[id].client && !self.lines[id].server {
                continue;
            }
            for (side, wanted) in [(true, server), (false, client)] {
                if wanted {
                    let wait = SILENCE + self.dice.between(0, 300) * MS;
                    self.after(wait, What::Silent { line: id, server: side, since: self.now });
                }
            }
        }
    }

    /// Whether a side has had to wait for the other since `since`.
    pub(crate) fn silent(&mut self, id: LineId, server: bool, since: Time) {
        let end = self.lines[id].end;
        let host = self.host(end);
        let node = &self.nodes[host];
        let cut = (node.cut_up || node.cut_down) && node.cut_since <= since;
        let gone = node.gone;
        let hung = self.sleeping_since(end).is_some_and(|began| began <= since);
        let coordinator = &self.coordinators[self.lines[id].coordinator];
        let paused = coordinator.paused && coordinator.paused_since <= since;
        if cut || gone || if server { hung } else { paused } {
            self.give_up(id, server);
        }
    }

    /// The way is free again: what was stuck gets through, where the line still stands.
    pub(crate) fn unstick(&mut self, node: NodeId) {
        for id in 0..self.lines.len() {
            if self.host(self.lines[id].end) != node {
                continue;
            }
            let ups: Vec<Up> = self.lines[id].stuck_up.drain(..).collect();
            let downs: Vec<Down> = self.lines[id].stuck_down.drain(..).collect();
            // Before whatever was sent later.
            ups.into_iter().for_each(|up| self.at(self.now, What::Up(id, up)));
            downs.into_iter().for_each(|down| self.at(self.now, What::Down(id, down)));
        }
    }
}
