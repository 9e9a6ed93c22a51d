//! Hard negatives: rows at drawn ranks of the ranking by backbone similarity, positives and the anchor left out.
//!
//! By rank, ranks send their best scores and everybody sorts them: rows at exactly the drawn ranks. By strata, for larger steps, the ranking is
//! cut into some [`STRATA`] runs of neighbouring ranks with a histogram that ranks add up; as many rows are taken from a stratum
//! as drawn ranks fall into it, those with the least key, a hash of (key, row). That is the same law but for which of a
//! stratum's rows are taken, and the same rows whatever the world is.

use super::batch::Batch;
use super::params::{HardBy, Variant};
use super::positives::{Positives, RowLists, best};
use super::{Context, StepError, StepInputs, highest};
use crate::bank::Bank;
use crate::collective::Collective;
use sgcl_draw::Purpose;
use tch::{IndexOp, Kind, Tensor};

/// Scores that ranks send each other at most before hard negatives go by strata: 64 MiB.
const BY_RANK: i64 = 1 << 24;
/// Strata of the ranking's top.
const STRATA: i64 = 256;
/// Cells of a histogram of scores.
const CELLS: i64 = 8192;
/// Candidates looked at once.
const BLOCK: i64 = 1 << 15;
/// Bits of a key; the rest of 63 name anchor and stratum.
const KEY_BITS: u32 = 40;

/// Keys the draws within strata: a function of seed, epoch and step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardKey(u64);

impl HardKey {
    /// The key of a step.
    #[must_use]
    pub fn new(seed: u64, epoch: u64, step: u64) -> Self {
        let mut rng = sgcl_draw::rng(seed, Purpose::HardRanks, epoch, step);
        rng.set_stream(u64::MAX);
        Self(rand::Rng::random(&mut rng))
    }

    /// A number below 2^40 for each row, as good as random and without ties within 2^40 rows.
    fn of(self, rows: &Tensor) -> Tensor {
        // xorshift and odd multiplications modulo 2^40 are each one-to-one.
        let mask = (1_i64 << KEY_BITS) - 1;
        let mut keys = rows.bitwise_xor((self.0 as i64) & mask);
        for (shift, factor) in [(19, 0x009e_3779_b97f_i64), (23, 0x000b_f584_76d1), (17, 0x0004_d049_bb13)] {
            let high = keys.bitwise_right_shift_tensor_scalar(shift);
            keys = (keys.bitwise_xor_tensor(&high) * (factor | 1)).bitwise_and(mask);
        }
        keys
    }
}

pub(super) fn find(
    batch: &Batch,
    positives: &Positives,
    inputs: &StepInputs<'_>,
    cx: &Context<'_>,
) -> Result<RowLists, StepError> {
    let p = cx.params;
    let top = p.top(cx.pool.total());
    let mut scores = cx.pool.scores(Bank::Backbone, &batch.x, cx);
    let fill = if p.variant == Variant::Released { 0.0 } else { f64::NEG_INFINITY };
    let (own, owned) = cx.owned(&batch.ids.unsqueeze(1));
    cx.blank(&mut scores, &positives.union.rows, &positives.union.valid, fill);
    cx.blank(&mut scores, &own, &owned, fill);
    let by_rank = match p.hard_by {
        HardBy::Auto => batch.len() * top <= BY_RANK,
        HardBy::Rank => true,
        HardBy::Strata => false,
    };
    let (places, valid) = if by_rank {
        ranked(&scores, inputs.hard_ranks, cx)?
    } else {
        stratified(&scores, top, inputs.hard_ranks, inputs.key, cx)?
    };
    Ok(RowLists { rows: cx.pool.slots(&places), valid })
}

