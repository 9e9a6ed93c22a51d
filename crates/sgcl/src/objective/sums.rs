//! Partial softmax sums of this rank's rows, added over ranks, and what follows from them: losses and gradients.

use super::batch::{Batch, Negatives};
use super::params::{Params, Variant};
use super::positives::{Positives, RowLists};
use super::{Context, StepError, StepInputs};
use crate::bank::Bank;
use tch::{Kind, Tensor};

/// Floats of rows gathered at once: 16 MiB.
const SCRATCH: i64 = 1 << 22;

/// Σ e and Σ e·row over some rows, e = exp((s − 1)/T): (B, 1) and (B, D).
struct Pull {
    sum: Tensor,
    rows: Tensor,
}

/// The sums of this rank's own anchors, over the rows of all ranks.
pub(super) struct Sums {
    global: Instance,
    /// Where there is an inner term.
    corners: Vec<Instance>,
    /// Where there is an inter term.
    inter: Option<Inter>,
}

/// Pull of positives and of hard negatives, and how many positives there are, (b, 1).
struct Inter {
    positives: Pull,
    hard: Pull,
    count: Tensor,
}

/// An anchor's own row (b, D) and the pull of its random negatives.
struct Instance {
    own: Tensor,
    negatives: Pull,
}

/// Losses of this rank's anchors and their gradients for its queries.
pub(super) struct Losses {
    pub(super) intra: Tensor,
    pub(super) inter: Tensor,
    pub(super) inner: Tensor,
    pub(super) total: Tensor,
    /// (b, D)
    pub(super) dq: Tensor,
    /// (4b, D)
    pub(super) dql: Tensor,
}

impl Sums {
    pub(super) fn of(
        batch: &Batch,
        positives: &Positives,
        hard: &RowLists,
        inputs: &StepInputs<'_>,
        cx: &Context<'_>,
    ) -> Result<Self, StepError> {
        let p = cx.params;
        let negatives = Random::new(batch, inputs.negatives, cx);
        let mut columns = Vec::new();
        let global = negatives.global(batch, cx);
        columns.extend([batch.own(Bank::Global, cx), global.sum, global.rows]);
        if p.inner {
            for (corner, pull) in negatives.corners(batch, cx).into_iter().enumerate() {
                columns.extend([batch.own(Bank::Corner(corner), cx), pull.sum, pull.rows]);
            }
        }
        if p.inter {
            for (lists, weight) in
                [(&positives.union, positives.weight.shallow_clone()), (hard, hard.valid.to_kind(Kind::Float))]
            {
                let pull = attend(cx, Bank::Global, &batch.q, &lists.rows, &weight, p.t_spatial);
                columns.extend([pull.sum, pull.rows]);
            }
            columns.push(positives.weight.sum_dim_intlist([1_i64].as_slice(), true, Kind::Float));
        }

        let widths: Vec<i64> = columns.iter().map(|column| column.size()[1]).collect();
        let columns = Tensor::cat(&columns, 1).to_kind(p.kind());
        let mine = cx.ring.reduce_scatter(&columns)?.narrow(0, 0, batch.mine);
        let mut parts = mine.split_with_sizes(widths.as_slice(), 1).into_iter();
        // Taken in the order they were put in.
        let mut next = || parts.next().unwrap_or_else(|| Tensor::zeros([0], (Kind::Float, mine.device())));
        let mut instance = || Instance { own: next(), negatives: Pull { sum: next(), rows: next() } };
        let global = instance();
        let corners = if p.inner { vec![instance(), instance(), instance(), instance()] } else { Vec::new() };
        let inter = p.inter.then(|| Inter {
            positives: Pull { sum: next(), rows: next() },
            hard: Pull { sum: next(), rows: next() },
            count: next(),
        });
        Ok(Self { global, corners, inter })
    }

