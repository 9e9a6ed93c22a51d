//! The epoch plan: every unused patch exactly once, whatever happens to the world size.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::HashSet;

use proptest::prelude::*;
use roaring::RoaringBitmap;
use sgcl_patchset::{EpochPlan, PlanError};

fn all(patches: usize) -> RoaringBitmap {
    (0..u32::try_from(patches).unwrap()).collect()
}

/// Patches in shards of any sizes, in any order.
fn sets() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(0_usize..40, 1..30).prop_flat_map(|sizes| {
        let of: Vec<u32> = (0_u32..).zip(sizes).flat_map(|(shard, n)| std::iter::repeat_n(shard, n)).collect();
        Just(of).prop_shuffle()
    })
}

proptest! {
    #[test]
    fn every_unused_patch_is_read_exactly_once_and_lanes_are_even(
        shard_of in sets(), seed: u64, epoch in 0_u64..5, lanes in 1_usize..9, batch in 1_usize..9, window in 1_usize..6,
        used in prop::collection::vec(any::<prop::sample::Index>(), 0..100),
    ) {
        let mut unused = all(shard_of.len());
        if !shard_of.is_empty() {
            for index in used {
                unused.remove(u32::try_from(index.index(shard_of.len())).unwrap());
            }
        }
        let plan = EpochPlan::from_shards(&shard_of, seed, epoch, &unused, lanes, batch, window).unwrap();
        let mut read: Vec<u32> = Vec::new();
        for step in 0..plan.steps() {
            for lane in 0..lanes {
                let here = plan.batch_of(lane, step);
                prop_assert!(here.len() <= batch);
                let least = if plan.lane(lane).is_empty() { 0 } else { plan.len().min(batch / 2) };
                prop_assert!(here.len() >= least, "{} of {} patches in a batch of {batch}", here.len(), plan.len());
                read.extend(here);
            }
        }
        prop_assert_eq!(read.len() as u64, unused.len());
        prop_assert_eq!(&read.into_iter().collect::<RoaringBitmap>(), &unused);
        prop_assert_eq!(&plan.used_before(plan.steps()), &unused);
        let lengths: Vec<_> = (0..lanes).map(|lane| plan.lane(lane).len()).filter(|&length| length > 0).collect();
        let (least, most) = (lengths.iter().min().unwrap_or(&0), lengths.iter().max().unwrap_or(&0));
        prop_assert!(most - least <= 1, "{:?}", lengths);
        prop_assert!(lengths.len() == lanes || plan.len() < lanes * batch.div_ceil(2), "{lengths:?} of {lanes} lanes read");
        let again = EpochPlan::from_shards(&shard_of, seed, epoch, &unused, lanes, batch, window).unwrap();
        prop_assert_eq!(plan, again);
    }

    #[test]
    fn changes_of_membership_neither_repeat_nor_skip_a_patch_nor_leave_a_few_for_a_batch(
        shard_of in sets(), seed: u64, batch in 1_usize..9,
        changes in prop::collection::vec((1_usize..8, 0_usize..6), 0..8),
    ) {
        let mut ledger = RoaringBitmap::new();
        let mut read = Vec::new();
        // Each change runs some steps with some lanes; the last goes on to the end.
        for (lanes, steps) in changes.into_iter().chain([(3, usize::MAX)]) {
            let unused = all(shard_of.len()) - &ledger;
            let plan = EpochPlan::from_shards(&shard_of, seed, 0, &unused, lanes, batch, 4).unwrap();
            let steps = steps.min(plan.steps());
            for step in 0..steps {
                for batch_of in (0..lanes).map(|lane| plan.batch_of(lane, step)).filter(|patches| !patches.is_empty()) {
                    prop_assert!(batch_of.len() >= shard_of.len().min(batch / 2), "{} of {batch}", batch_of.len());
                    read.extend_from_slice(batch_of);
                }
            }
            ledger |= plan.used_before(steps);
        }
        prop_assert_eq!(ledger, all(shard_of.len()));
        prop_assert_eq!(read.len(), shard_of.len());
        prop_assert_eq!(read.iter().collect::<HashSet<_>>().len(), shard_of.len());
    }

    #[test]
    fn a_lane_has_no_more_shards_in_use_than_its_window(shard_of in sets(), seed: u64, window in 1_usize..6) {
        let plan = EpochPlan::from_shards(&shard_of, seed, 0, &all(shard_of.len()), 1, 1, window).unwrap();
        let shards: Vec<_> = plan.lane(0).iter().map(|&id| shard_of[id as usize]).collect();
        for at in 0..shards.len() {
            let begun: HashSet<_> = shards[..=at].iter().collect();
            let coming: HashSet<_> = shards[at..].iter().collect();
            let open = begun.intersection(&coming).count();
            prop_assert!(open <= window, "{open} shards open at {at}");
        }
    }
}

