//! Whole runs over storage that fails: real workers, gRPC and rings, and an S3 server whose answers are wrong, late, lost or none.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use sgcl_coordinator::{Outcome, ProcessLauncher};
use sgcl_patchset::faults::Fault;
use sgcl_patchset::{PatchSet, Store};
use sgcl_proto::WAITING_FOR_STORAGE;
use sgcl_runstore::checkpoint::read_tensors;
use sgcl_runstore::metrics::read_metrics;
use sgcl_runstore::verify::verify;
use sgcl_runstore::{Commits, RunName, Spec, Tensor};
use sgcl_tests::S3Server;
use support::{Running, config, patch_set, start_over, worker};
use tokio::net::TcpListener;

struct Place {
    server: S3Server,
    bucket: Store,
    data: Store,
    folder: tempfile::TempDir,
}

async fn place() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start(&folder.path().join("s3"), &["lab"]).unwrap();
    let (bucket, data) = (server.store("s3://lab/runs").unwrap(), server.store("s3://lab/patches").unwrap());
    patch_set(&data, 2, 9).await;
    Place { server, bucket, data, folder }
}

impl Place {
    async fn begin(&self, name: &str, overrides: &[&str]) -> Running {
        self.begin_at(TcpListener::bind("127.0.0.1:0").await.unwrap(), name, overrides).await
    }

    async fn begin_at(&self, listener: TcpListener, name: &str, overrides: &[&str]) -> Running {
        let mut environment: Vec<(String, String)> =
            self.server.environment().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        environment.push(("SGCL_SHARD_CACHE".into(), self.folder.path().join("cache").display().to_string()));
        let launcher = ProcessLauncher::new(worker(), name.to_owned(), 1, 2).with_threads(1);
        let launcher = launcher.with_environment(environment);
        start_over(listener, launcher, &self.bucket, &self.data, name, 1, 2, config(overrides)).await
    }

    fn run(&self, name: &str) -> Store {
        RunName::new(name).unwrap().store(&self.bucket)
    }

    /// Every tensor of the newest commit, by part and name.
    async fn state(&self, name: &str) -> Vec<(String, Tensor)> {
        let run = self.run(name);
        let found = Commits::new(&run).newest_intact().await.unwrap().unwrap();
        assert!(found.skipped.is_empty(), "{:?}", found.skipped);
        let mut state = Vec::new();
        for part in &found.commit.progress.parts {
            for tensor in read_tensors(&run, part).await.unwrap() {
                state.push((format!("{} {}", part.path.rsplit('/').next().unwrap(), tensor.name), tensor));
            }
        }
        state
    }

    /// Every patch once, commits in one chain, every step's metrics.
    async fn check(&self, name: &str) {
        let run = self.run(name);
        let spec = Spec::find(&run).await.unwrap().unwrap();
        let set = PatchSet::load(self.data.clone()).await.unwrap();
        let proof = verify(&Commits::new(&run), &spec, &set, |_, _| {}).await.unwrap();
        assert!(proof.holds(), "{:#?}", proof.problems);
        let last = Commits::new(&run).latest().await.unwrap().unwrap();
        let steps: Vec<u64> = read_metrics(&run).await.unwrap().iter().map(|row| row.step).collect();
        assert!(steps.iter().copied().eq(1..=last.progress.step), "metrics of {} steps: {steps:?}", last.progress.step);
    }
}

