//! The run's state machine, without input or output: `(now, event) -> effects`, every decision with its reason.
//!
//! ```text
//! Gathering ──enough nodes──▶ Forming ──all ranks at the store──▶ Training ──all finished──▶ Ended
//!     ▲                          │ failure                           │ failure
//!     └───────ranks gone─────────┴──────────── Draining ◀────────────┘
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

/// What the run asks for.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Nodes wanted.
    pub nodes: u32,
    /// Fewest nodes that train.
    pub min_nodes: u32,
    /// Ranks on each.
    pub ranks_per_node: u32,
    /// Failures that are survived.
    pub max_restarts: u32,
    /// Longest wait for nodes, and for ranks to form a ring.
    pub startup_timeout: Duration,
    /// Longest silence of a training rank.
    pub step_timeout: Duration,
}

/// A rank's place: its node and its number there.
pub type Place = (String, u32);

/// What happened. Fields are named as in the gRPC contract.
#[allow(missing_docs)]
#[derive(Clone, Debug)]
pub enum Event {
    /// A supervisor holds its stream; ranks of other nodes reach it at `address`.
    NodeJoined { node: String, address: String },
    /// A supervisor's stream broke.
    NodeLost { node: String },
    /// A rank process ended.
    RankExited { node: String, generation: u64, local_rank: u32, code: i32, last_words: String },
    /// A rank holds its stream.
    RankJoined { node: String, generation: u64, local_rank: u32 },
    /// Rank 0 serves the rendezvous store.
    StoreListening { generation: u64, port: u32 },
    /// A sign of life.
    Progress { generation: u64 },
    /// A rank's parts of a checkpoint are durable.
    PartsWritten { generation: u64, rank: u32, step: u64 },
    /// A commit is durable.
    Committed { generation: u64, seq: u64, step: u64 },
    /// A commit could not be written.
    CommitFailed { generation: u64, reason: String },
    /// A rank has nothing left to do.
    RankFinished { generation: u64, rank: u32, stopped: bool },
    /// A rank gave up and says why.
    RankFailed { generation: u64, rank: u32, message: String, code: i32 },
    /// The user wants to stop; the second time at once.
    StopRequested,
    /// Time passed.
    Tick,
}

/// What to do. Fields are named as in the gRPC contract.
#[allow(missing_docs)]
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Start a node in a slot.
    Launch { slot: u32, attempt: u32 },
    /// Start rank processes on a node.
    StartRanks { node: String, generation: u64, count: u32 },
    /// End the rank processes of a node.
    StopRanks { node: String, generation: u64 },
    /// Send a node home.
    Leave { node: String, reason: String, code: i32 },
    /// Tell a rank who it is.
    Assign { place: Place, generation: u64, rank: u32, world: u32 },
    /// Tell a rank where the store is.
    Rendezvous { place: Place, host: String, port: u32 },
    /// Ask a rank to finish its step, commit and end.
    Stop { place: Place, reason: String },
    /// All parts of a checkpoint are there: make the commit.
    WriteCommit { generation: u64, step: u64 },
    /// Tell a rank that its checkpoint is committed.
    TellCommitted { place: Place, seq: u64, step: u64 },
    /// Training began in this generation.
    Started { generation: u64, world: u32 },
    /// Training goes on after a loss.
    Restarted { reason: String },
    /// The run is over here.
    End(Outcome),
}

/// How a run ended.
#[allow(missing_docs)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All epochs are trained and exported.
    Finished,
    /// Stopped on request; it can be resumed.
    Suspended { reason: String },
    /// Given up.
    Failed { message: String, code: i32 },
}

#[derive(Debug)]
struct Node {
    address: String,
    /// Order of joining: ranks are dealt in it.
    order: u64,
}

#[derive(Debug)]
enum State {
    Gathering { since: Instant },
    Forming { since: Instant, members: Members },
    Training { heard: Instant, members: Members },
    Draining { members: Members, then: Then, since: Instant },
    Ended,
}

