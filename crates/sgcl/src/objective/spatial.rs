//! The inter term: positives against hard negatives.

use super::params::{Params, Variant};
use super::positives::Positives;
use crate::bank::Banks;
use tch::{Kind, Tensor};

/// Bank rows (B, H) of the hard negatives: x (B, Db), idx (B), ranks (H) below ⌊top fraction · N⌋.
pub(super) fn hard(
    x: &Tensor,
    idx: &Tensor,
    banks: &Banks,
    positives: &Positives,
    ranks: &Tensor,
    p: &Params,
) -> Tensor {
    let ranking = x.matmul(&banks.backbone.tr());
    let taken = positives.mask.scatter_value(1, &idx.unsqueeze(1), 1);
    let fill = if p.variant == Variant::Released { 0.0 } else { f64::NEG_INFINITY };
    let top = p.top(banks.len());
    ranking.masked_fill(&taken, fill).topk(top, 1, true, true).1.index_select(1, ranks)
}

/// dots (B, N) with gradient, hard (B, H). Scalar.
pub(super) fn inter(dots: &Tensor, positives: &Positives, hard: &Tensor, p: &Params) -> Tensor {
    let valid = &positives.union.valid;
    let s = dots.gather(1, &positives.union.rows, false) / p.t_spatial;
    let h = dots.gather(1, hard, false) / p.t_spatial;
    match p.variant {
        Variant::Exact => {
            // An anchor without positives gets finite logits and weight 0: no NaN in its gradient.
            let has = valid.any_dim(1, true);
            let ignored = valid.logical_not().logical_and(&has);
            let pos = s.masked_fill(&ignored, f64::NEG_INFINITY).logsumexp([1_i64].as_slice(), false);
            let loss = (h.logsumexp([1_i64].as_slice(), false) - pos).softplus();
            let weight = has.squeeze_dim(1).to_kind(Kind::Float);
            (loss * &weight).sum(Kind::Float) / weight.sum(Kind::Float).clamp_min(1.0)
        }
        Variant::Released => {
            // Masked similarities of 0 add exp(0) = 1 each; hard negatives carry no gradient.
            let valid = valid.to_kind(Kind::Float);
            let sum = |t: Tensor| t.sum_dim_intlist([1_i64].as_slice(), false, Kind::Float);
            let phantom = sum(valid.shallow_clone()).neg() + dots.size()[1] as f64;
            let pos = sum(s.exp() * valid);
            let neg = sum(h.detach().exp()) + phantom;
            let share = &pos / (&pos + neg) + 1e-7;
            share.log().mean(Kind::Float).neg()
        }
    }
}
