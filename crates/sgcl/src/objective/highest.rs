//! The highest scores of each row of a ranking.
//!
//! On a CPU libtorch's `topk` orders pairs of a whole row, which at the published sizes was a quarter of the objective's step. Here a
//! threshold that a sample of the row suggests leaves a few of its scores to be ordered. The result is the same for any threshold; of equal
//! scores the lower place comes first.

use std::panic::resume_unwind;

use tch::{Device, Tensor};

/// Scores of a row that suggest its threshold.
const SAMPLE: usize = 8192;
/// Scores compared with the threshold at once.
const LANES: usize = 16;
/// Values of a digit of 11 bits, and digits of 32.
const DIGITS: usize = 1 << 11;
const PASSES: u32 = 3;
/// Scores that a thread of its own is worth.
const WORTH: usize = 1 << 16;

/// Places of the `k` highest scores of each row of `scores` (B, N) f32: (B, k) i64, in any order.
pub(super) fn places(scores: &Tensor, k: i64) -> Tensor {
    if elsewhere(scores) {
        return scores.topk(k, 1, true, false).1;
    }
    let k = usize::try_from(k).unwrap_or(0);
    stack(&each_row(scores, |row| row.highest(k).iter().map(|&packed| place(packed)).collect()), k)
}

/// The `k` highest scores of each row of `scores` (B, N) f32, high to low, with their places: (B, k) f32 and i64.
pub(super) fn sorted(scores: &Tensor, k: i64) -> (Tensor, Tensor) {
    if elsewhere(scores) {
        return scores.topk(k, 1, true, true);
    }
    let k = usize::try_from(k).unwrap_or(0);
    let places = stack(&each_row(scores, |row| row.ranking(k).iter().map(|&packed| place(packed)).collect()), k);
    (scores.gather(1, &places, false), places)
}

/// Places of the scores at `ranks` (H) of each row's ranking, rank 0 the highest: (B, H) i64. `scores` is (B, N) f32.
pub(super) fn at_ranks(scores: &Tensor, ranks: &Tensor) -> Tensor {
    // Nothing below the last rank needs an order.
    let top = ranks.max().int64_value(&[]) + 1;
    if elsewhere(scores) {
        return scores.topk(top, 1, true, true).1.index_select(1, ranks);
    }
    let mut wanted = vec![0_i64; ranks.numel()];
    ranks.copy_data(&mut wanted, ranks.numel());
    let top = usize::try_from(top).unwrap_or(0);
    let found = each_row(scores, |row| {
        let ranking = row.ranking(top);
        wanted.iter().map(|&rank| place(ranking[rank as usize])).collect()
    });
    stack(&found, wanted.len())
}

/// Whether libtorch is to do it: on a GPU, or with more rows than a packed place can name.
fn elsewhere(scores: &Tensor) -> bool {
    scores.device() != Device::Cpu || u32::try_from(scores.size()[1]).is_err()
}

/// Rows of `width` places.
fn stack(rows: &[Vec<i64>], width: usize) -> Tensor {
    Tensor::from_slice(&rows.concat()).view([rows.len() as i64, width as i64])
}

