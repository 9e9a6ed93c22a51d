//! Which Jobs a run has, and what they mean to its state machine. No input or output.
//!
//! A state machine counts attempts from 0 each time a coordinator begins. Jobs of earlier coordinators are still there, so a Job's
//! number is its own: the machine's where that is free, else the next one. A live Job that nobody asked for yet is taken as it is.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::pods::PodFacts;
use crate::launcher::Ended;

/// Failures on one machine, and on no other, after which the run avoids it.
const BAD_MACHINE: u32 = 2;
/// How long a pod must be lost before its node is given up for that alone, where nodes on other machines run. One that trained is known
/// earlier by its silent line; this is for one that never joined, or not yet to a new coordinator.
pub const LOST: Duration = Duration::from_secs(5);
/// The same where all are lost. When an API server comes back from an outage, the node controller finds every kubelet's lease stale and
/// calls all machines unready at once, though everything on them runs. A kubelet corrects that when its watch is back (client-go waits up
/// to 30 s between tries) and it next compares statuses (every 10 s).
const ALL_LOST: Duration = Duration::from_secs(45);

/// A Job of this run.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    slot: u32,
    number: u32,
    /// What the machine calls it, once it has asked.
    attempt: Option<u32>,
    pod: Option<PodFacts>,
    /// Since when its pod has been lost, where it is.
    lost: Option<Instant>,
    over: bool,
    /// Its end says nothing of its machine, or was counted.
    counted: bool,
}

/// Which Jobs there are and what they mean to the machine. No input or output.
#[derive(Debug, Default)]
pub struct Book {
    entries: Vec<Entry>,
    /// Failures by machine.
    failures: BTreeMap<String, u32>,
    /// Machines that nodes were given up on.
    suspects: BTreeMap<u32, String>,
}

/// What a launch comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Launch {
    /// A Job is there already.
    Adopt(u32),
    /// Make one of this number.
    Create {
        /// The number.
        number: u32,
        /// Machines that must not be used.
        never: Vec<String>,
        /// Machines that had better not be used.
        rather_not: Vec<String>,
    },
}

impl Book {
    /// Jobs that are there: slot, number, and whether over.
    pub fn known(&mut self, jobs: impl IntoIterator<Item = (u32, u32, bool)>) {
        for (slot, number, over) in jobs {
            if !self.entries.iter().any(|entry| (entry.slot, entry.number) == (slot, number)) {
                self.entries.push(Entry { slot, number, attempt: None, pod: None, lost: None, over, counted: over });
            }
        }
        self.entries.sort_by_key(|entry| (entry.slot, entry.number));
    }

    /// The machine wants a node in `slot`.
    pub fn launch(&mut self, slot: u32, attempt: u32) -> Launch {
        let mut of_slot = self.entries.iter_mut().filter(|entry| entry.slot == slot);
        if let Some(entry) = of_slot.by_ref().find(|entry| !entry.over) {
            entry.attempt = Some(attempt);
            return Launch::Adopt(entry.number);
        }
        let last = self.entries.iter().filter(|entry| entry.slot == slot).map(|entry| entry.number).max();
        let number = last.map_or(attempt, |last| attempt.max(last + 1));
        self.entries.push(Entry {
            slot,
            number,
            attempt: Some(attempt),
            pod: None,
            lost: None,
            over: false,
            counted: false,
        });
        let never = self.bad();
        let rather_not = self.suspects.get(&slot).filter(|machine| !never.contains(machine)).cloned();
        Launch::Create { number, never, rather_not: rather_not.into_iter().collect() }
    }

    /// The newest Job of each slot that has not ended, by its number: another machine takes them as they are.
    pub fn adopt(&mut self) -> Vec<(u32, u32)> {
        let mut newest = BTreeMap::new();
        for entry in self.entries.iter_mut().filter(|entry| !entry.over) {
            entry.attempt = Some(entry.number);
            newest.insert(entry.slot, entry.number);
        }
        newest.into_iter().collect()
    }

