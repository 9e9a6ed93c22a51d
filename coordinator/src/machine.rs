//! The run's state machine, without input or output: `(now, event) -> effects`, every decision with its reason.
//!
//! ```text
//! Gathering ──enough nodes──▶ Forming ──all ranks reunited──▶ Training ──all finished──▶ Ending ──▶ Ended
//!     ▲                          │ loss                          │ loss, drain, growth
//!     └──────ranks are back──────┴──────────── Pausing ◀─────────┘
//! ```
//! Ranks keep their state in memory from one generation to the next. A loss breaks the generation off (hard), a drain or a node that
//! joins lets it finish its step (soft); whoever is back then forms the next one.
//!
//! A new coordinator begins by listening (`Finding`): ranks that train already come to it, and are taken over as they are.

mod event;
mod finding;
mod nodes;
mod ranks;
mod regroup;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

pub use event::{Change, Effect, Event, Outcome, Place, Settings};

/// Why a run is suspended that was asked to stop, by its process or by an order in its bucket.
pub const ON_REQUEST: &str = "stopped on request";
/// Exit codes of what is the user's to mend: trying again would fail again.
const HOPELESS: [i32; 5] = [64, 65, 69, 73, 78];
/// Exit code of a node that was told to leave.
pub(crate) const YIELDED: i32 = 75;
/// Once enough nodes are ready to begin, those that have not even come are waited for so long.
const TOGETHER: Duration = Duration::from_secs(20);
/// Longest wait for more newcomers once one is ready.
const JOIN_TOGETHER: Duration = Duration::from_secs(3);
/// Time for a rank to come back from a broken ring, beyond which it is ended. Work between two collectives takes its time.
const BREAK_OFF: Duration = Duration::from_secs(10);
/// The same after a silence: whoever can has come to a collective long ago.
const BREAK_OFF_SILENT: Duration = Duration::from_secs(1);
/// Ranks find a new coordinator within so much of one another.
const HEARTBEATS: Duration = Duration::from_secs(3);
/// Time for ranks of an earlier coordinator to come to this one.
const FIND: Duration = Duration::from_secs(5);
/// Time for a node to mend a broken line, beyond which it is lost.
const MEND: Duration = Duration::from_secs(1);
/// Longest time between two events: ticks come more often. Beyond it this coordinator was not running, or its clock was set.
const AWAKE: Duration = Duration::from_millis(300);
/// Time for an ended rank to be reported as ended, beyond which its node is given up.
const REPORT: Duration = Duration::from_secs(3);

#[derive(Debug)]
struct Node {
    address: String,
    slot: u32,
    /// Order of joining: ranks are dealt in it.
    order: u64,
    leaving: bool,
    /// Sent home: what it held was handed over, or it held nothing.
    home: bool,
    /// Its line is broken since.
    cut: Option<Instant>,
    /// The launcher says that it has ended.
    ended: bool,
}

#[derive(Debug)]
struct Slot {
    attempt: u32,
    node: Option<String>,
    launched: bool,
    /// Started by an earlier coordinator.
    adopted: bool,
}

impl Slot {
    fn empty(attempt: u32, launched: bool) -> Self {
        Slot { attempt, node: None, launched, adopted: false }
    }
}

#[derive(Debug)]
struct Rank {
    attempt: u32,
    state: RankState,
    /// It has been in a generation, and may hold what nobody else has.
    holds: bool,
    /// The last one, as far as it was said.
    last: u64,
    /// The one that it said it is in, on a new line.
    returned: u64,
    /// Ran before this coordinator knew its node, and has not said what it does.
    unknown: Option<Instant>,
    /// Ended by us: its exit is no news.
    killed: bool,
    /// What it said when it gave up.
    failure: Option<String>,
}

