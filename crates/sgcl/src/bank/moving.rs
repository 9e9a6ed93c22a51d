//! Shards from rank to rank when the membership changes.

use super::{Bank, Banks, SHARDS, ShardPlan, Widths, rows_in_shard};
use crate::collective::{Collective, CollectiveError};
use tch::{Device, Kind, Tensor};

/// Bytes that a message carries at most, but for a single shard that is larger.
const MESSAGE_BYTES: i64 = 64 << 20;

const BANKS: [Bank; 6] =
    [Bank::Global, Bank::Backbone, Bank::Corner(0), Bank::Corner(1), Bank::Corner(2), Bank::Corner(3)];

/// Banks with what belongs to their rows besides.
#[derive(Debug)]
pub struct Held {
    /// The rows.
    pub banks: Banks,
    /// (runs, held) i64: k-means labels of the rows in each slot.
    pub labels: Tensor,
}

impl Held {
    /// By rows first, every tensor that travels with them.
    fn tensors(&self) -> Vec<Tensor> {
        BANKS.iter().map(|&bank| self.banks.bank(bank).shallow_clone()).chain([self.labels.tr()]).collect()
    }
}

/// What every rank's bank is.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Rows N over all ranks.
    pub n: i64,
    /// Widths of rows.
    pub widths: Widths,
    /// Runs of k-means.
    pub runs: i64,
    /// How rows are kept.
    pub dtype: Kind,
    /// Where.
    pub device: Device,
}

impl Layout {
    /// No row at all: a rank that is new.
    #[must_use]
    pub fn nothing(self) -> Held {
        self.empty(ShardPlan::for_rows(self.n, &[0], false), 1)
    }

    /// Rows that are not set yet, with labels 0.
    fn empty(self, plan: ShardPlan, rank: usize) -> Held {
        let banks = Banks::empty(self.n, self.widths, plan, rank, (self.dtype, self.device));
        let labels = Tensor::zeros([self.runs, banks.held()], (Kind::Int64, self.device));
        Held { banks, labels }
    }

    /// Random unit rows, with labels 0.
    #[must_use]
    pub fn random(self, seed: u64, plan: ShardPlan, rank: usize) -> Held {
        let banks = Banks::random(seed, self.n, self.widths, plan, rank, (self.dtype, self.device));
        let labels = Tensor::zeros([self.runs, banks.held()], (Kind::Int64, self.device));
        Held { banks, labels }
    }
}

impl Held {
    /// Who holds each shard among the ranks of `ring`, an owner first, as every rank then knows. A rank passes all it holds: after a
    /// move that broke off half-way these are two, the first under the older plan.
    ///
    /// # Errors
    /// The ring fails.
    pub fn holders(
        sources: &[&Self],
        layout: Layout,
        ring: &dyn Collective,
    ) -> Result<Vec<Vec<usize>>, CollectiveError> {
        let mut mine = vec![0_i64; SHARDS as usize];
        for held in sources {
            for (shard, has) in (0_i64..).zip(&mut mine) {
                if let Some(slot) = held.banks.place(shard) {
                    *has = (*has).max(if slot < held.banks.owned() { 2 } else { 1 });
                }
            }
        }
        let all =
            ring.all_gather(&Tensor::from_slice(&mine).to_device(layout.device).unsqueeze(0))?.to_device(Device::Cpu);
        let all: Vec<i64> = Vec::try_from(all.contiguous().view([-1])).unwrap_or_default();
        let ranks: Vec<&[i64]> = all.chunks_exact(SHARDS as usize).collect();
        let holding = |shard: usize, how: i64| {
            let ranks = ranks.iter().enumerate();
            ranks.filter_map(move |(rank, has)| (has[shard] == how).then_some(rank))
        };
        let shards = layout.n.clamp(0, SHARDS) as usize;
        Ok((0..shards).map(|shard| holding(shard, 2).chain(holding(shard, 1)).collect()).collect())
    }

