//! What neighbours add to the loss: sums over this rank's rows, and the terms that follow from them once they are added over ranks.

use super::batch::Batch;
use super::params::{Inter, Params, Variant};
use super::positives::{RowLists, unite};
use super::pull::{Pull, attend, by_block, total, towards};
use super::{Context, Found, StepError};
use crate::bank::Bank;
use tch::{Kind, Tensor};

/// The sums of this rank's own anchors, over the rows of all ranks.
pub(super) enum Neighbours {
    None,
    Joint(Joint),
    Apart(Apart),
}

/// Terms, each a mean over anchors that have positives of its kind, and the gradient of their sum for the queries (b, D).
pub(super) struct Terms {
    pub(super) inter: Tensor,
    pub(super) spatial: Tensor,
    pub(super) semantic: Tensor,
    pub(super) dq: Tensor,
}

impl Neighbours {
    /// Sums over this rank's rows, by anchor of all ranks: (B, ·) each.
    pub(super) fn columns(batch: &Batch, found: &Found, cx: &Context<'_>) -> Result<Vec<Tensor>, StepError> {
        match cx.params.inter {
            Inter::None => Ok(Vec::new()),
            Inter::United | Inter::Aggregated => Ok(Joint::columns(batch, found, cx)),
            Inter::Apart => Apart::columns(batch, found, cx),
        }
    }

    /// The same added over ranks, of this rank's own anchors: (b, ·) each, in their order.
    pub(super) fn of(inter: Inter, next: &mut dyn FnMut() -> Tensor) -> Self {
        match inter {
            Inter::None => Self::None,
            Inter::United | Inter::Aggregated => Self::Joint(Joint::of(next)),
            Inter::Apart => Self::Apart(Apart::of(next)),
        }
    }

    /// For queries (b, D).
    pub(super) fn terms(&self, q: &Tensor, cx: &Context<'_>) -> Terms {
        let p = cx.params;
        let zero = || Tensor::zeros([], (p.kind(), q.device()));
        match self {
            Self::None => Terms { inter: zero(), spatial: zero(), semantic: zero(), dq: q.zeros_like() },
            Self::Joint(sums) => {
                let (inter, dq) = match p.variant {
                    Variant::Exact => sums.exact(p.t_spatial),
                    Variant::Released => sums.released(p, cx.banks.len()),
                };
                Terms { inter, spatial: zero(), semantic: zero(), dq }
            }
            Self::Apart(sums) => {
                let (spatial, d_spatial) = sums.spatial.exact(p.t_spatial);
                let (semantic, d_semantic) = sums.semantic(p.t_spatial);
                Terms { inter: zero(), spatial, semantic, dq: d_spatial + d_semantic }
            }
        }
    }
}

/// Pull of positives and of hard negatives, and how many positives there are, (b, 1).
pub(super) struct Joint {
    positives: Pull,
    hard: Pull,
    count: Tensor,
}

impl Joint {
    fn columns(batch: &Batch, found: &Found, cx: &Context<'_>) -> Vec<Tensor> {
        let Found { positives, hard } = found;
        let mut columns = Vec::new();
        for (lists, weight) in
            [(&positives.union, positives.weight.shallow_clone()), (hard, hard.valid.to_kind(Kind::Float))]
        {
            let pull = attend(cx, Bank::Global, &batch.q, &lists.rows, &weight, cx.params.t_spatial);
            columns.extend([pull.sum, pull.rows]);
        }
        columns.push(total(&positives.weight));
        columns
    }

    fn of(next: &mut dyn FnMut() -> Tensor) -> Self {
        let mut pull = || Pull { sum: next(), rows: next() };
        let (positives, hard) = (pull(), pull());
        Self { positives, hard, count: next() }
    }

    /// log(1 + H/P) over anchors that have positives, and its gradient, both already a mean.
    fn exact(&self, t: f64) -> (Tensor, Tensor) {
        let (pos, neg) = (&self.positives, &self.hard);
        let has = self.count.gt(0.0);
        let kind = pos.sum.kind();
        let anchors = has.sum(kind).clamp_min(1.0);
        // An anchor without positives gets finite numbers and counts for nothing.
        let sum = pos.sum.where_self(&has, &pos.sum.ones_like());
        let loss = ((&neg.sum / &sum).log1p() * &has).sum(kind) / &anchors;
        let gradient = ((&pos.rows + &neg.rows) / (&sum + &neg.sum) - &pos.rows / &sum) * &has / anchors / t;
        (loss, gradient)
    }

