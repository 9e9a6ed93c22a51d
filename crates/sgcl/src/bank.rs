//! Feature memory: one unit row a patch in each of six banks, dealt over the ranks in virtual shards.
//!
//! A rank holds the shards that [`ShardPlan`] gives it, end to end: those it owns, then its second copies. Within a shard rows ascend,
//! so a row's slot is arithmetic: `base[row % 1024] + row / 1024`.

mod moving;
mod plan;
mod spread;

pub use moving::{Held, Layout, lost};
pub use plan::{SHARDS, ShardPlan, rows_in_shard, rows_of_shard, shard_of};
pub use spread::Spread;

use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use sgcl_draw::Purpose;
use std::collections::HashMap;
use tch::{Device, Kind, Tensor};

/// Corner banks in order; local views are corner-major in the same order.
pub const CORNERS: [&str; 4] = ["tl", "tr", "bl", "br"];

/// Rows drawn or converted at once.
const BLOCK: i64 = 1 << 16;
const BLOCK_CPU: i64 = 1 << 12;

/// Rows that cannot be read from or written to a bank.
#[derive(Debug, thiserror::Error)]
pub enum BankError {
    /// A row outside the bank.
    #[error("row {row} is outside a bank of {n} rows; the patch set and the bank must be of the same run")]
    Row {
        /// The row.
        row: i64,
        /// Rows of the bank, over all ranks.
        n: i64,
    },
    /// A row that another rank holds.
    #[error("row {row} is held by rank {owner}, not by rank {rank}; ask its owner")]
    Elsewhere {
        /// The row.
        row: i64,
        /// Its owner.
        owner: usize,
        /// This rank.
        rank: usize,
    },
    /// Features of another shape.
    #[error(
        "bank {bank} takes rows of shape {expected:?}, got {got:?}; use features of the same model and as many as rows"
    )]
    Shape {
        /// Name of the bank.
        bank: &'static str,
        /// Shape wanted.
        expected: [i64; 2],
        /// Shape given.
        got: Vec<i64>,
    },
}

/// One row of every bank for each of a list of patches, f32, in the order of the list.
#[derive(Debug)]
pub struct BankRows {
    /// (n, D).
    pub global: Tensor,
    /// (n, Db).
    pub backbone: Tensor,
    /// tl, tr, bl, br: (n, D) each.
    pub corners: [Tensor; 4],
}

impl BankRows {
    fn named(&self) -> [(&'static str, &Tensor); 6] {
        let [a, b, c, d] = &self.corners;
        [("global", &self.global), ("backbone", &self.backbone), ("tl", a), ("tr", b), ("bl", c), ("br", d)]
    }
}

/// This rank's part of the six banks, on one device. Rows are kept as `dtype`; whatever is computed with them is f32.
#[derive(Debug)]
pub struct Banks {
    plan: ShardPlan,
    rank: usize,
    n: i64,
    /// Slot of a shard's first row; negative where the shard is elsewhere.
    base: Vec<i64>,
    /// The same on the banks' device.
    base_tensor: Tensor,
    /// Slots of owned rows come first.
    owned: i64,
    /// (held) i64: the row in each slot.
    rows: Tensor,
    global: Tensor,
    backbone: Tensor,
    corners: [Tensor; 4],
}

/// Widths of bank rows. A method that has no use for a bank gives it width 0: it costs nothing then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widths {
    /// D, of the global bank.
    pub dim: i64,
    /// Db, of the backbone bank: for hard negatives.
    pub backbone: i64,
    /// Of the corner banks: D where there are local views.
    pub local: i64,
}

/// Which of the banks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bank {
    /// Projected global views, (·, D).
    Global,
    /// Pooled backbone features, (·, Db).
    Backbone,
    /// Projected local views of corner 0 to 3, (·, D).
    Corner(usize),
}

