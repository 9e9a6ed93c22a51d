//! Storage that fails: every request gives the right answer or a typed error, a patient store the right answer.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use object_store::ObjectStore;
use sgcl_patchset::faults::{Fault, FaultPlan, Faults, FaultyStore, Op};
use sgcl_patchset::{CacheOptions, Created, PatchSet, ReadError, Store, StoreError};
use support::{jpeg, memory, options, seed, write};

fn faulty(store: &Store, plan: &str) -> (Store, Faults) {
    let faults = Faults::new(plan.parse::<FaultPlan>().unwrap());
    let wrapped = store.wrapped(|inner| Arc::new(FaultyStore::new(inner, faults.clone())) as Arc<dyn ObjectStore>);
    (wrapped, faults)
}

/// A place in memory and one in a folder.
fn places() -> (tempfile::TempDir, [Store; 2]) {
    let folder = tempfile::tempdir().unwrap();
    let local = Store::open(folder.path().to_str().unwrap()).unwrap();
    (folder, [memory(), local])
}

fn large() -> Vec<u8> {
    (0..33 << 20).map(|i: u32| (i % 251) as u8).collect()
}

/// What a user does.
#[derive(Clone, Copy, Debug)]
enum Act {
    Get,
    Range,
    Stream,
    Size,
    Put,
    Create,
    Parts,
    Delete,
    List,
}

impl Act {
    /// Does it and says what came of it: `ok`, or what was wrong.
    async fn run(self, store: &Store) -> Result<String, StoreError> {
        let right = |is: bool| if is { "ok".to_owned() } else { format!("{self:?} gave something else") };
        Ok(match self {
            Self::Get => right(store.get("there", 99).await? == "abcdefgh"),
            Self::Range => right(store.get_range("there", 2..5).await? == "cde"),
            Self::Stream => {
                let mut all = Vec::new();
                let seen = store
                    .get_streamed("there", |chunk| {
                        all.extend_from_slice(&chunk);
                        Ok::<_, StoreError>(())
                    })
                    .await?;
                right(seen == 8 && all == b"abcdefgh")
            }
            Self::Size => right(store.size("there").await? == Some(8) && store.size("nowhere").await?.is_none()),
            Self::Put => {
                store.put("new", "written").await?;
                right(store.get("new", 9).await? == "written")
            }
            Self::Create => {
                let created = store.create("made", "by me", "me").await?;
                right(created == Created::Created && store.get("made", 9).await? == "by me")
            }
            Self::Parts => {
                store.put("large", large()).await?;
                right(store.get("large", u64::MAX).await? == large())
            }
            Self::Delete => {
                store.delete("gone").await?;
                right(store.size("gone").await?.is_none())
            }
            Self::List => {
                let listed = store.list("listed").await?;
                right(listed.iter().map(|l| &*l.rel).eq(["listed/a", "listed/b"]))
            }
        })
    }

    fn ops(self) -> &'static [Op] {
        match self {
            Self::Get | Self::Range | Self::Stream => &[Op::Get],
            Self::Size => &[Op::Head],
            Self::Put => &[Op::Put],
            Self::Create => &[Op::Create],
            Self::Parts => &[Op::Start, Op::Part, Op::Complete],
            Self::Delete => &[Op::Delete],
            Self::List => &[Op::List],
        }
    }
}

const ACTS: [Act; 9] =
    [Act::Get, Act::Range, Act::Stream, Act::Size, Act::Put, Act::Create, Act::Parts, Act::Delete, Act::List];

async fn furnish(store: &Store) {
    for (rel, bytes) in [("there", "abcdefgh"), ("gone", "x"), ("listed/a", "1"), ("listed/b", "2")] {
        store.put(rel, bytes).await.unwrap();
    }
    for rel in ["new", "made", "large"] {
        store.delete(rel).await.unwrap();
    }
}

