//! What is done to both systems, and when.

use std::time::Duration;

use rand::Rng as _;
use sgcl_draw::{Purpose, rng};

/// Nodes of every run.
pub const NODES: u32 = 2;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// SIGTERM to a node's supervisor or agent; a replacement is started when it has left.
    Notice,
    /// SIGKILL of one rank.
    Rank,
    /// SIGKILL of a node: supervisor or agent, and its ranks. A replacement is started at once.
    Node,
    /// The same, but the replacement comes late.
    Away,
    /// SIGKILL of every rank: no copy of the state is left.
    All,
    /// SIGSTOP of one rank.
    Hang,
    /// SIGSTOP of a node: as when its network is gone.
    Silent,
}

impl Kind {
    pub const ALL: [Self; 7] = [Self::Notice, Self::Rank, Self::Node, Self::All, Self::Away, Self::Hang, Self::Silent];

    pub fn name(self) -> &'static str {
        match self {
            Self::Notice => "notice",
            Self::Rank => "rank",
            Self::Node => "node",
            Self::Away => "away",
            Self::All => "all",
            Self::Hang => "hang",
            Self::Silent => "silent",
        }
    }

    /// Whether no copy of the state is left.
    pub fn takes_all(self) -> bool {
        self == Self::All
    }
}

impl std::str::FromStr for Kind {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.name() == s).ok_or_else(|| format!("no fault {s:?}"))
    }
}

/// Four notices, four losses without, two that take every copy, a hang, a node that falls silent.
pub const MIXED: [Kind; 12] = [
    Kind::Notice,
    Kind::Rank,
    Kind::All,
    Kind::Node,
    Kind::Notice,
    Kind::Hang,
    Kind::Notice,
    Kind::Away,
    Kind::All,
    Kind::Rank,
    Kind::Notice,
    Kind::Silent,
];

/// One of them at its moment.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub kind: Kind,
    /// Applied once this step is finished.
    pub step: u64,
    /// And this much later: somewhere within a step.
    pub after: Duration,
    /// Picks the victim.
    pub draw: usize,
}

/// Spread evenly over the run.
pub fn schedule(kinds: &[Kind], steps: u64, seed: u64) -> Vec<Fault> {
    let mut draw = rng(seed, Purpose::Phantom, 5, 5);
    let count = kinds.len() as u64;
    (1..)
        .zip(kinds)
        .map(|(at, &kind)| Fault {
            kind,
            step: at * steps / (count + 1),
            after: Duration::from_millis(draw.random_range(0..300)),
            draw: draw.random_range(0..1000),
        })
        .collect()
}

/// What one fault did.
#[derive(Clone, Debug, Default)]
pub struct Effects {
    /// Last step finished before it.
    pub step: u64,
    /// Steps that were trained again.
    pub lost: u64,
    /// Seconds from the fault to the end of the next step that a new membership made; none: not in the time given.
    pub stepping: Option<f64>,
    /// Seconds from the fault to the end of the first step with every rank.
    pub full: Option<f64>,
    /// Seconds from the newcomers' being ready to the same.
    pub join: Option<f64>,
    /// Seconds in which no step ended.
    pub still: Option<f64>,
    /// Steps finished while the node was away.
    pub while_away: Option<u64>,
    /// Seconds of each phase between the fault and stepping, by name.
    pub phases: Vec<(&'static str, f64)>,
    /// The same between newcomers' being ready and full size.
    pub join_phases: Vec<(&'static str, f64)>,
    /// Anything else worth a line.
    pub note: String,
}
