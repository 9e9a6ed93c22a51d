//! One step of the multi-crop objective over a bank dealt to all ranks: intra + w·inter + inner, with gradients for the queries. Other
//! methods of the family leave terms out or find other neighbours ([`Params`], [`Inter`]).
//!
//! ```text
//! gather queries ▸ positives (k-th score merged) ▸ hard negatives (ranks merged) ▸ partial sums ▸ reduce-scatter ▸ losses, gradients
//! ```
//!
//! Every term is a softmax over bank rows. With e = exp((s − 1)/T), s the similarity of unit rows, a rank adds up Σe and Σe·row over
//! the rows it owns; added over ranks these give loss and gradient at once, so no graph is kept over the bank and nothing
//! is normalised twice. The shift by 1/T keeps e in (0, 1]; T is at least 0.02, so that e of unrelated rows does not vanish.
//!
//! On the wire, floats a rank sends with W ranks, B anchors in all, A auxiliary anchors, L spatial neighbours at most
//! (ring algorithms: gather and scatter send (W − 1)/W of the whole, an all-reduce twice that):
//!
//! | what | whole |
//! |---|---|
//! | queries | B·(5D + Db), where there are keys B·D more |
//! | similarity to spatial neighbours (all-reduce) | B·L |
//! | auxiliary anchors (all-reduce) | B·A·D, and B·(1 + A) labels of 8 bytes |
//! | nearest scores | W·(1 + A)·B·c, c = `nearest`/W + 8·√(`nearest`/W) + 16 |
//! | hard negatives, by rank | W·B·min(r, N/W), r one more than the last rank drawn |
//! | hard negatives, by strata | histograms 2·B·8192 (all-reduce), keys of 8 bytes, about B·(H + 6·√(H·256) + 8·256) |
//! | sums (reduce-scatter) | B·(12D + 8) |
//!
//! DenseCL has P local queries of width D instead of the corners', no auxiliary anchors and no hard negatives: queries are B·(3 + P)·D, sums
//! B·(2D + 1 + P·(D + 1)). Local aggregation has no auxiliary anchors and no hard negatives: its nearest rows go over the wire once, its sums are B·(2D + 3).
//! SSLP's sums are B·(5D + 7), after an all-reduce of B.
//!
//! Whether hard negatives go by rank or by strata depends on B and N alone, so every world computes the same.

mod background;
mod batch;
mod hard;
mod highest;
mod inter;
mod params;
mod pool;
mod positives;
mod pull;
mod random;
mod sums;

pub use batch::{Negatives, Queries, gather};
pub use hard::HardKey;
pub use params::{HardBy, Inter, Local, Params, ParamsError, Variant};
pub use pool::{Candidates, Pool};
pub use positives::{Positives, RowLists};

use crate::bank::{BankError, BankRows, Banks, Widths};
use crate::collective::{Collective, CollectiveError};
use batch::Batch;
use std::cell::Cell;
use sums::{Losses, Sums};
use tch::{Kind, Tensor};

