//! From one generation to the next: pause or break off, come back, gather, form, train.

use super::*;

impl Machine {
    /// Where rank 0 is reached.
    pub(super) fn host(&self, members: &Members) -> Option<String> {
        members.places.first().and_then(|(node, _)| self.nodes.get(node)).map(|node| node.address.clone())
    }

    /// Tells the ranks where the store is.
    pub(super) fn rendezvous(&mut self, port: u32, effects: &mut Vec<Effect>) {
        if let Some(members) = self.members_mut() {
            members.store = Some(port);
        }
        if !matches!(self.state, State::Forming { .. } | State::Training { .. }) {
            return;
        }
        // Whoever is past that pays no heed.
        let Some(host) = self.members().and_then(|members| self.host(members)) else { return };
        let places = self.members().map(|members| members.places.as_slice()).unwrap_or_default();
        let tell = |place: &Place| Effect::Rendezvous { place: place.clone(), host: host.clone(), port };
        effects.extend(places.iter().map(tell));
    }

    pub(super) fn reunited(&mut self, now: Instant, place: Place, step: u64, from_commit: Option<u64>) {
        self.heard(now);
        if let State::Finding { .. } = self.state {
            self.trained = self.trained.max(self.generation);
        }
        if let State::Forming { members, .. } = &mut self.state {
            members.reunited.insert(place);
            members.step = step;
            members.from_commit = members.from_commit.or(from_commit);
        }
    }

    /// Lets the generation finish its step.
    pub(super) fn pause(&mut self, now: Instant, reason: String, commit: bool, effects: &mut Vec<Effect>) {
        let State::Training { members, .. } = &mut self.state else { return };
        let mut members = std::mem::take(members);
        let goes = |place: &Place| self.nodes.get(&place.0).is_none_or(|node| node.leaving);
        let leaving: Vec<u32> = (0..).zip(&members.places).filter(|(_, place)| goes(place)).map(|(at, _)| at).collect();
        effects.extend(members.places.iter().map(|place| Effect::Pause {
            place: place.clone(),
            generation: self.generation,
            reason: reason.clone(),
            leaving: leaving.clone(),
            commit,
        }));
        members.pause = Some(Pause { reason: reason.clone(), leaving, commit });
        self.begin(now, reason, Some(false), &members);
        self.state = State::Pausing { until: now + self.settings.step_timeout, hard: false, members };
    }

    /// Breaks the generation off: whoever is left comes back at once.
    pub(super) fn break_off(
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
        let members = Members { pause: None, ..members };
        effects.extend(self.away(&members).map(|place| Effect::Regroup {
            place: place.clone(),
            generation: self.generation,
            reason: reason.clone(),
        }));
        self.begin(now, reason, failure, &members);
        self.state = State::Pausing { until: now + wait, hard: true, members };
    }

    pub(super) fn begin(&mut self, now: Instant, reason: String, failure: Option<bool>, members: &Members) {
        let (world, step) = (members.places.len() as u32, self.step);
        self.episode.get_or_insert(Episode { since: now, reason, failure, world, step });
    }

    /// Members that have not come back.
    pub(super) fn away<'a>(&'a self, members: &'a Members) -> impl Iterator<Item = &'a Place> {
        members.places.iter().filter(|place| {
            let rank = self.ranks.get(*place);
            rank.is_some_and(|rank| rank.state == RankState::Member) && !members.finished.contains(*place)
        })
    }

    /// Ranks that could form a generation, in order.
    pub(super) fn ready(&self) -> Vec<Place> {
        let mut ready: Vec<(u64, Place)> = self
            .ranks
            .iter()
            .filter(|(_, rank)| rank.state == RankState::Ready && !rank.killed)
            .filter_map(|(place, rank)| {
                let node = self.nodes.get(&place.0).filter(|node| !node.home)?;
                // One that leaves comes along where there is something to take from it.
                (!node.leaving || rank.holds).then(|| (node.order, place.clone()))
            })
            .collect();
        ready.sort_unstable();
        ready.into_iter().map(|(_, place)| place).collect()
    }

