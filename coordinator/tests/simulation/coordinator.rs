//! A coordinator around the machine under test, with the server's rules: what it keeps beside the machine, how it carries effects
//! out, how it writes commits.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::rc::Rc;
use std::time::Duration;

use sgcl_coordinator::Outcome;
use sgcl_coordinator::machine::{Effect, Event, Machine, Place};
use tokio::time::Instant;

use crate::bucket::Commit;
use crate::line::{Down, End, LineId, Parts, Say, Up};
use crate::state::{ALL, Position};
use crate::world::{MS, SECOND, Time, What, World};

const TICK: Time = 100 * MS;
/// Ticks between two looks at whether another has taken over.
const LOOK: u64 = 20;

pub(crate) struct Coordinator {
    pub(crate) machine: Machine,
    pub(crate) lease: u64,
    pub(crate) alive: bool,
    pub(crate) paused: bool,
    pub(crate) paused_since: Time,
    /// What came while it was paused.
    pub(crate) backlog: Vec<What>,
    /// Its clock is so much ahead.
    pub(crate) jump: Time,
    ticks: u64,
    nodes: BTreeMap<String, LineId>,
    ranks: BTreeMap<Place, LineId>,
    parts: BTreeMap<(u64, u64), BTreeMap<Place, Parts>>,
    commit: Option<Rc<Commit>>,
    writing: bool,
    to_write: VecDeque<Write>,
    asking: Vec<Place>,
    /// Nodes that it was ever joined by.
    pub(crate) joined: BTreeSet<String>,
    /// Membership changes that it counted as failures.
    pub(crate) failures: u32,
}

/// A commit on its way.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    generation: u64,
    step: u64,
    position: Rc<Position>,
    done: bool,
}

/// What a coordinator and storage say to each other.
#[derive(Clone, Debug)]
pub(crate) enum Stage {
    /// Arrives at storage: is there a newer lease?
    Look(Option<Write>),
    Looked(Option<Write>, bool),
    Create(Write, Option<Rc<Commit>>),
    Created(Write, Result<Rc<Commit>, Rc<Commit>>),
    Found(Place),
}

impl Coordinator {
    /// Whether a rank has ever come to it.
    pub(crate) fn knows(&self, place: &Place) -> bool {
        self.ranks.contains_key(place)
    }
}

impl World {
    /// The first of a run starts it; a later one takes over what an earlier one left.
    pub(crate) fn coordinator_starts(&mut self) {
        let left = self.checks.running || !self.inventory().is_empty();
        self.begin_coordinating(left);
    }

    pub(crate) fn resume(&mut self) {
        self.clear();
        self.checks.resume();
        self.begin_coordinating(false);
    }

    fn begin_coordinating(&mut self, left: bool) {
        let lease = self.bucket.take_lease();
        let commit = self.bucket.newest();
        // Generations of an earlier coordinator may live and have left no commit: no number is used twice.
        let generation = commit.as_ref().map_or(0, |commit| commit.generation).max((lease - 1) * 1000);
        let (settings, now) = (self.scenario.settings.clone(), self.clock(0));
        let (machine, effects) = if left {
            (Machine::take_over(settings, generation, now), Vec::new())
        } else {
            Machine::start(settings, generation, now)
        };
        let id = self.coordinators.len();
        self.note(&format!("coordinator {id} begins with lease {lease}, generation {generation}, left: {left}"));
        self.coordinators.push(Coordinator {
            machine,
            lease,
            alive: true,
            paused: false,
            paused_since: 0,
            backlog: Vec::new(),
            jump: 0,
            ticks: 0,
            nodes: BTreeMap::new(),
            ranks: BTreeMap::new(),
            parts: BTreeMap::new(),
            commit,
            writing: false,
            to_write: VecDeque::new(),
            asking: Vec::new(),
            joined: BTreeSet::new(),
            failures: 0,
        });
        self.address = Some(id);
        self.carry_out(id, effects);
        if left {
            self.tell_what_is_left(id);
        }
        self.at(self.now, What::Tick(id));
    }

    /// What an earlier coordinator had started and committed.
    fn tell_what_is_left(&mut self, id: usize) {
        for (slot, attempt, ended) in self.inventory() {
            self.handle(id, Event::Launched { slot, attempt });
            if ended {
                self.handle(id, Event::LaunchEnded { slot, attempt, code: 1 });
            }
        }
        if let Some(commit) = self.coordinators[id].commit.clone() {
            let Commit { generation, seq, .. } = *commit;
            self.handle(id, Event::Committed { generation, seq, step: commit.position.step });
        }
    }

