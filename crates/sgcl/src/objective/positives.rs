//! Positives of the inter term, as padded lists of bank rows.

use super::params::{Params, Variant};
use tch::{Device, Kind, Tensor};

/// Padded lists: row (B, L) i64 with valid (B, L) bool.
#[derive(Debug)]
pub struct RowLists {
    /// Bank rows; where not valid, any row.
    pub rows: Tensor,
    /// Which entries count.
    pub valid: Tensor,
}

/// Positives of each anchor.
#[derive(Debug)]
pub struct Positives {
    /// Spatial neighbours.
    pub spatial: RowLists,
    /// Semantic positives; a row may stand twice, and may be spatial too.
    pub semantic: RowLists,
    /// Spatial ∪ semantic, every row once.
    pub union: RowLists,
    /// (B, N) bool of the union.
    pub(super) mask: Tensor,
}

/// Lists of unequal length, padded to at least `width`.
pub(super) fn pad(lists: &[Vec<i64>], width: usize, device: Device) -> RowLists {
    let width = lists.iter().map(Vec::len).max().unwrap_or(0).max(width);
    let mut rows = vec![0_i64; lists.len() * width];
    let mut valid = vec![false; rows.len()];
    for (at, list) in lists.iter().enumerate() {
        rows[at * width..][..list.len()].copy_from_slice(list);
        valid[at * width..][..list.len()].fill(true);
    }
    let shape = [lists.len() as i64, width as i64];
    RowLists {
        rows: Tensor::from_slice(&rows).view(shape).to_device(device),
        valid: Tensor::from_slice(&valid).view(shape).to_device(device),
    }
}

/// dots (B, N) detached, idx (B), bank (N, D), clusters: joint labels (N) of all k-means runs.
pub(super) fn find(
    dots: &Tensor,
    idx: &Tensor,
    bank: &Tensor,
    clusters: &Tensor,
    spatial: &[Vec<i64>],
    p: &Params,
) -> Positives {
    let (b, n) = (dots.size()[0], dots.size()[1]);
    let spatial = pad(spatial, p.auxiliary as usize, dots.device());
    let released = p.variant == Variant::Released;
    let fill = if released { 0.0 } else { f64::NEG_INFINITY };
    let own = idx.unsqueeze(1);

    // Auxiliary anchors: the most similar spatial neighbours. Released without any: row 0 stands in.
    let near = dots.gather(1, &spatial.rows, false).masked_fill(&spatial.valid.logical_not(), f64::NEG_INFINITY);
    let (best, place) = near.topk(p.auxiliary, 1, true, true);
    let auxiliary = spatial.rows.gather(1, &place, false);
    let usable = if released { best.ones_like().to_kind(Kind::Bool) } else { best.isfinite() };

    // Nearest rows of an owner that carry its labels in every run; an owner is never its own neighbour.
    let nearest = |scores: Tensor, owner: &Tensor| {
        let rows = scores.scatter_value(1, owner, fill).topk(p.nearest, 1, true, false).1;
        let same = clusters.index_select(0, &rows.view([-1])).view_as(&rows);
        let agree = same.eq_tensor(&clusters.index_select(0, &owner.view([-1])).unsqueeze(1));
        (rows, agree)
    };
    let mut lists = vec![nearest(dots.shallow_clone(), &own)];
    for a in 0..p.auxiliary {
        let owner = auxiliary.narrow(1, a, 1).contiguous();
        let scores = bank.index_select(0, &owner.view([-1])).matmul(&bank.tr());
        let (rows, agree) = nearest(scores, &owner);
        lists.push((rows, agree.logical_and(&usable.narrow(1, a, 1))));
    }
    if !released {
        for (rows, valid) in &mut lists {
            *valid = valid.logical_and(&rows.ne_tensor(&own));
        }
    }

    // A list's rows are distinct (padding aside), so marking list after list leaves each row valid once.
    // One column more than rows takes the marks of invalid entries.
    let marks = Tensor::zeros([b, n + 1], (Kind::Bool, dots.device()));
    let mut union = Vec::with_capacity(lists.len() + 1);
    for (rows, valid) in std::iter::once((&spatial.rows, &spatial.valid)).chain(lists.iter().map(|(r, v)| (r, v))) {
        union.push(valid.logical_and(&marks.gather(1, rows, false).logical_not()));
        let target = rows.masked_fill(&valid.logical_not(), n);
        let _ = marks.shallow_clone().scatter_value_(1, &target, 1);
    }
    let (rows, valid): (Vec<_>, Vec<_>) = lists.into_iter().unzip();
    let semantic = RowLists { rows: Tensor::cat(&rows, 1), valid: Tensor::cat(&valid, 1) };
    let union = RowLists { rows: Tensor::cat(&[&spatial.rows, &semantic.rows], 1), valid: Tensor::cat(&union, 1) };
    Positives { spatial, semantic, union, mask: marks.narrow(1, 0, n) }
}