    pub(super) fn gather(&mut self, now: Instant, since: Instant, effects: &mut Vec<Effect>) {
        if self.nodes.values().any(|node| node.cut.is_some()) {
            // Soon mended or lost.
            return;
        }
        self.end_the_old(effects);
        let Settings { nodes, min_nodes, ranks_per_node, startup_timeout, .. } = self.settings;
        let ready = self.ready();
        let mut by_node: BTreeMap<&String, u32> = BTreeMap::new();
        ready.iter().for_each(|(node, _)| *by_node.entry(node).or_default() += 1);
        let whole = by_node.values().filter(|&&ranks| ranks == ranks_per_node).count() as u32;
        let waited = now.duration_since(since) >= startup_timeout;
        self.enough = self.enough.filter(|_| whole >= min_nodes);
        if self.episode.is_some() {
            // Memory holds the state: go on with whoever is there. Those who must leave do not wait for more.
            let leaves = |node: &String| self.nodes.get(node).is_some_and(|node| node.leaving);
            let leave = by_node.keys().any(|node| leaves(node));
            let some = by_node.len() as u32;
            let recent = |since: Instant| now.duration_since(since) < BREAK_OFF;
            let unknown = self.ranks.values().any(|rank| !rank.killed && rank.unknown.is_some_and(recent));
            if unknown && !waited {
                // Those may hold what is needed, too.
            } else if some > 0 && (some >= min_nodes || self.stop.is_some() || leave) {
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
        } else if whole >= nodes || whole >= min_nodes && (waited || self.came_together(now)) {
            self.form(now, ready, effects);
        } else if whole >= min_nodes {
            // Whoever comes later joins.
            self.enough.get_or_insert(now);
        } else if waited {
            let message = format!(
                "{whole} of at least {min_nodes} nodes came within {} s; look at the workers' logs",
                startup_timeout.as_secs()
            );
            self.end(now, Outcome::Failed { message, code: 1 }, effects);
            self.advance(now, effects);
        }
    }

    /// Whether those who have come need wait for no others: a queue or a full cluster may keep them for hours.
    fn came_together(&self, now: Instant) -> bool {
        let starting = self.ranks.values().any(|rank| rank.state == RankState::Starting && !rank.killed);
        !starting && self.enough.is_some_and(|since| now.duration_since(since) >= TOGETHER)
    }

    pub(super) fn form(&mut self, now: Instant, places: Vec<Place>, effects: &mut Vec<Effect>) {
        self.generation = self.generation.max(self.base) + 1;
        let nodes = nodes_of(&places);
        for (rank, place) in (0..).zip(&places) {
            if let Some(rank) = self.ranks.get_mut(place) {
                (rank.state, rank.holds, rank.last) = (RankState::Member, true, self.generation);
            }
            let (place, nodes) = (place.clone(), nodes.clone());
            effects.push(Effect::Assign { place, generation: self.generation, rank, nodes });
        }
        (self.newcomers, self.enough) = (None, None);
        self.state =
            State::Forming { heard: now, members: Members { world: places.len(), places, ..Members::default() } };
    }

    pub(super) fn train(&mut self, now: Instant, members: Members, effects: &mut Vec<Effect>) {
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
        self.trained = self.generation;
        effects.push(Effect::Started { generation: self.generation, world, from_commit });
        self.state = State::Training { heard: now, members };
        self.send_stop(effects);
        self.change(now, effects);
    }

    /// Nobody got anywhere: somebody hangs. Those that can come back do so soon.
    pub(super) fn silent(&mut self, now: Instant, reason: String, effects: &mut Vec<Effect>) {
        if self.spend(now, &reason, effects) {
            self.break_off(now, reason, Some(true), BREAK_OFF_SILENT, effects);
        }
    }

    /// Makes room for those who leave, and for those who came.
    pub(super) fn change(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let State::Training { members, .. } = &self.state else { return };
        if self.stop.is_some() || !members.finished.is_empty() {
            return;
        }
        let gone = members.places.iter().find(|place| self.nodes.get(&place.0).is_some_and(|node| node.leaving));
        if let Some((node, _)) = gone.cloned() {
            self.preempting(now, &node, effects);
            return;
        }
        let mut newcomers = self.ready();
        newcomers.retain(|(node, _)| self.nodes.get(node).is_some_and(|node| !node.leaving));
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
    pub(super) fn come_back(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let State::Pausing { until, hard, members } = &self.state else { return };
        let (until, hard) = (*until, *hard);
        let away: Vec<Place> = self.away(members).cloned().collect();
        let handed_over = self.handed_over(members);
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
            self.send_home(&handed_over, effects);
            self.state = State::Gathering { since: now };
            self.advance(now, effects);
            if let State::Gathering { .. } = self.state {
                let (reason, least) =
                    (self.episode.as_ref().map_or("", |e| e.reason.as_str()), self.settings.min_nodes);
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

    /// Nodes of which nothing is needed any more: all that stay have come back with what they took over.
    pub(super) fn handed_over(&self, members: &Members) -> BTreeSet<String> {
        let leaving: BTreeSet<u32> = members.pause.iter().flat_map(|pause| pause.leaving.iter().copied()).collect();
        let (leave, stay): (Vec<_>, Vec<_>) = (0..).zip(&members.places).partition(|(rank, _)| leaving.contains(rank));
        let ready = |place: &Place| {
            self.nodes.get(&place.0).is_some_and(|node| node.cut.is_none())
                && self.ranks.get(place).is_some_and(|rank| rank.state == RankState::Ready)
        };
        if !stay.into_iter().all(|(_, place)| ready(place)) {
            return BTreeSet::new();
        }
        leave.into_iter().map(|(_, (node, _))| node.clone()).collect()
    }
}

/// The node of each rank, numbered from 0.
pub(super) fn nodes_of(places: &[Place]) -> Vec<u32> {
    let mut names: Vec<&String> = Vec::new();
    let mut nodes = Vec::with_capacity(places.len());
    for (node, _) in places {
        if names.last() != Some(&node) {
            names.push(node);
        }
        nodes.push(names.len() as u32 - 1);
    }
    nodes
}