#[rstest::rstest]
#[case(Fault::Error)]
#[case(Fault::Timeout)]
#[case(Fault::Slow)]
#[case(Fault::Lost)]
#[case(Fault::Conflict)]
#[case(Fault::Truncate)]
#[case(Fault::Full)]
#[tokio::test(flavor = "multi_thread")]
async fn under_every_fault_the_answer_is_right_or_a_typed_error_and_patience_makes_it_right(#[case] fault: Fault) {
    let (_folder, places) = places();
    for place in places {
        for act in ACTS {
            for &op in act.ops().iter().filter(|op| fault.applies_to(**op)) {
                let (store, faults) = faulty(&place, &format!("seed={},timeout=0:20ms,slow=0:20ms", seed()));
                furnish(&place).await;
                // Twice in a row: the first try may settle it by itself.
                faults.next(op, fault);
                faults.next(op, fault);
                match act.run(&store).await {
                    Ok(said) => assert_eq!(said, "ok", "{place} {fault:?} {op:?}"),
                    Err(StoreError::NoSpace { .. }) => assert_eq!(fault, Fault::Full, "{act:?} {op:?}"),
                    Err(error) => assert!(!error.is_permanent(), "{place} {act:?} {fault:?} {op:?}: {error}"),
                }
                // What is half done does not stand in the way of the next try.
                let (plain, _) = faulty(&place, "");
                assert_eq!(act.run(&plain).await.unwrap(), "ok", "{place} after {fault:?} {op:?}");

                furnish(&place).await;
                let (store, faults) = faulty(&place, &format!("seed={},timeout=0:20ms,slow=0:20ms", seed() + 1));
                faults.next(op, fault);
                match act.run(&store.patient()).await {
                    Ok(said) => assert_eq!(said, "ok", "{place} {fault:?} {op:?}"),
                    Err(error) => {
                        let full = matches!(error, StoreError::NoSpace { .. }) && fault == Fault::Full;
                        assert!(full, "{place} {act:?} {fault:?} {op:?}: {error}");
                    }
                }
                assert_eq!(faults.injected().get(&fault), Some(&1), "{act:?} asks for {op:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_writers_under_lost_replies_and_conflicts_exactly_one_creates() {
    let inner = memory();
    let plan = format!("seed={},lost=0.3,conflict=0.25,error=0.1,truncate=0.1", seed());
    let (store, faults) = faulty(&inner, &plan);
    let store = store.patient();
    let rounds = (0..1000).map(|round| {
        let store = store.clone();
        tokio::spawn(async move {
            let rel = format!("commits/{round}");
            let (a, b) = tokio::join!(store.create(&rel, "writer a", "a"), store.create(&rel, "writer b", "b"));
            (rel, a.unwrap(), b.unwrap())
        })
    });
    for round in futures::future::join_all(rounds).await {
        let (rel, a, b) = round.unwrap();
        let winner = inner.get(&rel, 99).await.unwrap();
        let expected = |mine: &str| {
            if winner == mine { Created::Created } else { Created::Exists(winner.clone()) }
        };
        assert_eq!((&a, &b), (&expected("writer a"), &expected("writer b")), "SGCL_SEED={} {rel}", seed());
        assert_ne!(a == Created::Created, b == Created::Created, "SGCL_SEED={} {rel}", seed());
    }
    let injected = faults.injected();
    assert!(injected[&Fault::Lost] > 300 && injected[&Fault::Conflict] > 200, "{injected:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_off_goes_on_behind_the_last_byte() {
    let (_folder, places) = places();
    for place in places {
        let bytes = large();
        place.put("large", bytes.clone()).await.unwrap();
        let (store, faults) = faulty(&place, &format!("seed={},truncate=0.8,error=0.1", seed()));
        let mut seen = Vec::new();
        let sink = |chunk: bytes::Bytes| {
            seen.extend_from_slice(&chunk);
            Ok::<_, StoreError>(())
        };
        assert_eq!(store.patient().get_streamed("large", sink).await.unwrap(), bytes.len() as u64);
        assert!(seen == bytes, "SGCL_SEED={} {place}", seed());

        faults.set(FaultPlan::default());
        faults.next(Op::Get, Fault::Truncate);
        let error = store.get_streamed("large", |_| Ok::<_, StoreError>(())).await.unwrap_err();
        assert!(!error.is_permanent(), "{error}");
    }
}

#[tokio::test]
async fn an_object_that_ends_too_early_is_told_from_a_transfer_that_does() {
    let (_folder, places) = places();
    for place in places {
        place.put("short", "abc").await.unwrap();
        for range in [1..9, 7..9] {
            let error = place.patient().get_range("short", range.clone()).await.unwrap_err();
            assert!(matches!(error, StoreError::TooShort { bytes: 3, needed: 9, .. }), "{place} {range:?}: {error}");
            assert!(error.is_permanent());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn patience_outlasts_an_outage_and_says_that_it_waits() {
    let (store, faults) = faulty(&memory(), "");
    let store = store.patient();
    store.put("a", "one").await.unwrap();
    assert!(!store.is_busy());
    faults.outage(true);
    let reading = tokio::spawn({
        let store = store.child("");
        async move { store.get("a", 9).await }
    });
    while faults.injected().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(store.is_busy() && !reading.is_finished());
    let error = store.impatient().get("a", 9).await.unwrap_err();
    assert!(!error.is_permanent(), "{error}");
    let error = store.patient_for(Duration::from_millis(300)).get("a", 9).await.unwrap_err();
    assert!(!error.is_permanent(), "{error}");
    faults.outage(false);
    assert_eq!(reading.await.unwrap().unwrap(), "one");
    assert!(!store.is_busy());
}

#[tokio::test(flavor = "multi_thread")]
async fn patience_is_not_wasted_on_what_somebody_has_to_mend() {
    let (store, faults) = faulty(&memory(), "");
    let store = store.patient();
    faults.full(true);
    assert!(matches!(store.put("a", "one").await, Err(StoreError::NoSpace { .. })));
    assert!(store.get("nothing", 9).await.unwrap_err().is_not_found());
}

async fn set(store: &Store) -> PatchSet {
    let mut options = options();
    options.shard_bytes = 30_000;
    write(store, 2, 10, options).await;
    PatchSet::load(store.clone()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_patch_reads_right_with_and_without_a_cache() {
    let place = memory();
    set(&place).await;
    for cached in [false, true] {
        let (store, faults) = faulty(&place, &format!("seed={},truncate=0.3,error=0.1,timeout=0.05:20ms", seed()));
        let set = PatchSet::load(store.patient()).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let reader = set.reader(cached.then(|| CacheOptions { dir: folder.path().into(), max_bytes: 1 << 30 }));
        let reads = (0..200).map(|id| {
            let reader = reader.clone();
            async move { (id, reader.read(id).await) }
        });
        for (id, read) in futures::future::join_all(reads).await {
            let row = set.index().row(id).unwrap();
            let expected = jpeg(u8::try_from(row.slide).unwrap(), row.x, row.y);
            assert_eq!(read.unwrap(), expected, "SGCL_SEED={} patch {id}", seed());
        }
        assert!(faults.injected().contains_key(&Fault::Truncate), "{:?}", faults.injected());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_shard_is_damage_whatever_else_fails() {
    let place = memory();
    let plain = set(&place).await;
    let path = plain.manifest().shards[0].path.clone();
    let bytes = place.get(&path, u64::MAX).await.unwrap();
    let id = (0..).find(|&id| plain.index().row(id).unwrap().shard == 0).unwrap();
    let (store, _) = faulty(&place, &format!("seed={},truncate=0.5,error=0.2", seed()));
    let store = store.patient();

    let mut flipped = bytes.to_vec();
    flipped[bytes.len() / 2] ^= 1;
    place.put(&path, flipped).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let cache = CacheOptions { dir: folder.path().into(), max_bytes: 1 << 30 };
    let cached = PatchSet::load(store.clone()).await.unwrap().reader(Some(cache));
    assert!(matches!(cached.read(id).await, Err(ReadError::Corrupt { .. })));

    place.put(&path, bytes.slice(..40)).await.unwrap();
    let uncached = PatchSet::load(store).await.unwrap().reader(None);
    let error = uncached.read(id).await.unwrap_err();
    assert!(matches!(error, ReadError::Store(StoreError::TooShort { .. })), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_the_cache_is_done_without() {
    let disk = match sgcl_tests::SmallDisk::mount(1) {
        Ok(disk) => disk,
        Err(reason) => {
            println!("skipped: a small file system cannot be mounted here ({reason})");
            return;
        }
    };
    let place = memory();
    let set = set(&place).await;
    // All but a little is taken by others.
    std::fs::write(disk.path().join("filler"), vec![0; (1 << 20) - 20_000]).unwrap();
    let reader = set.reader(Some(CacheOptions { dir: disk.path().into(), max_bytes: 1 << 30 }));
    for id in 0..200 {
        let row = set.index().row(id).unwrap();
        assert_eq!(reader.read(id).await.unwrap(), jpeg(u8::try_from(row.slide).unwrap(), row.x, row.y), "patch {id}");
    }
}
