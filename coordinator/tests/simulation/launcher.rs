//! Whoever starts nodes: slowly, sometimes in vain. It outlives coordinators, as a cluster does, and knows what it has started.

use std::collections::BTreeMap;

use crate::line::End;
use crate::node::Node;
use crate::world::{MS, NodeId, SECOND, What, World};

#[derive(Default)]
pub(crate) struct Launcher {
    /// What was started and is not known to have ended, by slot and attempt; none where nothing ever comes of it.
    pub(crate) started: BTreeMap<(u32, u32), Option<NodeId>>,
    /// Every name ever used in this run.
    names: BTreeMap<(u32, u32), u64>,
    /// Times that the user has resumed the run: names begin anew.
    pub(crate) resumed: u64,
}

impl World {
    /// False where whoever asks is stale.
    pub(crate) fn launch(&mut self, lease: u64, slot: u32, attempt: u32) -> bool {
        if lease < self.bucket.leases {
            return false;
        }
        let alive: Vec<u32> =
            self.launcher.started.keys().filter(|(other, _)| *other == slot).map(|&(_, attempt)| attempt).collect();
        let resumed = self.launcher.resumed;
        if !alive.is_empty() {
            self.violate(format!("slot {slot} is launched (attempt {attempt}) while attempts {alive:?} fill it"));
        }
        if self.launcher.names.insert((slot, attempt), resumed) == Some(resumed) {
            self.violate(format!("slot {slot} attempt {attempt} is launched a second time"));
        }
        if self.dice.percent(self.scenario.lost_launches) {
            self.checks.trouble(self.now);
            self.launcher.started.insert((slot, attempt), None);
            return true;
        }
        let wait = self.dice.between(100, 6000) * MS;
        if self.dice.percent(self.scenario.failed_launches) {
            self.checks.trouble(self.now);
            self.checks.failures += 1;
            self.launcher.started.insert((slot, attempt), None);
            self.after(wait, What::LaunchEnds { run: resumed, slot, attempt, code: 1 });
            return true;
        }
        let node = self.nodes.len();
        let name = format!("run{resumed}-{slot}-{attempt}");
        self.nodes.push(Node::new(name, slot, attempt));
        self.launcher.started.insert((slot, attempt), Some(node));
        self.after(wait, What::Booted(node));
        true
    }

    /// False where whoever asks is stale.
    pub(crate) fn discard(&mut self, lease: u64, slot: u32, attempt: u32) -> bool {
        if lease < self.bucket.leases {
            return false;
        }
        if let Some(node) = self.launcher.started.remove(&(slot, attempt)) {
            let wait = self.dice.between(1, 300) * MS;
            match node {
                Some(node) => {
                    self.nodes[node].discarded = true;
                    self.after(wait, What::NodeDies { node, code: 137 });
                }
                None => self.after(wait, What::LaunchEnds { run: self.launcher.resumed, slot, attempt, code: 137 }),
            }
        }
        true
    }

    /// What this run ever started, by slot and attempt, and whether it has ended.
    pub(crate) fn inventory(&self) -> Vec<(u32, u32, bool)> {
        let Launcher { names, started, resumed } = &self.launcher;
        let mut newest: BTreeMap<u32, (u32, bool)> = BTreeMap::new();
        for &(slot, attempt) in names.iter().filter(|(_, of)| *of == resumed).map(|(name, _)| name) {
            newest.insert(slot, (attempt, !started.contains_key(&(slot, attempt))));
        }
        newest.into_iter().map(|(slot, (attempt, ended))| (slot, attempt, ended)).collect()
    }

    /// Nothing of an ended run stays.
    pub(crate) fn clear(&mut self) {
        let left: Vec<NodeId> = (0..self.nodes.len()).filter(|&node| self.nodes[node].alive).collect();
        for node in left {
            self.node_dies(node, 137);
        }
        self.launcher.started.clear();
        self.launcher.resumed += 1;
    }

    /// The launcher notices that what it had started is gone.
    pub(crate) fn launch_ends(&mut self, run: u64, slot: u32, attempt: u32, code: i32) {
        if run != self.launcher.resumed {
            return;
        }
        self.launcher.started.remove(&(slot, attempt));
        self.tell_launch_ended(slot, attempt, code);
    }

    pub(crate) fn node_gone(&mut self, node: NodeId, code: i32) {
        let Node { slot, attempt, gone, .. } = self.nodes[node];
        // A cluster takes its time to see that a machine is off.
        let wait = if gone { self.dice.between(5, 40) * SECOND } else { self.dice.between(20, 1500) * MS };
        if self.launcher.started.get(&(slot, attempt)) == Some(&Some(node)) {
            self.after(wait, What::LaunchEnds { run: self.launcher.resumed, slot, attempt, code });
        }
    }

    pub(crate) fn ends_of(&self, node: NodeId) -> Vec<End> {
        let ranks = self.nodes[node].alive_ranks.values().map(|&rank| End::Rank(rank));
        ranks.chain([End::Node(node)]).collect()
    }
}