    /// Moves to `plan` among the ranks of `ring`, given what this rank holds (nothing where it is new) and who holds what. What a rank
    /// has already stays without touching the wire; the rest is broadcast, in messages of bounded size, by the first that holds it.
    /// Every shard must have a holder: see [`lost`].
    ///
    /// # Errors
    /// The ring fails. `sources` are as they were, and must be kept until every rank is known to have succeeded.
    pub fn moved(
        sources: &[&Self],
        holders: &[Vec<usize>],
        plan: &ShardPlan,
        layout: Layout,
        ring: &dyn Collective,
    ) -> Result<Self, CollectiveError> {
        let rank = ring.rank();
        let new = layout.empty(plan.clone(), rank);
        let (to, from): (Vec<Tensor>, Vec<Vec<Tensor>>) =
            (new.tensors(), sources.iter().map(|held| held.tensors()).collect());
        let find = |shard: i64| {
            sources.iter().zip(&from).find_map(|(held, tensors)| Some((held.banks.place(shard)?, tensors)))
        };
        let rows = |shard: i64| rows_in_shard(shard, layout.n);
        // Every rank finds the same: who sends what.
        let mut senders: Vec<Vec<i64>> = vec![Vec::new(); ring.world()];
        for (shard, holders) in (0..SHARDS).zip(holders) {
            let wanted = [Some(plan.owner(shard)), plan.replica(shard)];
            if let Some(&first) = holders.first()
                && wanted.iter().flatten().any(|rank| !holders.contains(rank))
            {
                senders[first].push(shard);
            }
        }
        tch::no_grad(|| {
            for shard in 0..SHARDS {
                if let Some((at, from)) = find(shard)
                    && let Some(slot) = new.banks.place(shard)
                {
                    for (to, from) in to.iter().zip(from) {
                        to.narrow(0, slot, rows(shard)).copy_(&from.narrow(0, at, rows(shard)));
                    }
                }
            }
            for (sender, shards) in senders.iter().enumerate() {
                for (bank, to) in to.iter().enumerate() {
                    let (width, kind) = (to.size()[1], to.kind());
                    let row_bytes = (width * kind.elt_size_in_bytes() as i64).max(1);
                    for group in groups(shards, |shard| rows(shard) * row_bytes) {
                        let total: i64 = group.iter().copied().map(rows).sum();
                        let mut message = if sender == rank {
                            let parts: Vec<Tensor> = group
                                .iter()
                                .filter_map(|&shard| {
                                    find(shard).map(|(at, from)| from[bank].narrow(0, at, rows(shard)))
                                })
                                .collect();
                            Tensor::cat(&parts, 0).contiguous()
                        } else {
                            Tensor::empty([total, width], (kind, layout.device))
                        };
                        ring.broadcast(&mut message, sender)?;
                        let mut at = 0;
                        for &shard in group {
                            if let Some(slot) = new.banks.place(shard) {
                                to.narrow(0, slot, rows(shard)).copy_(&message.narrow(0, at, rows(shard)));
                            }
                            at += rows(shard);
                        }
                    }
                }
            }
            Ok(())
        })?;
        Ok(new)
    }
}

/// Shards that nobody holds: they must come from a commit.
#[must_use]
pub fn lost(holders: &[Vec<usize>]) -> Vec<i64> {
    (0..SHARDS).zip(holders).filter(|(_, held)| held.is_empty()).map(|(shard, _)| shard).collect()
}

/// Consecutive shards of at most [`MESSAGE_BYTES`] together.
fn groups(shards: &[i64], bytes: impl Fn(i64) -> i64) -> Vec<&[i64]> {
    let (mut groups, mut from, mut sum) = (Vec::new(), 0, 0);
    for (at, &shard) in shards.iter().enumerate() {
        if at > from && sum + bytes(shard) > MESSAGE_BYTES {
            groups.push(&shards[from..at]);
            (from, sum) = (at, 0);
        }
        sum += bytes(shard);
    }
    if from < shards.len() {
        groups.push(&shards[from..]);
    }
    groups
}

impl Banks {
    /// Slot of a shard's first row, where it is held.
    fn place(&self, shard: i64) -> Option<i64> {
        Some(self.base[shard as usize]).filter(|&base| base >= 0)
    }
}
