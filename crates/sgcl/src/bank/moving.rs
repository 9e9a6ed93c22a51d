//! Shards from rank to rank when the membership changes.

use super::{Bank, Banks, ShardPlan, Widths, rows_in_shard};
use crate::collective::{Collective, CollectiveError};
use tch::{Device, Kind, Tensor};

/// Banks under their new plan.
#[derive(Debug)]
pub struct Moved {
    /// The banks.
    pub banks: Banks,
    /// Shards of which no copy was left: their rows are not set, and must come from a commit.
    pub lost: Vec<i64>,
    /// Shards that went over the wire.
    pub sent: usize,
}

const BANKS: [Bank; 6] =
    [Bank::Global, Bank::Backbone, Bank::Corner(0), Bank::Corner(1), Bank::Corner(2), Bank::Corner(3)];

impl Banks {
    /// Moves to `plan` among the ranks of `ring`. `kept[old rank]` is that rank's new number. Rank `ring.rank()` passes the banks it
    /// holds, or `None` where it is new; `n`, `widths` and `dtype` are the run's, the same on every rank. What a rank holds already
    /// stays without touching the wire; the rest is broadcast shard group by shard group, by the rank that has it.
    ///
    /// # Errors
    /// The ring fails: every rank keeps what it had.
    pub fn moved(
        old: Option<&Self>,
        before: &ShardPlan,
        kept: &[Option<usize>],
        plan: &ShardPlan,
        (n, widths): (i64, Widths),
        (dtype, device): (Kind, Device),
        ring: &dyn Collective,
    ) -> Result<Moved, CollectiveError> {
        let rank = ring.rank();
        let new = Self::empty(n, widths, plan.clone(), rank, (dtype, device));
        let now = |old: usize| kept.get(old).copied().flatten();
        // Every rank finds the same: who has a shard (new number), and whether anybody lacks it.
        let mut senders: Vec<Vec<i64>> = vec![Vec::new(); ring.world()];
        let mut lost = Vec::new();
        for shard in 0..super::SHARDS {
            if rows_in_shard(shard, n) == 0 {
                continue;
            }
            let holders: Vec<usize> =
                [Some(before.owner(shard)), before.replica(shard)].into_iter().flatten().filter_map(now).collect();
            let wanted = [Some(plan.owner(shard)), plan.replica(shard)];
            match holders.first() {
                None => lost.push(shard),
                Some(&from) if wanted.iter().flatten().any(|rank| !holders.contains(rank)) => senders[from].push(shard),
                Some(_) => {}
            }
        }
        let sent = senders.iter().map(Vec::len).sum();
        tch::no_grad(|| {
            if let Some(old) = old {
                for shard in 0..super::SHARDS {
                    if let Some((from, to)) = old.place(shard).zip(new.place(shard)) {
                        for bank in BANKS {
                            let rows = rows_in_shard(shard, n);
                            new.bank(bank).narrow(0, to, rows).copy_(&old.bank(bank).narrow(0, from, rows));
                        }
                    }
                }
            }
            for (from, shards) in senders.iter().enumerate() {
                // One message a shard and bank keeps the scratch small, whatever N is.
                for &shard in shards {
                    let rows = rows_in_shard(shard, n);
                    for bank in BANKS {
                        let width = new.bank(bank).size()[1];
                        let mut message = match old.and_then(|old| Some((old, old.place(shard)?))) {
                            Some((old, at)) if from == rank => old.bank(bank).narrow(0, at, rows).contiguous(),
                            _ => Tensor::empty([rows, width], (dtype, device)),
                        };
                        ring.broadcast(&mut message, from)?;
                        if let Some(to) = new.place(shard) {
                            new.bank(bank).narrow(0, to, rows).copy_(&message);
                        }
                    }
                }
            }
            Ok(())
        })?;
        Ok(Moved { banks: new, lost, sent })
    }

    /// Slot of a shard's first row, where it is held.
    fn place(&self, shard: i64) -> Option<i64> {
        Some(self.base[shard as usize]).filter(|&base| base >= 0)
    }
}