impl Banks {
    /// Random unit rows of `n` patches, those that `plan` gives to `rank`: a row is a function of (seed, row) alone. `dtype` is `Float`,
    /// `BFloat16` or `Half`.
    #[must_use]
    pub fn random(
        seed: u64,
        n: i64,
        widths: Widths,
        plan: ShardPlan,
        rank: usize,
        (dtype, device): (Kind, Device),
    ) -> Self {
        let banks = Self::empty(n, widths, plan, rank, (dtype, device));
        let rows: Vec<i64> = banks.held_rows();
        for (stream, (_, bank)) in (0..).zip(banks.named()) {
            for (block, start) in rows.chunks(BLOCK as usize).zip((0..).step_by(BLOCK as usize)) {
                let values = random_rows(seed, stream, block, bank.size()[1]);
                tch::no_grad(|| bank.narrow(0, start, block.len() as i64).copy_(&values));
            }
        }
        banks
    }

    /// Whole banks of a world of one, from rows in order: (N, D), (N, Db), four of (N, D).
    #[must_use]
    pub fn from_rows(all: &BankRows, plan: ShardPlan, rank: usize) -> Self {
        let n = all.global.size()[0];
        let [dim, backbone, local] = [&all.global, &all.backbone, &all.corners[0]].map(|bank| bank.size()[1]);
        let width = Widths { dim, backbone, local };
        let banks = Self::empty(n, width, plan, rank, (all.global.kind(), all.global.device()));
        for ((_, bank), (_, from)) in banks.named().into_iter().zip(all.named()) {
            tch::no_grad(|| bank.shallow_clone().copy_(&from.index_select(0, &banks.rows)));
        }
        banks
    }

    fn empty(n: i64, widths: Widths, plan: ShardPlan, rank: usize, (dtype, device): (Kind, Device)) -> Self {
        let mut base = vec![-1; SHARDS as usize];
        let mut held = Vec::new();
        let mut lay = |shards: &mut dyn Iterator<Item = i64>| {
            for shard in shards {
                base[shard as usize] = held.len() as i64;
                held.extend(rows_of_shard(shard, n));
            }
            held.len() as i64
        };
        let owned = lay(&mut plan.owned(rank));
        let all = lay(&mut plan.copied(rank));
        let bank = |width: i64| Tensor::empty([all, width], (dtype, device));
        Self {
            base_tensor: Tensor::from_slice(&base).to_device(device),
            rows: Tensor::from_slice(&held).to_device(device),
            plan,
            rank,
            n,
            base,
            owned,
            global: bank(widths.dim),
            backbone: bank(widths.backbone),
            corners: [(); 4].map(|()| bank(widths.local)),
        }
    }

    /// Rows N over all ranks.
    #[must_use]
    pub fn len(&self) -> i64 {
        self.n
    }

    /// Whether there are no rows at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// Rows this rank owns: slots 0 to this.
    #[must_use]
    pub fn owned(&self) -> i64 {
        self.owned
    }

    /// Rows this rank holds, second copies among them.
    #[must_use]
    pub fn held(&self) -> i64 {
        self.rows.size()[0]
    }

    /// Device of the banks.
    #[must_use]
    pub fn device(&self) -> Device {
        self.global.device()
    }

    /// Who holds what.
    #[must_use]
    pub fn plan(&self) -> &ShardPlan {
        &self.plan
    }

    /// Widths of rows.
    #[must_use]
    pub fn widths(&self) -> Widths {
        let [dim, backbone, local] = [&self.global, &self.backbone, &self.corners[0]].map(|bank| bank.size()[1]);
        Widths { dim, backbone, local }
    }

