//! The order of an epoch: which patch is read by which lane at which step, every unused patch exactly once.
//!
//! A *lane* is one micro-batch slot of a step; there are world size × accumulation of them, and a rank owns some. The plan knows
//! lanes only, so it does not depend on which rank owns which. It is a pure function of its arguments.
//!
//! 1. Shards are taken in random order and dealt whole to the lane that has least, while they fit its fair share.
//! 2. Those that fit nowhere are the uneven tail: their patches fill the lanes up, so that the lengths of lanes differ by at most one.
//! 3. A lane is read in steps of equal size, to one patch. No batch is a remainder: BatchNorm over the two patches that happen to be
//!    left makes gradients a thousand times too long, and one such step undoes an epoch. Where little is left, fewer lanes read.
//! 4. A lane mixes the patches of `window` shards: a patch of the k-th shard is read at a time drawn evenly from k+1-window to k+1,
//!    in units of shards. So at most `window` shards are in use at a time, and they end one after the other.

use rand::RngCore;
use rand::seq::SliceRandom;
use rayon::prelude::*;
use roaring::RoaringBitmap;
use sgcl_draw::{Purpose, rng};

use crate::index::Index;

/// The plan of one epoch, or of what is left of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EpochPlan {
    /// All lanes end to end.
    ids: Vec<u32>,
    /// Where each lane starts in `ids`, and the end.
    starts: Vec<usize>,
    batch: usize,
}

/// Arguments that no plan can be made from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A size that must not be zero is.
    #[error("an epoch plan needs at least one {what}")]
    Zero {
        /// Which size.
        what: &'static str,
    },
    /// The ledger is not of this patch set.
    #[error("patch {id} is to be read, but the set ends at {patches}: the ledger belongs to another patch set")]
    NoSuchPatch {
        /// Patch id.
        id: u32,
        /// Patches in the set.
        patches: usize,
    },
}

/// Some patches of one shard, in a lane: a range of the ids grouped by shard.
type Piece = std::ops::Range<usize>;

impl EpochPlan {
    /// Plans the patches in `unused` for `lanes` lanes that read up to `batch` patches a step, from at most `window` shards at a time.
    ///
    /// # Errors
    /// `lanes`, `batch` or `window` is zero, or `unused` names a patch that `index` does not have.
    pub fn new(
        index: &Index,
        seed: u64,
        epoch: u64,
        unused: &RoaringBitmap,
        lanes: usize,
        batch: usize,
        window: usize,
    ) -> Result<Self, PlanError> {
        Self::from_shards(index.shards(), seed, epoch, unused, lanes, batch, window)
    }

    /// [`EpochPlan::new`] from the shard number of each patch.
    ///
    /// # Errors
    /// As [`EpochPlan::new`].
    pub fn from_shards(
        shard_of: &[u32],
        seed: u64,
        epoch: u64,
        unused: &RoaringBitmap,
        lanes: usize,
        batch: usize,
        window: usize,
    ) -> Result<Self, PlanError> {
        for (size, what) in [(lanes, "lane"), (batch, "patch a batch"), (window, "open shard")] {
            if size == 0 {
                return Err(PlanError::Zero { what });
            }
        }
        if let Some(id) = unused.max().filter(|&id| id as usize >= shard_of.len()) {
            return Err(PlanError::NoSuchPatch { id, patches: shard_of.len() });
        }
        let mut groups = Groups::new(shard_of, unused);
        let mut order: Vec<usize> = (0..groups.shards()).filter(|&shard| !groups.range(shard).is_empty()).collect();
        order.shuffle(&mut rng(seed, Purpose::Plan, epoch, 0));

        let patches = groups.ids.len();
        // No more lanes than get half a batch each.
        let reading = (patches / batch.div_ceil(2)).clamp(1, lanes);
        let share = |lane: usize| {
            if lane < reading { patches / reading + usize::from(lane < patches % reading) } else { 0 }
        };
        let (pieces, tail) = deal(&order, |shard| groups.range(shard), reading, share);
        let draws = groups.draw(seed, epoch, &tail);

        let mut starts = vec![0; lanes + 1];
        for lane in 0..lanes {
            starts[lane + 1] = starts[lane] + share(lane);
        }
        let lanes: Vec<Vec<u32>> = pieces.par_iter().map(|lane| mix(lane, &groups.ids, &draws, window)).collect();
        Ok(Self { ids: lanes.concat(), starts, batch })
    }

    /// Lanes.
    #[must_use]
    pub fn lanes(&self) -> usize {
        self.starts.len() - 1
    }

    /// Patches in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether nothing is left to read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Most patches a lane reads a step.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Steps until every lane has been read.
    #[must_use]
    pub fn steps(&self) -> usize {
        // The first lane is the longest.
        self.lane(0).len().div_ceil(self.batch)
    }

    /// Patch ids of a lane, in order; empty for a lane that does not exist.
    #[must_use]
    pub fn lane(&self, lane: usize) -> &[u32] {
        match (self.starts.get(lane), self.starts.get(lane + 1)) {
            (Some(&from), Some(&to)) => &self.ids[from..to],
            _ => &[],
        }
    }

    /// Patch ids that a lane reads at `step`: at most [`EpochPlan::batch`] and at least half as many, unless the plan has fewer in all; none
    /// in a lane that does not read.
    #[must_use]
    pub fn batch_of(&self, lane: usize, step: usize) -> &[u32] {
        let ids = self.lane(lane);
        &ids[self.read_before(ids.len(), step)..self.read_before(ids.len(), step.saturating_add(1))]
    }

