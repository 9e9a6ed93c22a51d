//! A generation's ring: collectives that end for all, for none, or for some where the ring breaks at their end.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use crate::rank::Doing;
use crate::state::{ALL, Position, deal};
use crate::world::{MS, RankId, Time, What, World};

/// What ranks do together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Who holds what.
    Headers,
    /// Position, the last step's bank update and weights of the furthest.
    Share,
    /// Bank shards, and the barrier behind it.
    Move,
    Moved,
    /// The commit to go back to.
    Begin,
    Cluster,
    Step,
    /// As `Move`, before ranks leave.
    HandOver,
    HandedOver,
    /// Nobody leaves before the export is durable.
    Last,
}

/// What ranks agree on when a generation begins.
#[derive(Default)]
pub(crate) struct Decision {
    pub(crate) current: Vec<bool>,
    /// Memory does not hold everything.
    pub(crate) begin: bool,
    pub(crate) front: Rc<Position>,
    pub(crate) labels: bool,
}

pub(crate) struct Ring {
    pub(crate) generation: u64,
    world: u32,
    host: String,
    /// Who is here, by number.
    pub(crate) here: BTreeMap<u32, RankId>,
    stands: bool,
    pub(crate) broken: bool,
    operation: Option<Operation>,
    /// Collectives so far.
    count: u64,
    arrived: Vec<RankId>,
    pub(crate) decision: Decision,
    pub(crate) plan: Vec<u32>,
    pub(crate) seq: Option<u64>,
    pub(crate) position: Rc<Position>,
    pub(crate) asked: (bool, bool),
}

impl World {
    /// Rank 0 opens the store.
    pub(crate) fn listen(&mut self, id: RankId) -> usize {
        let rank = &self.ranks[id];
        self.rings.push(Ring {
            generation: rank.generation,
            world: rank.world(),
            host: format!("at-{}", rank.place.0),
            here: BTreeMap::new(),
            stands: false,
            broken: false,
            operation: None,
            count: 0,
            arrived: Vec::new(),
            decision: Decision::default(),
            plan: Vec::new(),
            seq: None,
            position: Rc::default(),
            asked: (false, false),
        });
        let ring = self.rings.len() - 1;
        self.ranks[id].ring = Some(ring);
        ring
    }

    /// A rank comes to the store; the last one completes the ring.
    pub(crate) fn meet(&mut self, id: RankId, host: &str, ring: usize) {
        let (generation, number) = (self.ranks[id].generation, self.ranks[id].number);
        self.go_wait(id, Doing::AtStore);
        let there = self.rings.get_mut(ring).filter(|ring| ring.generation == generation && !ring.broken);
        let Some(there) = there else {
            // Nobody listens there.
            self.break_generation(id);
            return;
        };
        if there.host != host {
            let text = format!("the store of generation {generation} is at {}, ranks are sent to {host}", there.host);
            self.violate(text);
            return;
        }
        self.ranks[id].ring = Some(ring);
        let there = &mut self.rings[ring];
        if let Some(other) = there.here.insert(number, id).filter(|&other| other != id) {
            let text = format!("two processes are number {number} of generation {generation}: {other} and {id}");
            self.violate(text);
            return;
        }
        if self.rings[ring].here.len() as u32 == self.rings[ring].world {
            self.rings[ring].stands = true;
            for rank in self.rings[ring].here.values().copied().collect::<Vec<_>>() {
                if self.ranks[rank].doing == Doing::AtStore {
                    self.ring_stands(rank);
                }
            }
        }
    }

    /// A rank comes to a collective; the last one completes it.
    pub(crate) fn arrive(&mut self, id: RankId, operation: Operation, seq: Option<u64>) {
        self.go_wait(id, Doing::Together(operation));
        let Some(ring) = self.ranks[id].ring else {
            self.break_generation(id);
            return;
        };
        if self.rings[ring].broken {
            self.ring_error(id);
            return;
        }
        let first = self.rings[ring].arrived.is_empty();
        let there = &mut self.rings[ring];
        if first {
            there.operation = Some(operation);
            let (wait, count) = (micros(self.scenario.settings.step_timeout), there.count);
            self.after(wait, What::RingTimesOut { ring, operation: count });
        } else if there.operation != Some(operation) {
            let text = format!("ranks of one ring come to {operation:?} and {:?}", there.operation);
            self.violate(text);
            return;
        }
        let there = &mut self.rings[ring];
        if operation == Operation::Begin {
            there.seq = seq.or(there.seq.filter(|_| !first));
        }
        there.arrived.push(id);
        if there.arrived.len() as u32 == there.world {
            self.complete(ring, operation);
        }
    }

