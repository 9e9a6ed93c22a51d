//! Euclidean k-means over the global bank, several runs, where every rank clusters the rows it owns.
//!
//! Centres are means of sums that ranks add up in fixed point: integer sums do not depend on their order, so labels are the same for any
//! world size and on GPUs, whose float additions come in no fixed order. A copy of a shard is labelled with its owner's centres.

use crate::bank::{Bank, Banks};
use crate::collective::{Collective, CollectiveError};
use rand::seq::index::sample;
use sgcl_draw::Purpose;
use tch::{Device, Kind, Tensor};

/// Rows compared with all centres at once: on a CPU their scores stay in its cache, on a GPU a block keeps it busy.
const BLOCK_CPU: i64 = 1024;
const BLOCK_GPU: i64 = 1 << 16;
/// Fixed point of sums of unit rows: 2^31 rows fit.
const ONE: f64 = (1_i64 << 30) as f64;

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
        "k-means of {runs} runs x {clusters} clusters does not fit {n} rows; use 1 to {n} clusters, and runs so few that \
         clusters^runs stays below 2^62"
    )]
    Size {
        /// Runs.
        runs: i64,
        /// Clusters.
        clusters: i64,
        /// Rows.
        n: i64,
    },
    /// Sums could not be exchanged.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
}

/// Labels (M, held) i64 of the rows this rank holds.
///
/// # Errors
/// See [`KMeansError`].
pub fn cluster(
    banks: &Banks,
    size: KMeans,
    seed: u64,
    epoch: u64,
    ring: &dyn Collective,
) -> Result<Tensor, KMeansError> {
    let n = banks.len();
    let fits = (size.clusters.max(2) as f64).log2() * size.runs as f64 <= 62.0;
    if size.runs < 1 || size.clusters < 1 || size.clusters > n || !fits {
        return Err(KMeansError::Size { runs: size.runs, clusters: size.clusters, n });
    }
    let runs = (0..size.runs).map(|run| {
        let lloyd = Lloyd { banks, clusters: size.clusters, ring };
        tch::no_grad(|| lloyd.run(size.iterations, seed, epoch, run as u64))
    });
    Ok(Tensor::stack(&runs.collect::<Result<Vec<_>, _>>()?, 0))
}

/// One number for the labels (M, held) of all runs: (held) i64, equal where every run agrees.
pub fn joint_labels(labels: &Tensor, clusters: i64) -> Tensor {
    let mut joint = labels.select(0, 0).copy();
    for run in 1..labels.size()[0] {
        joint = joint * clusters + labels.select(0, run);
    }
    joint
}

/// Mean squared distance of all rows to their nearest of `centres` (K, D), over all ranks.
///
/// # Errors
/// The ring fails.
pub fn inertia(banks: &Banks, labels: &Tensor, clusters: i64, ring: &dyn Collective) -> Result<f64, CollectiveError> {
    let lloyd = Lloyd { banks, clusters, ring };
    tch::no_grad(|| {
        let owned = labels.narrow(0, 0, banks.owned());
        let mut members = Members::none(&lloyd);
        lloyd.blocks(0, banks.owned(), |start, rows| {
            members.assign(start, &rows, &owned.narrow(0, start, rows.size()[0]))
        });
        let centres = lloyd.means(&members)?.0;
        let mut total = Tensor::zeros([1], (Kind::Double, banks.device()));
        lloyd.blocks(0, banks.owned(), |start, rows| {
            let own = centres.index_select(0, &owned.narrow(0, start, rows.size()[0]));
            total += (rows - own).square().sum(Kind::Double);
        });
        ring.all_reduce_sum(&mut total)?;
        Ok(total.double_value(&[0]) / banks.len() as f64)
    })
}

struct Lloyd<'a> {
    banks: &'a Banks,
    clusters: i64,
    ring: &'a dyn Collective,
}

