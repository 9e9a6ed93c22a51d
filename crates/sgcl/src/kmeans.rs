//! Euclidean k-means over the global bank, several runs, the same labels on every rank.

use crate::collective::{Collective, CollectiveError};
use rand::seq::index::sample;
use sgcl_draw::Purpose;
use tch::{Kind, Tensor};

/// Scores held at once: 2^25 f32, 128 MiB.
const SCORES: i64 = 1 << 25;

/// Sizes of a clustering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KMeans {
    /// Independent runs M.
    pub runs: i64,
    /// Clusters of a run, at most N.
    pub clusters: i64,
    /// Lloyd iterations.
    pub iterations: i64,
}

impl Default for KMeans {
    fn default() -> Self {
        Self { runs: 3, clusters: 1000, iterations: 20 }
    }
}

/// A clustering failed.
#[derive(Debug, thiserror::Error)]
pub enum KMeansError {
    /// Sizes that do not fit.
    #[error(
        "k-means of {runs} runs x {clusters} clusters does not fit {n} rows; use at least 1 run and 1 to {n} clusters"
    )]
    Size {
        /// Runs.
        runs: i64,
        /// Clusters.
        clusters: i64,
        /// Rows.
        n: i64,
    },
    /// Labels could not be exchanged.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

/// Labels (M, N) i64 of `rows` (N, D) f32. Run r is computed by rank r mod world and gathered: labels agree by construction.
pub fn cluster(
    rows: &Tensor,
    size: KMeans,
    seed: u64,
    epoch: u64,
    collective: &dyn Collective,
) -> Result<Tensor, KMeansError> {
    let n = rows.size()[0];
    if size.runs < 1 || size.clusters < 1 || size.clusters > n {
        return Err(KMeansError::Size { runs: size.runs, clusters: size.clusters, n });
    }
    let (rank, world) = (collective.rank() as i64, collective.world() as i64);
    let slots = (size.runs + world - 1) / world;
    let mine: Vec<Tensor> = (0..slots)
        .map(|slot| slot * world + rank)
        .map(|run| {
            if run < size.runs {
                tch::no_grad(|| one_run(rows, size, seed, epoch, run as u64))
            } else {
                Tensor::zeros([n], (Kind::Int64, rows.device()))
            }
        })
        .collect();
    let all = collective.all_gather(&Tensor::stack(&mine, 0))?;
    let order: Vec<i64> = (0..size.runs).map(|run| run % world * slots + run / world).collect();
    Ok(all.index_select(0, &Tensor::from_slice(&order).to_device(all.device())))
}

fn one_run(rows: &Tensor, size: KMeans, seed: u64, epoch: u64, run: u64) -> Tensor {
    let n = rows.size()[0];
    let mut rng = sgcl_draw::rng(seed, Purpose::KMeans, epoch, run);
    let first: Vec<i64> = sample(&mut rng, n as usize, size.clusters as usize).iter().map(|i| i as i64).collect();
    let mut centres = rows.index_select(0, &Tensor::from_slice(&first).to_device(rows.device()));
    for _ in 0..size.iterations {
        let (labels, score) = assign(rows, &centres);
        centres = means(rows, &labels, &score, size.clusters);
    }
    assign(rows, &centres).0
}

/// Nearest centre of each row: labels (N) i64 and x·c − |c|²/2 (N), in blocks of bounded memory.
fn assign(rows: &Tensor, centres: &Tensor) -> (Tensor, Tensor) {
    let half = (centres * centres).sum_dim_intlist([1_i64].as_slice(), false, Kind::Float) * 0.5;
    let centres = centres.tr();
    let block = (SCORES / centres.size()[1]).max(1);
    let (scores, labels): (Vec<_>, Vec<_>) =
        rows.split(block, 0).iter().map(|part| (part.matmul(&centres) - &half).max_dim(1, false)).unzip();
    (Tensor::cat(&labels, 0), Tensor::cat(&scores, 0))
}

/// Means of the clusters; an empty cluster takes one of the rows farthest from their centres, each a different one.
fn means(rows: &Tensor, labels: &Tensor, score: &Tensor, clusters: i64) -> Tensor {
    let options = (Kind::Float, rows.device());
    let mut sums = Tensor::zeros([clusters, rows.size()[1]], options);
    let _ = sums.index_add_(0, labels, rows);
    let mut counts = Tensor::zeros([clusters], options);
    let _ = counts.index_add_(0, labels, &Tensor::ones([rows.size()[0]], options));
    let mut centres = sums / counts.clamp_min(1.0).unsqueeze(1);
    let empty = counts.eq(0.0).nonzero().view([-1]);
    if empty.size()[0] > 0 {
        // |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2)
        let distance = (rows * rows).sum_dim_intlist([1_i64].as_slice(), false, Kind::Float) - score * 2.0;
        let far = distance.topk(empty.size()[0], 0, true, true).1;
        let _ = centres.index_copy_(0, &empty, &rows.index_select(0, &far));
    }
    centres
}
