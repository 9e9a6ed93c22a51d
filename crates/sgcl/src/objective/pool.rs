//! The rows that neighbours and hard negatives are looked for among: all of them, or a random sample of fixed size.
//!
//! With a sample of M of the N rows, drawn anew each step, cost does not depend on N. The law, in METHOD's terms: semantic positives are those
//! rows of the sample that are among its ⌈k·M/N⌉ nearest and share the anchor's labels; each stands for N/M rows and is
//! weighted so, which makes Σ_P e^{s/T} unbiased up to the k-th score's own error. Hard negatives are H rows whose ranks
//! within the sample, without positives, are drawn as METHOD draws them within the bank: the rank as a share of the ranking has the same law.
//! Spatial positives and random negatives are exact.

use super::Context;
use crate::bank::{Bank, Banks, shard_of};
use crate::draws;
use tch::{Kind, Tensor};

/// Rows that a step looks through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Candidates {
    /// Every row of the bank.
    #[default]
    Exact,
    /// A fresh random sample of this many rows each step.
    Sampled(i64),
}

/// This rank's candidates of a step.
#[derive(Debug)]
pub struct Pool {
    /// Their slots, ascending; none where all owned rows are candidates.
    slots: Option<Tensor>,
    /// Candidates of all ranks.
    total: i64,
    /// Candidates of the rank that has most.
    most: i64,
    /// Rows that a candidate stands for.
    weight: f64,
}

impl Pool {
    /// Every row.
    #[must_use]
    pub fn exact(banks: &Banks) -> Self {
        let world = banks.plan().world();
        let mut rows = vec![0; world];
        for shard in 0..banks.len().min(crate::bank::SHARDS) {
            rows[banks.plan().owner(shard)] += crate::bank::rows_in_shard(shard, banks.len());
        }
        Self { slots: None, total: banks.len(), most: rows.into_iter().max().unwrap_or(0), weight: 1.0 }
    }

    /// `count` distinct rows drawn for (seed, epoch, step), the same on every rank; all rows where there are no more.
    #[must_use]
    pub fn sampled(banks: &Banks, count: i64, seed: u64, epoch: u64, step: u64) -> Self {
        if count >= banks.len() {
            return Self::exact(banks);
        }
        let rows = draws::candidates(seed, epoch, step, count as usize, banks.len());
        let mut each = vec![0; banks.plan().world()];
        let mut slots = Vec::new();
        for row in rows {
            each[banks.plan().owner(shard_of(row))] += 1;
            slots.extend(banks.owned_slot(row));
        }
        slots.sort_unstable();
        Self {
            slots: Some(Tensor::from_slice(&slots).to_device(banks.device())),
            total: count,
            most: each.into_iter().max().unwrap_or(0),
            weight: banks.len() as f64 / count as f64,
        }
    }

    /// The pool that `candidates` asks for.
    #[must_use]
    pub fn new(candidates: Candidates, banks: &Banks, seed: u64, epoch: u64, step: u64) -> Self {
        match candidates {
            Candidates::Exact => Self::exact(banks),
            Candidates::Sampled(count) => Self::sampled(banks, count, seed, epoch, step),
        }
    }

    /// Candidates of all ranks.
    #[must_use]
    pub fn total(&self) -> i64 {
        self.total
    }

    pub(super) fn most(&self) -> i64 {
        self.most
    }

    pub(super) fn weight(&self) -> f64 {
        self.weight
    }

    /// `count` rows of the bank as a number of candidates.
    pub(super) fn share(&self, count: i64) -> i64 {
        ((count as f64 / self.weight).ceil() as i64).clamp(1, self.total)
    }

    /// Similarity of queries to this rank's candidates.
    pub(super) fn scores(&self, bank: Bank, queries: &Tensor, cx: &Context<'_>) -> Tensor {
        let kind = cx.params.kind();
        let queries = queries.to_kind(kind);
        match &self.slots {
            None => cx.banks.scores(bank, &queries, cx.room.take()),
            Some(slots) => queries.matmul(&cx.banks.at(bank, slots).to_kind(kind).tr()).to_kind(Kind::Float),
        }
    }

    /// Slots of candidates.
    pub(super) fn slots(&self, candidates: &Tensor) -> Tensor {
        match &self.slots {
            None => candidates.shallow_clone(),
            Some(slots) if slots.numel() == 0 => candidates.zeros_like(),
            Some(slots) => slots.take(candidates),
        }
    }

    /// Candidates at slots, and which of those slots are candidates.
    pub(super) fn find(&self, slots: &Tensor) -> (Tensor, Tensor) {
        match &self.slots {
            None => (slots.shallow_clone(), slots.ones_like().to_kind(Kind::Bool)),
            Some(all) if all.numel() == 0 => (slots.zeros_like(), slots.zeros_like().to_kind(Kind::Bool)),
            Some(all) => {
                let at = slots.contiguous().searchsorted::<Tensor>(all, false, false, "left", None);
                let at = at.clamp_max(all.numel() as i64 - 1);
                let here = all.take(&at).eq_tensor(slots);
                (at, here)
            }
        }
    }
}
