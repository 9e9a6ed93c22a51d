//! The intra and inner terms: a query's own bank row against random rows.

use super::params::{Params, Variant};
use crate::bank::Banks;
use tch::{Kind, Tensor};

/// Random negatives of a step, bank rows as i64.
#[derive(Debug)]
pub enum Negatives {
    /// (B·K): anchor i owns the i-th run of K, local query r of the 4B the r-th run of K/4.
    PerAnchor(Tensor),
    /// (K) for all queries of the step; local queries take the first K/4.
    Shared(Tensor),
}

/// Cross-entropy of the anchors' own rows: q (B, D), idx (B), dots (B, N) = q·Gᵀ. Mean over B.
pub(super) fn intra(q: &Tensor, dots: &Tensor, idx: &Tensor, banks: &Banks, neg: &Negatives, p: &Params) -> Tensor {
    let (rows, logits) = match neg {
        Negatives::PerAnchor(rows) => {
            let rows = rows.view([idx.size()[0], -1]);
            let logits = dots.gather(1, &rows, false);
            (rows, logits)
        }
        Negatives::Shared(rows) => (rows.unsqueeze(0), q.matmul(&banks.global.index_select(0, rows).tr())),
    };
    let own = (q * banks.global.index_select(0, idx)).sum_dim_intlist([1_i64].as_slice(), true, Kind::Float);
    cross_entropy(&own, logits, &rows.eq_tensor(&idx.unsqueeze(1)), p)
}

/// The same for local queries ql (4B, D), corner-major, each against its corner's row. Mean over 4B.
pub(super) fn inner(ql: &Tensor, idx: &Tensor, banks: &Banks, neg: &Negatives, p: &Params) -> Tensor {
    let owner = idx.repeat([4]);
    let own = Tensor::cat(&banks.corners.each_ref().map(|bank| bank.index_select(0, idx)), 0);
    let own = (ql * own).sum_dim_intlist([1_i64].as_slice(), true, Kind::Float);
    let (rows, logits) = match neg {
        Negatives::PerAnchor(rows) => {
            let rows = rows.view([owner.size()[0], -1]);
            let logits = banks.corners.each_ref().map(|bank| ql.matmul(&bank.tr()).gather(1, &rows, false));
            (rows, logits)
        }
        Negatives::Shared(rows) => {
            let rows = rows.narrow(0, 0, rows.size()[0] / 4);
            let logits = banks.corners.each_ref().map(|bank| ql.matmul(&bank.index_select(0, &rows).tr()));
            (rows.unsqueeze(0), logits)
        }
    };
    let hit = rows.eq_tensor(&owner.unsqueeze(1)).repeat([1, 4]);
    cross_entropy(&own, Tensor::cat(&logits, 1), &hit, p)
}

fn cross_entropy(own: &Tensor, negatives: Tensor, own_hit: &Tensor, p: &Params) -> Tensor {
    let negatives = match p.variant {
        Variant::Exact => negatives.masked_fill(own_hit, f64::NEG_INFINITY),
        Variant::Released => negatives,
    };
    let logits = Tensor::cat(&[own, &negatives], 1) / p.t_instance;
    (logits.logsumexp([1_i64].as_slice(), false) - logits.select(1, 0)).mean(Kind::Float)
}