#[test]
fn shards_stay_whole_but_for_a_tail() {
    // 64 shards of 100 patches over 8 lanes: nothing is uneven, so no shard is cut.
    let shard_of: Vec<u32> = (0..6400).map(|id| id / 100).collect();
    let plan = EpochPlan::from_shards(&shard_of, 1, 0, &all(6400), 8, 10, 4).unwrap();
    for lane in 0..8 {
        let shards: HashSet<_> = plan.lane(lane).iter().map(|&id| shard_of[id as usize]).collect();
        assert_eq!(shards.len(), 8, "lane {lane}");
    }
}

#[test]
fn epochs_and_seeds_differ() {
    let shard_of: Vec<u32> = (0..1000).map(|id| id / 100).collect();
    let plan = |seed, epoch| EpochPlan::from_shards(&shard_of, seed, epoch, &all(1000), 2, 10, 4).unwrap();
    assert_ne!(plan(1, 0), plan(1, 1));
    assert_ne!(plan(1, 0), plan(2, 0));
}

#[test]
fn a_lane_mixes_its_window() {
    let shard_of: Vec<u32> = (0..10_000).map(|id| id / 1000).collect();
    let plan = EpochPlan::from_shards(&shard_of, 1, 0, &all(10_000), 1, 10, 4).unwrap();
    let mean: f64 = (0..plan.steps())
        .map(|step| plan.batch_of(0, step).iter().map(|&id| shard_of[id as usize]).collect::<HashSet<_>>().len())
        .sum::<usize>() as f64
        / plan.steps() as f64;
    // Ten draws from four equal shards show 3.77 of them on average; the end of the lane has fewer.
    assert!(mean > 3.2, "{mean} shards a batch");
}

#[test]
fn a_ledger_of_another_set_and_empty_worlds_are_refused() {
    let plan = |lanes, unused: RoaringBitmap| EpochPlan::from_shards(&[0, 0], 1, 0, &unused, lanes, 1, 1);
    assert_eq!(plan(1, [7].into()), Err(PlanError::NoSuchPatch { id: 7, patches: 2 }));
    assert_eq!(plan(0, [1].into()), Err(PlanError::Zero { what: "lane" }));
    assert_eq!(plan(2, RoaringBitmap::new()).unwrap().steps(), 0);
}

#[test]
fn ten_million_patches_are_planned_in_seconds() {
    let patches = 10_000_000;
    let shard_of: Vec<u32> = (0..patches).map(|id| (id % 2000) as u32).collect();
    let begun = std::time::Instant::now();
    let plan = EpochPlan::from_shards(&shard_of, 1, 0, &all(patches), 64, 32, 8).unwrap();
    let took = begun.elapsed();
    println!("planned {} patches in {took:?}", plan.len());
    assert_eq!(plan.len(), patches);
    // Far above what it takes, far below what a quadratic plan would.
    assert!(took.as_secs() < 30, "{took:?}");
}