/// Rows at `ranks`: (B, H) places, and which are this rank's.
fn ranked(scores: &Tensor, ranks: &Tensor, cx: &Context<'_>) -> Result<(Tensor, Tensor), StepError> {
    if cx.ring.world() == 1 {
        let places = highest::at_ranks(scores, ranks);
        let valid = places.ones_like().to_kind(Kind::Bool);
        return Ok((places, valid));
    }
    let width = (ranks.max().int64_value(&[]) + 1).min(cx.pool.most());
    let (values, places) = best(scores, width);
    let all = cx.ring.all_gather(&values.unsqueeze(0))?.transpose(0, 1).reshape([scores.size()[0], -1]);
    let picked = highest::at_ranks(&all, ranks);
    let mine = picked.floor_divide_scalar(width).eq(cx.ring.rank() as i64);
    let places = places.gather(1, &(picked.remainder(width) * &mine), false);
    Ok((places, mine))
}

/// Rows by strata: (B, L) places and which count.
fn stratified(
    scores: &Tensor,
    top: i64,
    ranks: &Tensor,
    key: HardKey,
    cx: &Context<'_>,
) -> Result<(Tensor, Tensor), StepError> {
    let (b, device) = (scores.size()[0], scores.device());
    // Where the top lies, coarsely; then finely.
    let whole = Scale::new(&Tensor::full([b, 1], -1.0, (Kind::Float, device)), 2.0);
    let (above, occupied) = whole.above(scores, cx.ring)?;
    let inside = above.lt(top).to_kind(Kind::Int64).sum_dim_intlist([1_i64].as_slice(), true, Kind::Int64);
    // Cells count from high to low, so the first `inside` of them reach the top's end.
    let low = inside.to_kind(Kind::Float) * (-2.0 / CELLS as f64) + 1.0;
    let first = occupied.gt(0).to_kind(Kind::Float).argmax(1, true).to_kind(Kind::Float);
    let high = first * (-2.0 / CELLS as f64) + 1.0;
    let fine = Scale::between(&low, &high);
    let (above, counts) = fine.above(scores, cx.ring)?;

    // Cells to strata by the rank of their best row.
    let size = (top + STRATA - 1) / STRATA;
    let inside = above.lt(top);
    // The last cell holds what is no part of the top.
    let _ = inside.narrow(1, CELLS - 1, 1).fill_(0);
    let stratum = above.floor_divide_scalar(size).clamp(0, STRATA - 1);
    let counts = counts * &inside;
    let mut rows = Tensor::zeros([b, STRATA], (Kind::Int64, device));
    let _ = rows.scatter_add_(1, &stratum, &counts);
    let ends = rows.cumsum(1, Kind::Int64);
    let ranks = ranks.sort(0, false).0;
    let below = ends.contiguous().searchsorted::<Tensor>(&ranks, false, false, "left", None);
    let wanted = &below - Tensor::cat(&[below.narrow(1, 0, 1).zeros_like(), below.narrow(1, 0, STRATA - 1)], 1);

    // Candidates: rows whose key is low enough that, but for one in 10⁹ strata, the wanted ones are among them.
    let expected = wanted.to_kind(Kind::Double);
    let enough = &expected + expected.sqrt() * 6.0 + 8.0;
    let share = (enough / rows.clamp_min(1)).clamp_max(1.0) * wanted.gt(0);
    let limit = (share * (1_i64 << KEY_BITS) as f64).to_kind(Kind::Int64);
    let cell_limit = limit.gather(1, &stratum, false) * &inside;
    let held = cx.banks.slot_rows();
    let mut found = Vec::new();
    for start in (0..scores.size()[1]).step_by(BLOCK as usize) {
        let len = BLOCK.min(scores.size()[1] - start);
        let places = Tensor::arange_start(start, start + len, (Kind::Int64, device));
        let keys = key.of(&held.take(&cx.pool.slots(&places)));
        let cells = fine.cells(&scores.narrow(1, start, len));
        let kept = keys.unsqueeze(0).lt_tensor(&cell_limit.gather(1, &cells, false)).nonzero();
        let (anchor, at) = (kept.select(1, 0), kept.select(1, 1));
        let cell = cells.index(&[Some(&anchor), Some(&at)]);
        let group = &anchor * STRATA + stratum.index(&[Some(&anchor), Some(&cell)]);
        let packed = group * (1_i64 << KEY_BITS) + keys.take(&at);
        found.push(Tensor::stack(&[packed, anchor, at + start], 0));
    }
    let found = if found.is_empty() { Tensor::zeros([3, 0], (Kind::Int64, device)) } else { Tensor::cat(&found, 1) };

    // The highest key that is taken, by anchor and stratum.
    let all = cx.ring.all_gather_uneven(&found.i(0).contiguous())?.sort(0, false).0;
    let groups = Tensor::arange(b * STRATA + 1, (Kind::Int64, device)) * (1_i64 << KEY_BITS);
    let edges = groups.searchsorted::<Tensor>(&all, false, false, "left", None);
    let (from, to) = (edges.narrow(0, 0, b * STRATA), edges.narrow(0, 1, b * STRATA));
    let taken = wanted.view([-1]).minimum(&(&to - &from));
    let cut = if all.numel() == 0 {
        taken.zeros_like() - 1
    } else {
        let at = (from + &taken - 1).clamp(0, all.numel() as i64 - 1);
        all.take(&at).where_self(&taken.gt(0), &(taken.zeros_like() - 1))
    };
    let group = found.i(0).bitwise_right_shift_tensor_scalar(i64::from(KEY_BITS));
    let chosen = found.i(0).le_tensor(&cut.take(&group)).nonzero().view([-1]);
    Ok(lists(&found.i(1).index_select(0, &chosen), &found.i(2).index_select(0, &chosen), b))
}

