//! Faults strike, and pass.

use sgcl_coordinator::machine::Event;

use crate::line::End;
use crate::scenario::Fault;
use crate::world::{Ending, NodeId, RankId, SECOND, Time, What, World};

impl World {
    pub(crate) fn strike(&mut self, fault: Fault) {
        let ranks: Vec<RankId> = (0..self.ranks.len()).filter(|&rank| self.ranks[rank].alive).collect();
        let nodes: Vec<NodeId> =
            (0..self.nodes.len()).filter(|&node| self.nodes[node].alive && self.nodes[node].line.is_some()).collect();
        let (rank, node) = (self.dice.pick(&ranks), self.dice.pick(&nodes));
        let coordinator = self.address.filter(|&id| self.coordinators[id].alive && !self.coordinators[id].paused);
        let struck = match fault {
            Fault::KillRank | Fault::HangRank(_) => rank.map(|rank| format!("{:?}", self.ranks[rank].place)),
            Fault::KillSupervisor
            | Fault::LoseNode
            | Fault::HangNode(_)
            | Fault::Drain
            | Fault::Cut { .. }
            | Fault::Blink => node.map(|node| self.nodes[node].name.clone()),
            Fault::StorageOut(_) => Some(String::new()),
            _ => coordinator.map(|id| format!("coordinator {id}")),
        };
        let Some(struck) = struck else { return };
        self.note(&format!("FAULT {fault:?} {struck}"));
        self.checks.trouble(self.now);
        if fault.counts() {
            self.checks.failures += 1;
        }
        match (fault, rank, node, coordinator) {
            (Fault::KillRank, Some(rank), ..) => self.kill_rank(rank, 137),
            (Fault::HangRank(lasts), Some(rank), ..) => self.hang(&[End::Rank(rank)], lasts),
            (Fault::KillSupervisor, _, Some(node), _) => self.node_dies(node, 137),
            (Fault::LoseNode, _, Some(node), _) => {
                let ends = self.ends_of(node);
                self.nodes[node].gone = true;
                self.fall_silent(&ends, true, false);
                self.node_dies(node, 137);
            }
            (Fault::HangNode(lasts), _, Some(node), _) => {
                let ends = self.ends_of(node);
                self.hang(&ends, lasts);
            }
            (Fault::Drain, _, Some(node), _) => self.terminate(node),
            (Fault::Cut { up, down, lasts }, _, Some(node), _) => {
                let now = self.now;
                let cut = &mut self.nodes[node];
                (cut.cut_up, cut.cut_down, cut.cut_since) = (cut.cut_up | up, cut.cut_down | down, now);
                cut.cuts += 1;
                cut.cut_until = cut.cut_until.max(now + lasts);
                let number = cut.cuts;
                let ends = self.ends_of(node);
                self.fall_silent(&ends, true, true);
                self.ends_after(lasts, Ending::Cut { node, number });
            }
            (Fault::Blink, _, Some(node), _) => {
                let ends = self.ends_of(node);
                for line in 0..self.lines.len() {
                    if ends.contains(&self.lines[line].end) {
                        self.reset(line);
                    }
                }
            }
            (Fault::KillCoordinator(wait), _, _, Some(id)) => {
                self.end_coordinator(id, "killed");
                self.calm_after(wait);
                self.after(wait, What::CoordinatorStarts);
            }
            (Fault::PauseCoordinator(lasts), _, _, Some(id)) => self.pause_coordinator(id, lasts),
            (Fault::ReplaceCoordinator { comes, wakes }, _, _, Some(id)) => {
                self.pause_coordinator(id, wakes);
                self.after(comes, What::CoordinatorStarts);
            }
            (Fault::Jump(ahead), _, _, Some(id)) => self.coordinators[id].jump += ahead,
            (Fault::StorageOut(lasts), ..) => {
                self.bucket.out_until = self.bucket.out_until.max(self.now + lasts);
                self.calm_after(lasts);
            }
            (Fault::Stop, _, _, Some(id)) => {
                self.checks.stopped = true;
                self.handle(id, Event::StopRequested);
            }
            _ => {}
        }
    }

    fn calm_after(&mut self, wait: Time) {
        self.calm_from = self.calm_from.max(self.now + wait);
    }

    fn ends_after(&mut self, wait: Time, ending: Ending) {
        self.calm_after(wait);
        self.after(wait, What::FaultEnds(ending));
    }

    fn hang(&mut self, ends: &[End], lasts: Option<Time>) {
        let now = Some(self.now);
        for &end in ends {
            match end {
                End::Node(node) => self.nodes[node].hung = self.nodes[node].hung.or(now),
                End::Rank(rank) => self.ranks[rank].hung = self.ranks[rank].hung.or(now),
            }
            if let Some(lasts) = lasts {
                self.ends_after(lasts, Ending::Wakes(end));
            }
        }
        self.fall_silent(ends, true, false);
    }

    fn pause_coordinator(&mut self, id: usize, lasts: Time) {
        self.coordinators[id].paused = true;
        self.checks.nobody_coordinates();
        self.coordinators[id].paused_since = self.now;
        let ends: Vec<End> =
            self.lines.iter().filter(|line| line.coordinator == id && line.client).map(|line| line.end).collect();
        self.fall_silent(&ends, false, true);
        self.ends_after(lasts, Ending::CoordinatorWakes(id));
    }

    pub(crate) fn pass(&mut self, ending: Ending) {
        self.note(&format!("{ending:?}"));
        match ending {
            Ending::Cut { node, number } if self.nodes[node].cuts == number => {
                self.nodes[node].cut_up = false;
                self.nodes[node].cut_down = false;
                self.unstick(node);
            }
            Ending::Cut { .. } => {}
            Ending::Wakes(end) => {
                let backlog = match end {
                    End::Node(node) => {
                        self.nodes[node].hung = None;
                        self.catch_up(node);
                        std::mem::take(&mut self.nodes[node].backlog)
                    }
                    End::Rank(rank) => {
                        self.ranks[rank].hung = None;
                        self.ranks[rank].woke = Some(self.now);
                        std::mem::take(&mut self.ranks[rank].backlog)
                    }
                };
                backlog.into_iter().for_each(|what| self.at(self.now, what));
            }
            Ending::CoordinatorWakes(id) => {
                self.coordinators[id].paused = false;
                let backlog = std::mem::take(&mut self.coordinators[id].backlog);
                // Lines are read side by side, each in its order.
                let mut turns = std::collections::BTreeMap::new();
                for what in backlog {
                    let wait = match &what {
                        What::Heard(line, _) => *turns.entry(*line).or_insert_with(|| self.dice.between(0, 20_000)) + 1,
                        _ => self.dice.between(0, 20_000),
                    };
                    self.after(wait, what);
                }
            }
        }
    }
}

/// Nothing that passes by itself takes longer.
pub(crate) const AFTERMATH: Time = 90 * SECOND;
