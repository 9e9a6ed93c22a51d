//! A node's supervisor, with the rules of the worker's: it starts and ends ranks, tells how they ended, and makes its line anew.

use std::collections::BTreeMap;

use crate::line::{Down, End, LineId, Up};
use crate::rank::Rank;
use crate::world::{MS, NodeId, RankId, SECOND, Time, What, World};

/// Time from SIGTERM to a node's end, less what is kept to end ranks.
const DEADLINE: Time = 9 * SECOND;

pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) slot: u32,
    pub(crate) attempt: u32,
    pub(crate) alive: bool,
    /// Stopped since.
    pub(crate) hung: Option<Time>,
    pub(crate) backlog: Vec<What>,
    pub(crate) line: Option<LineId>,
    /// By number and attempt; one that has ended stays until it could be told.
    pub(crate) alive_ranks: BTreeMap<(u32, u32), RankId>,
    /// Ended, not told yet.
    unsaid: Vec<(u32, u32, i32)>,
    /// Told to leave.
    pub(crate) leaving: Option<Time>,
    pub(crate) cut_up: bool,
    pub(crate) cut_down: bool,
    pub(crate) cut_since: Time,
    pub(crate) cut_until: Time,
    pub(crate) cuts: u64,
    /// Without power.
    pub(crate) gone: bool,
    pub(crate) discarded: bool,
}

impl Node {
    pub(crate) fn new(name: String, slot: u32, attempt: u32) -> Self {
        Self {
            name,
            slot,
            attempt,
            alive: true,
            hung: None,
            backlog: Vec::new(),
            line: None,
            alive_ranks: BTreeMap::new(),
            unsaid: Vec::new(),
            leaving: None,
            cut_up: false,
            cut_down: false,
            cut_since: 0,
            cut_until: 0,
            cuts: 0,
            gone: false,
            discarded: false,
        }
    }
}

impl World {
    pub(crate) fn booted(&mut self, node: NodeId) {
        if self.nodes[node].alive {
            self.at(self.now, What::Connect(End::Node(node)));
        }
    }

    pub(crate) fn node_connected(&mut self, id: NodeId, line: LineId) {
        let node = &mut self.nodes[id];
        node.line = Some(line);
        let ranks = node.alive_ranks.keys().copied().collect();
        let unsaid = std::mem::take(&mut node.unsaid);
        let leaving = node.leaving.is_some();
        self.send_up(line, Up::NodeHello { ranks });
        if leaving {
            self.send_up(line, Up::Preempting);
        }
        for (local, attempt, code) in unsaid {
            self.nodes[id].alive_ranks.remove(&(local, attempt));
            self.send_up(line, Up::Exited { local, attempt, code });
        }
    }

    pub(crate) fn node_cut_off(&mut self, id: NodeId, line: LineId) {
        if self.nodes[id].line == Some(line) && self.nodes[id].alive {
            self.nodes[id].line = None;
            self.after(250 * MS, What::Connect(End::Node(id)));
        }
    }

    pub(crate) fn node_ordered(&mut self, id: NodeId, line: LineId, order: Down) {
        if self.nodes[id].line != Some(line) || !self.nodes[id].alive {
            return;
        }
        match order {
            Down::Start { local, attempt } => {
                let running = self.nodes[id].alive_ranks.iter().find(|((other, _), _)| *other == local);
                if let Some(((_, other), &rank)) = running
                    && self.ranks[rank].alive
                {
                    let name = &self.nodes[id].name;
                    let text =
                        format!("rank {local} of {name} is started (attempt {attempt}) while attempt {other} runs");
                    self.violate(text);
                }
                let rank = self.ranks.len();
                let place = (self.nodes[id].name.clone(), local);
                self.ranks.push(Rank::new(id, place, attempt));
                self.nodes[id].alive_ranks.insert((local, attempt), rank);
                self.at(self.now, What::Connect(End::Rank(rank)));
            }
            Down::Kill { local, attempt } => {
                if let Some(&rank) = self.nodes[id].alive_ranks.get(&(local, attempt)) {
                    self.kill_rank(rank, 137);
                }
            }
            Down::Leave { code } => {
                if code == 75 {
                    self.check_leave(id);
                }
                self.node_dies(id, code);
            }
            _ => {}
        }
    }

    /// A rank process of this node has ended.
    pub(crate) fn reap(&mut self, rank: RankId, code: i32) {
        let Rank { node: id, attempt, place: (_, local), .. } = self.ranks[rank];
        let node = &mut self.nodes[id];
        if !node.alive {
            return;
        }
        match node.line.filter(|_| node.hung.is_none()) {
            Some(line) => {
                node.alive_ranks.remove(&(local, attempt));
                self.send_up(line, Up::Exited { local, attempt, code });
            }
            None => node.unsaid.push((local, attempt, code)),
        }
    }

    /// What a stopped supervisor finds out when it goes on.
    pub(crate) fn catch_up(&mut self, id: NodeId) {
        let Some(line) = self.nodes[id].line else { return };
        for (local, attempt, code) in std::mem::take(&mut self.nodes[id].unsaid) {
            self.nodes[id].alive_ranks.remove(&(local, attempt));
            self.send_up(line, Up::Exited { local, attempt, code });
        }
    }

    /// SIGTERM.
    pub(crate) fn terminate(&mut self, id: NodeId) {
        let node = &mut self.nodes[id];
        if node.leaving.is_some() || !node.alive {
            return;
        }
        node.leaving = Some(self.now);
        match node.line {
            Some(line) => {
                self.send_up(line, Up::Preempting);
                self.after(DEADLINE, What::NodeDies { node: id, code: 75 });
            }
            // Nobody to ask.
            None => self.node_dies(id, 75),
        }
    }

    /// The supervisor's process ends, and its ranks with it.
    pub(crate) fn node_dies(&mut self, id: NodeId, code: i32) {
        if !self.nodes[id].alive {
            return;
        }
        if code == 75 && self.nodes[id].hung.is_some() {
            // A stopped process does not look at its watch.
            self.nodes[id].backlog.push(What::NodeDies { node: id, code });
            return;
        }
        let name = self.nodes[id].name.clone();
        self.note(&format!("{name} ends with {code}"));
        self.nodes[id].alive = false;
        self.nodes[id].backlog.clear();
        let ranks: Vec<RankId> = self.nodes[id].alive_ranks.values().copied().collect();
        ranks.into_iter().for_each(|rank| self.kill_rank(rank, 137));
        if let Some(line) = self.nodes[id].line.take() {
            self.close_client(line);
        }
        self.node_gone(id, code);
    }
}