    /// `q` (b, D) and `ql` (4b, D) without gradient.
    pub(super) fn losses(&self, q: &Tensor, ql: &Tensor, inter_weight: f64, cx: &Context<'_>) -> Losses {
        let p = cx.params;
        let b = q.size()[0];
        if b == 0 {
            let zero = || Tensor::zeros([], (Kind::Float, q.device()));
            let (dq, dql) = (q.zeros_like(), ql.zeros_like());
            return Losses { intra: zero(), inter: zero(), inner: zero(), total: zero(), dq, dql };
        }
        let (q, ql) = (&q.to_kind(p.kind()), &ql.to_kind(p.kind()));
        let zero = || Tensor::zeros([], (p.kind(), q.device()));
        let (intra, d_intra) = self.global.cross_entropy(q, p.t_instance);
        let (inner, d_inner): (Vec<_>, Vec<_>) = self
            .corners
            .iter()
            .zip(ql.chunk(4, 0))
            .map(|(instance, ql)| instance.cross_entropy(&ql, p.t_instance))
            .unzip();
        let (inner, dql) = if inner.is_empty() {
            (zero(), ql.zeros_like())
        } else {
            (Tensor::cat(&inner, 0).mean(p.kind()), Tensor::cat(&d_inner, 0) / (4 * b) as f64)
        };
        let (inter, d_inter) = match (&self.inter, p.variant) {
            (None, _) => (zero(), q.zeros_like()),
            (Some(inter), Variant::Exact) => inter.exact(p.t_spatial),
            (Some(inter), Variant::Released) => inter.released(p, cx.banks.len()),
        };
        let intra = intra.mean(p.kind());
        let total = &intra + &inter * inter_weight + &inner;
        let dq = d_intra / b as f64 + d_inter * inter_weight;
        let single = |t: Tensor| t.to_kind(Kind::Float);
        Losses {
            intra: single(intra),
            inter: single(inter),
            inner: single(inner),
            total: single(total),
            dq: single(dq),
            dql: single(dql),
        }
    }
}

impl Inter {
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

impl Instance {
    /// Cross-entropy of the own row against the negatives, (b, 1), and its gradient for each query.
    fn cross_entropy(&self, q: &Tensor, t: f64) -> (Tensor, Tensor) {
        let logit = ((q * &self.own).sum_dim_intlist([1_i64].as_slice(), true, q.kind()) - 1.0) / t;
        let e = logit.exp();
        let all = &e + &self.negatives.sum;
        let gradient = ((e * &self.own + &self.negatives.rows) / &all - &self.own) / t;
        (all.log() - logit, gradient)
    }
}

/// This rank's part of the random negatives.
enum Random {
    /// (k) slots, and how many of them are among the first K/4; (k) rows.
    Shared { slots: Tensor, quarter: i64, rows: Tensor },
    /// (B, K) slots and weights; (4B, K/4) of local queries.
    PerAnchor { slots: Tensor, weight: Tensor, local_slots: Tensor, local_weight: Tensor },
}

impl Random {
    fn new(batch: &Batch, negatives: &Negatives, cx: &Context<'_>) -> Self {
        let device = batch.q.device();
        let exact = cx.params.variant == Variant::Exact;
        match negatives {
            Negatives::Shared(all) => {
                let owned = |row: &i64| Some((*row, cx.banks.owned_slot(*row)?));
                let mine: Vec<(i64, i64)> = all.iter().filter_map(owned).collect();
                let quarter = all[..all.len() / 4].iter().filter_map(owned).count() as i64;
                let (rows, slots): (Vec<i64>, Vec<i64>) = mine.into_iter().unzip();
                let tensor = |values: &[i64]| Tensor::from_slice(values).to_device(device);
                Self::Shared { slots: tensor(&slots), quarter, rows: tensor(&rows) }
            }
            Negatives::PerAnchor(all) => {
                let k = cx.params.negatives;
                let all = Tensor::from_slice(all).to_device(device);
                let places = Tensor::from_slice(&batch.real).to_device(device);
                let spread = |rows: &Tensor| {
                    let mut out = Tensor::full([batch.len(), rows.size()[1]], -1, (Kind::Int64, device));
                    let _ = out.index_copy_(0, &places, rows);
                    out
                };
                let weigh = |rows: &Tensor, owner: &Tensor| {
                    let (slots, owned) = cx.owned(rows);
                    let hit = rows.eq_tensor(&owner.unsqueeze(1));
                    let counts = if exact { owned.logical_and(&hit.logical_not()) } else { owned };
                    (slots, counts.to_kind(Kind::Float))
                };
                let (slots, weight) = weigh(&spread(&all.view([-1, k])), &batch.ids);
                let corners: Vec<Tensor> = all.view([4, -1, k / 4]).unbind(0).iter().map(spread).collect();
                let (local_slots, local_weight) = weigh(&Tensor::cat(&corners, 0), &batch.ids.repeat([4]));
                Self::PerAnchor { slots, weight, local_slots, local_weight }
            }
        }
    }