    fn complete(&mut self, ring: usize, operation: Operation) {
        let there = &mut self.rings[ring];
        there.count += 1;
        there.arrived.clear();
        let members: Vec<RankId> = there.here.values().copied().collect();
        match operation {
            Operation::Headers => self.decide(ring, &members),
            Operation::HandOver => {
                let leaving = self.leaving(members[0]);
                self.plan(ring, &members, &leaving);
            }
            Operation::Begin => self.check_rollback(ring, &members),
            Operation::Step => {
                let position = Rc::clone(&self.ranks[members[0]].held.position);
                for &rank in &members {
                    if self.ranks[rank].held.position != position {
                        let text = format!("ranks of one ring stand at different places: {:?}", self.ranks[rank].place);
                        self.violate(text);
                        return;
                    }
                }
                match position.stepped(members.len() as u64, self.scenario.patches) {
                    Ok(next) => self.rings[ring].position = next,
                    Err(error) => self.violate(error),
                }
                let asked = members.iter().map(|&rank| self.ranks[rank].asked());
                self.rings[ring].asked = asked.fold((false, false), |all, one| (all.0 | one.0, all.1 | one.1));
                self.check_step(ring);
            }
            _ => {}
        }
        let late = self.dice.percent(10);
        for rank in members {
            let wait = if late { self.dice.between(0, 60_000) } else { self.dice.between(0, 2000) };
            let token = self.ranks[rank].token;
            self.after(wait, What::Timer { rank, token });
        }
    }

    /// Who is furthest, who stands, whether memory holds everything.
    fn decide(&mut self, ring: usize, members: &[RankId]) {
        let standing: Vec<RankId> = members.iter().copied().filter(|&rank| self.ranks[rank].held.standing).collect();
        let key = |rank: &RankId| {
            let rank = &self.ranks[*rank];
            (rank.held.position.step, rank.held.position.epoch, std::cmp::Reverse(rank.number))
        };
        let lead = standing.iter().copied().max_by_key(key);
        let front = lead.map(|lead| Rc::clone(&self.ranks[lead].held.position)).unwrap_or_default();
        let current = |rank: RankId| {
            let held = &self.ranks[rank].held;
            held.standing && held.position.step + 1 >= front.step
        };
        let sources = members.iter().filter(|&&rank| current(rank));
        let covered = sources.fold(0, |all, &rank| all | self.ranks[rank].held.sources());
        let labels = members
            .iter()
            .filter(|&&rank| current(rank))
            .all(|&rank| self.ranks[rank].held.labelled == Some(front.epoch));
        let current: Vec<bool> = members.iter().map(|&rank| current(rank)).collect();
        for (&rank, _) in members.iter().zip(&current).filter(|(_, current)| **current) {
            let position = &self.ranks[rank].held.position;
            let same = position.step == front.step && position.hash == front.hash;
            if !same && (position.step == front.step || position.hash != front.parent) {
                let text = format!(
                    "{:?} stands at step {} of another past than step {}",
                    self.ranks[rank].place, position.step, front.step
                );
                self.violate(text);
                return;
            }
        }
        let begin = lead.is_none() || covered != ALL;
        self.rings[ring].decision = Decision { current, begin, front, labels };
        if !begin {
            self.plan(ring, members, &[]);
            self.check_reunion(ring, members);
        }
    }

    fn plan(&mut self, ring: usize, members: &[RankId], leaving: &[u32]) {
        let nodes: Vec<Option<u32>> = (0..)
            .zip(self.ranks[members[0]].nodes.iter())
            .map(|(number, &node)| (!leaving.contains(&number)).then_some(node))
            .collect();
        let current = &self.rings[ring].decision.current;
        let holders: Vec<u32> = members
            .iter()
            .enumerate()
            .map(|(at, &rank)| if current[at] || !leaving.is_empty() { self.ranks[rank].held.sources() } else { 0 })
            .collect();
        self.rings[ring].plan = deal(&holders, &nodes, self.scenario.replicas);
    }

    fn ring_error(&mut self, id: RankId) {
        let token = self.ranks[id].token;
        let wait = self.dice.between(1, 30) * MS;
        self.after(wait, What::RingBreaks { rank: id, token });
    }

    /// A member left, died or was told to break off. What is through for some may be lost to others.
    pub(crate) fn break_ring(&mut self, ring: usize, died: bool) {
        if std::mem::replace(&mut self.rings[ring].broken, true) {
            return;
        }
        for rank in self.rings[ring].here.values().copied().collect::<Vec<_>>() {
            if !self.ranks[rank].alive || self.ranks[rank].ring != Some(ring) {
                continue;
            }
            match self.ranks[rank].doing {
                Doing::AtStore => self.ring_error(rank),
                Doing::Together(_) => {
                    let waits = self.rings[ring].arrived.contains(&rank);
                    if waits || died && self.dice.percent(50) || !died && self.ranks[rank].is_broken() {
                        self.ring_error(rank);
                    }
                }
                _ => {}
            }
        }
    }

    pub(crate) fn ring_times_out(&mut self, ring: usize, count: u64) {
        if self.rings[ring].count == count && !self.rings[ring].broken {
            self.note(&format!("the ring of generation {} times out", self.rings[ring].generation));
            self.break_ring(ring, true);
        }
    }
}

pub(crate) fn micros(duration: Duration) -> Time {
    duration.as_micros() as Time
}
