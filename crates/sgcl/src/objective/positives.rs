//! Positives of the inter term, as padded lists of this rank's rows.

use super::batch::Batch;
use super::params::Variant;
use super::{Context, StepError, StepInputs, highest};
use crate::bank::{Bank, Banks};
use tch::{Kind, Tensor};

/// Padded lists: rows (B, L) i64 with valid (B, L) bool.
#[derive(Debug)]
pub struct RowLists {
    /// Slots while a step is computed, bank rows in its results; where not valid, any.
    pub rows: Tensor,
    /// Which entries count.
    pub valid: Tensor,
}

impl RowLists {
    pub(super) fn none(batch: &Batch) -> Self {
        let empty = |kind| Tensor::zeros([batch.len(), 0], (kind, batch.q.device()));
        Self { rows: empty(Kind::Int64), valid: empty(Kind::Bool) }
    }

    /// Lists of real anchors, slots as bank rows.
    pub(super) fn of(&self, batch: &Batch, banks: &Banks) -> Self {
        let rows = if banks.held() == 0 { self.rows.shallow_clone() } else { banks.slot_rows().take(&self.rows) };
        Self { rows: batch.real_rows(&rows), valid: batch.real_rows(&self.valid) }
    }
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
    /// (B, L) f32: bank rows that an entry of the union stands for.
    pub weight: Tensor,
}

impl Positives {
    pub(super) fn none(batch: &Batch) -> Self {
        let none = || RowLists::none(batch);
        let weight = Tensor::zeros([batch.len(), 0], (Kind::Float, batch.q.device()));
        Self { spatial: none(), semantic: none(), union: none(), weight }
    }

    pub(super) fn of(&self, batch: &Batch, banks: &Banks) -> Self {
        Self {
            spatial: self.spatial.of(batch, banks),
            semantic: self.semantic.of(batch, banks),
            union: self.union.of(batch, banks),
            weight: batch.real_rows(&self.weight),
        }
    }
}

pub(super) fn find(batch: &Batch, inputs: &StepInputs<'_>, cx: &Context<'_>) -> Result<Positives, StepError> {
    let p = cx.params;
    let released = p.variant == Variant::Released;
    let fill = if released { 0.0 } else { f64::NEG_INFINITY };
    let (rows, listed) = batch.spread(inputs.spatial, p.auxiliary as usize);
    let (slots, owned) = cx.owned(&rows);
    let spatial = RowLists { rows: slots, valid: owned.logical_and(&listed) };

    // Auxiliary anchors: the most similar spatial neighbours. Each similarity is known to one rank. Released without any
    // neighbour: row 0 stands in.
    let mut near = (cx.banks.at(Bank::Global, &spatial.rows) * batch.q.unsqueeze(1)).sum_dim_intlist(
        [2_i64].as_slice(),
        false,
        Kind::Float,
    ) * &spatial.valid;
    cx.ring.all_reduce_sum(&mut near)?;
    let (best, place) = near.masked_fill(&listed.logical_not(), f64::NEG_INFINITY).topk(p.auxiliary, 1, true, true);
    let usable = if released { best.ones_like().to_kind(Kind::Bool) } else { best.isfinite() };
    let auxiliary = rows.gather(1, &place, false);

    // What owners know of anchors and auxiliary anchors.
    let owners = Tensor::cat(&[batch.ids.unsqueeze(1), auxiliary], 1);
    let (slots, owned) = cx.owned(&owners);
    let labels = labels_of(&slots, &owned, inputs, cx)?;
    let auxiliaries = |t: &Tensor| t.narrow(1, 1, p.auxiliary).contiguous();
    let mut features = cx.banks.at(Bank::Global, &auxiliaries(&slots)) * auxiliaries(&owned).unsqueeze(2);
    if p.auxiliary > 0 {
        cx.ring.all_reduce_sum(&mut features)?;
    }

    // Nearest rows of an owner that carry its labels in every run; an owner is never its own neighbour.
    let mut lists = Vec::new();
    for at in 0..=p.auxiliary {
        let query = if at == 0 { batch.q.shallow_clone() } else { features.select(1, at - 1) };
        let mut scores = cx.pool.scores(Bank::Global, &query, cx);
        let own = (slots.narrow(1, at, 1).contiguous(), owned.narrow(1, at, 1).contiguous());
        cx.blank(&mut scores, &own.0, &own.1, fill);
        let (near, mut valid) = nearest(&scores, cx.pool.share(p.nearest), cx)?;
        cx.room.set(Some(scores));
        let rows = cx.pool.slots(&near);
        valid = valid.logical_and(&inputs.clusters.take(&rows).eq_tensor(&labels.narrow(1, at, 1)));
        if at > 0 {
            valid = valid.logical_and(&usable.narrow(1, at - 1, 1));
        }
        if !released {
            let anchor = (slots.narrow(1, 0, 1), owned.narrow(1, 0, 1));
            valid = valid.logical_and(&rows.eq_tensor(&anchor.0).logical_and(&anchor.1).logical_not());
        }
        lists.push((rows, valid));
    }
    let (rows, valid): (Vec<_>, Vec<_>) = lists.into_iter().unzip();
    let semantic = RowLists { rows: Tensor::cat(&rows, 1), valid: Tensor::cat(&valid, 1) };
    let (union, weight) = unite(&spatial, &semantic, cx);
    Ok(Positives { spatial, semantic, union, weight })
}

