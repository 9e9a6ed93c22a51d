//! Nodes: started, joined, cut off and mended, told to leave, lost and replaced.

use super::*;

impl Machine {
    pub(super) fn launch_missing(&mut self, effects: &mut Vec<Effect>) {
        for (&slot, place) in self.slots.iter_mut().filter(|(_, place)| place.node.is_none() && !place.launched) {
            place.launched = true;
            effects.push(Effect::Launch { slot, attempt: place.attempt });
        }
    }

    pub(super) fn node_joined(
        &mut self,
        now: Instant,
        node: String,
        slot: u32,
        address: String,
        running: &[(u32, u32)],
        effects: &mut Vec<Effect>,
    ) {
        if self.nodes.get(&node).is_some_and(|known| known.slot == slot) {
            self.node_mended(now, &node, running, effects);
            return;
        }
        // The next attempt must not have the name of one that lives.
        let attempt: Option<u32> = node.rsplit_once('-').and_then(|(_, attempt)| attempt.parse().ok());
        let known = self.slots.get_mut(&slot).filter(|slot| {
            // One that was given up may still try to come back.
            let given_up = slot.launched && attempt.is_some_and(|attempt| attempt < slot.attempt);
            slot.node.is_none() && !self.nodes.contains_key(&node) && !given_up
        });
        let Some(place) = known else {
            let reason = format!("slot {slot} of this run is filled by another node");
            effects.push(Effect::Leave { node, reason, code: YIELDED });
            return;
        };
        place.node = Some(node.clone());
        place.attempt = place.attempt.max(attempt.unwrap_or(0));
        self.joins += 1;
        let order = self.joins;
        let joined = Node { address, slot, order, leaving: false, home: false, cut: None, ended: false };
        self.nodes.insert(node.clone(), joined);
        for local in 0..self.settings.ranks_per_node {
            let place = (node.clone(), local);
            match running.iter().find(|(number, _)| *number == local) {
                Some(&(_, attempt)) => {
                    self.ranks.insert(place.clone(), Rank { unknown: Some(now), ..Rank::starting(attempt) });
                    for event in self.early.remove(&place).unwrap_or_default() {
                        self.take(now, event, effects);
                    }
                }
                None => self.start_rank(place, 0, effects),
            }
        }
    }

    /// A node's line broke and is made anew: orders and reports may have been lost with it.
    pub(super) fn node_mended(&mut self, now: Instant, name: &str, running: &[(u32, u32)], effects: &mut Vec<Effect>) {
        if let Some(node) = self.nodes.get_mut(name) {
            node.cut = None;
        }
        for local in 0..self.settings.ranks_per_node {
            let place = (name.to_owned(), local);
            let Some(rank) = self.ranks.get(&place) else { continue };
            let attempt = rank.attempt;
            match (running.contains(&(local, attempt)), rank.state) {
                (true, _) if rank.killed => effects.push(Effect::KillRank { place, attempt }),
                (true, _) => {}
                // The order to start it was lost, most likely.
                (false, RankState::Starting) if !self.over() => self.start_rank(place, attempt + 1, effects),
                (false, _) => {
                    let words = "its end was not heard of, since the node's line was broken";
                    self.rank_exited(now, &place, attempt, 1, words, effects);
                }
            }
        }
    }