/// What a rank brings to a step; tensors on the banks' device. `ids`, `spatial` and the draws are the same on every rank.
#[derive(Debug)]
pub struct StepInputs<'a> {
    /// (b, D) unit rows of this rank's global views, with gradient; b may be 0 at an epoch's end.
    pub q: &'a Tensor,
    /// (b, Db) unit rows of the backbone; no gradient flows into them. Looked at where there are hard negatives, and with
    /// [`Local::Dense`]: there Db = D, and they are the pooled keys.
    pub x: &'a Tensor,
    /// (4b, D) unit rows of the local views, corner-major (tl, tr, bl, br), with gradient; (4b, 0) where a method has none. With
    /// [`Local::Dense`] (P·b, D), position-major.
    pub ql: &'a Tensor,
    /// (P·b, D) unit rows, no gradient, with [`Local::Dense`]: the key of each local query.
    pub dense_keys: Option<&'a Tensor>,
    /// (b, D) unit rows of the anchors' keys, no gradient: where given, they stand for the own rows in the intra term, and the global bank
    /// takes them instead of `q`.
    pub keys: Option<&'a Tensor>,
    /// Bank rows of every rank's anchors, by rank.
    pub ids: &'a [Vec<i64>],
    /// Spatial neighbours of each anchor, in the order of `ids`, from [`crate::neighbours::Lattice::neighbours`]. Looked at where a
    /// method has spatial positives.
    pub spatial: &'a [Vec<i64>],
    /// (held) i64, one number for the labels of all k-means runs, from [`crate::kmeans::joint_labels`].
    pub clusters: &'a Tensor,
    /// Rows that positives and hard negatives are looked for among.
    pub pool: &'a Pool,
    /// (H) i64, ranks below ⌊top fraction · pool⌋, shared by the anchors.
    pub hard_ranks: &'a Tensor,
    /// Random negatives.
    pub negatives: &'a Negatives,
    /// Of the draws within strata of the ranking.
    pub key: HardKey,
    /// Weight of the terms that neighbours make, [`crate::schedule::rampup`].
    pub inter_weight: f64,
}

/// Losses of this rank's anchors, and what they were made of.
#[derive(Debug)]
pub struct StepOutput {
    /// Anchors' own rows against random rows.
    pub intra: Tensor,
    /// Neighbours against hard negatives, or against the rest of the background.
    pub inter: Tensor,
    /// Spatial neighbours against hard negatives, where they are compared apart.
    pub spatial: Tensor,
    /// Semantic positives against hard negatives, there.
    pub semantic: Tensor,
    /// Local views' own rows against random rows; with [`Local::Dense`] local keys against pooled ones.
    pub inner: Tensor,
    /// intra + weight · (inter + spatial + semantic) + inner (intra and inner weighted with [`Local::Dense`]), a scalar whose `backward` fills the gradients of `q` and `ql`.
    pub total: Tensor,
    /// Features of all ranks' anchors, to be blended into the banks, in the order of `ids`.
    pub features: BankRows,
    /// What this rank's rows gave to the anchors of all ranks.
    pub found: Found,
}

/// Rows of this rank that were found for each anchor, in the order of `ids`.
#[derive(Debug)]
pub struct Found {
    /// Positives.
    pub positives: Positives,
    /// Hard negatives; of local aggregation the background's rows that are not close.
    pub hard: RowLists,
}

/// A step that cannot be computed.
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
    /// Banks refused.
    #[error(transparent)]
    Bank(#[from] BankError),
    /// The ring failed.
    #[error(transparent)]
    Ring(#[from] CollectiveError),
}

/// What the parts of a step share.
pub(crate) struct Context<'a> {
    banks: &'a Banks,
    params: &'a Params,
    ring: &'a dyn Collective,
    pool: &'a Pool,
    /// Scores that are no longer needed: the next ranking's are written over them.
    room: Cell<Option<Tensor>>,
}

