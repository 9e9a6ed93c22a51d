//! A new coordinator finds what an earlier one left: nodes that live, ranks that train or wait.

use super::*;

impl Machine {
    /// Ranks make their lines anew without waiting for their node: what they say is taken up when that has joined.
    pub(super) fn too_early(&mut self, place: Place, event: Event) {
        if let Event::RankReturned { generation, .. } = event {
            self.learn(generation);
        }
        let most = (self.settings.nodes * self.settings.ranks_per_node) as usize;
        if place.1 < self.settings.ranks_per_node && (self.early.len() < most || self.early.contains_key(&place)) {
            let said = self.early.entry(place).or_default();
            if let Event::RankReturned { .. } = event {
                said.clear();
            }
            said.truncate(1);
            said.push(event);
        }
    }

    /// A generation that an earlier coordinator has formed: what its ranks say counts, and the next one comes after it.
    pub(super) fn learn(&mut self, generation: u64) {
        if let State::Finding { .. } | State::Gathering { .. } = self.state {
            self.generation = self.generation.max(generation);
        }
    }

    /// What the launcher has of an earlier coordinator: it is waited for, not started again.
    pub(super) fn launched(&mut self, slot: u32, attempt: u32, effects: &mut Vec<Effect>) {
        let Some(place) = self.slots.get_mut(&slot).filter(|slot| slot.node.is_none()) else { return };
        if place.launched && place.attempt != attempt {
            effects.push(Effect::Discard { slot, attempt: place.attempt.min(attempt) });
        }
        *place = Slot { adopted: true, ..Slot::empty(place.attempt.max(attempt), true) };
    }

    pub(super) fn rank_returned(
        &mut self,
        now: Instant,
        place: Place,
        attempt: u32,
        member: Membership,
        effects: &mut Vec<Effect>,
    ) {
        let Some(rank) = self.ranks.get_mut(&place).filter(|rank| rank.attempt == attempt) else { return };
        rank.returned = rank.returned.max(member.generation);
        if rank.state == RankState::Member && member.generation == self.generation && rank.unknown.is_none() {
            self.say_again(&place, effects);
            return;
        }
        if !matches!(self.state, State::Finding { .. }) && rank.state != RankState::Starting {
            // Of a generation that it has left since: that message was late.
            return;
        }
        rank.holds = true;
        if let State::Finding { found, until, .. } = &mut self.state {
            rank.unknown = None;
            rank.state = RankState::Member;
            self.generation = self.generation.max(member.generation);
            found.insert(place, member);
            *until = (*until).max(now + HEARTBEATS);
            return;
        }
        // Too late to be taken over as a whole: it is waited for.
        rank.unknown = rank.unknown.and(Some(now));
        let reason = "another coordinator came, and this generation is not whole".to_owned();
        effects.push(Effect::Regroup { place, generation: member.generation, reason });
    }

    /// Takes over what was found training once it is whole. Otherwise, when there was time to come, whoever may hold state is called
    /// together.
    pub(super) fn find(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let State::Finding { until, found, members } = &mut self.state else { return };
        let newest = found.values().map(|member| member.generation).max().unwrap_or(0);
        let mut places: Vec<(u32, Place)> = found
            .iter()
            .filter(|(_, member)| member.generation == newest)
            .map(|(place, member)| (member.rank, place.clone()))
            .collect();
        places.sort_unstable();
        let world = found.values().filter(|m| m.generation == newest).map(|m| m.world).max().unwrap_or(0);
        let whole = !places.is_empty() && places.len() as u32 == world && newest >= self.trained;
        if !whole && now < *until {
            return;
        }
        if whole {
            let places: Vec<Place> = places.into_iter().map(|(_, place)| place).collect();
            let said = std::mem::take(members);
            let told = said.parts.iter().flat_map(|(&step, of)| of.iter().map(move |place| (step, place.clone())));
            let told: Vec<(u64, Place)> = told.collect();
            let members = Members { world: places.len(), places, parts: BTreeMap::new(), ..said };
            let store = members.store;
            let generation = newest;
            (self.generation, self.trained) = (newest, newest);
            self.state = State::Training { heard: now, members };
            effects.push(Effect::Found { generation, world });
            if let Some(port) = store {
                self.rendezvous(port, effects);
            }
            for (step, place) in told {
                self.take(now, Event::PartsWritten { generation, place, step }, effects);
            }
            self.send_stop(effects);
            self.launch_missing(effects);
            return;
        }
        let reason = "the coordinator was lost, and ranks with it".to_owned();
        for (place, member) in found.iter() {
            let (place, reason) = (place.clone(), reason.clone());
            effects.push(Effect::Regroup { place, generation: member.generation, reason });
        }
        // Those of whom nothing is known may hold what is needed, too.
        let mut away: Vec<Place> = found.keys().cloned().collect();
        for (place, rank) in self.ranks.iter_mut().filter(|(_, rank)| rank.unknown.is_some()) {
            rank.state = RankState::Member;
            away.push(place.clone());
        }
        let holds = !away.is_empty() || self.ranks.values().any(|rank| rank.holds);
        if holds {
            let members = Members { places: away, ..Members::default() };
            self.begin(now, reason, Some(false), &members);
            self.state = State::Pausing { until: now + BREAK_OFF, hard: true, members };
        } else {
            self.state = State::Gathering { since: now };
        }
        self.launch_missing(effects);
        self.advance(now, effects);
    }
}