impl Lloyd<'_> {
    fn run(&self, iterations: i64, seed: u64, epoch: u64, run: u64) -> Result<Tensor, CollectiveError> {
        let mut rng = sgcl_draw::rng(seed, Purpose::KMeans, epoch, run);
        let first = sample(&mut rng, self.banks.len() as usize, self.clusters as usize);
        let first: Vec<i64> = first.iter().map(|row| row as i64).collect();
        let mut centres = self.features(&Tensor::from_slice(&first).to_device(self.banks.device()))?;
        let mut members = Members::none(self);
        for _ in 0..iterations {
            centres = self.iterate(&centres, &mut members)?;
        }
        self.reassign(&centres, &mut members);
        let copies = self.assign(&centres, self.banks.owned(), self.banks.held());
        Ok(Tensor::cat(&[members.labels, copies], 0))
    }

    /// Features of rows, from whoever owns them.
    fn features(&self, rows: &Tensor) -> Result<Tensor, CollectiveError> {
        let (slots, owned) = self.banks.owned_slots(rows);
        let mut features = self.banks.at(Bank::Global, &slots) * owned.unsqueeze(1);
        self.ring.all_reduce_sum(&mut features)?;
        Ok(features)
    }

    fn iterate(&self, centres: &Tensor, members: &mut Members) -> Result<Tensor, CollectiveError> {
        self.reassign(centres, members);
        let (mut centres, counts) = self.means(members)?;
        let empty = counts.eq(0).nonzero().view([-1]);
        if empty.size()[0] > 0 {
            let far = self.farthest(&members.scores, empty.size()[0])?;
            let _ = centres.index_copy_(0, &empty, &self.features(&far)?);
        }
        Ok(centres)
    }

    /// Brings the owned rows to their nearest centres. A row whose own centre is where it was is compared with those that moved alone.
    fn reassign(&self, centres: &Tensor, members: &mut Members) {
        let all = Compare::new(centres);
        let moved = members.centres.replace(centres.shallow_clone()).map(|before| Moved::new(&before, centres));
        self.blocks(0, self.banks.owned(), |start, rows| {
            let (scores, labels) = match &moved {
                None => all.nearest(&rows),
                Some(moved) => {
                    let part = |t: &Tensor| t.narrow(0, start, rows.size()[0]).copy();
                    moved.nearest(&rows, part(&members.scores), part(&members.labels), &all)
                }
            };
            members.scores.narrow(0, start, scores.size()[0]).copy_(&scores);
            members.assign(start, &rows, &labels);
        });
    }

    /// Rows farthest from their centres, `count` different ones of all ranks.
    fn farthest(&self, scores: &Tensor, count: i64) -> Result<Tensor, CollectiveError> {
        let owned = self.banks.owned();
        let mut distances = Vec::new();
        self.blocks(0, owned, |start, rows| {
            // |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2)
            let square = rows.square().sum_dim_intlist([1_i64].as_slice(), false, Kind::Float);
            distances.push(square - scores.narrow(0, start, rows.size()[0]) * 2.0);
        });
        let device = self.banks.device();
        let all =
            if distances.is_empty() { Tensor::zeros([0], (Kind::Float, device)) } else { Tensor::cat(&distances, 0) };
        let (far, slots) = all.topk(count.min(owned), 0, true, true);
        let rows = if owned == 0 { slots } else { self.banks.slot_rows().take(&slots) };
        let far = self.ring.all_gather_uneven(&far.to_kind(Kind::Double))?;
        let rows = self.ring.all_gather_uneven(&rows)?;
        Ok(rows.index_select(0, &far.topk(count, 0, true, true).1))
    }

    /// The nearest of `centres` to the rows in slots `from` to `to`.
    fn assign(&self, centres: &Tensor, from: i64, to: i64) -> Tensor {
        let compare = Compare::new(centres);
        let labels = Tensor::empty([to - from], (Kind::Int64, self.banks.device()));
        self.blocks(from, to, |start, rows| {
            labels.narrow(0, start - from, rows.size()[0]).copy_(&compare.nearest(&rows).1);
        });
        labels
    }

    /// Means over all ranks, and counts; 0 where empty.
    fn means(&self, members: &Members) -> Result<(Tensor, Tensor), CollectiveError> {
        let mut all = Tensor::cat(&[&members.sums, &members.counts], 1);
        self.ring.all_reduce_sum(&mut all)?;
        let width = all.size()[1] - 1;
        let counts = all.narrow(1, width, 1);
        let means = all.narrow(1, 0, width).to_kind(Kind::Double) / counts.clamp_min(1) / ONE;
        Ok((means.to_kind(Kind::Float), counts.view([-1])))
    }

    /// Calls `each` with the first slot and the rows, f32, of every block of slots `from` to `to`.
    fn blocks(&self, from: i64, to: i64, mut each: impl FnMut(i64, Tensor)) {
        let bank = self.banks.bank(Bank::Global);
        let block = if self.banks.device() == Device::Cpu { BLOCK_CPU } else { BLOCK_GPU };
        for start in (from..to).step_by(block as usize) {
            each(start, bank.narrow(0, start, block.min(to - start)).to_kind(Kind::Float));
        }
    }
}

/// This rank's rows by cluster. Sums are integers, so a row that moves is taken from one and added to another without a trace, and an
/// iteration pays for the rows that move: few, after the first ones.
struct Members {
    /// (owned), −1 at first.
    labels: Tensor,
    /// (owned) x·c − |c|²/2 of each row and its centre.
    scores: Tensor,
    /// (K, D) that labels and scores are of; none at first.
    centres: Option<Tensor>,
    /// (K, D) fixed point.
    sums: Tensor,
    /// (K, 1)
    counts: Tensor,
}

