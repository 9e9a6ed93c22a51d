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
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

pub use event::{Change, Effect, Event, Outcome, Place, Settings};

/// Exit codes of what is the user's to mend: trying again would fail again.
const HOPELESS: [i32; 5] = [64, 65, 69, 73, 78];
/// Exit code of a node that was told to leave.
const YIELDED: i32 = 75;
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
/// Time for an ended rank to be reported as ended, beyond which its node is given up.
const REPORT: Duration = Duration::from_secs(3);

#[derive(Debug)]
struct Node {
    address: String,
    slot: u32,
    /// Order of joining: ranks are dealt in it.
    order: u64,
    leaving: bool,
}

#[derive(Debug)]
struct Slot {
    attempt: u32,
    node: Option<String>,
    launched: bool,
}

#[derive(Debug)]
struct Rank {
    attempt: u32,
    state: RankState,
    /// Ended by us: its exit is no news.
    killed: bool,
    /// What it said when it gave up.
    failure: Option<String>,
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
    Finding { until: Instant, found: BTreeMap<Place, Membership> },
    Gathering { since: Instant },
    Forming { heard: Instant, members: Members },
    Training { heard: Instant, members: Members },
    Pausing { until: Instant, hard: bool, members: Members },
    Ending { since: Instant, outcome: Outcome },
    Ended,
}

/// Ranks of one generation.
#[derive(Debug, Default)]
struct Members {
    places: Vec<Place>,
    reunited: BTreeSet<Place>,
    finished: BTreeSet<Place>,
    stopped: bool,
    parts: BTreeMap<u64, BTreeSet<Place>>,
    from_commit: Option<u64>,
    step: u64,
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
    restarts: u32,
    /// Newest step that a rank told of.
    step: u64,
    stop: Option<String>,
    episode: Option<Episode>,
    newcomers: Option<Instant>,
}

impl Machine {
    /// A run whose last generation was `generation` (0 for a new one), and the first effects: its nodes.
    #[must_use]
    pub fn start(settings: Settings, generation: u64, now: Instant) -> (Self, Vec<Effect>) {
        let mut machine = Self::new(settings, generation, State::Gathering { since: now });
        let mut launch = Vec::new();
        machine.launch_missing(&mut launch);
        (machine, launch)
    }

    /// A run that another coordinator may have left training: its nodes are waited for before any is started.
    #[must_use]
    pub fn take_over(settings: Settings, generation: u64, now: Instant) -> Self {
        Self::new(settings, generation, State::Finding { until: now + FIND, found: BTreeMap::new() })
    }

    fn new(settings: Settings, generation: u64, state: State) -> Self {
        Machine {
            slots: (0..settings.nodes).map(|slot| (slot, Slot { attempt: 0, node: None, launched: false })).collect(),
            settings,
            state,
            nodes: BTreeMap::new(),
            ranks: BTreeMap::new(),
            joins: 0,
            generation,
            restarts: 0,
            step: 0,
            stop: None,
            episode: None,
            newcomers: None,
        }
    }

    fn launch_missing(&mut self, effects: &mut Vec<Effect>) {
        for (&slot, place) in self.slots.iter_mut().filter(|(_, place)| place.node.is_none() && !place.launched) {
            place.launched = true;
            effects.push(Effect::Launch { slot, attempt: place.attempt });
        }
    }

    /// The current generation.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Rank 0 of the current generation.
    #[must_use]
    pub fn first_place(&self) -> Option<&Place> {
        self.members().and_then(|members| members.places.first())
    }

