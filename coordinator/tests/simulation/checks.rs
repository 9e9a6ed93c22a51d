//! What must hold whatever happens.

use std::collections::{BTreeMap, BTreeSet};

use sgcl_coordinator::Outcome;
use sgcl_coordinator::machine::{Effect, Place};

use crate::faults::AFTERMATH;
use crate::ring::micros;
use crate::state::ALL;
use crate::world::{NodeId, RankId, SECOND, Time, World};

/// Longest time for a loss to be noticed.
const UNNOTICED: Time = 5 * SECOND;
/// Longest time for a slot to stay empty: a new coordinator listens first.
const EMPTY: Time = 25 * SECOND;

/// What is remembered to tell right from wrong.
#[derive(Default)]
pub(crate) struct Checks {
    pub(crate) violation: Option<String>,
    /// Newest generation that was dealt, and by which coordinator.
    newest: (u64, usize),
    pub(crate) formed: u64,
    /// Newest generation that finished a step.
    stepping: u64,
    pub(crate) rollbacks: u64,
    /// Faults that the run's budget is for.
    pub(crate) failures: u32,
    /// The user asked for an end.
    pub(crate) stopped: bool,
    /// What the bucket says: ranks may be training.
    pub(crate) running: bool,
    last_trouble: Option<Time>,
    /// When a process was last killed.
    pub(crate) last_death: Option<Time>,
    /// Slots that nothing fills and nothing was started for, since when.
    empty: BTreeMap<u32, Time>,
}

impl Checks {
    /// The run begins anew from its newest commit: nothing of it lives.
    pub(crate) fn resume(&mut self) {
        (self.running, self.stopped) = (false, false);
        self.empty.clear();
    }

    pub(crate) fn nobody_coordinates(&mut self) {
        self.empty.clear();
    }

    pub(crate) fn trouble(&mut self, now: Time) {
        self.last_trouble = Some(now);
    }
}

impl World {
    pub(crate) fn check_effects(&mut self, id: usize, effects: &[Effect]) {
        if self.coordinators[id].lease < self.bucket.leases {
            // Stale: what it decides counts for nothing, as others than it can see.
            return;
        }
        let mut started: BTreeSet<&Place> = BTreeSet::new();
        for effect in effects {
            match effect {
                Effect::StartRank { place, .. } => {
                    self.check_place(id, place);
                    if !started.insert(place) {
                        self.violate(format!("{place:?} is started twice at once"));
                    }
                }
                Effect::KillRank { place, .. }
                | Effect::Rendezvous { place, .. }
                | Effect::Stop { place, .. }
                | Effect::Pause { place, .. }
                | Effect::Regroup { place, .. }
                | Effect::TellCommitted { place, .. } => self.check_place(id, place),
                Effect::Leave { node, .. } => self.check_node(id, node),
                Effect::Assign { place, generation, .. } => {
                    self.check_place(id, place);
                    let (newest, by) = self.checks.newest;
                    if *generation > newest {
                        self.checks.newest = (*generation, id);
                        self.checks.formed += 1;
                    } else if (*generation, id) != (newest, by) {
                        self.violate(format!("generation {generation} is formed after generation {newest}"));
                    }
                }
                Effect::Launch { slot, .. } | Effect::Discard { slot, .. } if *slot >= self.scenario.settings.nodes => {
                    self.violate(format!("slot {slot} is not of this run"));
                }
                Effect::Regrouped(change) => {
                    self.coordinators[id].failures += u32::from(change.failure);
                    if self.coordinators[id].failures > self.checks.failures {
                        let (counted, real) = (self.coordinators[id].failures, self.checks.failures);
                        let text = format!("{counted} failures are counted of {real}, the last: {}", change.reason);
                        self.violate(text);
                    }
                }
                Effect::End(outcome) => self.check_outcome(outcome),
                _ => {}
            }
        }
    }

