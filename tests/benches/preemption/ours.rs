//! A run that is hit: real workers, the coordinator in this process; read back from the bucket once it is over.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sgcl_coordinator::launcher::Ended;
use sgcl_coordinator::{Change, Launcher, Outcome, ProcessLauncher};
use sgcl_patchset::{PatchSet, Store};
use sgcl_runstore::metrics::StepMetrics;
use sgcl_runstore::verify::{Proof, verify};
use sgcl_runstore::{Commits, RunConfig, RunName, Spec};
use tokio::sync::mpsc;

use crate::Args;
use crate::faults::{Effects, Fault, Kind, NODES};
use crate::figures::{Figure, Log, between};
use crate::support::{self, Process, Running};

/// Epochs of a run, so that samples are proved over several.
const EPOCHS: u64 = 8;
/// Slides of the patch set.
const SLIDES: u64 = 4;
/// Longest wait for full size after a fault.
const GIVE_UP: Duration = Duration::from_secs(180);
const RUN: &str = "hit";

/// A patch set and a bucket.
pub struct Place {
    _folder: tempfile::TempDir,
    pub bucket: Store,
    pub data: String,
}

impl Place {
    /// With a patch set of at least `patches`.
    pub async fn new(args: &Args, patches: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("patches").display().to_string();
        let side = (1..).find(|side| SLIDES * side * side >= patches).unwrap();
        support::patch_set(&Store::open(&data).unwrap(), SLIDES, i32::try_from(side).unwrap()).await;
        let bucket = args.bucket.clone().unwrap_or_else(|| folder.path().join("bucket").display().to_string());
        Self { bucket: Store::open(&bucket).unwrap(), data, _folder: folder }
    }
}

/// A configuration of the sizes asked for.
pub fn config(args: &Args, overrides: &[String]) -> RunConfig {
    let mut sets = vec![
        format!("method={}", args.method),
        format!("views.global_px={}", args.px),
        format!("views.local_px={}", args.px),
        format!("batch.per_rank={}", args.batch),
        format!("seed={}", args.seed),
        "max_restarts=1000".into(),
        "checkpoint.every_epochs=1000".into(),
        "checkpoint.every_seconds=0".into(),
        "checkpoint.keep_last=1000".into(),
        // Decoding threads besides the computing one, as a rank has them on a machine of its own.
        "loader.threads=1".into(),
    ];
    sets.extend(overrides.iter().cloned());
    support::config(&sets.iter().map(String::as_str).collect::<Vec<_>>())
}

/// What a run under faults showed.
pub struct Found {
    pub effects: Vec<(Fault, Effects)>,
    pub commits: Figure,
    pub step: Figure,
    pub proof: Proof,
    pub seconds: f64,
}

impl Found {
    pub fn json(&self) -> Value {
        json!({
            "faults": crate::table::faults_json(&self.effects), "commit_seconds": self.commits.json(), "step_seconds": self.step.json(),
            "steps": self.proof.steps, "epochs": self.proof.epochs.len(), "commits": self.proof.commits.len(),
            "samples_missed": self.missed(), "verify_holds": self.proof.holds(), "verify_problems": self.proof.problems,
            "seconds": self.seconds,
        })
    }

    /// Patches of finished epochs that were not used; what was used twice is a problem of the proof.
    pub fn missed(&self) -> u64 {
        self.proof.epochs.iter().map(|epoch| epoch.of - epoch.patches).sum()
    }
}

/// Starts replacements late while a node is to stay away.
struct Late {
    nodes: Arc<ProcessLauncher>,
    away: Arc<Mutex<Option<Duration>>>,
}

impl Launcher for Late {
    fn launch(&self, slot: u32, attempt: u32, at: &str, ended: mpsc::UnboundedSender<Ended>) -> std::io::Result<()> {
        let Some(away) = self.away.lock().unwrap().take() else { return self.nodes.launch(slot, attempt, at, ended) };
        let (nodes, at) = (Arc::clone(&self.nodes), at.to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(away).await;
            nodes.launch(slot, attempt, &at, ended).unwrap();
        });
        Ok(())
    }

    fn adopt(&self, ended: mpsc::UnboundedSender<Ended>) -> Vec<(u32, u32)> {
        self.nodes.adopt(ended)
    }

    fn discard(&self, slot: u32, attempt: u32) {
        self.nodes.discard(slot, attempt);
    }

    fn kill_all(&self) {
        self.nodes.kill_all();
    }
}

/// When what was hit.
struct Hit {
    fault: Fault,
    at: Timestamp,
    generation: u64,
    /// Membership changes before it, and after it once the run was whole again.
    changes: (usize, usize),
}