impl Rank {
    fn starting(attempt: u32) -> Self {
        Rank {
            attempt,
            state: RankState::Starting,
            holds: false,
            last: 0,
            returned: 0,
            unknown: None,
            killed: false,
            failure: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RankState {
    Starting,
    Ready,
    /// Of the current generation.
    Member,
}

#[derive(Debug)]
enum State {
    /// `members` is what ranks have said of their generation.
    Finding {
        until: Instant,
        found: BTreeMap<Place, Membership>,
        members: Members,
    },
    Gathering {
        since: Instant,
    },
    Forming {
        heard: Instant,
        members: Members,
    },
    Training {
        heard: Instant,
        members: Members,
    },
    Pausing {
        until: Instant,
        hard: bool,
        members: Members,
    },
    Ending {
        since: Instant,
        outcome: Outcome,
    },
    Ended,
}

/// Ranks of one generation.
#[derive(Debug, Default)]
struct Members {
    places: Vec<Place>,
    /// How many there were: more than places where some were not found.
    world: usize,
    reunited: BTreeSet<Place>,
    finished: BTreeSet<Place>,
    stopped: bool,
    parts: BTreeMap<u64, BTreeSet<Place>>,
    from_commit: Option<u64>,
    step: u64,
    /// Where rank 0's store listens.
    store: Option<u32>,
    /// What they were asked when the generation is to end after a step.
    pause: Option<Pause>,
}

/// The order to make room.
#[derive(Clone, Debug)]
struct Pause {
    reason: String,
    leaving: Vec<u32>,
    commit: bool,
}

/// What a rank says of its generation.
#[derive(Clone, Copy, Debug)]
struct Membership {
    generation: u64,
    rank: u32,
    world: u32,
}

/// A membership change under way.
#[derive(Debug)]
struct Episode {
    since: Instant,
    reason: String,
    /// None: nobody knows yet what broke the ring.
    failure: Option<bool>,
    world: u32,
    /// Steps finished when it began.
    step: u64,
}

/// The state machine of one run.
#[derive(Debug)]
pub struct Machine {
    settings: Settings,
    state: State,
    slots: BTreeMap<u32, Slot>,
    nodes: BTreeMap<String, Node>,
    ranks: BTreeMap<Place, Rank>,
    joins: u64,
    generation: u64,
    /// The next generation comes after this one, too.
    base: u64,
    /// Newest generation that has trained: whoever was not in it holds something old.
    trained: u64,
    restarts: u32,
    /// Newest step that a rank told of.
    step: u64,
    stop: Option<String>,
    episode: Option<Episode>,
    /// Enough nodes to begin are ready since.
    enough: Option<Instant>,
    newcomers: Option<Instant>,
    /// Newest commit that this coordinator knows: generation, number, step.
    committed: Option<(u64, u64, u64)>,
    /// What ranks said before their node was known.
    early: BTreeMap<Place, Vec<Event>>,
    /// When nodes of an earlier coordinator must have come.
    adopt_until: Instant,
    /// Clock at the last event, and how long this coordinator was not running.
    seen: Instant,
    slept: Duration,
}

impl Machine {
    /// A run whose last generation was `generation` (0 for a new one), and the first effects: its nodes.
    #[must_use]
    pub fn start(settings: Settings, generation: u64, now: Instant) -> (Self, Vec<Effect>) {
        let mut machine = Self::new(settings, generation, State::Gathering { since: now }, now);
        let mut launch = Vec::new();
        machine.launch_missing(&mut launch);
        (machine, launch)
    }

    /// A run that another coordinator may have left training: its nodes are waited for before any is started.
    #[must_use]
    pub fn take_over(settings: Settings, generation: u64, now: Instant) -> Self {
        let machine = Self::new(
            settings,
            generation,
            State::Finding { until: now + FIND, found: BTreeMap::new(), members: Members::default() },
            now,
        );
        Machine { generation: 0, trained: 0, ..machine }
    }

    fn new(settings: Settings, generation: u64, state: State, now: Instant) -> Self {
        Machine {
            slots: (0..settings.nodes).map(|slot| (slot, Slot::empty(0, false))).collect(),
            adopt_until: now + settings.startup_timeout,
            settings,
            state,
            nodes: BTreeMap::new(),
            ranks: BTreeMap::new(),
            joins: 0,
            generation,
            base: generation,
            trained: generation,
            restarts: 0,
            step: 0,
            stop: None,
            episode: None,
            enough: None,
            newcomers: None,
            committed: None,
            early: BTreeMap::new(),
            seen: now,
            slept: Duration::ZERO,
        }
    }

    /// The current generation.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Where a node that is there, or may come back, was when it joined.
    #[must_use]
    pub fn address(&self, node: &str) -> Option<&str> {
        self.nodes.get(node).map(|node| node.address.as_str())
    }

    /// Rank 0 of the current generation.
    #[must_use]
    pub fn first_place(&self) -> Option<&Place> {
        self.members().and_then(|members| members.places.first())
    }

    /// Takes an event. Events of other generations or attempts than the current ones change nothing.
    pub fn handle(&mut self, now: Instant, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        let now = self.time(now);
        self.take(now, event, &mut effects);
        self.advance(now, &mut effects);
        effects
    }

    /// The clock without the time in which this coordinator did not run: nobody was silent then, it was not listening.
    fn time(&mut self, now: Instant) -> Instant {
        self.slept += now.saturating_duration_since(self.seen).saturating_sub(AWAKE);
        self.seen = self.seen.max(now);
        now.checked_sub(self.slept).unwrap_or(now)
    }

    fn take(&mut self, now: Instant, event: Event, effects: &mut Vec<Effect>) {
        let current = self.generation;
        match event {
            Event::NodeJoined { node, slot, address, ranks } => {
                self.node_joined(now, node, slot, address, &ranks, effects);
            }
            Event::Launched { slot, attempt } => self.launched(slot, attempt, effects),
            Event::RankReturned { ref place, .. } | Event::RankReady { ref place, .. }
                if !self.nodes.contains_key(&place.0) =>
            {
                self.too_early(place.clone(), event);
            }
            Event::RankReturned { place, attempt, generation, rank, world } => {
                self.rank_returned(now, place, attempt, Membership { generation, rank, world }, effects);
            }
            Event::NodeLost { node } => self.line_broke(now, &node, effects),
            Event::LaunchEnded { slot, attempt, code } => self.launch_ended(now, slot, attempt, code, effects),
            Event::Preempting { node, .. } => self.preempting(now, &node, effects),
            Event::RankExited { place, attempt, code, last_words } => {
                self.rank_exited(now, &place, attempt, code, &last_words, effects);
            }
            Event::RankReady { place, attempt, generation, broken } => {
                self.rank_ready(now, &place, attempt, generation, broken, effects);
            }
            Event::StoreListening { generation, port } if generation == current => self.rendezvous(port, effects),
            Event::Reunited { generation, place, step, from_commit } if generation == current => {
                self.reunited(now, place, step, from_commit);
            }
            Event::Progress { generation, step } if generation == current => {
                self.heard(now);
                self.trained = self.trained.max(generation);
                self.step = self.step.max(step);
            }
            Event::PartsWritten { generation, place, step } if generation == current => {
                self.heard(now);
                self.trained = self.trained.max(generation);
                if let Some((_, seq, step)) = self.committed.filter(|&(of, _, at)| (of, at) == (generation, step)) {
                    // It was not told, or not by this coordinator.
                    effects.push(Effect::TellCommitted { place, seq, step });
                } else if let Some(members) = self.members_mut() {
                    let ranks = members.parts.entry(step).or_default();
                    ranks.insert(place);
                    if ranks.len() == members.world && members.world > 0 {
                        members.parts.remove(&step);
                        effects.push(Effect::WriteCommit { generation, step });
                    }
                }
            }
            Event::Committed { generation, seq, step } => {
                self.committed = Some((generation, seq, step));
                self.trained = self.trained.max(generation);
                if generation != current {
                    return;
                }
                self.heard(now);
                let places = self.members().map(|members| members.places.clone()).unwrap_or_default();
                effects.extend(places.into_iter().map(|place| Effect::TellCommitted { place, seq, step }));
            }
            Event::CommitFailed { reason } => {
                self.end(now, Outcome::Failed { message: reason, code: 1 }, effects);
            }
            Event::RankFinished { generation, place, stopped } if generation == current => {
                self.heard(now);
                if let Some(members) = self.members_mut() {
                    members.finished.insert(place);
                    members.stopped |= stopped;
                }
            }
            Event::RankFailed { place, attempt, message, code } => {
                let (node, local) = &place;
                let reason = format!("rank {local} of node {node}: {message}");
                if let Some(rank) = self.ranks.get_mut(&place).filter(|rank| rank.attempt == attempt) {
                    rank.failure = Some(reason.clone());
                    if HOPELESS.contains(&code) {
                        self.end(now, Outcome::Failed { message: reason, code }, effects);
                    }
                }
            }
            Event::StopRequested => self.stop_requested(now, effects),
            Event::CancelRequested => self.end(now, Outcome::Cancelled, effects),
            _ => {}
        }
    }

    fn members(&self) -> Option<&Members> {
        match &self.state {
            State::Forming { members, .. } | State::Training { members, .. } | State::Pausing { members, .. } => {
                Some(members)
            }
            _ => None,
        }
    }

    fn members_mut(&mut self) -> Option<&mut Members> {
        match &mut self.state {
            State::Finding { members, .. }
            | State::Forming { members, .. }
            | State::Training { members, .. }
            | State::Pausing { members, .. } => Some(members),
            _ => None,
        }
    }

    fn heard(&mut self, now: Instant) {
        if let State::Training { heard, .. } | State::Forming { heard, .. } = &mut self.state {
            *heard = now;
        }
    }

    fn over(&self) -> bool {
        matches!(self.state, State::Ending { .. } | State::Ended)
    }

    /// Something is gone. Where it was part of the generation, that one breaks off.
    fn lost(&mut self, now: Instant, reason: String, failure: bool, member: bool, effects: &mut Vec<Effect>) {
        if failure && !self.spend(now, &reason, effects) {
            return;
        }
        if let Some(episode) = &mut self.episode {
            // The cause is better known than by its symptom.
            if episode.failure.is_none() {
                episode.reason.clone_from(&reason);
            }
            episode.failure = Some(episode.failure.unwrap_or(false) || failure);
        }
        if member {
            self.break_off(now, reason, Some(failure), BREAK_OFF, effects);
        }
    }

    /// Counts a failure. False where that was one too many.
    fn spend(&mut self, now: Instant, reason: &str, effects: &mut Vec<Effect>) -> bool {
        if self.restarts >= self.settings.max_restarts {
            let message =
                format!("{reason}\nthe run has restarted {} times, max_restarts allows no more", self.restarts);
            self.end(now, Outcome::Failed { message, code: 1 }, effects);
            return false;
        }
        self.restarts += 1;
        true
    }

    fn stop_requested(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let reason = ON_REQUEST.to_owned();
        if self.stop.replace(reason.clone()).is_some() {
            self.end(now, Outcome::Suspended { reason }, effects);
        } else if let State::Training { .. } = self.state {
            self.send_stop(effects);
        }
    }

    fn send_stop(&self, effects: &mut Vec<Effect>) {
        if let (Some(reason), Some(members)) = (&self.stop, self.members()) {
            let stop = |place: &Place| Effect::Stop { place: place.clone(), reason: reason.clone() };
            effects.extend(members.places.iter().map(stop));
        }
    }

    fn end(&mut self, now: Instant, outcome: Outcome, effects: &mut Vec<Effect>) {
        if self.over() {
            return;
        }
        // Those who trained to the end leave by themselves.
        let done = outcome == Outcome::Finished;
        for (place, rank) in self.ranks.iter_mut().filter(|(_, rank)| !done || rank.state != RankState::Member) {
            rank.killed = true;
            effects.push(Effect::KillRank { place: place.clone(), attempt: rank.attempt });
        }
        self.state = State::Ending { since: now, outcome };
    }

    /// What follows from time and state alone.
    fn advance(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        self.mend(now, effects);
        match &mut self.state {
            State::Finding { .. } => self.find(now, effects),
            State::Gathering { since } => {
                let since = *since;
                self.gather(now, since, effects);
            }
            State::Forming { heard, members } => {
                if members.reunited.len() == members.places.len() {
                    let members = std::mem::take(members);
                    self.train(now, members, effects);
                } else if now.duration_since(*heard) >= self.settings.startup_timeout.min(self.settings.step_timeout) {
                    self.silent(now, "the ranks did not find each other in time".into(), effects);
                }
            }
            State::Training { heard, members } => {
                if members.finished.len() == members.places.len() {
                    let stopped = members.stopped;
                    self.finish(now, stopped, effects);
                } else if now.duration_since(*heard) >= self.settings.step_timeout {
                    self.silent(now, format!("no step for {} s", self.settings.step_timeout.as_secs()), effects);
                } else {
                    self.change(now, effects);
                }
            }
            State::Pausing { .. } => self.come_back(now, effects),
            State::Ending { since, outcome } => {
                if !self.ranks.is_empty() && now.duration_since(*since) < Duration::from_secs(10) {
                    return;
                }
                let reason = match &*outcome {
                    Outcome::Finished => "the run is finished".to_owned(),
                    Outcome::Suspended { reason } => reason.clone(),
                    Outcome::Failed { message, .. } => message.clone(),
                    Outcome::Cancelled => "the run was cancelled".to_owned(),
                };
                let leave = |node: &String| Effect::Leave { node: node.clone(), reason: reason.clone(), code: 0 };
                effects.extend(self.nodes.keys().map(leave));
                effects.push(Effect::End(outcome.clone()));
                self.state = State::Ended;
            }
            State::Ended => {}
        }
    }

    fn finish(&mut self, now: Instant, stopped: bool, effects: &mut Vec<Effect>) {
        let outcome = if stopped {
            Outcome::Suspended { reason: self.stop.clone().unwrap_or_else(|| "stopped".into()) }
        } else {
            Outcome::Finished
        };
        self.end(now, outcome, effects);
        self.advance(now, effects);
    }
}
