//! The simulated world: a clock, a queue of what happens, and everyone in it. Nothing happens but by the queue, in order of time.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::fmt::Write;

use tokio::time::Instant;

use crate::bucket::Bucket;
use crate::checks::Checks;
use crate::coordinator::{Coordinator, Stage};
use crate::dice::Dice;
use crate::launcher::Launcher;
use crate::line::{Down, End, Line, LineId, Up};
use crate::node::Node;
use crate::rank::Rank;
use crate::ring::Ring;
use crate::scenario::{Fault, Scenario};

/// Microseconds since the world began.
pub(crate) type Time = u64;
pub(crate) const MS: Time = 1000;
pub(crate) const SECOND: Time = 1_000_000;
pub(crate) type NodeId = usize;
pub(crate) type RankId = usize;

/// Lines of the log that a failure shows.
const SHOWN: usize = 60;
/// Longest time from the last fault to the end of the run.
const PATIENCE: Time = 1200 * SECOND;

/// Something that happens at a moment.
#[derive(Debug)]
pub(crate) enum What {
    Fault(Fault),
    FaultEnds(Ending),
    Tick(usize),
    Up(LineId, Up),
    /// A coordinator that slept takes what had come meanwhile.
    Heard(LineId, Up),
    Down(LineId, Down),
    Connect(End),
    Break {
        line: LineId,
        server: bool,
    },
    Silent {
        line: LineId,
        server: bool,
        since: Time,
    },
    /// A node's process is up.
    Booted(NodeId),
    LaunchEnds {
        run: u64,
        slot: u32,
        attempt: u32,
        code: i32,
    },
    NodeDies {
        node: NodeId,
        code: i32,
    },
    /// A rank's own time passed; outdated where it went on to something else.
    Timer {
        rank: RankId,
        token: u64,
    },
    RingBreaks {
        rank: RankId,
        token: u64,
    },
    RingTimesOut {
        ring: usize,
        operation: u64,
    },
    Uploaded {
        rank: RankId,
        upload: u64,
    },
    /// The supervisor sees that a rank's process has ended.
    RankReaped {
        rank: RankId,
        code: i32,
    },
    Commit {
        coordinator: usize,
        stage: Stage,
    },
    /// Another coordinator begins.
    CoordinatorStarts,
    /// The user resumes a run that was suspended or failed.
    Resume,
}

/// What a fault leaves behind passes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ending {
    Cut { node: NodeId, number: u64 },
    Wakes(End),
    CoordinatorWakes(usize),
}

struct Entry {
    at: Time,
    number: u64,
    what: What,
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Entry {}

/// What came of a simulation.
pub(crate) struct Report {
    pub(crate) violation: Option<String>,
    /// The whole log where it was asked for, otherwise its end.
    pub(crate) log: String,
    pub(crate) took: Time,
    pub(crate) events: u64,
    pub(crate) generations: u64,
    pub(crate) rollbacks: u64,
}

pub(crate) struct World {
    pub(crate) scenario: Scenario,
    pub(crate) dice: Dice,
    pub(crate) now: Time,
    /// What coordinators' clocks show at time 0.
    pub(crate) epoch: Instant,
    queue: BinaryHeap<Reverse<Entry>>,
    number: u64,
    pub(crate) log: VecDeque<String>,
    whole_log: bool,
    pub(crate) coordinators: Vec<Coordinator>,
    /// Whom workers reach.
    pub(crate) address: Option<usize>,
    pub(crate) lines: Vec<Line>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) ranks: Vec<Rank>,
    pub(crate) rings: Vec<Ring>,
    pub(crate) launcher: Launcher,
    pub(crate) bucket: Bucket,
    pub(crate) checks: Checks,
    pub(crate) finished: bool,
    /// No fault, and nothing left of one, after this.
    pub(crate) calm_from: Time,
}

impl World {
    pub(crate) fn new(seed: u64, scenario: Scenario, whole_log: bool) -> Self {
        let mut world = Self {
            dice: Dice::new(seed),
            now: 0,
            epoch: Instant::now(),
            queue: BinaryHeap::new(),
            number: 0,
            log: VecDeque::new(),
            whole_log,
            coordinators: Vec::new(),
            address: None,
            lines: Vec::new(),
            nodes: Vec::new(),
            ranks: Vec::new(),
            rings: Vec::new(),
            launcher: Launcher::default(),
            bucket: Bucket::default(),
            checks: Checks::default(),
            finished: false,
            calm_from: 0,
            scenario,
        };
        for (at, fault) in world.scenario.faults.clone() {
            world.at(at, What::Fault(fault));
            world.calm_from = world.calm_from.max(at);
        }
        world.at(0, What::CoordinatorStarts);
        world
    }

    pub(crate) fn at(&mut self, at: Time, what: What) {
        self.number += 1;
        self.queue.push(Reverse(Entry { at, number: self.number, what }));
    }

    pub(crate) fn after(&mut self, wait: Time, what: What) {
        self.at(self.now + wait, what);
    }

