//! A run whose ranks, nodes, coordinator and storage fail at random moments, with real processes and S3 over HTTP: it finishes all its
//! epochs, the bucket proves that every patch was used once, and it has learnt what undisturbed runs learn.
//!
//! `SGCL_SEED` draws the faults; `SGCL_SOAK_S` goes on with the next seeds for so many seconds (`make soak`): those are not compared
//! with undisturbed runs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::sys::signal::Signal;
use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};
use sgcl_coordinator::launcher::Ended;
use sgcl_coordinator::{Launcher, Outcome, ProcessLauncher, RunView};
use sgcl_draw::{Purpose, rng};
use sgcl_patchset::faults::FaultPlan;
use sgcl_patchset::{PatchSet, Store};
use sgcl_runstore::metrics::read_metrics;
use sgcl_runstore::verify::verify;
use sgcl_runstore::{Commits, EventKind, Events, Order, Orders, RunConfig, RunName, Spec};
use sgcl_tests::S3Server;
use support::{Process, Running, config, patch_set, processes, start_over, worker};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

const NODES: u32 = 2;
const RANKS: u32 = 2;
/// Patches of the set, and of a step of all ranks.
const PATCHES: u64 = 162;
const BATCH: u64 = 32;

/// What is done to the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// kill -9 of a rank.
    Rank,
    /// The same in the middle of what is not a step.
    RankInKMeans,
    RankInCheckpoint,
    RankInRegroup,
    /// kill -9 of a supervisor, whose ranks die with it.
    Node,
    /// SIGTERM.
    Preempted,
    /// `sgclctl drain`.
    Drained,
    /// SIGSTOP of a rank.
    Hangs,
    /// SIGSTOP of a supervisor.
    Silent,
    /// The coordinator dies; another one comes.
    Coordinator,
    /// The storage does not answer for some seconds.
    Outage,
    /// Many of its answers are wrong, late or lost.
    Flaky,
    /// All ranks at once: no copy of anything is left in memory.
    Everything,
}

const FAULTS: [Fault; 13] = [
    Fault::Rank,
    Fault::RankInKMeans,
    Fault::RankInCheckpoint,
    Fault::RankInRegroup,
    Fault::Node,
    Fault::Preempted,
    Fault::Drained,
    Fault::Hangs,
    Fault::Silent,
    Fault::Coordinator,
    Fault::Outage,
    Fault::Flaky,
    Fault::Everything,
];

/// A fault, and the steps trained before it.
type Schedule = Vec<(u64, Fault)>;

/// Every fault once, and others to make at least twenty.
fn schedule(draw: &mut impl Rng) -> Schedule {
    let mut faults = FAULTS.to_vec();
    faults.extend((faults.len()..22).map(|_| *FAULTS.choose(draw).unwrap()));
    faults.shuffle(draw);
    faults.into_iter().map(|fault| (draw.random_range(3..13), fault)).collect()
}

/// Nodes outlive the coordinator that started them: the next one can still end them.
#[derive(Clone)]
struct Shared(Arc<ProcessLauncher>);

impl Launcher for Shared {
    fn launch(&self, slot: u32, attempt: u32, at: &str, ended: mpsc::UnboundedSender<Ended>) -> std::io::Result<()> {
        self.0.launch(slot, attempt, at, ended)
    }

    fn adopt(&self, ended: mpsc::UnboundedSender<Ended>) -> Vec<(u32, u32)> {
        self.0.adopt(ended)
    }

    fn discard(&self, slot: u32, attempt: u32) {
        self.0.discard(slot, attempt);
    }

    fn kill_all(&self) {
        self.0.kill_all();
    }
}

/// An S3 server with a patch set.
struct Place {
    server: S3Server,
    bucket: Store,
    data: Store,
    folder: tempfile::TempDir,
}

impl Place {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = S3Server::start(&folder.path().join("s3"), &["lab"]).unwrap();
        let (bucket, data) = (server.store("s3://lab/runs").unwrap(), server.store("s3://lab/patches").unwrap());
        assert_eq!(patch_set(&data, 2, 9).await.patches, PATCHES);
        Self { server, bucket, data, folder }
    }

    fn launcher(&self, name: &str, nodes: u32, ranks: u32) -> Shared {
        let mut environment: Vec<(String, String)> =
            self.server.environment().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        environment.push(("SGCL_SHARD_CACHE".into(), self.folder.path().join("cache").display().to_string()));
        let launcher = ProcessLauncher::new(worker(), name.to_owned(), nodes, ranks);
        Shared(Arc::new(launcher.with_threads(1).with_environment(environment)))
    }

    async fn start(&self, name: &str, launcher: Shared, listener: TcpListener, config: &RunConfig) -> Running {
        start_over(listener, launcher, &self.bucket, &self.data, name, NODES, RANKS, config.clone()).await
    }

    fn run(&self, name: &str) -> Store {
        // Read back while the storage may still be slow.
        RunName::new(name).unwrap().store(&self.bucket.patient())
    }

    /// The mean total loss of the last epochs.
    async fn last_loss(&self, name: &str, epochs: u32) -> f64 {
        let rows = read_metrics(&self.run(name)).await.unwrap();
        let losses: Vec<f64> =
            rows.iter().filter(|row| row.epoch + 5 >= epochs).map(|row| row.values["loss/total"]).collect();
        losses.iter().sum::<f64>() / losses.len() as f64
    }
}