    /// Forgets which attempts were asked for: another machine begins.
    pub fn begin(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.attempt = None);
    }

    /// A pod's news, at `now`; what the machine is told of it. One that is lost counts as ended once it has been so for long
    /// enough. The machine knows a node by the Job's number once that has joined, and by the attempt it asked for before; what it does not
    /// know it passes over. The number goes first: it is never below the attempt.
    pub fn pod(&mut self, facts: &PodFacts, now: Instant) -> Vec<Ended> {
        let elsewhere = self.pods().any(|pod| pod.running && pod.machine != facts.machine);
        let patience = if elsewhere { LOST } else { ALL_LOST };
        let Some(entry) = self.entries.iter_mut().find(|e| (e.slot, e.number) == (facts.slot, facts.number)) else {
            return Vec::new();
        };
        entry.pod = Some(facts.clone());
        entry.lost = (facts.lost && !facts.gone).then(|| entry.lost.unwrap_or(now));
        if entry.lost.is_some_and(|since| now.saturating_duration_since(since) < patience) {
            return Vec::new();
        }
        let Some(code) = facts.code() else { return Vec::new() };
        let (told, counted) = (std::mem::replace(&mut entry.over, true), std::mem::replace(&mut entry.counted, true));
        let (slot, number, attempt) = (entry.slot, entry.number, entry.attempt);
        if let (Some(machine), true) = (&facts.machine, failed(code) && !counted) {
            *self.failures.entry(machine.clone()).or_default() += 1;
        }
        if told {
            return Vec::new();
        }
        let mut told = vec![Ended { slot, attempt: number, code }];
        told.extend(attempt.filter(|attempt| *attempt != number).map(|attempt| Ended { slot, attempt, code }));
        told
    }

    /// The machine gives a node up: the number of the Job to end, if it has not ended.
    pub fn discard(&mut self, slot: u32, attempt: u32) -> Option<u32> {
        let mut found = self.entries.iter_mut().rev().filter(|e| e.slot == slot && !e.over);
        let entry = found.find(|e| e.number == attempt || e.attempt == Some(attempt))?;
        entry.over = true;
        // Until its pod says how it ended, the machine under it is the suspect.
        if let Some(machine) = entry.pod.as_ref().and_then(|pod| pod.machine.clone()) {
            self.suspects.insert(slot, machine);
        }
        Some(entry.number)
    }

    /// Everything from a slot on that has not ended, now given up.
    pub fn discard_beyond(&mut self, slot: u32) -> Vec<(u32, u32)> {
        let alive = self.entries.iter_mut().filter(|entry| !entry.over && entry.slot >= slot);
        alive
            .map(|entry| {
                (entry.over, entry.counted) = (true, true);
                (entry.slot, entry.number)
            })
            .collect()
    }

    /// Everything whose process does not run, now given up.
    pub fn discard_idle(&mut self) -> Vec<(u32, u32)> {
        let idle = |entry: &Entry| !entry.over && !entry.pod.as_ref().is_some_and(|pod| pod.running);
        let alive = self.entries.iter_mut().filter(|entry| idle(entry));
        alive
            .map(|entry| {
                (entry.over, entry.counted) = (true, true);
                (entry.slot, entry.number)
            })
            .collect()
    }

    /// The newest news of a Job's pod.
    #[must_use]
    pub fn pod_of(&self, slot: u32, number: u32) -> Option<&PodFacts> {
        self.entries.iter().find(|entry| (entry.slot, entry.number) == (slot, number))?.pod.as_ref()
    }

    /// The news of a pod that is lost and not yet given up.
    #[must_use]
    pub fn still_lost(&self, slot: u32, number: u32) -> Option<PodFacts> {
        let entry = self.entries.iter().find(|entry| (entry.slot, entry.number) == (slot, number))?;
        entry.pod.clone().filter(|pod| pod.lost && !entry.over)
    }

    /// Whether a Job's pod has ended or is gone.
    #[must_use]
    pub fn has_ended(&self, slot: u32, number: u32) -> bool {
        self.pod_of(slot, number).is_some_and(|pod| pod.ended.is_some() || pod.gone)
    }

    /// Whether a Job's pod has ended, or was told to.
    #[must_use]
    pub fn is_going(&self, slot: u32, number: u32) -> bool {
        self.pod_of(slot, number).is_some_and(|pod| pod.leaving || pod.ended.is_some() || pod.gone)
    }

    /// The last that a slot's newest pod wrote.
    #[must_use]
    pub fn said(&self, slot: u32) -> Option<String> {
        self.entries.iter().rev().find(|entry| entry.slot == slot && entry.over)?.pod.as_ref()?.said.clone()
    }

    /// Pods of Jobs that have not ended.
    pub fn pods(&self) -> impl Iterator<Item = &PodFacts> {
        self.entries.iter().filter(|entry| !entry.over).filter_map(|entry| entry.pod.as_ref())
    }

    /// Slot and number of the Jobs that have not ended and whose pod was not made yet: a queue keeps them, or the cluster is slow.
    pub fn without_pod(&self) -> impl Iterator<Item = (u32, u32)> {
        self.entries.iter().filter(|entry| !entry.over && entry.pod.is_none()).map(|entry| (entry.slot, entry.number))
    }

    /// Machines with failures that no other machine had.
    fn bad(&self) -> Vec<String> {
        match self.failures.iter().collect::<Vec<_>>()[..] {
            [(machine, &count)] if count >= BAD_MACHINE => vec![machine.clone()],
            _ => Vec::new(),
        }
    }
}

