//! One step of the multi-crop objective: intra + w·inter + inner, with gradients for the queries.

mod instance;
mod params;
mod positives;
mod spatial;

pub use instance::Negatives;
pub use params::{Params, ParamsError, Variant};
pub use positives::{Positives, RowLists};

use crate::bank::Banks;
use tch::{Kind, Tensor};

/// What a lane brings to a step; all on the banks' device.
#[derive(Debug)]
pub struct StepInputs<'a> {
    /// (B, D) unit rows of the global views, with gradient.
    pub q: &'a Tensor,
    /// (B, Db) unit rows of the backbone; no gradient flows into them.
    pub x: &'a Tensor,
    /// (4B, D) unit rows of the local views, corner-major (tl, tr, bl, br), with gradient.
    pub ql: &'a Tensor,
    /// Patch ids of the B anchors.
    pub ids: &'a [i64],
    /// Spatial neighbours of each anchor, from [`crate::neighbours::Lattice::neighbours`].
    pub spatial: &'a [Vec<i64>],
    /// (N) i64 from [`joint_labels`].
    pub clusters: &'a Tensor,
    /// (H) i64, ranks below ⌊top fraction · N⌋, shared by the anchors.
    pub hard_ranks: &'a Tensor,
    /// Random negatives.
    pub negatives: &'a Negatives,
    /// Weight of the inter term, [`crate::schedule::rampup`].
    pub inter_weight: f64,
}

/// Losses of a step, scalars with gradient, and what they were made of.
#[derive(Debug)]
pub struct StepOutput {
    /// Anchors' own rows against random rows.
    pub intra: Tensor,
    /// Positives against hard negatives.
    pub inter: Tensor,
    /// Local views' own rows against random rows.
    pub inner: Tensor,
    /// intra + weight · inter + inner; call `backward` on it.
    pub total: Tensor,
    /// Positives of each anchor.
    pub positives: Positives,
    /// (B, H) i64 bank rows of the hard negatives.
    pub hard: Tensor,
}

/// Inputs that do not fit together.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// Parameters do not fit the bank.
    #[error(transparent)]
    Params(#[from] ParamsError),
    /// A tensor of the wrong shape.
    #[error("step input {name} has shape {got:?}, expected {expected:?}; it must match the anchors and the banks")]
    Shape {
        /// Field.
        name: &'static str,
        /// Shape wanted.
        expected: Vec<i64>,
        /// Shape given.
        got: Vec<i64>,
    },
    /// A bank row outside the bank.
    #[error("step input {name} names bank row {row} of {n}; the patch set and the bank must be of the same run")]
    Row {
        /// Field.
        name: &'static str,
        /// The row.
        row: i64,
        /// Rows of the bank.
        n: i64,
    },
}

/// One label for the labels (M, N) i64 of all k-means runs: (N) i64, equal where every run agrees.
pub fn joint_labels(labels: &Tensor) -> Tensor {
    let mut joint = labels.select(0, 0).copy();
    for run in 1..labels.size()[0] {
        // Renumbering after each run keeps the product below N², whatever the number of runs.
        let label = labels.select(0, run);
        let pair = joint * (label.max() + 1) + label;
        joint = pair.internal_unique2(true, true, false).1;
    }
    joint
}

/// Losses of one step. `banks` is read, not updated. Anchors must be distinct for the mean to be one over patches.
pub fn step(inputs: &StepInputs<'_>, banks: &Banks, p: &Params) -> Result<StepOutput, StepError> {
    check(inputs, banks, p)?;
    let idx = Tensor::from_slice(inputs.ids).to_device(banks.device());
    let dots = inputs.q.matmul(&banks.global.tr());
    let (positives, hard) = tch::no_grad(|| {
        let found = positives::find(&dots.detach(), &idx, &banks.global, inputs.clusters, inputs.spatial, p);
        let hard = spatial::hard(&inputs.x.detach(), &idx, banks, &found, inputs.hard_ranks, p);
        (found, hard)
    });
    let inter = spatial::inter(&dots, &positives, &hard, p);
    let intra = instance::intra(inputs.q, &dots, &idx, banks, inputs.negatives, p);
    let inner = instance::inner(inputs.ql, &idx, banks, inputs.negatives, p);
    let total = &intra + &inter * inputs.inter_weight + &inner;
    Ok(StepOutput { intra, inter, inner, total, positives, hard })
}

fn check(inputs: &StepInputs<'_>, banks: &Banks, p: &Params) -> Result<(), StepError> {
    let (n, b) = (banks.len(), inputs.ids.len() as i64);
    p.check(n)?;
    let (d, db) = (banks.global.size()[1], banks.backbone.size()[1]);
    let (rows, count) = match inputs.negatives {
        Negatives::PerAnchor(rows) => (rows, b * p.negatives),
        Negatives::Shared(rows) => (rows, p.negatives),
    };
    for (name, tensor, expected) in [
        ("q", inputs.q, vec![b, d]),
        ("x", inputs.x, vec![b, db]),
        ("ql", inputs.ql, vec![4 * b, d]),
        ("clusters", inputs.clusters, vec![n]),
        ("hard_ranks", inputs.hard_ranks, vec![p.hard]),
        ("negatives", rows, vec![count]),
    ] {
        if tensor.size() != expected {
            return Err(StepError::Shape { name, expected, got: tensor.size() });
        }
    }
    if inputs.spatial.len() as i64 != b || b == 0 {
        return Err(StepError::Shape {
            name: "spatial",
            expected: vec![b.max(1)],
            got: vec![inputs.spatial.len() as i64],
        });
    }
    let named = inputs.ids.iter().map(|&r| ("ids", r));
    let mut all = named.chain(inputs.spatial.iter().flatten().map(|&r| ("spatial", r)));
    match all.find(|&(_, row)| row < 0 || row >= n) {
        Some((name, row)) => Err(StepError::Row { name, row, n }),
        None => Ok(()),
    }
}

/// Positives an anchor has on average, (spatial, spatial ∪ semantic): for logs. Waits for the device.
#[must_use]
pub fn positive_counts(positives: &Positives) -> (f64, f64) {
    let mean = |lists: &RowLists| lists.valid.sum(Kind::Int64).double_value(&[]) / lists.valid.size()[0].max(1) as f64;
    (mean(&positives.spatial), mean(&positives.union))
}
