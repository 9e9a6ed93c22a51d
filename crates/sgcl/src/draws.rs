//! Random negatives and ranks of hard negatives, as functions of (seed, epoch, step, lane).

use rand::Rng as _;
use rand_distr::{Distribution, OpenClosed01};
use sgcl_draw::Purpose;

fn stream(seed: u64, purpose: Purpose, epoch: u64, step: u64, lane: u64) -> sgcl_draw::Rng {
    let mut rng = sgcl_draw::rng(seed, purpose, epoch, step);
    rng.set_stream(lane);
    rng
}

/// `k` bank rows of `n`, uniform with replacement. Empty where `n` is 0.
#[must_use]
pub fn negatives(seed: u64, epoch: u64, step: u64, lane: u64, k: usize, n: i64) -> Vec<i64> {
    if n < 1 {
        return Vec::new();
    }
    let mut rng = stream(seed, Purpose::Negatives, epoch, step, lane);
    (0..k).map(|_| rng.random_range(0..n)).collect()
}

/// `count` distinct bank rows of `n`, the sample that a step looks through. The cost does not depend on `n`.
#[must_use]
pub fn candidates(seed: u64, epoch: u64, step: u64, count: usize, n: i64) -> Vec<i64> {
    let mut rng = stream(seed, Purpose::Negatives, epoch, step, u64::MAX);
    let n = usize::try_from(n).unwrap_or(0);
    rand::seq::index::sample(&mut rng, n, count.min(n)).into_iter().map(|row| row as i64).collect()
}

/// Draws ranks without replacement, weighted by a Beta density over the top of the ranking.
#[derive(Clone, Debug)]
pub struct HardRanks {
    log_weights: Vec<f32>,
    count: usize,
}

impl HardRanks {
    /// `count` ranks (H) of the `top` best, by the density of Beta(a, b), published Beta(5, 15); `top` = ⌊top fraction · N⌋. Fewer
    /// where `top` < `count`.
    #[must_use]
    pub fn new(top: usize, count: usize, [a, b]: [f64; 2]) -> Self {
        let log_weight = |rank: usize| {
            let p = (rank as f64 + 0.5) / top as f64;
            ((a - 1.0) * p.ln() + (b - 1.0) * (1.0 - p).ln()) as f32
        };
        Self { log_weights: (0..top).map(log_weight).collect(), count: count.min(top) }
    }

    /// Distinct ranks below `top`, by Gumbel top-k: the law of drawing one after another without replacement.
    #[must_use]
    pub fn draw(&self, seed: u64, epoch: u64, step: u64, lane: u64) -> Vec<i64> {
        let mut rng = stream(seed, Purpose::HardRanks, epoch, step, lane);
        let mut keys: Vec<(f32, i64)> = self
            .log_weights
            .iter()
            .zip(0..)
            .map(|(&weight, rank)| {
                let u: f32 = OpenClosed01.sample(&mut rng);
                // u = 1 gives +inf, which wins as a maximal Gumbel should.
                (weight - (-u.ln()).ln(), rank)
            })
            .collect();
        let best_first = |a: &(f32, i64), b: &(f32, i64)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if self.count < keys.len() {
            keys.select_nth_unstable_by(self.count, best_first);
            keys.truncate(self.count);
        }
        keys.sort_unstable_by(best_first);
        keys.into_iter().map(|(_, rank)| rank).collect()
    }
}