    fn clock(&self, jump: Time) -> Instant {
        self.epoch + Duration::from_micros(self.now + jump)
    }

    pub(crate) fn tick(&mut self, id: usize) {
        if !self.coordinators[id].alive {
            return;
        }
        self.after(TICK, What::Tick(id));
        if self.coordinators[id].paused {
            return;
        }
        self.coordinators[id].ticks += 1;
        if self.coordinators[id].ticks.is_multiple_of(LOOK) {
            let wait = self.storage();
            self.after(wait, What::Commit { coordinator: id, stage: Stage::Look(None) });
        }
        self.handle(id, Event::Tick);
        if self.coordinators[id].ticks.is_multiple_of(LOOK) {
            self.check_slots(id);
        }
    }

    /// It ends without a word: its lines close.
    pub(crate) fn end_coordinator(&mut self, id: usize, why: &str) {
        if !std::mem::take(&mut self.coordinators[id].alive) {
            return;
        }
        self.note(&format!("coordinator {id} ends: {why}"));
        self.checks.nobody_coordinates();
        if self.address == Some(id) {
            self.address = None;
        }
        for line in 0..self.lines.len() {
            if self.lines[line].coordinator == id {
                self.close_server(line);
            }
        }
    }

    pub(crate) fn tell_launch_ended(&mut self, slot: u32, attempt: u32, code: i32) {
        let Some(id) = self.address else { return };
        let coordinator = &mut self.coordinators[id];
        if coordinator.paused {
            let run = self.launcher.resumed;
            coordinator.backlog.push(What::LaunchEnds { run, slot, attempt, code });
        } else {
            self.handle(id, Event::LaunchEnded { slot, attempt, code });
        }
    }

    /// A message has come to a coordinator.
    pub(crate) fn hear(&mut self, line: LineId, message: Up) {
        let id = self.lines[line].coordinator;
        let coordinator = &mut self.coordinators[id];
        if !coordinator.alive {
            return;
        }
        if coordinator.paused {
            coordinator.backlog.push(What::Heard(line, message));
            return;
        }
        let event = match self.lines[line].end {
            End::Node(node) => {
                let name = self.nodes[node].name.clone();
                match message {
                    Up::NodeHello { ranks } => {
                        coordinator.nodes.insert(name.clone(), line);
                        coordinator.joined.insert(name.clone());
                        let address = format!("at-{name}");
                        Some(Event::NodeJoined { node: name, slot: self.nodes[node].slot, address, ranks })
                    }
                    Up::Exited { local, attempt, code } => {
                        Some(Event::RankExited { place: (name, local), attempt, code, last_words: String::new() })
                    }
                    Up::Preempting => Some(Event::Preempting { node: name, deadline: Duration::from_secs(10) }),
                    Up::Closed => {
                        self.lines[line].server = false;
                        let known = coordinator.nodes.get(&name) == Some(&line);
                        known.then(|| {
                            coordinator.nodes.remove(&name);
                            Event::NodeLost { node: name }
                        })
                    }
                    Up::RankHello { .. } | Up::Said { .. } => None,
                }
            }
            End::Rank(rank) => {
                let place = self.ranks[rank].place.clone();
                let attempt = self.ranks[rank].attempt;
                match message {
                    Up::RankHello { member } => {
                        coordinator.ranks.insert(place.clone(), line);
                        self.send_down(line, Down::Welcome);
                        member.map(|(generation, rank, world)| Event::RankReturned {
                            place,
                            attempt,
                            generation,
                            rank,
                            world,
                        })
                    }
                    Up::Said { generation, what } => self.said(id, place, attempt, generation, what),
                    Up::Closed => {
                        self.lines[line].server = false;
                        None
                    }
                    _ => None,
                }
            }
        };
        if let Some(event) = event {
            self.handle(id, event);
        }
    }

