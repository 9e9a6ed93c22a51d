//! Whether features still tell patches apart: an encoder that maps all to one point has a small loss and is worth nothing.

use super::{Bank, Banks};
use crate::collective::{Collective, CollectiveError};
use tch::{Device, Kind, Tensor};

/// How far the rows of the global bank spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Standard deviation of a coordinate, times √D: 1 for rows evenly on the sphere, 0 where all are one.
    pub deviation: f64,
    /// exp of the entropy of the covariance's eigenvalues: how many directions are used, 1 to D.
    pub effective_rank: f64,
}

impl Spread {
    /// Whether rows have (nearly) become one point or one line.
    #[must_use]
    pub fn collapsed(self) -> bool {
        self.deviation < 0.05 || self.effective_rank < 2.0
    }
}

const BLOCK: i64 = 1 << 14;

impl Banks {
    /// The spread of all rows, over all ranks.
    ///
    /// # Errors
    /// The ring fails.
    pub fn spread(&self, ring: &dyn Collective) -> Result<Spread, CollectiveError> {
        let d = self.widths().dim;
        tch::no_grad(|| {
            // Σ rows and Σ row·rowᵀ, in f64.
            let mut moments = Tensor::zeros([d + 1, d], (Kind::Double, self.device()));
            let owned = self.bank(Bank::Global).narrow(0, 0, self.owned());
            for start in (0..self.owned()).step_by(BLOCK as usize) {
                let rows = owned.narrow(0, start, BLOCK.min(self.owned() - start)).to_kind(Kind::Double);
                let ones = Tensor::ones([1, rows.size()[0]], (Kind::Double, self.device()));
                moments += Tensor::cat(&[ones, rows.tr()], 0).matmul(&rows);
            }
            ring.all_reduce_sum(&mut moments)?;
            let moments = moments.to_device(Device::Cpu) / self.len().max(1) as f64;
            let mean = moments.narrow(0, 0, 1);
            let covariance = moments.narrow(0, 1, d) - mean.tr().matmul(&mean);
            let variance = covariance.diag(0).sum(Kind::Double).double_value(&[]).max(0.0);
            let eigen = covariance.linalg_eigvalsh("L").clamp_min(0.0);
            let share = &eigen / eigen.sum(Kind::Double).clamp_min(1e-300);
            let entropy = -(&share * share.clamp_min(1e-300).log()).sum(Kind::Double);
            // Σ of D variances is 1 − |mean|² for unit rows.
            Ok(Spread { deviation: variance.sqrt(), effective_rank: entropy.double_value(&[]).exp() })
        })
    }
}