impl Members {
    fn none(lloyd: &Lloyd<'_>) -> Self {
        let options = (Kind::Int64, lloyd.banks.device());
        Self {
            labels: Tensor::full([lloyd.banks.owned()], -1, options),
            scores: Tensor::zeros([lloyd.banks.owned()], (Kind::Float, lloyd.banks.device())),
            centres: None,
            sums: Tensor::zeros([lloyd.clusters, lloyd.banks.widths().dim], options),
            counts: Tensor::zeros([lloyd.clusters, 1], options),
        }
    }

    /// Moves rows (n, D), which start at slot `start`, to the clusters `labels` (n).
    fn assign(&mut self, start: i64, rows: &Tensor, labels: &Tensor) {
        let mut before = self.labels.narrow(0, start, labels.size()[0]);
        let moved = before.ne_tensor(labels).nonzero().view([-1]);
        if moved.size()[0] == 0 {
            return;
        }
        let (from, to) = (before.index_select(0, &moved), labels.index_select(0, &moved));
        let fixed = (rows.index_select(0, &moved) * ONE).to_kind(Kind::Int64);
        self.add(&to, &fixed, 1);
        let left = from.ge(0).nonzero().view([-1]);
        if left.size()[0] > 0 {
            self.add(&from.index_select(0, &left), &fixed.index_select(0, &left), -1);
        }
        before.copy_(labels);
    }

    fn add(&mut self, clusters: &Tensor, fixed: &Tensor, sign: i64) {
        let _ = self.sums.index_add_(0, clusters, &(fixed * sign));
        let _ = self.counts.index_add_(0, clusters, &(clusters.ones_like() * sign).unsqueeze(1));
    }
}

/// The centres that are not where they were. After some iterations they are few: most clusters neither win nor lose a row.
struct Moved {
    /// (K) bool
    mask: Tensor,
    /// Their numbers, (m).
    numbers: Tensor,
    compare: Option<Compare>,
}

impl Moved {
    fn new(before: &Tensor, centres: &Tensor) -> Self {
        let mask = before.ne_tensor(centres).any_dim(1, false);
        let numbers = mask.nonzero().view([-1]);
        let compare = (numbers.size()[0] > 0).then(|| Compare::new(&centres.index_select(0, &numbers)));
        Self { mask, numbers, compare }
    }

    /// Scores and labels (n) of rows (n, D) that had others before: against `all` centres where the own one moved, else against those
    /// that did, of which only a nearer one counts.
    fn nearest(&self, rows: &Tensor, mut scores: Tensor, mut labels: Tensor, all: &Compare) -> (Tensor, Tensor) {
        let Some(compare) = &self.compare else {
            return (scores, labels);
        };
        let lost = self.mask.take(&labels);
        let at = lost.nonzero().view([-1]);
        if at.size()[0] > 0 {
            let (score, label) = all.nearest(&rows.index_select(0, &at));
            let _ = (scores.index_copy_(0, &at, &score), labels.index_copy_(0, &at, &label));
        }
        let at = lost.logical_not().nonzero().view([-1]);
        if at.size()[0] > 0 {
            let (score, which) = compare.nearest(&rows.index_select(0, &at));
            let (own_score, own) = (scores.index_select(0, &at), labels.index_select(0, &at));
            let nearer = score.gt_tensor(&own_score);
            let _ = scores.index_copy_(0, &at, &score.maximum(&own_score));
            let _ = labels.index_copy_(0, &at, &self.numbers.take(&which).where_self(&nearer, &own));
        }
        (scores, labels)
    }
}

/// Scores that are compared at once: a maximum over so many takes vector instructions, one that keeps its place does not.
const GROUP: i64 = 32;

/// Centres, ready to be compared with.
struct Compare {
    transposed: Tensor,
    half: Tensor,
}

impl Compare {
    /// Padded to whole groups with centres that are nearest to nothing.
    fn new(centres: &Tensor) -> Self {
        let half = (centres * centres).sum_dim_intlist([1_i64].as_slice(), false, Kind::Float) * -0.5;
        let padding = (GROUP - centres.size()[0] % GROUP) % GROUP;
        Self {
            transposed: centres.tr().pad([0, padding], "constant", 0.0).contiguous(),
            half: half.pad([0, padding], "constant", f64::NEG_INFINITY),
        }
    }

    /// x·c − |c|²/2 of the nearest centre (n), and its number (n); the first of equals.
    fn nearest(&self, rows: &Tensor) -> (Tensor, Tensor) {
        let scores = self.half.addmm(rows, &self.transposed);
        let (n, groups) = (scores.size()[0], scores.size()[1] / GROUP);
        let scores = scores.view([n, groups, GROUP]);
        let (best, group) = scores.amax([2_i64].as_slice(), false).max_dim(1, false);
        let winners = scores.gather(1, &group.view([n, 1, 1]).expand([n, 1, GROUP], false), false).squeeze_dim(1);
        (best, group * GROUP + winners.argmax(1, false))
    }
}
