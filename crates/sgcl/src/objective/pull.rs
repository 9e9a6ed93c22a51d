//! What rows of the bank do to a query: the sums that softmaxes and their gradients are made of.

use super::Context;
use crate::bank::Bank;
use tch::Tensor;

/// Floats of rows gathered at once: 16 MiB.
const SCRATCH: i64 = 1 << 22;

/// Σ e and Σ e·row over some rows, e = exp((s − 1)/T): (B, 1) and (B, D).
pub(super) struct Pull {
    pub(super) sum: Tensor,
    pub(super) rows: Tensor,
}

/// Rows of each query's own: `slots` and `weight` (B, L).
pub(super) fn attend(cx: &Context<'_>, bank: Bank, queries: &Tensor, slots: &Tensor, weight: &Tensor, t: f64) -> Pull {
    let (mut sums, mut rows) = (Vec::new(), Vec::new());
    by_block(cx, bank, queries, slots, t, |e, found, part| {
        let e = e * part(weight);
        sums.push(total(&e));
        rows.push(towards(&e, found));
    });
    Pull { sum: Tensor::cat(&sums, 0), rows: Tensor::cat(&rows, 0) }
}

/// Rows of each query's own, some queries at a time: `take` gets e (b, L), the rows (b, L, D), and what cuts the same part out of a tensor of
/// all queries.
pub(super) fn by_block(
    cx: &Context<'_>,
    bank: Bank,
    queries: &Tensor,
    slots: &Tensor,
    t: f64,
    mut take: impl FnMut(&Tensor, &Tensor, &dyn Fn(&Tensor) -> Tensor),
) {
    let kind = cx.params.kind();
    let (b, l) = (slots.size()[0], slots.size()[1]);
    let block = (SCRATCH / (l * queries.size()[1]).max(1)).max(1);
    for start in (0..b).step_by(block as usize) {
        let len = block.min(b - start);
        let part = |t: &Tensor| t.narrow(0, start, len);
        let found = cx.banks.at(bank, &part(slots).contiguous()).to_kind(kind);
        let s = found.bmm(&part(queries).to_kind(kind).unsqueeze(2)).squeeze_dim(2);
        take(&((s - 1.0) / t).exp(), &found, &part);
    }
}

/// Σ over a query's rows: (b, L) to (b, 1).
pub(super) fn total(e: &Tensor) -> Tensor {
    e.sum_dim_intlist([1_i64].as_slice(), true, e.kind())
}

/// Σ e·row: (b, L) and (b, L, D) to (b, D).
pub(super) fn towards(e: &Tensor, found: &Tensor) -> Tensor {
    e.unsqueeze(1).bmm(found).squeeze_dim(1)
}