/// Labels of rows in `slots` where they are `owned` here, from those who own the others: of equal shape.
pub(super) fn labels_of(
    slots: &Tensor,
    owned: &Tensor,
    inputs: &StepInputs<'_>,
    cx: &Context<'_>,
) -> Result<Tensor, StepError> {
    let mut labels = inputs.clusters.take(slots) * owned;
    cx.ring.all_reduce_sum(&mut labels)?;
    Ok(labels)
}

/// Every row once, with the rows it stands for: a spatial neighbour for itself, a row of a sample for N/M.
pub(super) fn unite(spatial: &RowLists, semantic: &RowLists, cx: &Context<'_>) -> (RowLists, Tensor) {
    let rows = Tensor::cat(&[&spatial.rows, &semantic.rows], 1);
    let valid = Tensor::cat(&[&spatial.valid, &semantic.valid], 1);
    // Sorted, a row's entries are neighbours, the spatial one first; what does not count goes to the end.
    let (sorted, order) = rows.masked_fill(&valid.logical_not(), cx.banks.held()).sort_stable(true, 1, false);
    let width = sorted.size()[1];
    let first = Tensor::ones([sorted.size()[0], 1.min(width)], (Kind::Bool, sorted.device()));
    let rest = (width - 1).max(0);
    let fresh = sorted.narrow(1, width - rest, rest).ne_tensor(&sorted.narrow(1, 0, rest));
    let counts = sorted.lt(cx.banks.held());
    let valid = Tensor::cat(&[first, fresh], 1).logical_and(&counts);
    let near = order.lt(spatial.rows.size()[1]);
    let weight = (near.to_kind(Kind::Float) * (1.0 - cx.pool.weight()) + cx.pool.weight()) * &valid;
    // Few of the nearest share a label: waiting for the longest list saves gathering the rest of all.
    let longest = counts.sum_dim_intlist([1_i64].as_slice(), false, Kind::Int64).max().int64_value(&[]);
    let cut = |t: &Tensor| t.narrow(1, 0, longest).contiguous();
    (RowLists { rows: cut(&(sorted * &counts)), valid: cut(&valid) }, cut(&weight))
}

/// This rank's candidates among the `k` of all ranks that score highest: (B, c) places and which count. Every rank sends its best
/// scores; the k-th of all is the threshold.
pub(super) fn nearest(scores: &Tensor, k: i64, cx: &Context<'_>) -> Result<(Tensor, Tensor), StepError> {
    let (world, here) = (cx.ring.world() as i64, scores.size()[1]);
    if world == 1 {
        let places = highest::places(scores, k);
        let valid = places.ones_like().to_kind(Kind::Bool);
        return Ok((places, valid));
    }
    // Rows are dealt evenly, so a rank's part of the k nearest is about k/world. Where one had more, all send k.
    let even = k as f64 / world as f64;
    let expected = (even + 8.0 * even.sqrt() + 16.0).ceil() as i64;
    let most = cx.pool.most();
    for width in [expected.min(k).min(most), k.min(most)] {
        let (values, places) = best(scores, width);
        let all = cx.ring.all_gather(&values.unsqueeze(0))?;
        let merged = all.transpose(0, 1).reshape([scores.size()[0], -1]);
        let threshold = highest::sorted(&merged, k.min(merged.size()[1])).0.select(1, -1).unsqueeze(1);
        let cut_short = || {
            let last = all.select(2, width - 1);
            bool::try_from(last.ge_tensor(&threshold.squeeze_dim(1)).logical_and(&last.isfinite()).any())
                .unwrap_or(true)
        };
        if width < k.min(most) && cut_short() {
            continue;
        }
        let valid = values.ge_tensor(&threshold).logical_and(&values.isfinite());
        return Ok((places.clamp_max((here - 1).max(0)), valid));
    }
    unreachable!("the second width leaves nothing out")
}

/// The best `width` scores of each row, high to low, with their places; −∞ where a rank has fewer.
pub(super) fn best(scores: &Tensor, width: i64) -> (Tensor, Tensor) {
    let here = scores.size()[1];
    let (values, places) = highest::sorted(scores, width.min(here));
    if here >= width {
        return (values, places);
    }
    let pad = [0, width - here];
    (values.pad(pad, "constant", f64::NEG_INFINITY), places.pad(pad, "constant", 0.0))
}

impl Context<'_> {
    /// Takes slots out of a ranking of candidates: their scores become −∞, or 0 as the published code has it.
    pub(super) fn blank(&self, scores: &mut Tensor, slots: &Tensor, valid: &Tensor, fill: f64) {
        if scores.size()[1] == 0 {
            return;
        }
        let (places, found) = self.pool.find(slots);
        let valid = valid.logical_and(&found);
        let places = places * &valid;
        if fill == 0.0 {
            let keep = valid.logical_not().to_kind(Kind::Float);
            let _ = scores.internal_scatter_reduce_(1, &places, &keep, "prod", true);
        } else {
            let nothing = valid.zeros_like().to_kind(Kind::Float);
            let _ = scores.scatter_add_(1, &places, &nothing.masked_fill(&valid, fill));
        }
    }
}