/// Runs to the end under the faults.
pub async fn measure(args: &Args, log: &Log) -> Found {
    let world = args.world();
    let patches = args.steps / EPOCHS * u64::from(world) * args.batch as u64;
    let place = Place::new(args, patches).await;
    let sets = [
        format!("epochs={EPOCHS}"),
        format!("checkpoint.every_steps={}", args.every),
        format!("step_timeout_s={}", args.step_timeout),
    ];
    let away = Arc::new(Mutex::new(None));
    let nodes = ProcessLauncher::new(support::worker(), RUN.to_owned(), NODES, args.ranks).with_threads(1);
    let launcher = Late { nodes: Arc::new(nodes), away: Arc::clone(&away) };
    let began = Instant::now();
    let mut running =
        support::start_with(launcher, &place.bucket, &place.data, RUN, NODES, args.ranks, config(args, &sets)).await;
    let watch = tokio::spawn(watch(running.view.clone()));
    let mut hits = Vec::new();
    for fault in args.schedule() {
        whole(&mut running, world, fault.step).await;
        tokio::time::sleep(fault.after).await;
        if running.outcome.is_finished() {
            break;
        }
        let (generation, changes) = {
            let view = running.view.borrow();
            (view.generation, view.changes.len())
        };
        if fault.kind == Kind::Away {
            *away.lock().unwrap() = Some(args.away);
        }
        let at = Timestamp::now();
        hit(&fault);
        let again = running.view.wait_for(|view| view.generation > generation && view.ranks == world);
        let again = tokio::time::timeout(GIVE_UP, again).await;
        let after = again.expect("the run is whole again in three minutes").unwrap().changes.len();
        hits.push(Hit { fault, at, generation, changes: (changes, after) });
    }
    let outcome = tokio::time::timeout(Duration::from_secs(1800), running.outcome).await.expect("never ends").unwrap();
    assert_eq!(outcome, Outcome::Finished);
    let seconds = began.elapsed().as_secs_f64();
    let seen = watch.await.unwrap();
    let run = RunName::new(RUN).unwrap().store(&place.bucket);
    let steps = every_step(&run).await;
    let effects = hits.iter().map(|hit| (hit.fault, effects(args, hit, &seen, &steps, log))).collect();
    let spec = Spec::find(&run).await.unwrap().unwrap();
    let set = PatchSet::open(&place.data).await.unwrap();
    let proof = verify(&Commits::new(&run), &spec, &set, |_, _| {}).await.unwrap();
    Found { effects, commits: commits(&run, &seen, &steps).await, step: pace(&steps, &seen, world), proof, seconds }
}

/// Waits until every rank trains and `step` is finished.
async fn whole(running: &mut Running, world: u32, step: u64) {
    let ready = running.view.wait_for(|view| view.ranks == world && view.step >= step && view.phase == "training");
    // The view's sender goes when the run ends.
    let _ = tokio::time::timeout(Duration::from_secs(1800), ready).await.expect("the run does not get on");
}

fn hit(fault: &Fault) {
    let all = support::processes(RUN);
    let (nodes, ranks): (Vec<Process>, Vec<Process>) =
        all.into_iter().partition(|process| process.local_rank.is_none());
    let node = &nodes[fault.draw % nodes.len()];
    let rank = &ranks[fault.draw % ranks.len()];
    let on_node = || ranks.iter().filter(|rank| rank.node == node.node).chain([node]);
    match fault.kind {
        Kind::Notice => assert!(node.signal(Signal::SIGTERM)),
        Kind::Rank => assert!(rank.signal(Signal::SIGKILL)),
        // Its ranks end with it.
        Kind::Node | Kind::Away => assert!(node.signal(Signal::SIGKILL)),
        Kind::All => ranks.iter().for_each(|rank| assert!(rank.signal(Signal::SIGKILL))),
        Kind::Hang => assert!(rank.signal(Signal::SIGSTOP)),
        Kind::Silent => on_node().for_each(|process| assert!(process.signal(Signal::SIGSTOP))),
    }
}

/// What was seen of a run while it went.
#[derive(Default)]
struct Seen {
    /// Ranks of each generation.
    worlds: BTreeMap<u64, u32>,
    /// When each commit was made.
    commits: Vec<(u64, Timestamp)>,
    changes: Vec<Change>,
}

async fn watch(mut view: tokio::sync::watch::Receiver<sgcl_coordinator::RunView>) -> Seen {
    let mut seen = Seen::default();
    loop {
        {
            let view = view.borrow_and_update();
            seen.worlds.insert(view.generation, view.ranks);
            if let Some(seq) = view.last_commit.filter(|&seq| seen.commits.last().is_none_or(|last| last.0 < seq)) {
                seen.commits.push((seq, Timestamp::now()));
            }
            if seen.changes.len() < view.changes.len() {
                seen.changes.clone_from(&view.changes);
            }
        }
        if view.changed().await.is_err() {
            return seen;
        }
    }
}