/// Whether a code counts against a machine. What is the user's to mend would fail anywhere.
fn failed(code: i32) -> bool {
    !matches!(code, 0 | 75 | 64 | 65 | 69 | 73 | 78)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn pod(slot: u32, number: u32, machine: &str, ended: Option<i32>) -> PodFacts {
        PodFacts {
            name: format!("run-{slot}-{number}-x"),
            run: "run".into(),
            slot,
            number,
            machine: Some(machine.into()),
            priority: 0,
            running: ended.is_none(),
            started: true,
            leaving: false,
            disrupted: false,
            lost: false,
            ended,
            said: None,
            waiting: None,
            gone: false,
        }
    }

    fn created(launch: &Launch) -> u32 {
        match launch {
            Launch::Create { number, .. } => *number,
            Launch::Adopt(number) => panic!("adopted {number}"),
        }
    }

    #[test]
    fn a_new_run_numbers_its_jobs_as_the_machine_does() {
        let mut book = Book::default();
        assert_eq!(created(&book.launch(0, 0)), 0);
        let told = book.pod(&pod(0, 0, "a", Some(75)), Instant::now());
        assert_eq!(told.iter().map(|e| (e.attempt, e.code)).collect::<Vec<_>>(), [(0, 75)]);
        assert_eq!(created(&book.launch(0, 1)), 1);
    }

    #[test]
    fn a_new_coordinator_takes_live_jobs_and_never_reuses_a_number() {
        let mut book = Book::default();
        book.known([(0, 0, true), (0, 1, false), (1, 4, true)]);
        assert_eq!(book.launch(0, 0), Launch::Adopt(1));
        assert_eq!(created(&book.launch(1, 0)), 5);
    }

    #[test]
    fn the_newest_live_job_of_a_slot_is_adopted_and_its_end_told_once() {
        let mut book = Book::default();
        book.known([(0, 0, true), (0, 1, false), (0, 2, false), (1, 4, true)]);
        assert_eq!(book.adopt(), [(0, 2)]);
        let told = book.pod(&pod(0, 2, "a", Some(75)), Instant::now());
        assert_eq!(told.iter().map(|e| (e.slot, e.attempt, e.code)).collect::<Vec<_>>(), [(0, 2, 75)]);
        assert_eq!(book.adopt(), [(0, 1)]);
    }

    #[test]
    fn an_end_is_told_by_number_and_then_by_attempt() {
        let mut book = Book::default();
        book.known([(0, 6, true)]);
        assert_eq!(created(&book.launch(0, 0)), 7);
        let told = book.pod(&pod(0, 7, "a", Some(70)), Instant::now());
        assert_eq!(told.iter().map(|e| e.attempt).collect::<Vec<_>>(), [7, 0]);
        assert!(book.pod(&pod(0, 7, "a", Some(70)), Instant::now()).is_empty(), "once");
    }

    #[test]
    fn a_node_that_is_given_up_makes_its_machine_the_last_choice_for_the_next() {
        let mut book = Book::default();
        book.launch(0, 0);
        book.pod(&pod(0, 0, "a", None), Instant::now());
        assert_eq!(book.discard(0, 0), Some(0));
        assert_eq!(book.discard(0, 0), None, "it is given up already");
        let next = book.launch(0, 1);
        assert_eq!(next, Launch::Create { number: 1, never: vec![], rather_not: vec!["a".into()] });
    }

    #[test]
    fn a_failure_counts_though_the_node_was_given_up_before_its_pod_said_how_it_ended() {
        let mut book = Book::default();
        for attempt in 0..2 {
            assert_eq!(created(&book.launch(0, attempt)), attempt);
            book.pod(&pod(0, attempt, "bad", None), Instant::now());
            book.discard(0, attempt);
            assert!(book.pod(&pod(0, attempt, "bad", Some(139)), Instant::now()).is_empty(), "the machine knows");
        }
        assert!(matches!(book.launch(0, 2), Launch::Create { never, .. } if never == ["bad"]));
        book.pod(&pod(0, 2, "good", None), Instant::now());
        book.discard_beyond(0);
        book.pod(&pod(0, 2, "good", Some(137)), Instant::now());
        assert!(matches!(book.launch(0, 3), Launch::Create { never, .. } if never == ["bad"]), "we ended that one");
    }

    #[test]
    fn a_machine_is_excluded_after_two_failures_that_no_other_had() {
        let mut book = Book::default();
        for attempt in 0..2 {
            assert_eq!(created(&book.launch(0, attempt)), attempt);
            book.pod(&pod(0, attempt, "bad", Some(139)), Instant::now());
        }
        assert!(matches!(book.launch(0, 2), Launch::Create { never, .. } if never == ["bad"]));
        book.pod(&pod(0, 2, "good", Some(139)), Instant::now());
        assert!(matches!(book.launch(0, 3), Launch::Create { never, .. } if never.is_empty()), "it is not the machine");
    }

    #[test]
    fn all_machines_away_for_a_moment_cost_no_node_and_one_that_stays_away_does() {
        let mut book = Book::default();
        book.launch(0, 0);
        book.launch(1, 0);
        let (begin, second) = (Instant::now(), Duration::from_secs(1));
        let well = [pod(0, 0, "a", None), pod(1, 0, "b", None)];
        let lost = well.clone().map(|pod| PodFacts { lost: true, running: false, ..pod });
        let tell = |book: &mut Book, pod: &PodFacts, at| {
            book.pod(pod, at).iter().map(|end| (end.slot, end.code)).collect::<Vec<_>>()
        };
        for at in [begin, begin + LOST * 2, begin + ALL_LOST - second] {
            assert_eq!(lost.each_ref().map(|pod| tell(&mut book, pod, at)), [vec![], vec![]]);
        }
        assert_eq!(book.still_lost(1, 0), Some(lost[1].clone()));
        // One is back.
        let at = begin + ALL_LOST;
        assert_eq!(tell(&mut book, &well[1], at), []);
        assert_eq!(book.still_lost(1, 0), None);
        assert_eq!(tell(&mut book, &lost[0], at), [(0, crate::machine::YIELDED)]);
        assert_eq!(book.still_lost(0, 0), None, "it was given up");
        // The time begins anew, and is short while another runs.
        book.launch(0, 1);
        assert_eq!(tell(&mut book, &pod(0, 1, "c", None), at), []);
        assert_eq!(tell(&mut book, &lost[1], at), []);
        assert_eq!(tell(&mut book, &lost[1], at + LOST - second), []);
        assert_eq!(tell(&mut book, &lost[1], at + LOST), [(1, crate::machine::YIELDED)]);
    }

    #[test]
    fn a_lost_pod_that_is_deleted_has_ended_at_once() {
        let mut book = Book::default();
        book.launch(0, 0);
        let lost = PodFacts { lost: true, running: false, ..pod(0, 0, "a", None) };
        assert!(book.pod(&lost, Instant::now()).is_empty());
        let told = book.pod(&PodFacts { gone: true, ..lost }, Instant::now());
        assert_eq!(told.len(), 1);
    }

    #[test]
    fn a_job_waits_for_its_pod_until_that_is_made_or_it_is_given_up() {
        let mut book = Book::default();
        book.launch(0, 0);
        book.launch(1, 0);
        assert_eq!(book.without_pod().collect::<Vec<_>>(), [(0, 0), (1, 0)]);
        book.pod(&pod(0, 0, "a", None), Instant::now());
        book.discard(1, 0);
        assert_eq!(book.without_pod().count(), 0);
    }

    #[test]
    fn yielding_and_what_the_user_must_mend_are_no_faults_of_a_machine() {
        let mut book = Book::default();
        for (attempt, code) in [(0, 75), (1, 65), (2, 0)] {
            book.launch(0, attempt);
            book.pod(&pod(0, attempt, "a", Some(code)), Instant::now());
        }
        assert!(matches!(book.launch(0, 3), Launch::Create { never, .. } if never.is_empty()));
    }
}