    fn said(&mut self, id: usize, place: Place, attempt: u32, generation: u64, what: Say) -> Option<Event> {
        match what {
            Say::Ready { broken } => {
                let broken = broken.then(|| "a peer is gone".to_owned());
                Some(Event::RankReady { place, attempt, generation, broken })
            }
            Say::Store { port } => Some(Event::StoreListening { generation, port }),
            Say::AskCommit => {
                self.coordinators[id].asking.push(place);
                self.answer(id);
                None
            }
            Say::Reunited { step, from_commit } => Some(Event::Reunited { generation, place, step, from_commit }),
            Say::Progress { step } => Some(Event::Progress { generation, step }),
            Say::Parts(parts) => {
                let coordinator = &mut self.coordinators[id];
                if generation != coordinator.machine.generation() {
                    return None;
                }
                let step = parts.step;
                coordinator.parts.entry((generation, step)).or_default().insert(place.clone(), parts);
                Some(Event::PartsWritten { generation, place, step })
            }
            Say::Finished { stopped } => Some(Event::RankFinished { generation, place, stopped }),
        }
    }

    pub(crate) fn handle(&mut self, id: usize, event: Event) {
        if !self.coordinators[id].alive {
            return;
        }
        let now = self.clock(self.coordinators[id].jump);
        let quiet = matches!(event, Event::Tick | Event::Progress { .. });
        let text = if quiet { String::new() } else { format!("{event:?}") };
        let effects = self.coordinators[id].machine.handle(now, event);
        if !quiet || !effects.is_empty() {
            let mut text = format!("c{id} {text}");
            for effect in &effects {
                text.push_str("\n               > ");
                text.push_str(&brief(effect));
            }
            self.note(&text);
        }
        self.check_effects(id, &effects);
        self.carry_out(id, effects);
    }

    fn order(&mut self, id: usize, node: &str, order: Down) {
        if let Some(&line) = self.coordinators[id].nodes.get(node).filter(|&&line| self.lines[line].server) {
            self.send_down(line, order);
        }
    }

    fn tell(&mut self, id: usize, place: &Place, order: Down) {
        if let Some(&line) = self.coordinators[id].ranks.get(place).filter(|&&line| self.lines[line].server) {
            self.send_down(line, order);
        }
    }

    fn carry_out(&mut self, id: usize, effects: Vec<Effect>) {
        let lease = self.coordinators[id].lease;
        for effect in effects {
            match effect {
                Effect::Launch { slot, attempt } => {
                    if !self.launch(lease, slot, attempt) {
                        self.end_coordinator(id, "stale, a launch was refused");
                        return;
                    }
                }
                Effect::Discard { slot, attempt } => {
                    if !self.discard(lease, slot, attempt) {
                        self.end_coordinator(id, "stale, a discard was refused");
                        return;
                    }
                }
                Effect::StartRank { place: (node, local), attempt } => {
                    self.order(id, &node, Down::Start { local, attempt });
                }
                Effect::KillRank { place: (node, local), attempt } => {
                    self.order(id, &node, Down::Kill { local, attempt });
                }
                Effect::Leave { node, code, .. } => self.order(id, &node, Down::Leave { code }),
                Effect::Assign { place, generation, rank, nodes } => {
                    self.coordinators[id].parts.retain(|&(of, _), _| of == generation);
                    self.tell(id, &place, Down::Assignment { generation, rank, nodes: Rc::new(nodes) });
                }
                Effect::Rendezvous { place, host, port } => self.tell(id, &place, Down::Rendezvous { host, port }),
                Effect::Stop { place, .. } => self.tell(id, &place, Down::Stop),
                Effect::Pause { place, generation, leaving, commit, .. } => {
                    self.tell(id, &place, Down::Pause { generation, leaving: Rc::new(leaving), commit });
                }
                Effect::Regroup { place, generation, .. } => self.tell(id, &place, Down::Regroup { generation }),
                Effect::WriteCommit { generation, step } => self.write_commit(id, generation, step),
                Effect::TellCommitted { place, step, .. } => self.tell(id, &place, Down::Committed { step }),
                Effect::Started { .. } => self.checks.running = true,
                Effect::Found { .. } | Effect::Regrouped(_) | Effect::Note { .. } => {}
                Effect::End(_) if lease < self.bucket.leases => {
                    self.end_coordinator(id, "stale, the run is another's to end");
                    return;
                }
                Effect::End(outcome) => {
                    self.end_coordinator(id, &format!("{outcome:?}"));
                    if outcome == Outcome::Finished {
                        self.finished = true;
                    } else {
                        self.after(3 * SECOND, What::Resume);
                    }
                    return;
                }
            }
        }
    }