    /// Takes an event. Events of other generations or attempts than the current ones change nothing.
    pub fn handle(&mut self, now: Instant, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        let current = self.generation;
        match event {
            Event::NodeJoined { node, slot, address, ranks } => {
                self.node_joined(node, slot, address, &ranks, &mut effects);
            }
            Event::RankReturned { place, attempt, generation, rank, world } => {
                self.rank_returned(now, place, attempt, Membership { generation, rank, world }, &mut effects);
            }
            Event::NodeLost { node } => self.node_lost(now, &node, &mut effects),
            Event::LaunchEnded { slot, attempt, code } => self.launch_ended(now, slot, attempt, code, &mut effects),
            Event::Preempting { node, .. } => self.preempting(now, &node, &mut effects),
            Event::RankExited { place, attempt, code, last_words } => {
                self.rank_exited(now, &place, attempt, code, &last_words, &mut effects);
            }
            Event::RankReady { place, attempt, generation, broken } => {
                self.rank_ready(now, &place, attempt, generation, broken, &mut effects);
            }
            Event::StoreListening { generation, port } if generation == current => self.rendezvous(port, &mut effects),
            Event::Reunited { generation, place, step, from_commit } if generation == current => {
                self.reunited(now, place, step, from_commit);
            }
            Event::Progress { generation, step } if generation == current => {
                self.heard(now);
                self.step = self.step.max(step);
            }
            Event::PartsWritten { generation, place, step } if generation == current => {
                self.heard(now);
                if let Some(members) = self.members_mut() {
                    let ranks = members.parts.entry(step).or_default();
                    ranks.insert(place);
                    if ranks.len() == members.places.len() {
                        members.parts.remove(&step);
                        effects.push(Effect::WriteCommit { generation, step });
                    }
                }
            }
            Event::Committed { generation, seq, step } if generation == current => {
                self.heard(now);
                let places = self.members().map(|members| members.places.clone()).unwrap_or_default();
                effects.extend(places.into_iter().map(|place| Effect::TellCommitted { place, seq, step }));
            }
            Event::CommitFailed { reason } => {
                self.end(now, Outcome::Failed { message: reason, code: 1 }, &mut effects);
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
                        self.end(now, Outcome::Failed { message: reason, code }, &mut effects);
                    }
                }
            }
            Event::StopRequested => self.stop_requested(now, &mut effects),
            Event::CancelRequested => self.end(now, Outcome::Cancelled, &mut effects),
            _ => {}
        }
        self.advance(now, &mut effects);
        effects
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
            State::Forming { members, .. } | State::Training { members, .. } | State::Pausing { members, .. } => {
                Some(members)
            }
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

    fn node_joined(
        &mut self,
        node: String,
        slot: u32,
        address: String,
        running: &[(u32, u32)],
        effects: &mut Vec<Effect>,
    ) {
        if self.nodes.get(&node).is_some_and(|known| known.slot == slot) {
            // Its line broke and is mended: what it had is as it was.
            return;
        }
        let known = self.slots.get_mut(&slot).filter(|slot| slot.node.is_none() && !self.nodes.contains_key(&node));
        let Some(place) = known else {
            let reason = format!("slot {slot} of this run is filled by another node");
            effects.push(Effect::Leave { node, reason, code: YIELDED });
            return;
        };
        place.node = Some(node.clone());
        // The next attempt must not have the name of one that lives.
        let attempt = node.rsplit_once('-').and_then(|(_, attempt)| attempt.parse().ok());
        place.attempt = place.attempt.max(attempt.unwrap_or(0));
        self.joins += 1;
        self.nodes.insert(node.clone(), Node { address, slot, order: self.joins, leaving: false });
        for local in 0..self.settings.ranks_per_node {
            let place = (node.clone(), local);
            match running.iter().find(|(number, _)| *number == local) {
                Some(&(_, attempt)) => {
                    let rank = Rank { attempt, state: RankState::Starting, killed: false, failure: None };
                    self.ranks.insert(place, rank);
                }
                None => self.start_rank(place, 0, effects),
            }
        }
    }

    fn rank_returned(
        &mut self,
        now: Instant,
        place: Place,
        attempt: u32,
        member: Membership,
        effects: &mut Vec<Effect>,
    ) {
        let reason = "another coordinator came, and this generation is not whole";
        let Some(rank) = self.ranks.get_mut(&place).filter(|rank| rank.attempt == attempt) else { return };
        if rank.state == RankState::Member && member.generation == self.generation {
            // Its line broke and is mended.
            return;
        }
        rank.state = RankState::Member;
        if let State::Finding { found, until } = &mut self.state {
            found.insert(place, member);
            *until = (*until).max(now + HEARTBEATS);
            return;
        }
        // Too late to be taken over as a whole.
        effects.push(Effect::Regroup { place, generation: member.generation, reason: reason.into() });
    }

    /// Takes over what was found training, once it is whole or has been waited for.
    fn find(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let State::Finding { until, found } = &mut self.state else { return };
        let newest = found.values().map(|member| member.generation).max();
        let Some(generation) = newest else {
            if now >= *until {
                self.state = State::Gathering { since: now };
                self.launch_missing(effects);
            }
            return;
        };
        let mut places: Vec<(u32, Place)> = found
            .iter()
            .filter(|(_, member)| member.generation == generation)
            .map(|(place, member)| (member.rank, place.clone()))
            .collect();
        places.sort_unstable();
        let world = found.values().filter(|m| m.generation == generation).map(|m| m.world).max().unwrap_or(0);
        let whole = places.len() as u32 == world;
        if !whole && now < *until {
            return;
        }
        let places = places.into_iter().map(|(_, place)| place).collect();
        self.generation = self.generation.max(generation);
        let members = Members { places, ..Members::default() };
        self.state = State::Training { heard: now, members };
        effects.push(Effect::Found { generation, world });
        if !whole || self.generation != generation {
            let reason = "the coordinator was lost, and ranks with it".to_owned();
            self.break_off(now, reason, Some(true), BREAK_OFF, effects);
        }
        self.launch_missing(effects);
    }

    fn start_rank(&mut self, place: Place, attempt: u32, effects: &mut Vec<Effect>) {
        let rank = Rank { attempt, state: RankState::Starting, killed: false, failure: None };
        self.ranks.insert(place.clone(), rank);
        effects.push(Effect::StartRank { place, attempt });
    }

    fn node_lost(&mut self, now: Instant, name: &str, effects: &mut Vec<Effect>) {
        let Some(node) = self.nodes.remove(name) else { return };
        let member = self.members().is_some_and(|members| {
            members.places.iter().any(|place| place.0 == name && !members.finished.contains(place))
        });
        self.ranks.retain(|place, _| place.0 != name);
        if self.over() {
            return;
        }
        let reason = if node.leaving { format!("node {name} was preempted") } else { format!("node {name} was lost") };
        self.lost(now, reason, !node.leaving, member, effects);
        self.relaunch(node.slot, effects);
    }

    /// Fills a slot anew, and makes sure that whatever filled it before is gone.
    fn relaunch(&mut self, slot: u32, effects: &mut Vec<Effect>) {
        if self.over() {
            return;
        }
        if let Some(place) = self.slots.get_mut(&slot) {
            effects.push(Effect::Discard { slot, attempt: place.attempt });
            *place = Slot { attempt: place.attempt + 1, node: None, launched: true };
            effects.push(Effect::Launch { slot, attempt: place.attempt });
        }
    }

    fn launch_ended(&mut self, now: Instant, slot: u32, attempt: u32, code: i32, effects: &mut Vec<Effect>) {
        let Some(place) = self.slots.get(&slot).filter(|slot| slot.attempt == attempt) else { return };
        match place.node.clone() {
            // Its stream's end tells the rest.
            Some(node) => {
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.leaving |= code == YIELDED;
                }
            }
            None if self.over() => {}
            None => {
                let reason = format!("a node for slot {slot} ended with code {code} before it joined");
                self.lost(now, reason, code != YIELDED, false, effects);
                self.relaunch(slot, effects);
            }
        }
    }

    fn preempting(&mut self, now: Instant, name: &str, effects: &mut Vec<Effect>) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        node.leaving = true;
        // Where it trains, `advance` lets the step finish first.
        let member = self.members().is_some_and(|members| members.places.iter().any(|place| place.0 == name));
        if !member {
            self.send_home(effects);
        } else if let State::Training { .. } = self.state {
            let remaining: BTreeSet<&String> =
                self.nodes.iter().filter(|(_, node)| !node.leaving).map(|(name, _)| name).collect();
            let commit = (remaining.len() as u32) < self.settings.min_nodes;
            self.pause(now, format!("node {name} was told to leave"), commit, effects);
        }
    }

    fn rank_exited(
        &mut self,
        now: Instant,
        place: &Place,
        attempt: u32,
        code: i32,
        last_words: &str,
        effects: &mut Vec<Effect>,
    ) {
        let Some(rank) = self.ranks.get(place).filter(|rank| rank.attempt == attempt) else { return };
        let (killed, member) = (rank.killed, rank.state == RankState::Member);
        let (node, local) = place;
        let reason = rank.failure.clone().unwrap_or_else(|| {
            let words = if last_words.is_empty() { String::new() } else { format!(":\n{last_words}") };
            format!("rank {local} of node {node} ended with code {code}{words}")
        });
        self.ranks.remove(place);
        if let State::Finding { found, .. } = &mut self.state {
            found.remove(place);
        }
        let finished = self.members().is_some_and(|members| members.finished.contains(place));
        if finished || self.over() {
            return;
        }
        if HOPELESS.contains(&code) {
            self.end(now, Outcome::Failed { message: reason, code }, effects);
            return;
        }
        let leaving = self.nodes.get(node).is_none_or(|node| node.leaving);
        self.lost(now, reason, !killed && !leaving, member, effects);
        if !leaving && !self.over() {
            self.start_rank(place.clone(), attempt + 1, effects);
        }
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

    fn rank_ready(
        &mut self,
        now: Instant,
        place: &Place,
        attempt: u32,
        generation: u64,
        broken: Option<String>,
        effects: &mut Vec<Effect>,
    ) {
        let current = self.generation;
        let Some(rank) = self.ranks.get_mut(place).filter(|rank| rank.attempt == attempt) else { return };
        if rank.state == RankState::Member && generation != current {
            return;
        }
        let member = rank.state == RankState::Member;
        rank.state = RankState::Ready;
        if let (true, Some(broken)) = (member, broken) {
            self.break_off(now, format!("the ring broke: {broken}"), None, BREAK_OFF, effects);
        }
    }

    /// Tells the ranks where the store is.
    fn rendezvous(&self, port: u32, effects: &mut Vec<Effect>) {
        let State::Forming { members, .. } = &self.state else { return };
        let host = members.places.first().and_then(|(node, _)| self.nodes.get(node)).map(|n| n.address.clone());
        let Some(host) = host else { return };
        let tell = |place: &Place| Effect::Rendezvous { place: place.clone(), host: host.clone(), port };
        effects.extend(members.places.iter().map(tell));
    }

    fn reunited(&mut self, now: Instant, place: Place, step: u64, from_commit: Option<u64>) {
        self.heard(now);
        if let State::Forming { members, .. } = &mut self.state {
            members.reunited.insert(place);
            members.step = step;
            members.from_commit = members.from_commit.or(from_commit);
        }
    }

    fn stop_requested(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let reason = "stopped on request".to_owned();
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

    /// Lets the generation finish its step.
    fn pause(&mut self, now: Instant, reason: String, commit: bool, effects: &mut Vec<Effect>) {
        let State::Training { members, .. } = &mut self.state else { return };
        let members = std::mem::take(members);
        let goes = |place: &Place| self.nodes.get(&place.0).is_none_or(|node| node.leaving);
        let leaving: Vec<u32> = (0..).zip(&members.places).filter(|(_, place)| goes(place)).map(|(at, _)| at).collect();
        effects.extend(members.places.iter().map(|place| Effect::Pause {
            place: place.clone(),
            generation: self.generation,
            reason: reason.clone(),
            leaving: leaving.clone(),
            commit,
        }));
        self.begin(now, reason, Some(false), &members);
        self.state = State::Pausing { until: now + self.settings.step_timeout, hard: false, members };
    }

    /// Breaks the generation off: whoever is left comes back at once.
    fn break_off(
        &mut self,
        now: Instant,
        reason: String,
        failure: Option<bool>,
        wait: Duration,
        effects: &mut Vec<Effect>,
    ) {
        let members = match &mut self.state {
            State::Forming { members, .. }
            | State::Training { members, .. }
            | State::Pausing { hard: false, members, .. } => std::mem::take(members),
            _ => return,
        };
        effects.extend(self.away(&members).map(|place| Effect::Regroup {
            place: place.clone(),
            generation: self.generation,
            reason: reason.clone(),
        }));
        self.begin(now, reason, failure, &members);
        self.state = State::Pausing { until: now + wait, hard: true, members };
    }

    fn begin(&mut self, now: Instant, reason: String, failure: Option<bool>, members: &Members) {
        let (world, step) = (members.places.len() as u32, self.step);
        self.episode.get_or_insert(Episode { since: now, reason, failure, world, step });
    }

    /// Members that have not come back.
    fn away<'a>(&'a self, members: &'a Members) -> impl Iterator<Item = &'a Place> {
        members.places.iter().filter(|place| {
            let rank = self.ranks.get(*place);
            rank.is_some_and(|rank| rank.state == RankState::Member) && !members.finished.contains(*place)
        })
    }

    fn send_home(&self, effects: &mut Vec<Effect>) {
        let reason = "this node was told to leave";
        effects.extend(self.nodes.iter().filter(|(_, node)| node.leaving).map(|(node, _)| Effect::Leave {
            node: node.clone(),
            reason: reason.into(),
            code: YIELDED,
        }));
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

    /// Ranks that could form a generation, in order.
    fn ready(&self) -> Vec<Place> {
        let mut ready: Vec<(u64, Place)> = self
            .ranks
            .iter()
            .filter(|(_, rank)| rank.state == RankState::Ready)
            .filter_map(|(place, _)| {
                let node = self.nodes.get(&place.0).filter(|node| !node.leaving)?;
                Some((node.order, place.clone()))
            })
            .collect();
        ready.sort_unstable();
        ready.into_iter().map(|(_, place)| place).collect()
    }

    /// What follows from time and state alone.
    fn advance(&mut self, now: Instant, effects: &mut Vec<Effect>) {
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

    fn gather(&mut self, now: Instant, since: Instant, effects: &mut Vec<Effect>) {
        let Settings { nodes, min_nodes, ranks_per_node, startup_timeout, .. } = self.settings;
        let ready = self.ready();
        let mut by_node: BTreeMap<&String, u32> = BTreeMap::new();
        ready.iter().for_each(|(node, _)| *by_node.entry(node).or_default() += 1);
        let whole = by_node.values().filter(|&&ranks| ranks == ranks_per_node).count() as u32;
        let waited = now.duration_since(since) >= startup_timeout;
        if self.episode.is_some() {
            // Memory holds the state: go on with whoever is there.
            let some = by_node.len() as u32;
            if some > 0 && (some >= min_nodes || self.stop.is_some()) {
                self.form(now, ready, effects);
            } else if waited {
                let reason = format!(
                    "{some} of at least {min_nodes} nodes were left, and no other came within {} s",
                    startup_timeout.as_secs()
                );
                self.stop = Some(reason.clone());
                if some > 0 {
                    self.form(now, ready, effects);
                } else {
                    self.end(now, Outcome::Suspended { reason }, effects);
                    self.advance(now, effects);
                }
            }
        } else if let Some(reason) = self.stop.clone() {
            self.end(now, Outcome::Suspended { reason }, effects);
            self.advance(now, effects);
        } else if whole >= nodes || waited && whole >= min_nodes {
            self.form(now, ready, effects);
        } else if waited {
            let message = format!(
                "{whole} of at least {min_nodes} nodes came within {} s; look at the workers' logs",
                startup_timeout.as_secs()
            );
            self.end(now, Outcome::Failed { message, code: 1 }, effects);
            self.advance(now, effects);
        }
    }

    fn form(&mut self, now: Instant, places: Vec<Place>, effects: &mut Vec<Effect>) {
        self.generation += 1;
        let mut names: Vec<&String> = Vec::new();
        let mut nodes = Vec::with_capacity(places.len());
        for (node, _) in &places {
            if names.last() != Some(&node) {
                names.push(node);
            }
            nodes.push(names.len() as u32 - 1);
        }
        for (rank, place) in (0..).zip(&places) {
            if let Some(rank) = self.ranks.get_mut(place) {
                rank.state = RankState::Member;
            }
            let (place, nodes) = (place.clone(), nodes.clone());
            effects.push(Effect::Assign { place, generation: self.generation, rank, nodes });
        }
        self.newcomers = None;
        self.state = State::Forming { heard: now, members: Members { places, ..Members::default() } };
    }

    fn train(&mut self, now: Instant, members: Members, effects: &mut Vec<Effect>) {
        let (world, from_commit) = (members.places.len() as u32, members.from_commit);
        if let Some(episode) = self.episode.take() {
            effects.push(Effect::Regrouped(Change {
                reason: episode.reason,
                failure: episode.failure.unwrap_or(true),
                world_before: episode.world,
                world,
                took: now.duration_since(episode.since),
                step: members.step,
                steps_lost: episode.step.saturating_sub(members.step),
                from_commit,
            }));
        }
        self.step = members.step;
        effects.push(Effect::Started { generation: self.generation, world, from_commit });
        self.state = State::Training { heard: now, members };
        self.send_stop(effects);
        self.change(now, effects);
    }

    /// Nobody got anywhere: somebody hangs. Those that can come back do so soon.
    fn silent(&mut self, now: Instant, reason: String, effects: &mut Vec<Effect>) {
        if self.spend(now, &reason, effects) {
            self.break_off(now, reason, Some(true), BREAK_OFF_SILENT, effects);
        }
    }

    /// Makes room for those who leave, and for those who came.
    fn change(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let State::Training { members, .. } = &self.state else { return };
        if self.stop.is_some() || !members.finished.is_empty() {
            return;
        }
        let gone = members.places.iter().find(|place| self.nodes.get(&place.0).is_some_and(|node| node.leaving));
        if let Some((node, _)) = gone.cloned() {
            self.preempting(now, &node, effects);
            return;
        }
        let newcomers = self.ready();
        let Some((node, _)) = newcomers.first() else {
            self.newcomers = None;
            return;
        };
        let since = *self.newcomers.get_or_insert(now);
        let more = self.ranks.values().any(|rank| rank.state == RankState::Starting);
        if !more || now.duration_since(since) >= JOIN_TOGETHER {
            let reason = format!("{} rank(s) joined, the first on node {node}", newcomers.len());
            self.pause(now, reason, false, effects);
        }
    }

    /// Whether those asked to come back have done so.
    fn come_back(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let State::Pausing { until, hard, members } = &self.state else { return };
        let (until, hard) = (*until, *hard);
        let away: Vec<Place> = self.away(members).cloned().collect();
        if away.is_empty() {
            // Ranks finish together: one that has done so speaks for all.
            if !members.finished.is_empty() {
                let stopped = members.stopped;
                self.finish(now, stopped, effects);
                return;
            }
            if let Some(Episode { failure: failure @ None, reason, .. }) = &mut self.episode {
                *failure = Some(true);
                let reason = reason.clone();
                if !self.spend(now, &reason, effects) {
                    self.advance(now, effects);
                    return;
                }
            }
            self.send_home(effects);
            self.state = State::Gathering { since: now };
            self.advance(now, effects);
            if let State::Gathering { .. } = self.state {
                let (reason, least) = (self.episode.as_ref().map_or("", |e| e.reason.as_str()), self.settings.min_nodes);
                effects.push(Effect::Note { message: format!("{reason}; waiting for at least {least} node(s)") });
            }
        } else if now >= until {
            if hard {
                self.end_the_stuck(now, away, effects);
            } else {
                self.silent(now, "the ranks did not come to the end of their step".into(), effects);
            }
        }
    }

    /// Ladder: first the rank process, then its node.
    fn end_the_stuck(&mut self, now: Instant, away: Vec<Place>, effects: &mut Vec<Effect>) {
        let mut nodes = BTreeSet::new();
        for place in away {
            let Some(rank) = self.ranks.get_mut(&place) else { continue };
            if rank.killed {
                nodes.insert(place.0);
            } else {
                rank.killed = true;
                effects.push(Effect::KillRank { place, attempt: rank.attempt });
            }
        }
        if let State::Pausing { until, .. } = &mut self.state {
            *until = now + REPORT;
        }
        for node in &nodes {
            self.node_lost(now, node, effects);
        }
        if !nodes.is_empty() {
            self.advance(now, effects);
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
