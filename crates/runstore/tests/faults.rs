//! A run's records under storage faults: commits form one chain, an intact part is never taken for damaged, no metric is lost.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use object_store::ObjectStore;
use object_store::memory::InMemory;
use object_store::path::Path;
use sgcl_patchset::faults::{Fault, FaultPlan, Faults, FaultyStore, Op};
use sgcl_patchset::{Store, StoreError};
use sgcl_runstore::checkpoint::read_part;
use sgcl_runstore::config::Checkpoint;
use sgcl_runstore::metrics::{CHUNK, MetricsWriter, StepMetrics, read_metrics};
use sgcl_runstore::{Commit, Commits, EventKind, Events, Ledger, PartKind, PartWriter, Progress, RunStoreError};

fn seed() -> u64 {
    std::env::var("SGCL_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

fn now() -> Timestamp {
    Timestamp::from_second(1_700_000_000).unwrap()
}

/// A run, undisturbed and disturbed.
fn run(plan: &str) -> (Store, Store, Faults) {
    let plain = Store::from_parts(Arc::new(InMemory::new()), Path::from("runs/first"), "mem://b/runs/first");
    let faults = Faults::new(plan.parse::<FaultPlan>().unwrap());
    let faulty = plain.wrapped(|inner| Arc::new(FaultyStore::new(inner, faults.clone())) as Arc<dyn ObjectStore>);
    (plain, faulty, faults)
}

async fn progress(run: &Store, step: u64) -> Progress {
    let writer = PartWriter::new(run, 1, step);
    let bytes: Vec<u8> = (0..50_000_u64).map(|i| (i * step % 251) as u8).collect();
    let model = writer.put(PartKind::Model, "model.safetensors", bytes.into()).await.unwrap();
    let used: Ledger = roaring(step);
    let ledger = writer.put(PartKind::Ledger, "ledger.roaring", used.to_bytes().unwrap()).await.unwrap();
    Progress {
        generation: 1,
        lease_epoch: 0,
        step,
        epoch: 0,
        epoch_step: step,
        cursor: step,
        lanes: 2,
        window: 4,
        segments: Vec::new(),
        history: Vec::new(),
        world: 2,
        plan_base: None,
        ledger,
        parts: vec![model],
        losses: BTreeMap::new(),
        done: false,
    }
}

fn roaring(step: u64) -> Ledger {
    let mut used = Ledger::new();
    used.extend(0..u32::try_from(step).unwrap());
    used
}

const ROUGH: &str = "error=0.1,lost=0.15,conflict=0.1,truncate=0.15";

#[tokio::test(flavor = "multi_thread")]
async fn commits_made_under_faults_form_one_chain_of_intact_parts() {
    let (plain, faulty, faults) = run(&format!("seed={},{ROUGH}", seed()));
    let patient = faulty.patient();
    let commits = Commits::new(&patient);
    let mut parent: Option<Commit> = None;
    for step in 1..=25 {
        let commit = Commit::after(parent.as_ref(), progress(&patient, step).await, now());
        commits.append(&commit).await.unwrap();
        // What an impatient clean-up does not get done is left for the next.
        let keep = Checkpoint { keep_last: 3, keep_every: 0, ..Checkpoint::default() };
        if let Err(error) = Commits::new(&faulty).retain(&keep).await {
            assert!(!error.is_damage(), "SGCL_SEED={}: {error}", seed());
        }
        parent = Some(commit);
    }
    let found = commits.newest_intact().await.unwrap().unwrap();
    assert_eq!((found.commit.seq, found.skipped.len()), (25, 0), "SGCL_SEED={}: {:?}", seed(), found.skipped);
    let plain = Commits::new(&plain);
    let mut kept = Vec::new();
    for seq in plain.list().await.unwrap() {
        kept.push(plain.read(seq).await.unwrap());
    }
    assert!(kept.len() >= 3, "{}", kept.len());
    plain.check_chain(&kept).unwrap();
    for fault in [Fault::Error, Fault::Lost, Fault::Conflict, Fault::Truncate] {
        assert!(faults.injected().contains_key(&fault), "{fault:?} was never injected");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_coordinators_one_makes_each_commit() {
    let (plain, faulty, _) = run(&format!("seed={},lost=0.3,conflict=0.2,truncate=0.1", seed()));
    let patient = faulty.patient();
    let progress = progress(&plain, 1).await;
    let races = (0..200).map(|race| {
        let (run, progress) = (patient.child(&format!("race-{race}")), progress.clone());
        async move {
            let commits = Commits::new(&run);
            let [a, b] = [1, 2].map(|_| Commit::after(None, progress.clone(), now()));
            let (first, second) = tokio::join!(commits.append(&a), commits.append(&b));
            let winner = commits.read(1).await.unwrap().write_id;
            for (commit, result) in [(&a, first), (&b, second)] {
                match result {
                    Ok(()) => assert_eq!(winner, commit.write_id, "SGCL_SEED={} race {race}", seed()),
                    Err(RunStoreError::Lost { winner: told, .. }) => {
                        assert!(told == winner && winner != commit.write_id, "SGCL_SEED={} race {race}", seed());
                    }
                    Err(other) => panic!("SGCL_SEED={} race {race}: {other}", seed()),
                }
            }
        }
    });
    futures::future::join_all(races).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_is_cut_short_sets_no_commit_aside_and_damage_does() {
    let (plain, faulty, faults) = run("");
    let commits = Commits::new(&plain);
    let first = Commit::after(None, progress(&plain, 1).await, now());
    commits.append(&first).await.unwrap();
    let second = Commit::after(Some(&first), progress(&plain, 2).await, now());
    commits.append(&second).await.unwrap();

    for _ in 0..4 {
        faults.next(Op::Get, Fault::Truncate);
    }
    let found = Commits::new(&faulty.patient()).newest_intact().await.unwrap().unwrap();
    assert_eq!((found.commit.seq, found.skipped), (2, Vec::new()));

    // Without patience it is an error, and not one that blames the object.
    for nth in 0..3 {
        for _ in 0..nth {
            faults.next(Op::Get, None);
        }
        faults.next(Op::Get, Fault::Truncate);
        let error = Commits::new(&faulty).newest_intact().await.unwrap_err();
        assert!(matches!(&error, RunStoreError::Store(e) if !e.is_permanent()) && !error.is_damage(), "{nth}: {error}");
    }

    // Truly shorter than its commit says, behind a line that breaks off as well.
    let part = second.progress.parts[0].clone();
    let bytes = plain.get(&part.path, u64::MAX).await.unwrap();
    plain.put(&part.path, bytes.slice(..bytes.len() / 2)).await.unwrap();
    faults.set(format!("seed={},truncate=0.5", seed()).parse().unwrap());
    let patient = faulty.patient();
    assert!(read_part(&patient, &part).await.unwrap_err().is_damage());
    let found = Commits::new(&patient).newest_intact().await.unwrap().unwrap();
    assert_eq!((found.commit.seq, found.skipped.len()), (1, 1), "{:?}", found.skipped);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_of_two_writers_are_each_there_once() {
    let (plain, faulty, _) = run(&format!("seed={},{ROUGH}", seed()));
    let run = faulty.patient();
    let write = async |writer: &'static str| {
        for n in 0..20 {
            let kind = EventKind::Suspended { reason: format!("{writer} {n}") };
            Events::new(&run).append(kind, now()).await.unwrap();
        }
    };
    tokio::join!(write("a"), write("b"));
    let events = Events::new(&plain).read().await.unwrap();
    let mut reasons: Vec<String> = events
        .iter()
        .map(|event| match &event.kind {
            EventKind::Suspended { reason } => reason.clone(),
            other => panic!("{other:?}"),
        })
        .collect();
    reasons.sort();
    let mut expected: Vec<String> = ["a", "b"].iter().flat_map(|w| (0..20).map(move |n| format!("{w} {n}"))).collect();
    expected.sort();
    assert_eq!(reasons, expected, "SGCL_SEED={}", seed());
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_that_could_not_be_written_are_written_later() {
    let (plain, faulty, faults) = run("");
    let mut writer = MetricsWriter::new(&faulty, "first");
    let push = |writer: &mut MetricsWriter, steps: std::ops::Range<u64>| {
        for step in steps {
            let values = BTreeMap::from([("loss/total".to_owned(), step as f64)]);
            let (generation, epoch_step) = (1 + step / 700, step);
            writer.push(StepMetrics { step, generation, epoch: 0, epoch_step, epoch_steps: 9999, time: now(), values });
        }
    };
    push(&mut writer, 1..500);
    writer.flush().await.unwrap();
    faults.outage(true);
    push(&mut writer, 500..2500);
    assert!(matches!(
        writer.flush().await,
        Err(RunStoreError::Store(StoreError::Other { .. } | StoreError::Unreachable { .. }))
    ));
    assert!(writer.pending() > CHUNK);
    faults.outage(false);
    faults.set(format!("seed={},error=0.3,lost=0.3", seed()).parse().unwrap());
    while writer.flush().await.is_err() {}
    let steps: Vec<u64> = read_metrics(&plain).await.unwrap().iter().map(|row| row.step).collect();
    assert!(steps.iter().copied().eq(1..2500), "{} of 2499", steps.len());
}