    /// −log(P/(P + H + ones) + 1e-7): a masked similarity of 0 adds exp(0) = 1 for each of the N − |P| rows that are no positives;
    /// hard negatives carry no gradient.
    fn released(&self, p: &Params, n: i64) -> (Tensor, Tensor) {
        let (pos, b) = (&self.positives, self.count.size()[0] as f64);
        let phantom = (-&self.count + n as f64) * (-1.0 / p.t_spatial).exp();
        let neg = &self.hard.sum + phantom;
        let all = &pos.sum + &neg;
        let share = &pos.sum / &all + 1e-7;
        let loss = share.log().mean(pos.sum.kind()).neg();
        let gradient = neg / (&all * &all) / &share * &pos.rows * (-1.0 / (p.t_spatial * b));
        (loss, gradient)
    }
}

/// Of positives that are compared with the hard negatives each for itself. With r_j = s_j/(s_j + H) a semantic positive adds
/// r_j to the sum, r_j·(1 − r_j)·row to what it is drawn by, and r_j/(s_j + H) times what H is drawn by is taken from that.
pub(super) struct Apart {
    spatial: Joint,
    /// Σ r_j, (b, 1).
    share: Tensor,
    /// Σ r_j·(1 − r_j)·row, (b, D).
    rows: Tensor,
    /// Σ r_j/(s_j + H), (b, 1).
    against: Tensor,
    /// Semantic positives, (b, 1).
    count: Tensor,
}

impl Apart {
    fn columns(batch: &Batch, found: &Found, cx: &Context<'_>) -> Result<Vec<Tensor>, StepError> {
        let (t, kind) = (cx.params.t_spatial, cx.params.kind());
        let Found { positives, hard } = found;
        let counted = |lists: &RowLists| lists.valid.to_kind(Kind::Float);
        let pull = |lists: &RowLists| attend(cx, Bank::Global, &batch.q, &lists.rows, &counted(lists), t);
        let (spatial, negatives) = (pull(&positives.spatial), pull(hard));
        // A share of a positive needs the hard negatives of all ranks.
        let mut all = negatives.sum.copy();
        cx.ring.all_reduce_sum(&mut all)?;
        let (semantic, weight) = unite(&RowLists::none(batch), &positives.semantic, cx);
        let (mut share, mut rows, mut against) = (Vec::new(), Vec::new(), Vec::new());
        by_block(cx, Bank::Global, &batch.q, &semantic.rows, t, |e, found, part| {
            let (hard, weight) = (part(&all), part(&weight).to_kind(kind));
            let both = e + &hard;
            let r = e / &both * weight;
            share.push(total(&r));
            against.push(total(&(&r / &both)));
            rows.push(towards(&(r * hard / both), found));
        });
        let [share, rows, against] = [share, rows, against].map(|parts| Tensor::cat(&parts, 0));
        let (near, semantic) = (total(&counted(&positives.spatial)), total(&weight));
        Ok(vec![spatial.sum, spatial.rows, negatives.sum, negatives.rows, near, share, rows, against, semantic])
    }

    fn of(next: &mut dyn FnMut() -> Tensor) -> Self {
        Self { spatial: Joint::of(next), share: next(), rows: next(), against: next(), count: next() }
    }

    /// −log Σ r_j over anchors that have semantic positives, and its gradient, both already a mean.
    fn semantic(&self, t: f64) -> (Tensor, Tensor) {
        let has = self.count.gt(0.0);
        let kind = self.share.kind();
        let anchors = has.sum(kind).clamp_min(1.0);
        let share = self.share.where_self(&has, &self.share.ones_like());
        let loss = -(share.log() * &has).sum(kind) / &anchors;
        let gradient = (&self.against * &self.spatial.hard.rows - &self.rows) / share * &has / anchors / t;
        (loss, gradient)
    }
}