    /// What is lost is started again, where somebody is there to do it.
    pub(crate) fn check_slots(&mut self, id: usize) {
        let filled: BTreeSet<u32> = self.launcher.started.keys().map(|(slot, _)| *slot).collect();
        let coordinates = self.address == Some(id) && self.coordinators[id].lease == self.bucket.leases;
        for slot in 0..self.scenario.settings.nodes {
            if filled.contains(&slot) || !coordinates {
                self.checks.empty.remove(&slot);
            } else if *self.checks.empty.entry(slot).or_insert(self.now) + EMPTY < self.now {
                self.violate(format!("slot {slot} is empty, and nothing is started in it"));
            }
        }
    }

    fn check_place(&mut self, id: usize, place: &Place) {
        // A rank may be heard of before its node.
        if !self.coordinators[id].knows(place) {
            self.check_node(id, &place.0);
        }
        if place.1 >= self.scenario.settings.ranks_per_node {
            self.violate(format!("there is no place {place:?}"));
        }
    }

    fn check_node(&mut self, id: usize, node: &str) {
        if !self.coordinators[id].joined.contains(node) {
            self.violate(format!("node {node} never joined this coordinator"));
        }
    }

    fn check_outcome(&mut self, outcome: &Outcome) {
        let settings = &self.scenario.settings;
        let patience = micros(settings.startup_timeout) + AFTERMATH;
        let troubled = self.checks.last_trouble.is_some_and(|at| at + patience >= self.now);
        match outcome {
            Outcome::Failed { message, .. } if message.contains("max_restarts") => {
                let (real, survives) = (self.checks.failures, settings.max_restarts);
                let text = format!("{real} failures end a run that survives {survives}: {message}");
                // Ends that a coordinator had ordered before it was lost are failures to the next one.
                if real <= survives && !self.checks.stopped {
                    self.violate(text)
                }
            }
            Outcome::Failed { message, .. } if !troubled => {
                self.violate(format!("the run fails without cause: {message}"))
            }
            Outcome::Suspended { reason } if !troubled && !self.checks.stopped => {
                self.violate(format!("the run is suspended without cause: {reason}"));
            }
            _ => {}
        }
    }

    /// A step is about to end for all ranks of a ring.
    pub(crate) fn check_step(&mut self, ring: usize) {
        let generation = self.rings[ring].generation;
        let woke = self.rings[ring].here.values().any(|&rank| {
            let rank = &self.ranks[rank];
            rank.woke.is_some_and(|at| at + 10 * SECOND >= self.now)
        });
        if generation < self.checks.stepping && woke {
            // All of it was out of reach: it ends its step, then hears that it is over. Nothing of it is committed.
            return;
        }
        if generation < self.checks.stepping {
            let text = format!("generation {generation} trains beside generation {}", self.checks.stepping);
            self.violate(text);
        }
        self.checks.stepping = generation;
    }

    /// Others than `members` that hold state, live and could be asked.
    fn left_out(&self, members: &[RankId]) -> Vec<RankId> {
        let reachable = |node: NodeId| {
            let node = &self.nodes[node];
            let cut = node.cuts > 0 && node.cut_until + 40 * SECOND >= self.now;
            node.alive && !node.discarded && !node.gone && node.hung.is_none() && !cut
        };
        (0..self.ranks.len())
            .filter(|rank| !members.contains(rank))
            .filter(|&rank| {
                let rank = &self.ranks[rank];
                let woke = rank.woke.is_some_and(|at| at + 10 * SECOND >= self.now);
                rank.alive && rank.hung.is_none() && !woke && rank.held.standing && reachable(rank.node)
            })
            .collect()
    }

    /// No step is lost while somebody has it.
    pub(crate) fn check_reunion(&mut self, ring: usize, members: &[RankId]) {
        let step = self.rings[ring].decision.front.step;
        let further = self.left_out(members).into_iter().find(|&rank| self.ranks[rank].held.position.step > step);
        if let Some(rank) = further {
            let rank = &self.ranks[rank];
            let text = format!(
                "generation {} goes on from step {step}, and {:?} with step {} is left out",
                self.rings[ring].generation, rank.place, rank.held.position.step
            );
            self.violate(text);
        }
    }