async fn end(running: Running) -> (Outcome, sgcl_coordinator::RunView) {
    let outcome = tokio::time::timeout(Duration::from_secs(400), running.outcome).await.expect("never ends").unwrap();
    (outcome, running.view.borrow().clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_over_storage_that_fails_at_random_ends_as_an_undisturbed_one_does() {
    let seed: u64 = std::env::var("SGCL_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let place = place().await;
    let sets = ["epochs=2", "checkpoint.every_steps=4", "checkpoint.keep_last=4"];
    assert_eq!(end(place.begin("calm", &sets).await).await.0, Outcome::Finished);

    // Its cache is of no use to the next run, which shall meet the storage.
    std::fs::remove_dir_all(place.folder.path().join("cache")).unwrap();
    let running = place.begin("rough", &sets).await;
    let plan = "error=0.15,timeout=0.03:500ms,slow=0.1:100ms,lost=0.1,conflict=0.1,truncate=0.15";
    place.server.faults().set(format!("seed={seed},{plan}").parse().unwrap());
    let (outcome, view) = end(running).await;
    let injected = place.server.faults().injected();
    place.server.faults().set("".parse().unwrap());
    println!("SGCL_SEED={seed}: {injected:?} in {} requests", place.server.faults().requests());
    assert_eq!(outcome, Outcome::Finished, "SGCL_SEED={seed}");
    assert_eq!((view.restarts, view.changes.len()), (0, 0), "SGCL_SEED={seed}: {:?}", view.changes);
    assert!(injected.values().sum::<u64>() > 20, "{injected:?}");
    place.check("rough").await;
    let (calm, rough) = (place.state("calm").await, place.state("rough").await);
    assert_eq!(calm.len(), rough.len());
    for ((name, a), (other, b)) in calm.iter().zip(&rough) {
        assert_eq!(name, other);
        assert!(a.data == b.data, "SGCL_SEED={seed}: {name} differs");
    }
}

#[rstest::rstest]
#[case::of_shards("loader.cache_bytes=0")]
#[case::of_commits("checkpoint.every_steps=3")]
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_longer_than_a_hang_may_last_is_waited_for_and_no_hang(#[case] set: &str) {
    let place = place().await;
    let mut running = place.begin("waits", &["epochs=3", "step_timeout_s=8", set]).await;
    running.view.wait_for(|view| view.step >= 4).await.unwrap();
    place.server.faults().outage(true);
    let waits = running.view.wait_for(|view| view.phase == WAITING_FOR_STORAGE);
    drop(tokio::time::timeout(Duration::from_secs(120), waits).await.expect("it does not say that it waits").unwrap());
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert!(!running.outcome.is_finished());
    place.server.faults().outage(false);
    let (outcome, view) = end(running).await;
    assert_eq!(outcome, Outcome::Finished);
    assert_eq!((view.restarts, view.changes.len()), (0, 0), "{:?}", view.changes);
    assert!(place.server.faults().injected()[&Fault::Outage] > 1);
    place.check("waits").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_is_full_ends_the_run_at_once_and_says_so() {
    let place = place().await;
    let mut running = place.begin("full", &["epochs=50", "checkpoint.every_steps=5"]).await;
    running.view.wait_for(|view| view.last_commit.is_some()).await.unwrap();
    place.server.faults().full(true);
    match end(running).await.0 {
        Outcome::Failed { message, code } => {
            assert!(code == 73 && message.contains("no space left"), "{code}: {message}");
        }
        other => panic!("{other:?}"),
    }
    place.server.faults().full(false);
    assert!(Commits::new(&place.run("full")).newest_intact().await.unwrap().unwrap().skipped.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_coordinator_makes_commits_over_storage_in_which_the_newest_is_long_looked_for() {
    let place = place().await;
    let sets = ["epochs=6", "checkpoint.every_steps=3", "step_timeout_s=60"];
    let mut running = place.begin("looks", &sets).await;
    running.view.wait_for(|view| view.last_commit.is_some()).await.unwrap();
    let address = running.address;
    running.outcome.abort();
    let _ = running.outcome.await;
    // To read a commit with all its parts takes longer than to make one.
    place.server.faults().set("slow=1:200ms".parse().unwrap());
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    let mut next = place.begin_at(listener, "looks", &sets).await;
    let first = next.view.wait_for(|view| view.last_commit.is_some()).await.unwrap().last_commit;
    let more = next.view.wait_for(|view| view.last_commit >= first.map(|seq| seq + 2));
    drop(tokio::time::timeout(Duration::from_secs(120), more).await.expect("no more commits").unwrap());
    place.server.faults().set(sgcl_patchset::faults::FaultPlan::default());
    let (outcome, _) = end(next).await;
    assert_eq!(outcome, Outcome::Finished);
    place.check("looks").await;
}
