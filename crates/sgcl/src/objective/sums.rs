//! Partial softmax sums of this rank's rows, added over ranks, and what follows from them: losses and gradients.

use super::batch::Batch;
use super::inter::{Neighbours, Terms};
use super::params::{Inter, Local};
use super::pull::{Pull, attend};
use super::random::Random;
use super::{Context, Found, StepError, StepInputs};
use crate::bank::Bank;
use tch::{Kind, Tensor};

/// The sums of this rank's own anchors, over the rows of all ranks.
pub(super) struct Sums {
    /// Where there is an intra term.
    global: Option<Instance>,
    /// Of each corner, or position, where there is an inner term.
    parts: Vec<Instance>,
    neighbours: Neighbours,
}

/// An anchor's own row, or key, (b, D) and the pull of its negatives.
struct Instance {
    own: Tensor,
    negatives: Pull,
}

/// Losses of this rank's anchors and their gradients for its queries.
pub(super) struct Losses {
    pub(super) intra: Tensor,
    pub(super) inter: Tensor,
    pub(super) spatial: Tensor,
    pub(super) semantic: Tensor,
    pub(super) inner: Tensor,
    pub(super) total: Tensor,
    /// (b, D)
    pub(super) dq: Tensor,
    /// (4b, D), or (P·b, D).
    pub(super) dql: Tensor,
}

impl Sums {
    pub(super) fn of(
        batch: &Batch,
        found: &Found,
        inputs: &StepInputs<'_>,
        cx: &Context<'_>,
    ) -> Result<Self, StepError> {
        let p = cx.params;
        let mut columns = Vec::new();
        let random = p.draws().then(|| Random::new(batch, inputs.negatives, cx));
        if p.intra {
            let negatives = match &random {
                Some(random) if p.inter != Inter::Apart => random.global(batch, cx),
                _ => {
                    let weight = found.hard.valid.to_kind(Kind::Float);
                    attend(cx, Bank::Global, &batch.q, &found.hard.rows, &weight, p.t_instance)
                }
            };
            columns.extend([batch.own(Bank::Global, cx), negatives.sum, negatives.rows]);
        }
        match (&random, p.local) {
            (Some(random), Local::Corners) => {
                for (corner, pull) in random.corners(batch, cx).into_iter().enumerate() {
                    columns.extend([batch.own(Bank::Corner(corner), cx), pull.sum, pull.rows]);
                }
            }
            // Their keys are known where they are needed.
            (Some(random), Local::Dense { .. }) => {
                columns.extend(random.dense(batch, cx).into_iter().flat_map(|pull| [pull.sum, pull.rows]));
            }
            _ => {}
        }
        columns.extend(Neighbours::columns(batch, found, cx)?);

        let widths: Vec<i64> = columns.iter().map(|column| column.size()[1]).collect();
        let columns = Tensor::cat(&columns, 1).to_kind(p.kind());
        let mine = cx.ring.reduce_scatter(&columns)?.narrow(0, 0, batch.mine);
        let mut parts = mine.split_with_sizes(widths.as_slice(), 1).into_iter();
        // Taken in the order they were put in.
        let mut next = || parts.next().unwrap_or_else(|| Tensor::zeros([0], (Kind::Float, mine.device())));
        let mut instance = |own: Option<Tensor>| Instance {
            own: own.unwrap_or_else(&mut next),
            negatives: Pull { sum: next(), rows: next() },
        };
        let mut global = p.intra.then(|| instance(None));
        if let (Some(instance), Some(keys)) = (&mut global, inputs.keys) {
            instance.own = keys.to_kind(p.kind());
        }
        let parts = match (p.local, inputs.dense_keys) {
            (Local::Corners, _) => (0..4).map(|_| instance(None)).collect(),
            (Local::Dense { positions, .. }, Some(keys)) => {
                keys.to_kind(p.kind()).chunk(positions, 0).into_iter().map(|own| instance(Some(own))).collect()
            }
            _ => Vec::new(),
        };
        Ok(Self { global, parts, neighbours: Neighbours::of(p.inter, &mut next) })
    }

    /// `q` (b, D) and `ql` (4b, D), or (P·b, D), without gradient.
    pub(super) fn losses(&self, q: &Tensor, ql: &Tensor, inputs: &StepInputs<'_>, cx: &Context<'_>) -> Losses {
        let p = cx.params;
        let (inter_weight, (of_intra, of_inner)) = (inputs.inter_weight, p.local.weights());
        let b = q.size()[0];
        if b == 0 {
            let zero = || Tensor::zeros([], (Kind::Float, q.device()));
            let (intra, inter, inner, total) = (zero(), zero(), zero(), zero());
            let (spatial, semantic, dq, dql) = (zero(), zero(), q.zeros_like(), ql.zeros_like());
            return Losses { intra, inter, spatial, semantic, inner, total, dq, dql };
        }
        let (q, ql) = (&q.to_kind(p.kind()), &ql.to_kind(p.kind()));
        let zero = || Tensor::zeros([], (p.kind(), q.device()));
        let (intra, d_intra) = match &self.global {
            None => (zero(), q.zeros_like()),
            Some(instance) => {
                let (intra, d_intra) = instance.cross_entropy(q, p.t_instance);
                (intra.mean(p.kind()), d_intra / b as f64)
            }
        };
        let (inner, d_inner): (Vec<_>, Vec<_>) = self
            .parts
            .iter()
            .zip(ql.chunk(p.local.parts(), 0))
            .map(|(instance, ql)| instance.cross_entropy(&ql, p.t_instance))
            .unzip();
        let (inner, dql) = if inner.is_empty() {
            (zero(), ql.zeros_like())
        } else {
            (
                Tensor::cat(&inner, 0).mean(p.kind()),
                Tensor::cat(&d_inner, 0) * (of_inner / (p.local.parts() * b) as f64),
            )
        };
        let Terms { inter, spatial, semantic, dq: d_inter } = self.neighbours.terms(q, cx);
        let total = &intra * of_intra + (&inter + &spatial + &semantic) * inter_weight + &inner * of_inner;
        let dq = d_intra * of_intra + d_inter * inter_weight;
        let single = |t: Tensor| t.to_kind(Kind::Float);
        Losses {
            intra: single(intra),
            inter: single(inter),
            spatial: single(spatial),
            semantic: single(semantic),
            inner: single(inner),
            total: single(total),
            dq: single(dq),
            dql: single(dql),
        }
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