/// What `of` makes of each row, on as many threads as libtorch has.
fn each_row(scores: &Tensor, of: impl Fn(&mut Row) -> Vec<i64> + Sync) -> Vec<Vec<i64>> {
    let mut rows = scores.unbind(0);
    let of = &of;
    let work = |share: Vec<Tensor>| {
        let mut row = Row::default();
        let one = |scores| {
            row.read(scores);
            of(&mut row)
        };
        share.iter().map(one).collect::<Vec<_>>()
    };
    let threads = usize::try_from(tch::get_num_threads()).unwrap_or(1).min(scores.numel() / WORTH).max(1);
    if threads == 1 {
        return work(rows);
    }
    let share = rows.len().div_ceil(threads);
    let mut shares = Vec::new();
    while !rows.is_empty() {
        let rest = rows.split_off(share.min(rows.len()));
        shares.push(std::mem::replace(&mut rows, rest));
    }
    std::thread::scope(|scope| {
        let spawned: Vec<_> = shares.into_iter().map(|share| scope.spawn(move || work(share))).collect();
        spawned.into_iter().flat_map(|one| one.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}

/// A score and its place as one number: of two, the larger comes first in a ranking.
fn pack(score: f32, place: u32) -> u64 {
    let bits = score.to_bits();
    // Floats as integers of the same order: negative ones have all bits turned, others the sign alone.
    let turned = match bits >> 31 {
        _ if score.is_nan() => u32::MAX,
        1 => !bits,
        _ => bits | 1 << 31,
    };
    u64::from(turned) << 32 | u64::from(!place)
}

/// The place of a packed score.
fn place(packed: u64) -> i64 {
    i64::from(!(packed as u32))
}

/// A row, and room to order some of it.
#[derive(Default)]
struct Row {
    scores: Vec<f32>,
    sample: Vec<f32>,
    packed: Vec<u64>,
    spare: Vec<u64>,
}

impl Row {
    fn read(&mut self, scores: &Tensor) {
        self.scores.resize(scores.numel(), 0.0);
        self.packed.resize(scores.numel() + 1, 0);
        scores.copy_data(&mut self.scores, scores.numel());
    }

    /// The `k` highest, packed, in any order.
    fn highest(&mut self, k: usize) -> &[u64] {
        let kept = self.keep(k);
        let kept = &mut self.packed[..kept];
        if k < kept.len() {
            kept.select_nth_unstable_by(k, |a, b| b.cmp(a));
        }
        &kept[..k.min(kept.len())]
    }

    /// The same, high to low.
    fn ranking(&mut self, k: usize) -> &[u64] {
        let kept = self.keep(k);
        let kept = &mut self.packed[..kept];
        if kept.len() < DIGITS {
            kept.sort_unstable_by(|a, b| b.cmp(a));
            return &kept[..k.min(kept.len())];
        }
        // Digit by digit from the least: each pass keeps the order of equal ones, which is that of their places. Three passes end in `spare`.
        let length = kept.len();
        self.spare.resize(length.max(self.spare.len()), 0);
        let (mut from, mut to) = (kept, &mut self.spare[..length]);
        for pass in 0..PASSES {
            let digit = |packed: u64| DIGITS - 1 - ((packed >> (32 + 11 * pass)) as usize & (DIGITS - 1));
            let mut next = [0_usize; DIGITS];
            from.iter().for_each(|&packed| next[digit(packed)] += 1);
            let mut before = 0;
            for next in &mut next {
                before += std::mem::replace(next, before);
            }
            for &packed in &*from {
                let at = &mut next[digit(packed)];
                to[*at] = packed;
                *at += 1;
            }
            std::mem::swap(&mut from, &mut to);
        }
        &from[..k.min(from.len())]
    }

    /// Packs at least the `k` highest and few more, by place; how many.
    fn keep(&mut self, k: usize) -> usize {
        let k = k.min(self.scores.len());
        let least = self.threshold(k);
        let likely = self.take(least);
        // Fewer where the sample was not like the row.
        if likely < k { self.take(f32::NEG_INFINITY) } else { likely }
    }

    /// What the `k` highest, in all likelihood, and few more are not below.
    fn threshold(&mut self, k: usize) -> f32 {
        let stride = self.scores.len().div_ceil(SAMPLE).max(1);
        self.sample.clear();
        self.sample.extend(self.scores.iter().step_by(stride));
        // Four standard deviations more than the share of the sample that is among the k highest.
        let share = k as f64 / stride as f64;
        let at = (share + 4.0 * share.sqrt() + 4.0).ceil() as usize;
        if at < self.sample.len() {
            *self.sample.select_nth_unstable_by(at, |a, b| b.total_cmp(a)).1
        } else {
            f32::NEG_INFINITY
        }
    }

    /// Packs all scores that are not below `least`; how many.
    fn take(&mut self, least: f32) -> usize {
        let mut kept = 0;
        for (first, lanes) in (0_u32..).step_by(LANES).zip(self.scores.chunks(LANES)) {
            // What is no number belongs to the highest, as with `topk`.
            if lanes.iter().fold(true, |all, score| all & (*score < least)) {
                continue;
            }
            for (place, &score) in (first..).zip(lanes) {
                // Written in any case: no branch to guess wrong.
                self.packed[kept] = pack(score, place);
                kept += usize::from((score >= least) | score.is_nan());
            }
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng as _;
    use sgcl_draw::{Purpose, rng};
    use tch::Kind;

    fn seed() -> u64 {
        std::env::var("SGCL_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
    }

    /// Rows of scores with ties, blanks and infinities, and lengths around the sample's.
    fn rows(length: usize, case: u64) -> Tensor {
        let mut draw = rng(seed(), Purpose::Phantom, length as u64, case);
        let mut one = || match draw.random_range(0..20) {
            0 => f32::NEG_INFINITY,
            1 => 0.0,
            2 => -0.0,
            3 => 0.25,
            _ => draw.random_range(-1.0..1.0_f32),
        };
        Tensor::from_slice(&(0..3 * length).map(|_| one()).collect::<Vec<_>>()).view([3, length as i64])
    }

    #[test]
    fn the_highest_are_those_of_topk_and_ties_go_by_place() {
        for length in [1, 15, 16, 17, 1000, SAMPLE, 3 * SAMPLE + 5] {
            let scores = rows(length, 0);
            // Stable: of equal scores the lower place is first. −0 counts as 0 there.
            let ranking = scores.argsort_stable(true, 1, true);
            for k in [1, 2, length / 3, length - 1, length].into_iter().filter(|&k| (1..=length).contains(&k)) {
                let k = k as i64;
                let told = format!("length {length}, k {k}, seed {}", seed());
                let expected = scores.gather(1, &ranking.narrow(1, 0, k), false);
                let (values, at) = sorted(&scores, k);
                assert!(values.equal(&expected), "{told}");
                assert!(scores.gather(1, &at, false).equal(&expected), "{told}");
                let any = scores.gather(1, &places(&scores, k), false);
                assert!(any.sort(1, true).0.equal(&expected), "{told}");
                let ranks = Tensor::from_slice(&[k - 1, 0, k / 2]);
                let picked = at_ranks(&scores, &ranks);
                assert!(picked.equal(&at.index_select(1, &ranks)), "{told}");
            }
        }
    }

    #[test]
    fn equal_scores_come_in_the_order_of_their_places() {
        let scores = Tensor::full([2, 5000], 0.5, (Kind::Float, Device::Cpu));
        let (_, at) = sorted(&scores, 4000);
        assert!(at.equal(&Tensor::arange(4000, (Kind::Int64, Device::Cpu)).expand([2, 4000], false)));
    }

    #[test]
    fn a_sample_unlike_its_row_changes_nothing() {
        // Every sampled score is high, hardly any other.
        let stride = 4;
        let one = |place: usize| if place.is_multiple_of(stride) { 1.0 } else { -(place as f32) };
        let row: Vec<f32> = (0..SAMPLE * stride).map(one).collect();
        let scores = Tensor::from_slice(&row).unsqueeze(0);
        let k = (SAMPLE + 100) as i64;
        let (values, _) = sorted(&scores, k);
        assert!(values.equal(&scores.topk(k, 1, true, true).0));
    }

    #[test]
    fn what_is_no_number_is_among_the_highest() {
        for nothing in [f32::NAN, -f32::NAN] {
            let mut row = vec![0.0_f32; 1000];
            row[700] = nothing;
            let found = places(&Tensor::from_slice(&row).unsqueeze(0), 1);
            assert_eq!(found.int64_value(&[0, 0]), 700);
        }
    }
}