/// A run under fire.
struct Chaos<'a> {
    place: &'a Place,
    name: String,
    config: RunConfig,
    launcher: Shared,
    running: Running,
    log: Vec<String>,
    /// When a commit was first seen: what is lost in all its copies before starts at the beginning.
    committed: Option<Timestamp>,
}

impl Chaos<'_> {
    fn ranks(&self) -> Vec<Process> {
        processes(&self.name).into_iter().filter(|process| process.local_rank.is_some()).collect()
    }

    fn supervisors(&self) -> Vec<Process> {
        processes(&self.name).into_iter().filter(|process| process.local_rank.is_none()).collect()
    }

    fn step(&self) -> u64 {
        self.running.view.borrow().step
    }

    /// Waits until the view is as wanted; panics where that never comes.
    async fn until(&mut self, what: &str, longest: Duration, wanted: impl FnMut(&RunView) -> bool) -> bool {
        let came = tokio::time::timeout(longest, self.running.view.wait_for(wanted)).await;
        assert!(!self.running.outcome.is_finished(), "{what}: the run has ended early, after {:#?}", self.log);
        matches!(came, Ok(Ok(_)))
    }

    fn signal(&self, processes: &[Process], signal: Signal, draw: &mut impl Rng) -> bool {
        processes.choose(draw).is_some_and(|process| process.signal(signal))
    }

    async fn strike(&mut self, fault: Fault, draw: &mut impl Rng) {
        let soon = Duration::from_secs(20);
        // Within a step, not at its end.
        tokio::time::sleep(Duration::from_millis(draw.random_range(0..200))).await;
        let at = self.step();
        if self.running.view.borrow().last_commit.is_some() {
            self.committed.get_or_insert_with(Timestamp::now);
        }
        let hit = match fault {
            Fault::Rank => self.signal(&self.ranks(), Signal::SIGKILL, draw),
            Fault::RankInKMeans | Fault::RankInCheckpoint => {
                let phase = if fault == Fault::RankInKMeans { "k-means" } else { "checkpoint" };
                self.until(phase, soon, |view| view.phase == phase).await
                    && self.signal(&self.ranks(), Signal::SIGKILL, draw)
            }
            Fault::RankInRegroup => {
                let first = self.signal(&self.ranks(), Signal::SIGKILL, draw);
                tokio::time::sleep(Duration::from_millis(draw.random_range(20..400))).await;
                first && self.signal(&self.ranks(), Signal::SIGKILL, draw)
            }
            Fault::Node => self.signal(&self.supervisors(), Signal::SIGKILL, draw),
            Fault::Preempted => self.signal(&self.supervisors(), Signal::SIGTERM, draw),
            Fault::Drained => {
                let node = draw.random_range(0..NODES).to_string();
                let orders = Orders::new(&self.place.run(&self.name));
                orders.give(Order::Drain { node }, Timestamp::now()).await.is_ok()
            }
            Fault::Hangs => self.signal(&self.ranks(), Signal::SIGSTOP, draw),
            Fault::Silent => self.signal(&self.supervisors(), Signal::SIGSTOP, draw),
            Fault::Coordinator => {
                self.replace_coordinator(Duration::from_millis(draw.random_range(0..3000))).await;
                true
            }
            Fault::Outage => {
                self.place.server.faults().outage_for(Duration::from_millis(draw.random_range(500..4000)));
                true
            }
            Fault::Flaky => {
                let seed = draw.next_u64() % 1000;
                let plan = format!(
                    "seed={seed},error=0.1,lost=0.1,conflict=0.1,truncate=0.1,slow=0.1:100ms,timeout=0.02:300ms"
                );
                self.place.server.faults().set(plan.parse().unwrap());
                true
            }
            Fault::Everything => self.ranks().iter().filter(|rank| rank.signal(Signal::SIGKILL)).count() > 0,
        };
        self.log.push(format!("step {at}: {fault:?}{}", if hit { "" } else { " (nobody to hit)" }));
    }

    async fn replace_coordinator(&mut self, absent: Duration) {
        self.running.outcome.abort();
        let _ = (&mut self.running.outcome).await;
        tokio::time::sleep(absent).await;
        let listener = loop {
            match TcpListener::bind(self.running.address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        let launcher = self.launcher.clone();
        self.running = self.place.start(&self.name, launcher, listener, &self.config).await;
    }
}

/// One run under the faults of `seed`: its last loss, and its epochs. Its processes are found, and struck, by its `name`.
async fn survive(place: &Place, name: String, seed: u64) -> (f64, u32) {
    let mut draw = rng(seed, Purpose::Phantom, 7, 7);
    let schedule = schedule(&mut draw);
    let steps: u64 = schedule.iter().map(|(gap, _)| gap).sum();
    let epochs = u32::try_from(steps.div_ceil(PATCHES.div_ceil(BATCH))).unwrap() + 6;
    let epochs_key = format!("epochs={epochs}");
    let sets =
        [&epochs_key, "checkpoint.every_steps=15", "step_timeout_s=6", "checkpoint.keep_last=5", "max_restarts=1000"];
    let config = config(&sets);
    let launcher = place.launcher(&name, NODES, RANKS);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let running = place.start(&name, launcher.clone(), listener, &config).await;
    let mut chaos = Chaos { place, name: name.clone(), config, launcher, running, log: Vec::new(), committed: None };
    for (gap, fault) in schedule {
        let next = chaos.step() + gap;
        let came = chaos.until("training", Duration::from_secs(120), |view| view.step >= next).await;
        assert!(came, "SGCL_SEED={seed}: no progress for two minutes after {:#?}", chaos.log);
        // Whatever the storage suffered is over by the next fault.
        place.server.faults().set(FaultPlan::default());
        chaos.strike(fault, &mut draw).await;
    }
    place.server.faults().set(FaultPlan::default());
    let Chaos { running, log, committed, .. } = chaos;
    let outcome = tokio::time::timeout(Duration::from_secs(300), running.outcome).await;
    let outcome = outcome.unwrap_or_else(|_| panic!("SGCL_SEED={seed}: never ends after {log:#?}")).unwrap();
    assert_eq!(outcome, Outcome::Finished, "SGCL_SEED={seed}: after {log:#?}");

    let run = place.run(&name);
    let spec = Spec::find(&run).await.unwrap().unwrap();
    let set = PatchSet::load(place.data.clone()).await.unwrap();
    let proof = verify(&Commits::new(&run), &spec, &set, |_, _| {}).await.unwrap();
    assert!(proof.holds(), "SGCL_SEED={seed}: {:#?} after {log:#?}", proof.problems);
    assert!(proof.epochs.iter().all(|epoch| epoch.patches == PATCHES) && proof.epochs.len() == epochs as usize);
    let mut changes = 0;
    for event in Events::new(&run).read().await.unwrap() {
        if let EventKind::Regrouped { reason, steps_lost, from_commit, .. } = event.kind {
            changes += 1;
            let nothing_to_go_back_to = committed.is_none_or(|committed| event.time < committed);
            assert!(
                from_commit.is_some() || steps_lost == 0 || nothing_to_go_back_to,
                "SGCL_SEED={seed}: {steps_lost} steps lost after {log:#?}: {reason}"
            );
        }
    }
    assert!(changes >= 10, "SGCL_SEED={seed}: {changes} changes only after {log:#?}");
    eprintln!(
        "SGCL_SEED={seed}: {} faults, {changes} changes of membership, {epochs} epochs, {} steps",
        log.len(),
        proof.steps
    );
    (place.last_loss(&name, epochs).await, epochs)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

/// The last losses of runs that nothing happens to: of one rank each, which computes the step of four.
async fn undisturbed(place: &Place, epochs: u32) -> Vec<f64> {
    let calm = (0..3).map(|seed| async move {
        let name = format!("calm-{seed}");
        let lanes = format!("batch.accumulate={}", NODES * RANKS);
        let config = config(&[&format!("epochs={epochs}"), &format!("seed={seed}"), &lanes]);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let launcher = place.launcher(&name, 1, 1);
        let running = start_over(listener, launcher, &place.bucket, &place.data, &name, 1, 1, config).await;
        assert_eq!(running.outcome.await.unwrap(), Outcome::Finished);
        place.last_loss(&name, epochs).await
    });
    futures::future::join_all(calm).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_under_twenty_faults_uses_every_patch_once_and_learns_what_undisturbed_runs_learn() {
    let (first, soak) = (number("SGCL_SEED").unwrap_or(1), Duration::from_secs(number("SGCL_SOAK_S").unwrap_or(0)));
    let began = Instant::now();
    let place = Place::new().await;
    for seed in first.. {
        let (loss, epochs) = survive(&place, format!("chaos-{seed}"), seed).await;
        if seed == first {
            let calm = undisturbed(&place, epochs).await;
            let (least, most) = calm.iter().fold((f64::MAX, f64::MIN), |(a, b), &loss| (a.min(loss), b.max(loss)));
            // Three runs show less than their whole spread; a smaller world takes smaller steps for a while.
            let slack = (most - least).max(0.03 * most);
            eprintln!("SGCL_SEED={seed}: last loss {loss:.3}, undisturbed {calm:.3?}");
            assert!((least - slack..=most + slack).contains(&loss), "SGCL_SEED={seed}: {loss} is not among {calm:?}");
        }
        if began.elapsed() >= soak {
            break;
        }
    }
}