    /// A commit is gone back to only where something is held by nobody.
    pub(crate) fn check_rollback(&mut self, ring: usize, members: &[RankId]) {
        let others = self.left_out(members);
        let all: Vec<RankId> = members.iter().copied().chain(others).collect();
        let standing = all.into_iter().filter(|&rank| self.ranks[rank].held.standing);
        let standing: Vec<RankId> = standing.collect();
        let front = standing.iter().map(|&rank| self.ranks[rank].held.position.step).max().unwrap_or(0);
        let current = standing.iter().filter(|&&rank| self.ranks[rank].held.position.step + 1 >= front);
        let committed = self.bucket.newest().map_or(0, |commit| commit.position.step);
        self.checks.rollbacks += u64::from(front > committed);
        if front > committed && current.fold(0, |all, &rank| all | self.ranks[rank].held.sources()) == ALL {
            let generation = self.rings[ring].generation;
            self.violate(format!(
                "generation {generation} goes back to a commit of step {committed}, while memory holds step {front}"
            ));
        }
    }

    /// A node that leaves in good order takes nothing with it that nobody else has.
    pub(crate) fn check_leave(&mut self, node: NodeId) {
        let unnoticed = self.checks.last_death.is_some_and(|at| at + UNNOTICED >= self.now);
        if self.nodes[node].discarded || unnoticed {
            // Given up before; or another was just lost, which nobody could know.
            return;
        }
        let standing = |rank: &RankId| self.ranks[*rank].alive && self.ranks[*rank].held.standing;
        let (own, others): (Vec<RankId>, Vec<RankId>) =
            (0..self.ranks.len()).filter(standing).partition(|&rank| self.ranks[rank].node == node);
        let step = |ranks: &[RankId]| ranks.iter().map(|&rank| self.ranks[rank].held.position.step).max().unwrap_or(0);
        let front = step(&own).max(step(&others));
        let hold = |ranks: &[RankId]| {
            let current = ranks.iter().filter(|&&rank| self.ranks[rank].held.position.step + 1 >= front);
            current.fold(0, |all, &rank| all | self.ranks[rank].held.sources())
        };
        let committed = self.bucket.newest().map_or(0, |commit| commit.position.step);
        if front > committed && hold(&others) != ALL && hold(&others) | hold(&own) == ALL {
            let name = self.nodes[node].name.clone();
            self.violate(format!("{name} is sent home with what nobody else has of step {front}, commit: {committed}"));
        }
    }

    /// Commits are one chain, and go ahead.
    pub(crate) fn check_chain(&mut self) {
        let Some([before, last]) = self.bucket.commits.last_chunk() else { return };
        let (before, last) = (before.clone(), last.clone());
        if last.parent != Some(before.write_id) || last.seq != before.seq + 1 {
            self.violate(format!("commit {} does not follow commit {}", last.seq, before.seq));
        }
        if last.position.step < before.position.step || last.generation < before.generation {
            self.violate(format!(
                "commit {} of step {}, generation {} follows commit {} of step {}, generation {}",
                last.seq, last.position.step, last.generation, before.seq, before.position.step, before.generation
            ));
        }
        if last.lease < before.lease {
            self.violate(format!("commit {} is of lease {} after lease {}", last.seq, last.lease, before.lease));
        }
    }

    pub(crate) fn check_the_end(&mut self) {
        let whole = self.bucket.newest().filter(|commit| {
            let position = &commit.position;
            commit.done && position.epoch + 1 == self.scenario.epochs && position.is_over(self.scenario.patches)
        });
        if whole.is_none() {
            self.violate("the run is called finished, and its last commit is not of its end".into());
        }
    }
}
