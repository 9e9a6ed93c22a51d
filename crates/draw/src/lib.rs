//! Counter-based randomness. Every draw in the system is a pure function of (seed, purpose, epoch, item): never of rank,
//! time or thread, so a run resumed, or regrouped on other ranks, draws what it would have drawn undisturbed.
//!
//! The generator is ChaCha8 keyed with the four numbers themselves: a pseudo-random function needs no hash in front.

use rand::SeedableRng;
pub use rand_chacha::ChaCha8Rng as Rng;

/// What a stream of draws is for. The numbers are part of a run's identity: never change or reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u64)]
pub enum Purpose {
    /// Initial weights; item = index of the tensor.
    Weights = 1,
    /// Initial bank rows; item = patch id.
    Bank = 2,
    /// Order of shards and patches in an epoch; item = shard, or 0 for the order of shards.
    Plan = 3,
    /// Views of a patch; epoch, item = patch id.
    Augment = 4,
    /// Random negatives; epoch, item = step.
    Negatives = 5,
    /// Ranks of hard negatives; epoch, item = step.
    HardRanks = 6,
    /// k-means seeding; epoch, item = clustering run.
    KMeans = 7,
    /// Order of slides and patches while a patch set is written; item = group.
    Ingest = 8,
    /// Phantom slides; item = slide.
    Phantom = 9,
    /// Probes: splits and initial weights; item = trial.
    Probe = 10,
    /// Patches shown in reports.
    Report = 11,
    /// Storage faults that tests inject; item = request.
    Faults = 12,
    /// Training of probes, epoch by epoch; item = 0 order of patches, 1 labels that are kept, 2 the classifier's initial weights,
    /// 3 slides to validate on, 4 seeds of trials, 5 a segmentation head's last layer, 6 its dropout (epoch = step).
    Evaluate = 20,
    /// Slides drawn with replacement, for intervals; item = resample.
    Bootstrap = 21,
}

/// The stream of draws for one item.
///
/// ```
/// use sgcl_draw::{Purpose, rng};
/// use rand::RngCore;
/// assert_eq!(rng(7, Purpose::Augment, 3, 42).next_u64(), rng(7, Purpose::Augment, 3, 42).next_u64());
/// assert_ne!(rng(7, Purpose::Augment, 3, 42).next_u64(), rng(7, Purpose::Augment, 4, 42).next_u64());
/// ```
#[must_use]
pub fn rng(seed: u64, purpose: Purpose, epoch: u64, item: u64) -> Rng {
    let mut key = [0_u8; 32];
    for (slot, word) in key.chunks_exact_mut(8).zip([seed, purpose as u64, epoch, item]) {
        slot.copy_from_slice(&word.to_le_bytes());
    }
    Rng::from_seed(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::RngCore;

    proptest! {
        #[test]
        fn streams_differ_where_any_part_of_the_key_differs(seed: u64, epoch: u64, item: u64, delta in 1_u64..) {
            let base = rng(seed, Purpose::Plan, epoch, item).next_u64();
            prop_assert_ne!(base, rng(seed.wrapping_add(delta), Purpose::Plan, epoch, item).next_u64());
            prop_assert_ne!(base, rng(seed, Purpose::Bank, epoch, item).next_u64());
            prop_assert_ne!(base, rng(seed, Purpose::Plan, epoch.wrapping_add(delta), item).next_u64());
            prop_assert_ne!(base, rng(seed, Purpose::Plan, epoch, item.wrapping_add(delta)).next_u64());
        }
    }

    #[test]
    fn the_stream_is_pinned_because_runs_on_disk_depend_on_it() {
        assert_eq!(rng(1, Purpose::Augment, 2, 3).next_u64(), 3_181_766_576_306_927_166);
    }
}