    /// Until the run is finished, something is wrong, or nobody has patience any more.
    pub(crate) fn run(mut self) -> Report {
        let mut events = 0;
        while let Some(Reverse(entry)) = self.queue.pop() {
            self.now = entry.at;
            events += 1;
            self.happen(entry.what);
            if self.finished || self.checks.violation.is_some() {
                break;
            }
            if self.now > self.calm_from + PATIENCE {
                let state = self.coordinators.last().map(|c| format!("{:?}", c.machine)).unwrap_or_default();
                let state: String = state.chars().take(6000).collect();
                let ranks: Vec<String> = self
                    .ranks
                    .iter()
                    .filter(|rank| rank.alive)
                    .map(|rank| format!("{:?} generation {} {:?}", rank.place, rank.generation, rank.doing))
                    .take(40)
                    .collect();
                self.violate(format!(
                    "the run is not finished {} s after the last fault; the machine: {state}\nranks: {}",
                    PATIENCE / SECOND,
                    ranks.join("\n       ")
                ));
                break;
            }
        }
        if self.checks.violation.is_none() {
            self.check_the_end();
        }
        Report {
            violation: self.checks.violation.take(),
            took: self.now,
            events,
            generations: self.checks.formed,
            rollbacks: self.checks.rollbacks,
            log: self.log.into_iter().collect(),
        }
    }

    fn happen(&mut self, what: What) {
        match what {
            What::Fault(fault) => self.strike(fault),
            What::FaultEnds(ending) => self.pass(ending),
            What::Tick(coordinator) => self.tick(coordinator),
            What::Up(line, message) => self.arrive_up(line, message),
            What::Heard(line, message) => self.hear(line, message),
            What::Down(line, message) => self.arrive_down(line, message),
            What::Connect(end) => {
                if let Some(backlog) = self.sleeps(end).then(|| self.backlog(end)).flatten() {
                    backlog.push(What::Connect(end));
                } else if self.wants_line(end) {
                    self.connect(end);
                }
            }
            What::Break { line, server } => self.give_up(line, server),
            What::Silent { line, server, since } => self.silent(line, server, since),
            What::Booted(node) => self.booted(node),
            What::LaunchEnds { run, slot, attempt, code } => self.launch_ends(run, slot, attempt, code),
            What::NodeDies { node, code } => self.node_dies(node, code),
            What::Timer { rank, token } | What::RingBreaks { rank, token }
                if !self.ranks[rank].alive || self.ranks[rank].token != token => {}
            What::Timer { rank, .. } | What::RingBreaks { rank, .. } if self.sleeps(End::Rank(rank)) => {
                self.ranks[rank].backlog.push(what);
            }
            What::Timer { rank, .. } => self.rank_goes_on(rank),
            What::RingBreaks { rank, .. } => self.ring_broke(rank),
            What::RingTimesOut { ring, operation } => self.ring_times_out(ring, operation),
            What::Uploaded { rank, upload } => {
                if self.sleeps(End::Rank(rank)) {
                    self.ranks[rank].backlog.push(what);
                } else {
                    self.uploaded(rank, upload);
                }
            }
            What::RankReaped { rank, code } => self.reap(rank, code),
            What::Commit { coordinator, stage } => self.commit_goes_on(coordinator, stage),
            What::CoordinatorStarts => self.coordinator_starts(),
            What::Resume => self.resume(),
        }
    }

    pub(crate) fn note(&mut self, text: &str) {
        let mut line = String::with_capacity(text.len() + 16);
        let _ = writeln!(line, "{:>5}.{:06} {text}", self.now / SECOND, self.now % SECOND);
        if !self.whole_log && self.log.len() >= SHOWN {
            self.log.pop_front();
        }
        self.log.push_back(line);
    }

    pub(crate) fn violate(&mut self, what: String) {
        if self.checks.violation.is_none() {
            self.note(&format!("VIOLATION: {what}"));
            self.checks.violation = Some(what);
        }
    }

    /// Time that storage takes to answer now.
    pub(crate) fn storage(&mut self) -> Time {
        self.bucket.out_until.saturating_sub(self.now) + self.dice.between(2, 40) * MS
    }

    /// Whether a process is stopped.
    pub(crate) fn sleeps(&self, end: End) -> bool {
        self.sleeping_since(end).is_some()
    }

    pub(crate) fn sleeping_since(&self, end: End) -> Option<Time> {
        match end {
            End::Node(node) => self.nodes[node].hung,
            End::Rank(rank) => self.ranks[rank].hung,
        }
    }

    /// What waits for a process to go on; none where it is gone.
    pub(crate) fn backlog(&mut self, end: End) -> Option<&mut Vec<What>> {
        match end {
            End::Node(node) => Some(&mut self.nodes[node]).filter(|node| node.alive).map(|node| &mut node.backlog),
            End::Rank(rank) => Some(&mut self.ranks[rank]).filter(|rank| rank.alive).map(|rank| &mut rank.backlog),
        }
    }

    fn wants_line(&self, end: End) -> bool {
        match end {
            End::Node(node) => self.nodes[node].alive && self.nodes[node].line.is_none(),
            End::Rank(rank) => self.ranks[rank].alive && self.ranks[rank].line.is_none(),
        }
    }
}