#[derive(Debug)]
enum Then {
    Retry,
    End(Outcome),
}

/// Ranks of one generation.
#[derive(Debug, Default)]
struct Members {
    places: Vec<Place>,
    joined: BTreeSet<Place>,
    port: Option<u32>,
    running: BTreeSet<Place>,
    parts: BTreeMap<u64, BTreeSet<u32>>,
    finished: BTreeSet<u32>,
    stopped: bool,
}

/// The state machine of one run.
#[derive(Debug)]
pub struct Machine {
    settings: Settings,
    state: State,
    nodes: BTreeMap<String, Node>,
    joins: u64,
    generation: u64,
    restarts: u32,
    stop: Option<String>,
}

impl Machine {
    /// A run whose last generation was `generation` (0 for a new one), and the first effects: its nodes.
    #[must_use]
    pub fn start(settings: Settings, generation: u64, now: Instant) -> (Self, Vec<Effect>) {
        let launch = (0..settings.nodes).map(|slot| Effect::Launch { slot, attempt: 0 }).collect();
        let machine = Machine {
            settings,
            state: State::Gathering { since: now },
            nodes: BTreeMap::new(),
            joins: 0,
            generation,
            restarts: 0,
            stop: None,
        };
        (machine, launch)
    }

    /// The current generation.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Takes an event. Events of other generations than the current one change nothing.
    pub fn handle(&mut self, now: Instant, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::NodeJoined { node, address } => {
                self.joins += 1;
                self.nodes.insert(node, Node { address, order: self.joins });
            }
            Event::NodeLost { node } => self.node_lost(now, &node, &mut effects),
            Event::RankExited { node, generation, local_rank, code, last_words } if generation == self.generation => {
                self.rank_exited(now, (node, local_rank), code, &last_words, &mut effects);
            }
            Event::RankJoined { node, generation, local_rank } if generation == self.generation => {
                self.rank_joined((node, local_rank), &mut effects);
            }
            Event::StoreListening { generation, port } if generation == self.generation => {
                self.store_listening(now, port, &mut effects);
            }
            Event::Progress { generation } if generation == self.generation => self.heard(now),
            Event::PartsWritten { generation, rank, step } if generation == self.generation => {
                self.heard(now);
                if let State::Training { members, .. } = &mut self.state {
                    let ranks = members.parts.entry(step).or_default();
                    ranks.insert(rank);
                    if ranks.len() == members.places.len() {
                        members.parts.remove(&step);
                        effects.push(Effect::WriteCommit { generation, step });
                    }
                }
            }
            Event::Committed { generation, seq, step } if generation == self.generation => {
                self.heard(now);
                if let State::Training { members, .. } = &self.state {
                    effects.extend(members.places.iter().map(|p| Effect::TellCommitted {
                        place: p.clone(),
                        seq,
                        step,
                    }));
                }
            }
            Event::CommitFailed { generation, reason } if generation == self.generation => {
                self.fail(now, reason, None, &mut effects);
            }
            Event::RankFinished { generation, rank, stopped } if generation == self.generation => {
                self.heard(now);
                if let State::Training { members, .. } = &mut self.state {
                    members.finished.insert(rank);
                    members.stopped |= stopped;
                }
            }
            Event::RankFailed { generation, rank, message, code } if generation == self.generation => {
                self.fail(now, format!("rank {rank}: {message}"), Some(code), &mut effects);
            }
            Event::StopRequested => self.stop_requested(now, &mut effects),
            _ => {}
        }
        self.advance(now, &mut effects);
        effects
    }

    fn heard(&mut self, now: Instant) {
        if let State::Training { heard, .. } = &mut self.state {
            *heard = now;
        }
    }

    fn node_lost(&mut self, now: Instant, node: &str, effects: &mut Vec<Effect>) {
        if self.nodes.remove(node).is_none() {
            return;
        }
        let member = match &mut self.state {
            State::Forming { members, .. } | State::Training { members, .. } | State::Draining { members, .. } => {
                members.running.retain(|place| place.0 != node);
                members.places.iter().any(|place| place.0 == node)
            }
            _ => false,
        };
        if member && !matches!(self.state, State::Draining { .. }) {
            self.fail(now, format!("node {node} was lost"), None, effects);
        }
    }

    fn rank_exited(&mut self, now: Instant, place: Place, code: i32, last_words: &str, effects: &mut Vec<Effect>) {
        let (State::Forming { members, .. } | State::Training { members, .. } | State::Draining { members, .. }) =
            &mut self.state
        else {
            return;
        };
        members.running.remove(&place);
        let rank = members.places.iter().position(|p| *p == place);
        let done = rank.is_some_and(|rank| u32::try_from(rank).is_ok_and(|rank| members.finished.contains(&rank)));
        if !done && !matches!(self.state, State::Draining { .. }) {
            let (node, local) = place;
            let words = if last_words.is_empty() { String::new() } else { format!(":\n{last_words}") };
            self.fail(now, format!("rank {local} of node {node} ended with code {code}{words}"), Some(code), effects);
        }
    }

    fn rank_joined(&mut self, place: Place, effects: &mut Vec<Effect>) {
        let State::Forming { members, .. } = &mut self.state else { return };
        let Some(rank) = members.places.iter().position(|p| *p == place) else { return };
        members.joined.insert(place.clone());
        let (rank, world) = (rank as u32, members.places.len() as u32);
        effects.push(Effect::Assign { place, generation: self.generation, rank, world });
        self.rendezvous(effects);
    }

    fn store_listening(&mut self, now: Instant, port: u32, effects: &mut Vec<Effect>) {
        if let State::Forming { members, .. } = &mut self.state {
            members.port = Some(port);
        }
        let _ = now;
        self.rendezvous(effects);
    }

    /// Tells the ranks where the store is, once it listens and all are there.
    fn rendezvous(&mut self, effects: &mut Vec<Effect>) {
        let State::Forming { members, .. } = &self.state else { return };
        let Some(port) = members.port else { return };
        if members.joined.len() < members.places.len() {
            return;
        }
        let host = members.places.first().and_then(|(node, _)| self.nodes.get(node)).map(|n| n.address.clone());
        let Some(host) = host else { return };
        effects.extend(members.places.iter().map(|p| Effect::Rendezvous {
            place: p.clone(),
            host: host.clone(),
            port,
        }));
    }

    fn stop_requested(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let reason = "stopped on request".to_owned();
        let again = self.stop.replace(reason.clone()).is_some();
        match &self.state {
            State::Training { members, .. } if !again => {
                effects
                    .extend(members.places.iter().map(|p| Effect::Stop { place: p.clone(), reason: reason.clone() }));
            }
            State::Gathering { .. } | State::Forming { .. } | State::Training { .. } => {
                let outcome = Outcome::Suspended { reason };
                self.drain(now, Then::End(outcome), effects);
            }
            State::Draining { .. } | State::Ended => {}
        }
    }

    /// A generation cannot go on: try again from the newest commit, or give the run up.
    fn fail(&mut self, now: Instant, reason: String, code: Option<i32>, effects: &mut Vec<Effect>) {
        if matches!(self.state, State::Draining { .. } | State::Ended) {
            return;
        }
        // 64, 65, 78: the user's to mend; trying again would fail again.
        let hopeless = code.filter(|code| matches!(code, 64 | 65 | 69 | 73 | 78));
        let then = if let Some(code) = hopeless {
            Then::End(Outcome::Failed { message: reason, code })
        } else if self.stop.is_some() {
            Then::End(Outcome::Suspended { reason: format!("stopping, then {reason}") })
        } else if self.restarts >= self.settings.max_restarts {
            let message =
                format!("{reason}\nthe run has restarted {} times, max_restarts allows no more", self.restarts);
            Then::End(Outcome::Failed { message, code: 1 })
        } else {
            self.restarts += 1;
            effects.push(Effect::Restarted { reason });
            Then::Retry
        };
        self.drain(now, then, effects);
    }

    fn drain(&mut self, now: Instant, then: Then, effects: &mut Vec<Effect>) {
        let members = match std::mem::replace(&mut self.state, State::Ended) {
            State::Forming { members, .. } | State::Training { members, .. } | State::Draining { members, .. } => {
                members
            }
            _ => Members::default(),
        };
        let nodes: BTreeSet<&String> = members.running.iter().map(|(node, _)| node).collect();
        let generation = self.generation;
        effects.extend(nodes.into_iter().map(|node| Effect::StopRanks { node: node.clone(), generation }));
        self.state = State::Draining { members, then, since: now };
    }

    /// What follows from time and state alone.
    fn advance(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        match &mut self.state {
            State::Gathering { since } => {
                let ready = self.nodes.len() as u32;
                let waited = now.duration_since(*since) >= self.settings.startup_timeout;
                if ready >= self.settings.nodes || (waited && ready >= self.settings.min_nodes) {
                    self.form(now, effects);
                } else if waited {
                    let message = format!(
                        "{ready} of at least {} nodes came within {} s; look at the workers' logs",
                        self.settings.min_nodes,
                        self.settings.startup_timeout.as_secs()
                    );
                    self.drain(now, Then::End(Outcome::Failed { message, code: 1 }), effects);
                    self.advance(now, effects);
                }
            }
            State::Forming { since, members } => {
                if members.port.is_some() && members.joined.len() == members.places.len() {
                    let State::Forming { members, .. } = std::mem::replace(&mut self.state, State::Ended) else {
                        return;
                    };
                    let world = members.places.len() as u32;
                    effects.push(Effect::Started { generation: self.generation, world });
                    self.state = State::Training { heard: now, members };
                    if self.stop.is_some() {
                        self.stop = None;
                        self.stop_requested(now, effects);
                    }
                } else if now.duration_since(*since) >= self.settings.startup_timeout {
                    self.fail(now, "the ranks did not find each other in time".into(), None, effects);
                }
            }
            State::Training { heard, members } => {
                if members.finished.len() == members.places.len() {
                    let outcome = if members.stopped {
                        Outcome::Suspended { reason: "stopped on request".into() }
                    } else {
                        Outcome::Finished
                    };
                    let State::Training { members, .. } = std::mem::replace(&mut self.state, State::Ended) else {
                        return;
                    };
                    // They leave by themselves.
                    self.state = State::Draining { members, then: Then::End(outcome), since: now };
                    self.advance(now, effects);
                } else if now.duration_since(*heard) >= self.settings.step_timeout {
                    let message = format!("no step for {} s", self.settings.step_timeout.as_secs());
                    self.fail(now, message, None, effects);
                }
            }
            State::Draining { members, then, since } => {
                // A rank that does not end is ended by its supervisor; do not wait for a lost report for ever.
                if !members.running.is_empty() && now.duration_since(*since) < Duration::from_secs(60) {
                    return;
                }
                match std::mem::replace(then, Then::Retry) {
                    Then::Retry => {
                        self.state = State::Gathering { since: now };
                        self.advance(now, effects);
                    }
                    Then::End(outcome) => {
                        let reason = match &outcome {
                            Outcome::Finished => "the run is finished".to_owned(),
                            Outcome::Suspended { reason } => reason.clone(),
                            Outcome::Failed { message, .. } => message.clone(),
                        };
                        let leave =
                            |node: &String| Effect::Leave { node: node.clone(), reason: reason.clone(), code: 0 };
                        effects.extend(self.nodes.keys().map(leave));
                        effects.push(Effect::End(outcome));
                        self.state = State::Ended;
                    }
                }
            }
            State::Ended => {}
        }
    }

    fn form(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        self.generation += 1;
        let mut nodes: Vec<(&u64, &String)> = self.nodes.iter().map(|(name, node)| (&node.order, name)).collect();
        nodes.sort_unstable();
        let count = self.settings.ranks_per_node;
        let places: Vec<Place> =
            nodes.iter().flat_map(|(_, node)| (0..count).map(move |local| ((*node).clone(), local))).collect();
        effects.extend(nodes.iter().map(|(_, node)| Effect::StartRanks {
            node: (*node).clone(),
            generation: self.generation,
            count,
        }));
        let members = Members { running: places.iter().cloned().collect(), places, ..Members::default() };
        self.state = State::Forming { since: now, members };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    struct Run {
        machine: Machine,
        now: Instant,
        log: Vec<Effect>,
    }

    impl Run {
        fn new(nodes: u32, ranks: u32, max_restarts: u32) -> Self {
            let now = Instant::now();
            let settings = Settings {
                nodes,
                min_nodes: nodes,
                ranks_per_node: ranks,
                max_restarts,
                startup_timeout: Duration::from_secs(60),
                step_timeout: Duration::from_secs(30),
            };
            let (machine, log) = Machine::start(settings, 0, now);
            Run { machine, now, log }
        }

        fn on(&mut self, event: Event) -> Vec<Effect> {
            let effects = self.machine.handle(self.now, event);
            self.log.extend(effects.iter().cloned());
            effects
        }

        fn wait(&mut self, seconds: u64) -> Vec<Effect> {
            self.now += Duration::from_secs(seconds);
            self.on(Event::Tick)
        }

        /// Joins nodes and ranks until the generation trains.
        fn train(&mut self, nodes: &[&str], ranks: u32) {
            for node in nodes {
                self.on(Event::NodeJoined { node: (*node).into(), address: format!("at-{node}") });
            }
            let generation = self.machine.generation();
            for node in nodes {
                for local_rank in 0..ranks {
                    self.on(Event::RankJoined { node: (*node).into(), generation, local_rank });
                }
            }
            self.on(Event::StoreListening { generation, port: 7 });
        }

        fn exit(&mut self, node: &str, local_rank: u32, code: i32) -> Vec<Effect> {
            let generation = self.machine.generation();
            self.on(Event::RankExited { node: node.into(), generation, local_rank, code, last_words: "words".into() })
        }
    }

    fn outcome(effects: &[Effect]) -> Option<&Outcome> {
        effects.iter().find_map(|effect| if let Effect::End(outcome) = effect { Some(outcome) } else { None })
    }

    #[test]
    fn ranks_are_dealt_node_by_node_and_meet_at_rank_0s_store() {
        let mut run = Run::new(2, 2, 0);
        run.train(&["a", "b"], 2);
        let ranks: Vec<_> = run
            .log
            .iter()
            .filter_map(|e| {
                if let Effect::Assign { place, rank, world, .. } = e {
                    Some((place.clone(), *rank, *world))
                } else {
                    None
                }
            })
            .collect();
        let place = |node: &str, local| (node.to_owned(), local);
        assert_eq!(ranks, [(place("a", 0), 0, 4), (place("a", 1), 1, 4), (place("b", 0), 2, 4), (place("b", 1), 3, 4)]);
        let hosts: Vec<_> = run
            .log
            .iter()
            .filter_map(
                |e| if let Effect::Rendezvous { host, port, .. } = e { Some((host.as_str(), *port)) } else { None },
            )
            .collect();
        assert_eq!(hosts, [("at-a", 7); 4]);
        assert!(run.log.contains(&Effect::Started { generation: 1, world: 4 }));
    }

    #[test]
    fn a_commit_is_made_once_all_ranks_have_written_and_told_to_all() {
        let mut run = Run::new(1, 2, 0);
        run.train(&["a"], 2);
        assert_eq!(run.on(Event::PartsWritten { generation: 1, rank: 0, step: 5 }), []);
        assert_eq!(
            run.on(Event::PartsWritten { generation: 1, rank: 0, step: 5 }),
            [],
            "a repeated report counts once"
        );
        let effects = run.on(Event::PartsWritten { generation: 1, rank: 1, step: 5 });
        assert_eq!(effects, [Effect::WriteCommit { generation: 1, step: 5 }]);
        let told = run.on(Event::Committed { generation: 1, seq: 9, step: 5 });
        assert_eq!(told.iter().filter(|e| matches!(e, Effect::TellCommitted { seq: 9, .. })).count(), 2);
    }

    #[test]
    fn a_lost_rank_ends_the_generation_and_the_next_one_waits_for_the_others_to_be_gone() {
        let mut run = Run::new(1, 2, 1);
        run.train(&["a"], 2);
        let effects = run.exit("a", 0, 139);
        assert!(
            effects.iter().any(|e| matches!(e, Effect::Restarted { reason } if reason.contains("139"))),
            "{effects:?}"
        );
        assert!(effects.contains(&Effect::StopRanks { node: "a".into(), generation: 1 }));
        assert!(!effects.iter().any(|e| matches!(e, Effect::StartRanks { .. })), "rank 1 still lives");
        let effects = run.exit("a", 1, 143);
        assert_eq!(effects, [Effect::StartRanks { node: "a".into(), generation: 2, count: 2 }]);
        assert_eq!(
            run.on(Event::PartsWritten { generation: 1, rank: 1, step: 5 }),
            [],
            "an old generation commits nothing"
        );
    }

    #[test]
    fn the_restart_budget_ends_and_the_users_mistakes_are_not_tried_again() {
        let mut run = Run::new(1, 1, 0);
        run.train(&["a"], 1);
        let effects = run.exit("a", 0, 1);
        assert!(matches!(outcome(&effects), Some(Outcome::Failed { code: 1, .. })), "{effects:?}");

        let mut run = Run::new(1, 1, 9);
        run.train(&["a"], 1);
        run.on(Event::RankFailed { generation: 1, rank: 0, message: "no such key".into(), code: 78 });
        let effects = run.exit("a", 0, 78);
        assert!(
            matches!(outcome(&effects), Some(Outcome::Failed { code: 78, message }) if message.contains("no such key"))
        );
    }

    #[test]
    fn a_stop_asks_every_rank_and_the_run_is_suspended_when_they_have_committed_and_gone() {
        let mut run = Run::new(1, 2, 0);
        run.train(&["a"], 2);
        let effects = run.on(Event::StopRequested);
        assert_eq!(effects.iter().filter(|e| matches!(e, Effect::Stop { .. })).count(), 2);
        run.on(Event::RankFinished { generation: 1, rank: 0, stopped: true });
        run.on(Event::RankFinished { generation: 1, rank: 1, stopped: true });
        run.exit("a", 0, 0);
        let effects = run.exit("a", 1, 0);
        assert!(matches!(outcome(&effects), Some(Outcome::Suspended { .. })), "{effects:?}");
        assert!(effects.iter().any(|e| matches!(e, Effect::Leave { .. })));
    }

    #[test]
    fn silence_beyond_the_step_timeout_is_a_failure_and_a_sign_of_life_is_not() {
        let mut run = Run::new(1, 1, 1);
        run.train(&["a"], 1);
        run.wait(29);
        run.on(Event::Progress { generation: 1 });
        assert_eq!(run.wait(29), []);
        assert!(run.wait(2).iter().any(|e| matches!(e, Effect::Restarted { .. })));
    }

    #[test]
    fn nodes_that_do_not_come_fail_the_run_with_the_count() {
        let mut run = Run::new(2, 1, 0);
        run.on(Event::NodeJoined { node: "a".into(), address: "at-a".into() });
        let effects = run.wait(61);
        assert!(
            matches!(outcome(&effects), Some(Outcome::Failed { message, .. }) if message.contains("1 of at least 2"))
        );
    }
}