    /// Patches that a lane of `length` has read before `step`.
    fn read_before(&self, length: usize, step: usize) -> usize {
        let steps = self.steps().max(1);
        // In 128 bits, so that no product is too long.
        (length as u128 * step.min(steps) as u128 / steps as u128) as usize
    }

    /// What all lanes have read before `step`: the ledger, to be united with what was used before the plan was made.
    #[must_use]
    pub fn used_before(&self, step: usize) -> RoaringBitmap {
        let mut used: Vec<u32> = Vec::new();
        for lane in 0..self.lanes() {
            let ids = self.lane(lane);
            used.extend(&ids[..self.read_before(ids.len(), step)]);
        }
        used.par_sort_unstable();
        RoaringBitmap::from_sorted_iter(used.iter().copied()).unwrap_or_else(|_| used.into_iter().collect())
    }
}

/// Unused patches grouped by shard.
struct Groups {
    ids: Vec<u32>,
    starts: Vec<usize>,
}

impl Groups {
    fn new(shard_of: &[u32], unused: &RoaringBitmap) -> Self {
        let shards = shard_of.par_iter().max().map_or(0, |&shard| shard as usize + 1);
        let mut starts = vec![0; shards + 1];
        for id in unused {
            starts[shard_of[id as usize] as usize + 1] += 1;
        }
        for shard in 0..shards {
            starts[shard + 1] += starts[shard];
        }
        let mut next = starts.clone();
        let mut ids = vec![0; starts[shards]];
        for id in unused {
            let slot = &mut next[shard_of[id as usize] as usize];
            ids[*slot] = id;
            *slot += 1;
        }
        Self { ids, starts }
    }

    fn shards(&self) -> usize {
        self.starts.len() - 1
    }

    fn range(&self, shard: usize) -> Piece {
        self.starts[shard]..self.starts[shard + 1]
    }

    /// Shuffles the shards of the tail, since they are cut, and draws a number for every patch. Keyed by shard, so the draws do not
    /// depend on who reads it.
    fn draw(&mut self, seed: u64, epoch: u64, tail: &[usize]) -> Vec<u32> {
        let mut draws = vec![0; self.ids.len()];
        let mut cut = vec![false; self.shards()];
        tail.iter().for_each(|&shard| cut[shard] = true);
        let mut work = Vec::with_capacity(self.shards());
        let (mut ids, mut rest) = (&mut self.ids[..], &mut draws[..]);
        for (shard, bounds) in self.starts.windows(2).enumerate() {
            let (here, after) = ids.split_at_mut(bounds[1] - bounds[0]);
            let (drawn, more) = rest.split_at_mut(here.len());
            (ids, rest) = (after, more);
            work.push((shard, here, drawn));
        }
        work.into_par_iter().for_each(|(shard, ids, draws)| {
            let mut rng = rng(seed, Purpose::Plan, epoch, shard as u64 + 1);
            draws.iter_mut().for_each(|draw| *draw = rng.next_u32());
            if cut[shard] {
                ids.shuffle(&mut rng);
            }
        });
        draws
    }
}

/// Deals shards whole to the lane that has least, then fills the lanes up from the shards that did not fit. Returns each lane's
/// pieces, and the shards that were cut.
fn deal(
    order: &[usize],
    range: impl Fn(usize) -> Piece,
    lanes: usize,
    share: impl Fn(usize) -> usize,
) -> (Vec<Vec<Piece>>, Vec<usize>) {
    use std::cmp::Reverse;
    let mut pieces = vec![Vec::new(); lanes];
    let mut tail = Vec::new();
    let mut least: std::collections::BinaryHeap<_> = (0..lanes).map(|lane| Reverse((0, lane))).collect();
    for &shard in order {
        let Some(mut top) = least.peek_mut() else { break };
        let Reverse((load, lane)) = *top;
        let load = load + range(shard).len();
        if load <= share(lane) {
            pieces[lane].push(range(shard));
            *top = Reverse((load, lane));
        } else {
            tail.push(shard);
        }
    }
    let mut rest = tail.iter().map(|&shard| range(shard));
    let mut open = 0..0;
    for (lane, pieces) in pieces.iter_mut().enumerate() {
        let mut missing = share(lane) - pieces.iter().map(ExactSizeIterator::len).sum::<usize>();
        while missing > 0 {
            if open.is_empty() {
                // The shares add up to all patches, so the tail ends when the last lane is full.
                open = rest.next().unwrap_or(0..0);
                if open.is_empty() {
                    break;
                }
            }
            let cut = open.start + missing.min(open.len());
            missing -= cut - open.start;
            pieces.push(open.start..cut);
            open.start = cut;
        }
    }
    (pieces, tail)
}

/// The patches of a lane in the order of their times.
fn mix(pieces: &[Piece], ids: &[u32], draws: &[u32], window: usize) -> Vec<u32> {
    // Time in 32 bits beside the id, so that one integer sort does it.
    let unit = u64::from(u32::MAX) / (pieces.len().max(1) as u64);
    let mut timed: Vec<u64> = Vec::with_capacity(pieces.iter().map(ExactSizeIterator::len).sum());
    for (at, piece) in pieces.iter().enumerate() {
        let from = (at + 1).saturating_sub(window) as u64 * unit;
        let length = (at as u64 + 1) * unit - from;
        timed.extend(piece.clone().map(|slot| {
            let time = from + ((u64::from(draws[slot]) * length) >> 32);
            time << 32 | u64::from(ids[slot])
        }));
    }
    timed.par_sort_unstable();
    timed.into_iter().map(|timed| (timed & u64::from(u32::MAX)) as u32).collect()
}