/// Stretches of time, one after the other.
struct Phases {
    last: Timestamp,
    found: Vec<(&'static str, f64)>,
}

impl Phases {
    fn since(last: Timestamp) -> Self {
        Self { last, found: Vec::new() }
    }

    /// The next one ended then.
    fn until(&mut self, name: &'static str, at: Option<Timestamp>) {
        if let Some(at) = at {
            self.found.push((name, between(self.last, at)));
            self.last = at;
        }
    }
}

fn effects(args: &Args, hit: &Hit, seen: &Seen, steps: &[StepMetrics], log: &Log) -> Effects {
    let world = args.world();
    let changes = &seen.changes[hit.changes.0..hit.changes.1];
    let since = |at: Timestamp| between(hit.at, at);
    let before = steps.iter().rev().find(|step| step.generation <= hit.generation);
    let next = steps.iter().find(|step| step.generation > hit.generation);
    let full =
        steps.iter().find(|step| step.generation > hit.generation && seen.worlds.get(&step.generation) == Some(&world));
    let back = changes.iter().find_map(|change| change.from_commit);
    let decided = |name: &str, from: Timestamp| log.decided(name, from).first().map(|(at, _)| *at);

    // From the fault to the first step of those who are left.
    let mut phases = Phases::since(hit.at);
    let noticed = [decided("Regroup {", hit.at), decided("Pause {", hit.at)].into_iter().flatten().min();
    phases.until("noticed", noticed);
    phases.until("back", decided("Assign {", phases.last));
    phases.until("store", decided("Rendezvous {", phases.last));
    phases.until("ring and state", decided("Started {", phases.last));
    phases.until("first step", next.map(|step| step.time));

    // From the newcomers' being there to the first step of all.
    let asked = log.decided("Pause {", hit.at).into_iter().find(|(_, what)| what.contains("joined"));
    let grown = changes.iter().any(|change| change.reason.contains("joined"));
    let join = asked.zip(full).filter(|_| grown).map(|((asked, _), full)| {
        let mut phases = Phases::since(asked);
        phases.until("end of step", decided("Assign {", phases.last));
        phases.until("store", decided("Rendezvous {", phases.last));
        phases.until("ring and state", decided("Started {", phases.last));
        phases.until("first step", Some(full.time));
        (between(asked, full.time), phases.found)
    });
    let (join, join_phases) = join.map_or((None, Vec::new()), |(took, phases)| (Some(took), phases));
    let end = since(next.map_or(hit.at, |step| step.time));
    let while_away = (hit.fault.kind == Kind::Away).then(|| {
        let gone = args.away.as_secs_f64();
        steps.iter().filter(|step| step.generation > hit.generation && since(step.time) < gone).count() as u64
    });
    Effects {
        step: before.map_or(0, |step| step.step),
        lost: changes.iter().map(|change| change.steps_lost).sum(),
        stepping: next.map(|_| end),
        full: full.map(|step| since(step.time)),
        join,
        // What was not written yet when every rank was killed is not told of.
        still: if back.is_some() { next.map(|_| end) } else { before.zip(next).map(|(a, b)| between(a.time, b.time)) },
        while_away,
        phases: phases.found,
        join_phases,
        note: back.map_or_else(String::new, |seq| format!("back to commit {seq}")),
    }
}

/// All steps that were finished, also those that a later generation undid, as time went.
async fn every_step(run: &Store) -> Vec<StepMetrics> {
    let mut steps = BTreeMap::new();
    for chunk in run.list("metrics").await.unwrap() {
        let text = run.get(&chunk.rel, 64 << 20).await.unwrap();
        for line in text.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            let step: StepMetrics = serde_json::from_slice(line).unwrap();
            steps.insert((step.generation, step.step), step);
        }
    }
    let mut steps: Vec<StepMetrics> = steps.into_values().collect();
    steps.sort_by_key(|step| step.time);
    steps
}

/// Seconds from the end of a checkpoint's step to its commit.
async fn commits(run: &Store, seen: &Seen, steps: &[StepMetrics]) -> Figure {
    let store = Commits::new(run);
    let mut took = Vec::new();
    for &(seq, at) in &seen.commits {
        let Ok(commit) = store.read(seq).await else { continue };
        let (generation, step) = (commit.progress.generation, commit.progress.step);
        let ended = steps.iter().find(|metric| metric.step == step && metric.generation == generation);
        took.extend(ended.map(|metric| between(metric.time, at)));
    }
    took.into_iter().collect()
}

/// Seconds of a step with every rank.
fn pace(steps: &[StepMetrics], seen: &Seen, world: u32) -> Figure {
    let same = |pair: &&[StepMetrics]| {
        pair[0].generation == pair[1].generation
            && pair[0].epoch == pair[1].epoch
            && seen.worlds.get(&pair[1].generation) == Some(&world)
    };
    steps.windows(2).filter(same).map(|pair| between(pair[0].time, pair[1].time)).collect()
}