/// Losses of one step. Every rank calls it together. `banks` is read, not updated.
///
/// # Errors
/// See [`StepError`].
pub fn step(
    inputs: &StepInputs<'_>,
    banks: &Banks,
    p: &Params,
    ring: &dyn Collective,
) -> Result<StepOutput, StepError> {
    check(inputs, banks, p, ring)?;
    let cx = Context { banks, params: p, ring, pool: inputs.pool, room: Cell::new(None) };
    let (batch, found, sums) = tch::no_grad(|| -> Result<_, StepError> {
        let StepInputs { q, x, ql, keys, ids, .. } = *inputs;
        let batch = Batch::gather(&Queries { q, x, ql, keys, ids }, p.local, banks, ring)?;
        let found = match p.inter {
            Inter::United | Inter::Apart => {
                let positives = positives::find(&batch, inputs, &cx)?;
                let hard = hard::find(&batch, &positives, inputs, &cx)?;
                Found { positives, hard }
            }
            Inter::Aggregated => background::find(&batch, inputs, &cx)?,
            Inter::None => Found { positives: Positives::none(&batch), hard: RowLists::none(&batch) },
        };
        let sums = Sums::of(&batch, &found, inputs, &cx)?;
        Ok((batch, found, sums))
    })?;
    let (q, ql) = (inputs.q.detach(), inputs.ql.detach());
    let losses = tch::no_grad(|| sums.losses(&q, &ql, inputs, &cx));
    // The value of the loss, with the gradient that was summed up: constant + (queries − themselves)·gradient.
    let pull = |queries: &Tensor, gradient: &Tensor| ((queries - queries.detach()) * gradient).sum(Kind::Float);
    let total = &losses.total + pull(inputs.q, &losses.dq) + pull(inputs.ql, &losses.dql);
    let found = Found { positives: found.positives.of(&batch, banks), hard: found.hard.of(&batch, banks) };
    let features = batch.features();
    let Losses { intra, inter, spatial, semantic, inner, .. } = losses;
    Ok(StepOutput { intra, inter, spatial, semantic, inner, total, features, found })
}

fn check(inputs: &StepInputs<'_>, banks: &Banks, p: &Params, ring: &dyn Collective) -> Result<(), StepError> {
    let n = banks.len();
    p.check(n)?;
    let anchors: usize = inputs.ids.iter().map(Vec::len).sum();
    let mine = inputs.ids.get(ring.rank()).map_or(0, |ids| ids.len() as i64);
    let Widths { dim: d, backbone: db, local } = banks.widths();
    let shape = |name, expected: Vec<i64>, got: Vec<i64>| {
        if expected == got { Ok(()) } else { Err(StepError::Shape { name, expected, got }) }
    };
    shape("q", vec![mine, d], inputs.q.size())?;
    if p.ranks() || p.dense() {
        shape("x", vec![mine, db], inputs.x.size())?;
    }
    if p.dense() {
        let all = vec![p.local.parts() * mine, d];
        shape("backbone bank", vec![d], vec![db])?;
        shape("ql", all.clone(), inputs.ql.size())?;
        shape("dense_keys", all, inputs.dense_keys.map_or_else(Vec::new, Tensor::size))?;
    } else {
        shape("ql", vec![4 * mine, local], inputs.ql.size())?;
    }
    if let Some(keys) = inputs.keys {
        shape("keys", vec![mine, d], keys.size())?;
    }
    if p.local == Local::Corners {
        shape("corner banks", vec![d], vec![local])?;
    }
    shape("clusters", vec![banks.held()], inputs.clusters.size())?;
    shape("ids", vec![ring.world() as i64], vec![inputs.ids.len() as i64])?;
    shape("spatial", vec![anchors as i64], vec![inputs.spatial.len() as i64])?;
    let drawn = if p.draws() { p.negatives } else { 0 };
    let (rows, count) = match inputs.negatives {
        Negatives::PerAnchor(rows) => (rows, anchors as i64 * drawn),
        Negatives::Shared(rows) => (rows, drawn),
    };
    shape("negatives", vec![count], vec![rows.len() as i64])?;
    let named = inputs.ids.iter().flatten().map(|&row| ("ids", row));
    let near = inputs.spatial.iter().flatten().map(|&row| ("spatial", row));
    let mut all = named.chain(near).chain(rows.iter().map(|&row| ("negatives", row)));
    match all.find(|&(_, row)| row < 0 || row >= n) {
        Some((name, row)) => Err(StepError::Row { name, row, n }),
        None => Ok(()),
    }
}

/// Positives an anchor has on average among this rank's rows, (spatial, spatial ∪ semantic): for logs. Waits for the device.
#[must_use]
pub fn positive_counts(positives: &Positives) -> (f64, f64) {
    let mean = |lists: &RowLists| lists.valid.sum(Kind::Int64).double_value(&[]) / lists.valid.size()[0].max(1) as f64;
    (mean(&positives.spatial), mean(&positives.union))
}
