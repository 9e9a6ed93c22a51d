//! Rank processes: started, ready, ended, and told again what went with a broken line.

use super::regroup::nodes_of;
use super::*;

impl Machine {
    /// A member's line is made anew: what it had not been told yet it is told now.
    pub(super) fn say_again(&self, place: &Place, effects: &mut Vec<Effect>) {
        let (place, generation) = (place.clone(), self.generation);
        if let Some((_, seq, step)) = self.committed.filter(|(of, ..)| *of == generation) {
            effects.push(Effect::TellCommitted { place: place.clone(), seq, step });
        }
        match &self.state {
            // Ranks that another coordinator has found training may still look for each other.
            State::Forming { members, .. } | State::Training { members, .. } => {
                if let (Some(port), Some(host)) = (members.store, self.host(members)) {
                    effects.push(Effect::Rendezvous { place: place.clone(), host, port });
                }
                if let (State::Training { .. }, Some(reason)) = (&self.state, self.stop.clone()) {
                    effects.push(Effect::Stop { place, reason });
                }
            }
            State::Pausing { hard: false, members, .. } => {
                if let Some(Pause { reason, leaving, commit }) = members.pause.clone() {
                    effects.push(Effect::Pause { place, generation, reason, leaving, commit });
                }
            }
            State::Pausing { hard: true, .. } => {
                let reason = self.episode.as_ref().map_or_else(String::new, |episode| episode.reason.clone());
                effects.push(Effect::Regroup { place, generation, reason });
            }
            _ => {}
        }
    }

    pub(super) fn start_rank(&mut self, place: Place, attempt: u32, effects: &mut Vec<Effect>) {
        self.ranks.insert(place.clone(), Rank::starting(attempt));
        effects.push(Effect::StartRank { place, attempt });
    }

    pub(super) fn rank_exited(
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
        let stopped = self.stop.is_some();
        // A rank ends with 0 when all is done, and where it could not say so the others do.
        if let Some(members) = self.members_mut().filter(|_| code == 0 && member) {
            members.finished.insert(place.clone());
            members.stopped |= stopped;
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
        // One that ends with 0 had nothing left to do, and an earlier coordinator was to be told.
        self.lost(now, reason, !killed && !leaving && code != 0, member, effects);
        if !leaving && !self.over() {
            self.start_rank(place.clone(), attempt + 1, effects);
        }
    }

    pub(super) fn rank_ready(
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
        let member = rank.state == RankState::Member;
        if generation < rank.returned {
            // It is in a newer generation, and said this before.
            return;
        }
        if member && rank.unknown.is_none() && generation < current {
            match &mut self.state {
                // Said on an earlier line as well: the assignment that answered it was lost with that line.
                State::Forming { .. } => return self.assign_again(place, effects),
                // Who trains was assigned: a late one.
                State::Training { .. } => return,
                _ => {}
            }
        }
        if let State::Finding { found, .. } = &mut self.state {
            found.remove(place);
        }
        rank.last = generation;
        rank.holds |= generation > 0;
        rank.unknown = None;
        rank.state = RankState::Ready;
        self.learn(generation);
        if let State::Finding { until, .. } = &mut self.state {
            *until = (*until).max(now + HEARTBEATS);
        }
        if let (true, Some(broken)) = (member && generation == current, broken) {
            self.break_off(now, format!("the ring broke: {broken}"), None, BREAK_OFF, effects);
        }
        self.end_the_old(effects);
    }

    /// Others have trained on without these. What they hold is of another past, maybe: they begin anew.
    pub(super) fn end_the_old(&mut self, effects: &mut Vec<Effect>) {
        let trained = self.trained;
        let old = |rank: &Rank| rank.state == RankState::Ready && rank.last > 0 && rank.last < trained && !rank.killed;
        for (place, rank) in self.ranks.iter_mut().filter(|(_, rank)| old(rank)) {
            rank.killed = true;
            effects.push(Effect::KillRank { place: place.clone(), attempt: rank.attempt });
        }
    }

    pub(super) fn assign_again(&self, place: &Place, effects: &mut Vec<Effect>) {
        let State::Forming { members, .. } = &self.state else { return };
        let Some((rank, _)) = (0..).zip(&members.places).find(|(_, other)| *other == place) else { return };
        let nodes = nodes_of(&members.places);
        effects.push(Effect::Assign { place: place.clone(), generation: self.generation, rank, nodes });
        if let (Some(port), Some(host)) = (members.store, self.host(members)) {
            effects.push(Effect::Rendezvous { place: place.clone(), host, port });
        }
    }

    /// Ladder: first the rank process, then its node.
    pub(super) fn end_the_stuck(&mut self, now: Instant, away: Vec<Place>, effects: &mut Vec<Effect>) {
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
            // Counted when it fell silent.
            self.node_lost(now, node, false, effects);
        }
        if !nodes.is_empty() {
            self.advance(now, effects);
        }
    }
}
