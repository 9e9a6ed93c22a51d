//! Random negatives of the intra and inner terms.

use super::Context;
use super::batch::{Batch, Negatives};
use super::params::Variant;
use super::pull::{Pull, attend, total};
use crate::bank::Bank;
use tch::{Kind, Tensor};

/// Scores of shared rows at once: 128 MiB. SGCL's at the published size fit, the queries of a feature map may not.
const SCORES: i64 = 1 << 25;

/// This rank's part of the random negatives.
pub(super) enum Random {
    /// (k) slots, and how many of them are among the first K/4; (k) rows.
    Shared { slots: Tensor, quarter: i64, rows: Tensor },
    /// (B, K) slots and weights; (4B, K/4) of local queries.
    PerAnchor { slots: Tensor, weight: Tensor, local_slots: Tensor, local_weight: Tensor },
}

impl Random {
    pub(super) fn new(batch: &Batch, negatives: &Negatives, cx: &Context<'_>) -> Self {
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

    pub(super) fn global(&self, batch: &Batch, cx: &Context<'_>) -> Pull {
        let t = cx.params.t_instance;
        match self {
            Self::Shared { slots, rows, .. } => shared(Bank::Global, &batch.q, &batch.ids, slots, rows, cx),
            Self::PerAnchor { slots, weight, .. } => attend(cx, Bank::Global, &batch.q, slots, weight, t),
        }
    }

    /// Queries at every position against all pooled keys, by position.
    pub(super) fn dense(&self, batch: &Batch, cx: &Context<'_>) -> Vec<Pull> {
        let parts = batch.ql.len() as i64;
        let queries = Tensor::cat(&batch.ql, 0);
        let pull = match self {
            Self::Shared { slots, rows, .. } => {
                shared(Bank::Backbone, &queries, &batch.ids.repeat([parts]), slots, rows, cx)
            }
            Self::PerAnchor { slots, weight, .. } => {
                let (slots, weight) = (slots.repeat([parts, 1]), weight.repeat([parts, 1]));
                attend(cx, Bank::Backbone, &queries, &slots, &weight, cx.params.t_instance)
            }
        };
        pull.sum
            .chunk(parts, 0)
            .into_iter()
            .zip(pull.rows.chunk(parts, 0))
            .map(|(sum, rows)| Pull { sum, rows })
            .collect()
    }

    /// Local queries of every corner against all four corner banks.
    pub(super) fn corners(&self, batch: &Batch, cx: &Context<'_>) -> [Pull; 4] {
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

/// Rows shared by all queries: one gather, two matrix products for so many queries as their scores fit the scratch.
fn shared(bank: Bank, queries: &Tensor, ids: &Tensor, slots: &Tensor, rows: &Tensor, cx: &Context<'_>) -> Pull {
    let kind = cx.params.kind();
    let found = cx.banks.at(bank, slots).to_kind(kind);
    let all = queries.size()[0];
    let block = (SCORES / found.size()[0].max(1)).max(1);
    let (mut sums, mut pulls) = (Vec::new(), Vec::new());
    for start in (0..all.max(1)).step_by(block as usize) {
        let part = |t: &Tensor| t.narrow(0, start, block.min(all - start));
        // In place: fresh memory for each operation costs more than the operation.
        let mut e = part(queries).to_kind(kind).matmul(&found.tr());
        let _ = e.g_sub_scalar_(1.0).g_div_scalar_(cx.params.t_instance).exp_();
        if cx.params.variant == Variant::Exact {
            let _ = e.masked_fill_(&part(ids).unsqueeze(1).eq_tensor(&rows.unsqueeze(0)), 0.0);
        }
        sums.push(total(&e));
        pulls.push(e.matmul(&found));
    }
    Pull { sum: Tensor::cat(&sums, 0), rows: Tensor::cat(&pulls, 0) }
}