/// Pairs (anchor, place) as padded lists.
fn lists(anchor: &Tensor, place: &Tensor, b: i64) -> (Tensor, Tensor) {
    let device = anchor.device();
    let (anchor, order) = anchor.sort_stable(true, 0, false);
    let each = anchor.bincount::<Tensor>(None, b);
    let width = if anchor.numel() == 0 { 0 } else { each.max().int64_value(&[]) };
    let first = each.cumsum(0, Kind::Int64) - &each;
    let column = Tensor::arange(anchor.numel() as i64, (Kind::Int64, device)) - first.take(&anchor);
    let at = &anchor * width + column;
    let mut places = Tensor::zeros([b * width], (Kind::Int64, device));
    let _ = places.index_copy_(0, &at, &place.index_select(0, &order));
    let mut valid = Tensor::zeros([b * width], (Kind::Bool, device));
    let _ = valid.index_fill_(0, &at, 1);
    (places.view([b, width]), valid.view([b, width]))
}

/// Equal cells of a range of scores, by anchor, counted from high to low. What lies below is in the last cell, which no
/// stratum holds rows of; what lies above in the first.
struct Scale {
    /// (B, 1)
    high: Tensor,
    /// (B, 1) cells a unit of score.
    density: Tensor,
}

impl Scale {
    fn new(low: &Tensor, width: f64) -> Self {
        Self { high: low + width, density: low.full_like(CELLS as f64 / width) }
    }

    /// One cell is kept for what lies below.
    fn between(low: &Tensor, high: &Tensor) -> Self {
        let density = (CELLS - 1) as f64 / (high - low).clamp_min(1e-6);
        Self { high: high.shallow_clone(), density }
    }

    fn cells(&self, scores: &Tensor) -> Tensor {
        let cells = (&self.high - scores) * &self.density;
        cells.clamp(0.0, (CELLS - 1) as f64).to_kind(Kind::Int64)
    }

    /// Of each cell (B, CELLS): rows in higher cells, and rows in it, over all ranks.
    fn above(&self, scores: &Tensor, ring: &dyn Collective) -> Result<(Tensor, Tensor), StepError> {
        let mut counts = Tensor::zeros([scores.size()[0], CELLS], (Kind::Int64, scores.device()));
        for start in (0..scores.size()[1]).step_by(BLOCK as usize) {
            let cells = self.cells(&scores.narrow(1, start, BLOCK.min(scores.size()[1] - start)));
            let _ = counts.scatter_add_(1, &cells, &cells.ones_like());
        }
        ring.all_reduce_sum(&mut counts)?;
        let above = counts.cumsum(1, Kind::Int64) - &counts;
        Ok((above, counts))
    }
}
