//! Feature memory: one unit row a patch in each of six banks, replicated on every rank.

use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use sgcl_draw::Purpose;
use std::collections::HashMap;
use tch::{Device, Kind, Tensor};

/// Corner banks in order; local views are corner-major in the same order.
pub const CORNERS: [&str; 4] = ["tl", "tr", "bl", "br"];

/// Virtual shards a bank is dealt in.
pub const SHARDS: i64 = 1024;

/// Virtual shard of a patch id.
#[must_use]
pub fn shard_of(id: i64) -> i64 {
    id.rem_euclid(SHARDS)
}

/// Patch ids below `n` in a virtual shard, ascending.
pub fn rows_of_shard(shard: i64, n: i64) -> impl Iterator<Item = i64> {
    (shard..n).step_by(SHARDS as usize)
}

/// Rows that cannot be read from or written to a bank.
#[derive(Debug, thiserror::Error)]
pub enum BankError {
    /// A patch id outside the bank.
    #[error("patch id {id} is outside a bank of {n} rows; the patch set and the bank must be of the same run")]
    Id {
        /// The id.
        id: i64,
        /// Rows of the bank.
        n: i64,
    },
    /// Features of another shape.
    #[error(
        "bank {bank} takes rows of shape {expected:?}, got {got:?}; use features of the same model and as many as ids"
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

/// One row of every bank for each of a list of patch ids, in the order of the list.
#[derive(Debug)]
pub struct BankRows {
    /// (n, D) f32.
    pub global: Tensor,
    /// (n, Db) f32.
    pub backbone: Tensor,
    /// tl, tr, bl, br: (n, D) f32 each.
    pub corners: [Tensor; 4],
}

impl BankRows {
    fn named(&self) -> [(&'static str, &Tensor); 6] {
        let [a, b, c, d] = &self.corners;
        [("global", &self.global), ("backbone", &self.backbone), ("tl", a), ("tr", b), ("bl", c), ("br", d)]
    }
}

/// The six banks, f32 unit rows on one device.
#[derive(Debug)]
pub struct Banks {
    /// (N, D).
    pub global: Tensor,
    /// (N, Db).
    pub backbone: Tensor,
    /// tl, tr, bl, br: (N, D) each.
    pub corners: [Tensor; 4],
}

impl Banks {
    /// Random unit rows: a row is a function of (seed, patch id) alone. `dim` is D, `backbone_dim` Db.
    #[must_use]
    pub fn random(seed: u64, n: i64, dim: i64, backbone_dim: i64, device: Device) -> Self {
        let bank = |stream, dim| random_rows(seed, stream, n, dim).to_device(device);
        Self {
            global: bank(0, dim),
            backbone: bank(1, backbone_dim),
            corners: [2, 3, 4, 5].map(|stream| bank(stream, dim)),
        }
    }

    /// Rows N.
    #[must_use]
    pub fn len(&self) -> i64 {
        self.global.size()[0]
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Device of the banks.
    #[must_use]
    pub fn device(&self) -> Device {
        self.global.device()
    }

    fn named(&self) -> [(&'static str, &Tensor); 6] {
        let [a, b, c, d] = &self.corners;
        [("global", &self.global), ("backbone", &self.backbone), ("tl", a), ("tr", b), ("bl", c), ("br", d)]
    }

    /// row ← unit((1 − m)·row + m·unit(feature)). Of a repeated id the last feature counts, the others are dropped.
    pub fn apply(&mut self, ids: &[i64], features: &BankRows, momentum: f64) -> Result<(), BankError> {
        self.check(ids, features)?;
        let last: HashMap<i64, i64> = ids.iter().enumerate().map(|(at, &id)| (id, at as i64)).collect();
        let mut pairs: Vec<(i64, i64)> = last.into_iter().collect();
        pairs.sort_unstable();
        let (rows, from): (Vec<i64>, Vec<i64>) = pairs.into_iter().unzip();
        let rows = Tensor::from_slice(&rows).to_device(self.device());
        let from = Tensor::from_slice(&from).to_device(self.device());
        tch::no_grad(|| {
            for ((_, bank), (_, feature)) in self.named().into_iter().zip(features.named()) {
                let feature = unit(&feature.to_device(bank.device()).index_select(0, &from));
                let old = bank.index_select(0, &rows);
                let _ =
                    bank.shallow_clone().index_copy_(0, &rows, &unit(&(old * (1.0 - momentum) + feature * momentum)));
            }
        });
        Ok(())
    }

    /// Copies of the rows of `ids`, on the banks' device.
    pub fn rows(&self, ids: &[i64]) -> Result<BankRows, BankError> {
        self.check_ids(ids)?;
        let at = Tensor::from_slice(ids).to_device(self.device());
        let take = |bank: &Tensor| tch::no_grad(|| bank.index_select(0, &at));
        Ok(BankRows {
            global: take(&self.global),
            backbone: take(&self.backbone),
            corners: self.corners.each_ref().map(take),
        })
    }

    /// Puts rows back as they are, such as those of a checkpoint. `ids` must be distinct.
    pub fn put(&mut self, ids: &[i64], rows: &BankRows) -> Result<(), BankError> {
        self.check(ids, rows)?;
        let at = Tensor::from_slice(ids).to_device(self.device());
        tch::no_grad(|| {
            for ((_, bank), (_, row)) in self.named().into_iter().zip(rows.named()) {
                let _ = bank.shallow_clone().index_copy_(0, &at, &row.to_device(bank.device()));
            }
        });
        Ok(())
    }

    fn check_ids(&self, ids: &[i64]) -> Result<(), BankError> {
        let n = self.len();
        ids.iter().find(|&&id| id < 0 || id >= n).map_or(Ok(()), |&id| Err(BankError::Id { id, n }))
    }

    fn check(&self, ids: &[i64], rows: &BankRows) -> Result<(), BankError> {
        self.check_ids(ids)?;
        for ((name, bank), (_, row)) in self.named().into_iter().zip(rows.named()) {
            let expected = [ids.len() as i64, bank.size()[1]];
            if row.size() != expected {
                return Err(BankError::Shape { bank: name, expected, got: row.size() });
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

fn random_rows(seed: u64, stream: u64, n: i64, dim: i64) -> Tensor {
    let width = dim as usize;
    let mut values = vec![0_f32; n as usize * width];
    values.par_chunks_exact_mut(width.max(1)).enumerate().for_each(|(row, out)| {
        let mut rng = sgcl_draw::rng(seed, Purpose::Bank, 0, row as u64);
        rng.set_stream(stream);
        out.fill_with(|| StandardNormal.sample(&mut rng));
        let length = out.iter().map(|v| v * v).sum::<f32>().sqrt().max(1e-12);
        out.iter_mut().for_each(|v| *v /= length);
    });
    Tensor::from_slice(&values).view([n, dim])
}
