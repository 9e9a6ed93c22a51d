//! What is simulated under a seed: the size of the run, its settings, its faults and when they strike.

use std::time::Duration;

use sgcl_coordinator::machine::Settings;

use crate::dice::Dice;
use crate::world::{MS, SECOND, Time};

/// A run and what befalls it.
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) settings: Settings,
    pub(crate) epochs: u32,
    /// Patches of an epoch.
    pub(crate) patches: u64,
    pub(crate) step: Time,
    /// Steps between two checkpoints.
    pub(crate) every: u64,
    pub(crate) replicas: bool,
    pub(crate) faults: Vec<(Time, Fault)>,
    /// Launches, in a hundred, that end before they join.
    pub(crate) failed_launches: u64,
    /// Launches, in a hundred, that never join and never end.
    pub(crate) lost_launches: u64,
}

/// What goes wrong, or is asked for. Whom it strikes is drawn when it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    KillRank,
    /// kill -9: its ranks go with it.
    KillSupervisor,
    /// Power off: nobody is told.
    LoseNode,
    /// SIGSTOP, and SIGCONT after a while where there is one.
    HangRank(Option<Time>),
    HangNode(Option<Time>),
    /// SIGTERM to a node.
    Drain,
    /// Between a node and whoever coordinates: both ways, up or down.
    Cut {
        up: bool,
        down: bool,
        lasts: Time,
    },
    /// A node's connections are reset.
    Blink,
    /// kill -9; another comes after a while.
    KillCoordinator(Time),
    /// SIGSTOP, SIGCONT.
    PauseCoordinator(Time),
    /// It is paused, another comes, it wakes up.
    ReplaceCoordinator {
        comes: Time,
        wakes: Time,
    },
    /// Its clock goes ahead.
    Jump(Time),
    StorageOut(Time),
    /// The user stops the run, and resumes it later.
    Stop,
}

impl Scenario {
    pub(crate) fn draw(seed: u64) -> Self {
        let mut dice = Dice::new(seed ^ 0x5ce7_a210);
        let nodes = if dice.between(0, 299) == 0 { dice.between(100, 250) } else { dice.between(1, 8) };
        let ranks = if nodes > 8 { 1 } else { dice.between(1, 4) };
        let faults = match dice.between(0, 9) {
            0 => 0,
            1..=7 => dice.between(1, 10),
            _ => dice.between(10, 40),
        };
        Self::of(nodes, ranks, faults, &mut dice)
    }

    pub(crate) fn of(nodes: u64, ranks: u64, faults: u64, dice: &mut Dice) -> Self {
        let world = nodes * ranks;
        let steps = if nodes > 8 { 6 } else { dice.between(5, 40) };
        let epochs = dice.between(1, 3) as u32;
        let step = dice.between(60, 500) * MS;
        let length = 5 * SECOND + u64::from(epochs) * steps * step;
        let faults: Vec<(Time, Fault)> =
            (0..faults).map(|_| (dice.between(0, length * 5 / 4), Fault::draw(dice))).collect();
        let trouble = dice.percent(20);
        let settings = Settings {
            nodes: nodes as u32,
            min_nodes: dice.between(1, nodes) as u32,
            ranks_per_node: ranks as u32,
            // Just enough, or plenty: one failure counted too many shows in the first case.
            max_restarts: if dice.percent(50) && !trouble {
                faults.iter().filter(|(_, f)| f.counts()).count() as u32
            } else {
                1000
            },
            startup_timeout: Duration::from_secs(dice.between(30, 90)),
            step_timeout: Duration::from_secs(dice.between(20, 40)),
        };
        Self {
            settings,
            epochs,
            patches: world * steps - dice.between(0, world - 1),
            step,
            every: dice.between(2, 10),
            replicas: dice.percent(85),
            faults,
            failed_launches: if trouble { 10 } else { 0 },
            lost_launches: if trouble { dice.between(0, 3) } else { 0 },
        }
    }
}

impl Fault {
    fn draw(dice: &mut Dice) -> Self {
        let seconds = |dice: &mut Dice, low: u64, high: u64| dice.between(low * 1000, high * 1000) * MS;
        match dice.between(0, 19) {
            0..=2 => Self::KillRank,
            3 => Self::KillSupervisor,
            4 => Self::LoseNode,
            5 | 6 => Self::HangRank(dice.percent(50).then(|| seconds(dice, 1, 60))),
            7 => Self::HangNode(dice.percent(50).then(|| seconds(dice, 1, 60))),
            8..=10 => Self::Drain,
            11 | 12 => {
                let (up, down) = match dice.between(0, 3) {
                    0 => (true, false),
                    1 => (false, true),
                    _ => (true, true),
                };
                Self::Cut { up, down, lasts: seconds(dice, 0, 20) }
            }
            13 => Self::Blink,
            14 | 15 => Self::KillCoordinator(seconds(dice, 0, 20)),
            16 => Self::PauseCoordinator(seconds(dice, 0, 12)),
            17 => {
                let comes = seconds(dice, 0, 15);
                Self::ReplaceCoordinator { comes, wakes: comes + seconds(dice, 0, 15) }
            }
            18 if dice.percent(50) => Self::Jump(seconds(dice, 1, 120)),
            18 => Self::StorageOut(seconds(dice, 1, 8)),
            _ if dice.percent(70) => Self::Drain,
            _ => Self::Stop,
        }
    }

    /// Whether it is a failure, which the run's budget is for.
    pub(crate) fn counts(self) -> bool {
        match self {
            Self::KillRank | Self::KillSupervisor | Self::LoseNode | Self::HangRank(_) | Self::HangNode(_) => true,
            Self::Cut { .. } => true,
            // Before the replaced one knows, it may break a ring for what it cannot see.
            Self::ReplaceCoordinator { .. } => true,
            // Nothing of the run itself failed.
            Self::Drain | Self::Blink | Self::Stop | Self::Jump(_) | Self::StorageOut(_) => false,
            Self::KillCoordinator(_) | Self::PauseCoordinator(_) => false,
        }
    }
}