    /// A node's line broke. It makes it anew at once, unless it is gone.
    pub(super) fn line_broke(&mut self, now: Instant, name: &str, effects: &mut Vec<Effect>) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        node.cut = node.cut.or(Some(now));
        if node.ended || node.home || self.over() {
            self.node_lost(now, name, true, effects);
        }
    }

    /// Gives up nodes that do not come back.
    pub(super) fn mend(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let gone = |node: &Node| node.cut.is_some_and(|since| now.duration_since(since) >= MEND);
        let gone: Vec<String> =
            self.nodes.iter().filter(|(_, node)| gone(node)).map(|(name, _)| name.clone()).collect();
        for name in gone {
            self.node_lost(now, &name, true, effects);
        }
        if now >= self.adopt_until {
            let adopted = |slot: &Slot| slot.adopted && slot.node.is_none();
            let missing: Vec<u32> =
                self.slots.iter().filter(|(_, slot)| adopted(slot)).map(|(&number, _)| number).collect();
            for slot in missing {
                self.relaunch(slot, effects);
            }
        }
    }

    pub(super) fn node_lost(&mut self, now: Instant, name: &str, failure: bool, effects: &mut Vec<Effect>) {
        let Some(node) = self.nodes.remove(name) else { return };
        let member = self.members().is_some_and(|members| {
            members.places.iter().any(|place| place.0 == name && !members.finished.contains(place))
        });
        self.ranks.retain(|place, _| place.0 != name);
        if let State::Finding { found, .. } = &mut self.state {
            found.retain(|place, _| place.0 != name);
        }
        if self.over() {
            return;
        }
        let reason = if node.leaving { format!("node {name} was preempted") } else { format!("node {name} was lost") };
        self.lost(now, reason, failure && !node.leaving, member, effects);
        self.relaunch(node.slot, effects);
    }

    /// Fills a slot anew, and makes sure that whatever filled it before is gone.
    pub(super) fn relaunch(&mut self, slot: u32, effects: &mut Vec<Effect>) {
        if self.over() {
            return;
        }
        if let Some(place) = self.slots.get_mut(&slot) {
            effects.push(Effect::Discard { slot, attempt: place.attempt });
            *place = Slot::empty(place.attempt + 1, true);
            effects.push(Effect::Launch { slot, attempt: place.attempt });
        }
    }

    pub(super) fn launch_ended(&mut self, now: Instant, slot: u32, attempt: u32, code: i32, effects: &mut Vec<Effect>) {
        let Some(place) = self.slots.get(&slot).filter(|slot| slot.attempt == attempt) else { return };
        match place.node.clone() {
            // Its stream's end tells the rest, which may have come before.
            Some(name) => {
                let Some(node) = self.nodes.get_mut(&name) else { return };
                node.ended = true;
                node.leaving |= code == YIELDED;
                if node.cut.is_some() {
                    self.node_lost(now, &name, true, effects);
                }
            }
            // It ended before this coordinator came.
            None if matches!(self.state, State::Finding { .. }) => {
                if let Some(place) = self.slots.get_mut(&slot) {
                    effects.push(Effect::Discard { slot, attempt });
                    *place = Slot::empty(attempt + 1, false);
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

    pub(super) fn preempting(&mut self, now: Instant, name: &str, effects: &mut Vec<Effect>) {
        let holds = self.ranks.iter().any(|(place, rank)| place.0 == name && (rank.holds || rank.unknown.is_some()));
        let Some(node) = self.nodes.get_mut(name) else { return };
        node.leaving = true;
        node.home |= !holds;
        if node.home {
            effects.push(go_home(name));
            return;
        }
        // What it holds is handed over first: after the step where it trains, otherwise in the next generation.
        if let State::Training { members, .. } = &self.state
            && members.places.iter().any(|place| place.0 == name)
        {
            // Only members hold anything.
            let stays = |place: &&Place| self.nodes.get(&place.0).is_some_and(|node| !node.leaving);
            let remaining: BTreeSet<&String> = members.places.iter().filter(stays).map(|(node, _)| node).collect();
            let commit = (remaining.len() as u32) < self.settings.min_nodes;
            self.pause(now, format!("node {name} was told to leave"), commit, effects);
        }
    }

    /// Lets go of the nodes whose shards were handed over.
    pub(super) fn send_home(&mut self, handed_over: &BTreeSet<String>, effects: &mut Vec<Effect>) {
        for name in handed_over {
            if let Some(node) = self.nodes.get_mut(name) {
                node.home = true;
                effects.push(go_home(name));
            }
        }
    }
}

fn go_home(node: &str) -> Effect {
    Effect::Leave { node: node.to_owned(), reason: "this node was told to leave".into(), code: YIELDED }
}