    fn global(&self, batch: &Batch, cx: &Context<'_>) -> Pull {
        let t = cx.params.t_instance;
        match self {
            Self::Shared { slots, rows, .. } => shared(Bank::Global, &batch.q, &batch.ids, slots, rows, cx),
            Self::PerAnchor { slots, weight, .. } => attend(cx, Bank::Global, &batch.q, slots, weight, t),
        }
    }

    /// Local queries of every corner against all four corner banks.
    fn corners(&self, batch: &Batch, cx: &Context<'_>) -> [Pull; 4] {
        let t = cx.params.t_instance;
        let queries = Tensor::cat(&batch.ql, 0);
        let ids = batch.ids.repeat([4]);
        let pulls = [0, 1, 2, 3].map(|corner| match self {
            Self::Shared { slots, quarter, rows } => {
                let (slots, rows) = (slots.narrow(0, 0, *quarter), rows.narrow(0, 0, *quarter));
                shared(Bank::Corner(corner), &queries, &ids, &slots, &rows, cx)
            }
            Self::PerAnchor { local_slots, local_weight, .. } => {
                attend(cx, Bank::Corner(corner), &queries, local_slots, local_weight, t)
            }
        });
        let add = |of: fn(&Pull) -> &Tensor| {
            pulls
                .iter()
                .map(of)
                .fold(None, |all: Option<Tensor>, one| Some(all.map_or_else(|| one.shallow_clone(), |a| a + one)))
        };
        let (sum, rows) = (add(|p| &p.sum), add(|p| &p.rows));
        let b = batch.len();
        [0, 1, 2, 3].map(|corner| {
            let part = |all: &Option<Tensor>| all.as_ref().map_or_else(Tensor::new, |all| all.narrow(0, corner * b, b));
            Pull { sum: part(&sum), rows: part(&rows) }
        })
    }
}

/// Rows shared by all queries: one gather, two matrix products.
fn shared(bank: Bank, queries: &Tensor, ids: &Tensor, slots: &Tensor, rows: &Tensor, cx: &Context<'_>) -> Pull {
    let kind = cx.params.kind();
    let found = cx.banks.at(bank, slots).to_kind(kind);
    let mut e = ((queries.to_kind(kind).matmul(&found.tr()) - 1.0) / cx.params.t_instance).exp();
    if cx.params.variant == Variant::Exact {
        let _ = e.masked_fill_(&ids.unsqueeze(1).eq_tensor(&rows.unsqueeze(0)), 0.0);
    }
    Pull { sum: e.sum_dim_intlist([1_i64].as_slice(), true, kind), rows: e.matmul(&found) }
}

/// Rows of each query's own: `slots` and `weight` (B, L), some queries at a time.
fn attend(cx: &Context<'_>, bank: Bank, queries: &Tensor, slots: &Tensor, weight: &Tensor, t: f64) -> Pull {
    let kind = cx.params.kind();
    let (b, l) = (slots.size()[0], slots.size()[1]);
    let block = (SCRATCH / (l * queries.size()[1]).max(1)).max(1);
    let (mut sums, mut rows) = (Vec::new(), Vec::new());
    for start in (0..b).step_by(block as usize) {
        let len = block.min(b - start);
        let part = |t: &Tensor| t.narrow(0, start, len);
        let found = cx.banks.at(bank, &part(slots).contiguous()).to_kind(kind);
        let s = found.bmm(&part(queries).to_kind(kind).unsqueeze(2)).squeeze_dim(2);
        let e = ((s - 1.0) / t).exp() * part(weight);
        sums.push(e.sum_dim_intlist([1_i64].as_slice(), true, kind));
        rows.push(e.unsqueeze(1).bmm(&found).squeeze_dim(1));
    }
    Pull { sum: Tensor::cat(&sums, 0), rows: Tensor::cat(&rows, 0) }
}