    /// Bytes of bank rows on this rank.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.named().iter().map(|(_, bank)| bank.numel() * bank.kind().elt_size_in_bytes()).sum()
    }

    /// (held) i64: the row in each slot.
    pub fn slot_rows(&self) -> &Tensor {
        &self.rows
    }

    /// The rows this rank owns, in order of their slots.
    #[must_use]
    pub fn owned_rows(&self) -> Vec<i64> {
        self.plan.owned(self.rank).flat_map(|shard| rows_of_shard(shard, self.n)).collect()
    }

    fn held_rows(&self) -> Vec<i64> {
        let copies = self.plan.copied(self.rank).flat_map(|shard| rows_of_shard(shard, self.n));
        self.owned_rows().into_iter().chain(copies).collect()
    }

    /// Slot of a row, where this rank holds it.
    #[must_use]
    pub fn slot(&self, row: i64) -> Option<i64> {
        let base = *self.base.get(usize::try_from(shard_of(row)).ok()?)?;
        (base >= 0).then_some(base + row / SHARDS)
    }

    /// Slot of a row, where this rank owns it.
    #[must_use]
    pub fn owned_slot(&self, row: i64) -> Option<i64> {
        self.slot(row).filter(|&slot| slot < self.owned)
    }

    /// Slots of `rows`, a tensor of any shape on the banks' device, and which of them are owned. A slot that is not is 0. Waits for
    /// nothing.
    pub fn owned_slots(&self, rows: &Tensor) -> (Tensor, Tensor) {
        let base = self.base_tensor.take(&rows.remainder(SHARDS));
        let slots = &base + rows.divide_scalar_mode(SHARDS, "floor");
        let owned = base.ge(0).logical_and(&slots.lt(self.owned));
        (slots.masked_fill(&owned.logical_not(), 0), owned)
    }

    /// All held rows of a bank as they are kept, (held, ·).
    pub fn bank(&self, bank: Bank) -> &Tensor {
        match bank {
            Bank::Global => &self.global,
            Bank::Backbone => &self.backbone,
            Bank::Corner(corner) => &self.corners[corner],
        }
    }

    /// Rows in `slots` as f32: (…) i64 to (…, ·).
    pub fn at(&self, bank: Bank, slots: &Tensor) -> Tensor {
        let bank = self.bank(bank);
        let mut shape = slots.size();
        shape.push(bank.size()[1]);
        bank.index_select(0, &slots.view([-1])).to_kind(Kind::Float).view(shape.as_slice())
    }

    /// Similarity of queries (B, ·) to all owned rows: (B, owned) f32, computed in the queries' kind. On a CPU it is written over `room`
    /// where that has this shape: new pages for a matrix as large as this cost a good part of the product.
    pub fn scores(&self, bank: Bank, queries: &Tensor, room: Option<Tensor>) -> Tensor {
        let owned = self.bank(bank).narrow(0, 0, self.owned);
        let gpu = self.device() != Device::Cpu;
        if gpu && owned.kind() == Kind::Float && queries.kind() == Kind::Float {
            return queries.matmul(&owned.tr());
        }
        // Rows of fewer bits are widened block by block: sums are f32, and no copy of the bank is made. On a CPU a block, its scores
        // and their transposition stay in the cache, and rows × queries is the faster product where queries are few.
        let block = if gpu { BLOCK } else { BLOCK_CPU };
        let shape = [queries.size()[0], self.owned];
        let scores = room
            .filter(|room| room.size() == shape)
            .unwrap_or_else(|| Tensor::empty(shape, (Kind::Float, self.device())));
        let columns = queries.tr().contiguous();
        for start in (0..self.owned).step_by(block as usize) {
            let len = block.min(self.owned - start);
            let rows = owned.narrow(0, start, len).to_kind(queries.kind());
            scores.narrow(1, start, len).copy_(&rows.matmul(&columns).tr());
        }
        scores
    }

    fn named(&self) -> [(&'static str, &Tensor); 6] {
        let [a, b, c, d] = &self.corners;
        [("global", &self.global), ("backbone", &self.backbone), ("tl", a), ("tr", b), ("bl", c), ("br", d)]
    }

    /// row ← unit((1 − m)·row + m·unit(feature)) for those of `rows` that are held here; the others are for their holders. Of a
    /// repeated row the last feature counts.
    ///
    /// # Errors
    /// [`BankError::Row`], [`BankError::Shape`].
    pub fn apply(&mut self, rows: &[i64], features: &BankRows, momentum: f64) -> Result<(), BankError> {
        self.check(rows, features)?;
        let last: HashMap<i64, i64> =
            rows.iter().zip(0..).filter_map(|(&row, at)| Some((self.slot(row)?, at))).collect();
        let mut pairs: Vec<(i64, i64)> = last.into_iter().collect();
        if pairs.is_empty() {
            return Ok(());
        }
        pairs.sort_unstable();
        let (slots, from): (Vec<i64>, Vec<i64>) = pairs.into_iter().unzip();
        let slots = Tensor::from_slice(&slots).to_device(self.device());
        let from = Tensor::from_slice(&from).to_device(self.device());
        tch::no_grad(|| {
            for ((_, bank), (_, feature)) in self.named().into_iter().zip(features.named()) {
                let feature = unit(&feature.to_device(bank.device()).to_kind(Kind::Float).index_select(0, &from));
                let old = bank.index_select(0, &slots).to_kind(Kind::Float);
                let new = unit(&(old * (1.0 - momentum) + feature * momentum)).to_kind(bank.kind());
                let _ = bank.shallow_clone().index_copy_(0, &slots, &new);
            }
        });
        Ok(())
    }

    /// Copies of `rows`, all of them held here, as f32 on the banks' device.
    ///
    /// # Errors
    /// [`BankError::Row`], [`BankError::Elsewhere`].
    pub fn rows(&self, rows: &[i64]) -> Result<BankRows, BankError> {
        let slots = self.slots(rows)?;
        let take = |bank| tch::no_grad(|| self.at(bank, &slots));
        Ok(BankRows {
            global: take(Bank::Global),
            backbone: take(Bank::Backbone),
            corners: [0, 1, 2, 3].map(|corner| take(Bank::Corner(corner))),
        })
    }

    /// Puts rows as they are, such as those of a checkpoint, where they are held here; others are left out. `rows` must be distinct.
    ///
    /// # Errors
    /// [`BankError::Row`], [`BankError::Shape`].
    pub fn put(&mut self, rows: &[i64], values: &BankRows) -> Result<(), BankError> {
        self.check(rows, values)?;
        let (slots, from): (Vec<i64>, Vec<i64>) =
            rows.iter().zip(0_i64..).filter_map(|(&row, at)| Some((self.slot(row)?, at))).unzip();
        let slots = Tensor::from_slice(&slots).to_device(self.device());
        let from = Tensor::from_slice(&from).to_device(self.device());
        tch::no_grad(|| {
            for ((_, bank), (_, value)) in self.named().into_iter().zip(values.named()) {
                let value = value.to_device(bank.device()).index_select(0, &from).to_kind(bank.kind());
                let _ = bank.shallow_clone().index_copy_(0, &slots, &value);
            }
        });
        Ok(())
    }

    fn slots(&self, rows: &[i64]) -> Result<Tensor, BankError> {
        self.check_rows(rows)?;
        let slots = rows
            .iter()
            .map(|&row| {
                let owner = self.plan.owner(shard_of(row));
                self.slot(row).ok_or(BankError::Elsewhere { row, owner, rank: self.rank })
            })
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Tensor::from_slice(&slots).to_device(self.device()))
    }

    fn check_rows(&self, rows: &[i64]) -> Result<(), BankError> {
        let n = self.n;
        rows.iter().find(|&&row| row < 0 || row >= n).map_or(Ok(()), |&row| Err(BankError::Row { row, n }))
    }

    fn check(&self, rows: &[i64], values: &BankRows) -> Result<(), BankError> {
        self.check_rows(rows)?;
        for ((name, bank), (_, value)) in self.named().into_iter().zip(values.named()) {
            let expected = [rows.len() as i64, bank.size()[1]];
            if value.size() != expected {
                return Err(BankError::Shape { bank: name, expected, got: value.size() });
            }
        }
        Ok(())
    }
}

/// Rows divided by their Euclidean length, at least 1e-12: (n, D) to (n, D).
pub fn unit(rows: &Tensor) -> Tensor {
    let length = (rows * rows).sum_dim_intlist([1_i64].as_slice(), true, Kind::Float).sqrt();
    rows / length.clamp_min(1e-12)
}

fn random_rows(seed: u64, stream: u64, rows: &[i64], dim: i64) -> Tensor {
    let width = dim as usize;
    let mut values = vec![0_f32; rows.len() * width];
    values.par_chunks_exact_mut(width.max(1)).zip(rows).for_each(|(out, &row)| {
        let mut rng = sgcl_draw::rng(seed, Purpose::Bank, 0, row as u64);
        rng.set_stream(stream);
        out.fill_with(|| StandardNormal.sample(&mut rng));
        let length = out.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-12);
        out.iter_mut().for_each(|v| *v /= length);
    });
    Tensor::from_slice(&values).view([rows.len() as i64, dim])
}