    fn write_commit(&mut self, id: usize, generation: u64, step: u64) {
        let parts = self.coordinators[id].parts.remove(&(generation, step)).unwrap_or_default();
        let shards = parts.values().fold(0, |all, parts| all | parts.shards);
        let head = parts.values().find_map(|parts| Some((parts.position.clone()?, parts.done)));
        let Some((position, done)) = head.filter(|_| shards == ALL) else {
            self.violate(format!("the commit of step {step}, generation {generation}, lacks parts"));
            return;
        };
        self.coordinators[id].to_write.push_back(Write { generation, step, position, done });
        self.write_next(id);
    }

    /// One commit at a time: what is newest is not known before it ends.
    fn write_next(&mut self, id: usize) {
        if self.coordinators[id].writing {
            return;
        }
        if let Some(write) = self.coordinators[id].to_write.pop_front() {
            self.coordinators[id].writing = true;
            let wait = self.storage();
            self.after(wait, What::Commit { coordinator: id, stage: Stage::Look(Some(write)) });
        } else {
            self.answer(id);
        }
    }

    fn answer(&mut self, id: usize) {
        if self.coordinators[id].writing {
            return;
        }
        for place in std::mem::take(&mut self.coordinators[id].asking) {
            let wait = self.storage();
            self.after(wait, What::Commit { coordinator: id, stage: Stage::Found(place) });
        }
    }

    pub(crate) fn commit_goes_on(&mut self, id: usize, stage: Stage) {
        let coordinator = &mut self.coordinators[id];
        // What storage has taken happens, whoever lives to hear of it.
        let at_storage = matches!(stage, Stage::Look(_) | Stage::Create(..));
        if !at_storage && !coordinator.alive {
            return;
        }
        if !at_storage && coordinator.paused {
            coordinator.backlog.push(What::Commit { coordinator: id, stage });
            return;
        }
        let lease = coordinator.lease;
        let commit = coordinator.commit.clone();
        let next = match stage {
            Stage::Look(write) => Stage::Looked(write, self.bucket.leases > lease),
            Stage::Looked(_, true) => {
                self.end_coordinator(id, "stale, another has the lease");
                return;
            }
            Stage::Looked(None, false) => return,
            Stage::Looked(Some(write), false) => Stage::Create(write, commit),
            Stage::Create(write, parent) => {
                let Write { generation, ref position, done, .. } = write;
                let made = Commit {
                    seq: parent.as_ref().map_or(0, |parent| parent.seq) + 1,
                    write_id: self.bucket.write_id(),
                    parent: parent.as_ref().map(|parent| parent.write_id),
                    lease,
                    generation,
                    position: Rc::clone(position),
                    done,
                };
                let result = self.bucket.create(made);
                if let Ok(commit) = &result {
                    self.note(&format!("commit {} of step {}, lease {lease}", commit.seq, commit.position.step));
                    self.check_chain();
                }
                Stage::Created(write, result)
            }
            Stage::Created(Write { generation, step, .. }, Ok(commit)) => {
                let seq = commit.seq;
                self.coordinators[id].commit = Some(commit);
                self.coordinators[id].writing = false;
                self.answer(id);
                self.handle(id, Event::Committed { generation, seq, step });
                self.write_next(id);
                return;
            }
            Stage::Created(_, Err(winner)) if winner.lease > lease => {
                self.end_coordinator(id, "stale, it lost a commit to a newer lease");
                return;
            }
            Stage::Created(_, Err(winner)) if winner.lease == lease => {
                self.violate(format!("commit {} is written twice by one coordinator", winner.seq));
                return;
            }
            Stage::Created(write, Err(winner)) => {
                self.coordinators[id].commit = Some(winner);
                Stage::Look(Some(write))
            }
            Stage::Found(place) => {
                let newest = self.bucket.newest();
                let seq = newest.as_ref().map(|commit| commit.seq);
                self.coordinators[id].commit = newest;
                self.tell(id, &place, Down::Newest(seq));
                return;
            }
        };
        let wait = self.storage();
        self.after(wait, What::Commit { coordinator: id, stage: next });
    }
}

/// An effect in a line.
fn brief(effect: &Effect) -> String {
    let mut text = String::new();
    let _ = match effect {
        Effect::Assign { place, generation, rank, nodes } => {
            write!(text, "Assign {place:?} generation {generation} rank {rank}/{}", nodes.len())
        }
        Effect::Leave { node, code, .. } => write!(text, "Leave {node} {code}"),
        effect => write!(text, "{effect:?}"),
    };
    if text.len() > 400 {
        text = text.chars().take(400).collect();
    }
    text
}
