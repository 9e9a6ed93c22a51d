//! What it costs a step to be ready for losses: the same learner, data and world of two, bare and in the system.
//!
//! All four live at once and take turns of [`SLICE`]: whoever's turn it is not is stopped (SIGSTOP of its ranks). So what drifts on this machine
//! – its clock, its neighbours – hits all alike, where whole runs one after the other differ by more than what is to be measured. Time counts
//! for a world while it may compute.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::signal::Signal;
use rand::seq::SliceRandom as _;
use serde_json::{Value, json};
use sgcl_coordinator::ProcessLauncher;
use sgcl_draw::{Purpose, rng};
use sgcl_patchset::PatchSet;
use sgcl_runstore::metrics::read_metrics;
use sgcl_runstore::{RunConfig, RunName, Spec};

use crate::Args;
use crate::figures::{Figure, between};
use crate::ours::{Place, config};
use crate::support::{self, Running};

/// Ranks, each on a node of its own: this machine has as many cores.
const WORLD: u32 = 2;
/// Steps at the beginning that do not count.
const WARM: u64 = 20;
/// A turn. Three of them are shorter than the silence after which a line counts as broken.
const SLICE: Duration = Duration::from_millis(300);
/// Steps of a world that are possible at most: its epoch is as long, so that no k-means comes between.
const STEPS: u64 = 4000;
/// Longest wait for the first steps of a world.
const PATIENCE: Duration = Duration::from_secs(300);

/// Who takes turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// Loader and learner in a world formed over c10d alone, without second copies of the bank.
    Bare,
    /// In the system without checkpoints and without second copies.
    Single,
    /// In the system with second copies, without checkpoints.
    System,
    /// The same with checkpoints.
    Checkpoints,
}

impl What {
    const ALL: [Self; 4] = [Self::Bare, Self::Single, Self::System, Self::Checkpoints];

    fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Single => "single",
            Self::System => "system",
            Self::Checkpoints => "checkpoints",
        }
    }
}

/// Seconds of a step, stretch by stretch of the same time.
#[derive(Default)]
pub struct Found {
    pub bare: Vec<f64>,
    pub single: Vec<f64>,
    pub system: Vec<f64>,
    pub checkpoints: Vec<f64>,
    /// Steps between two checkpoints.
    every: u64,
    /// Steps that count, of the world that made the fewest.
    pub steps: u64,
}

impl Found {
    fn of(&mut self, what: What) -> &mut Vec<f64> {
        match what {
            What::Bare => &mut self.bare,
            What::Single => &mut self.single,
            What::System => &mut self.system,
            What::Checkpoints => &mut self.checkpoints,
        }
    }

    /// Share of a step that `one` takes longer than `other`.
    fn more(one: &[f64], other: &[f64]) -> Figure {
        one.iter().zip(other).map(|(one, other)| one / other - 1.0).collect()
    }

    pub fn replicas(&self) -> Figure {
        Self::more(&self.system, &self.single)
    }

    /// Seconds that one checkpoint takes from training.
    pub fn checkpoint_seconds(&self) -> Figure {
        self.checkpoints.iter().zip(&self.system).map(|(with, without)| (with - without) * self.every as f64).collect()
    }

    /// Share of step time for checkpoints `every` so many steps.
    pub fn checkpointing(&self, every: u64) -> Figure {
        let less = self.every as f64 / every as f64;
        self.checkpoints.iter().zip(&self.system).map(|(with, without)| (with / without - 1.0) * less).collect()
    }

    /// Everything over the bare loop: second copies, line to the coordinator, metrics, and checkpoints `every` so many steps.
    pub fn whole(&self, every: u64) -> Figure {
        let less = self.every as f64 / every as f64;
        let stretches = self.checkpoints.iter().zip(&self.system).zip(&self.bare);
        stretches.map(|((with, without), bare)| (without + (with - without) * less) / bare - 1.0).collect()
    }

    pub fn json(&self, every: u64) -> Value {
        let figure = |values: &[f64]| values.iter().copied().collect::<Figure>().json();
        json!({
            "bare_step_seconds": figure(&self.bare), "system_step_seconds": figure(&self.system),
            "with_checkpoints_step_seconds": figure(&self.checkpoints), "without_replicas_step_seconds": figure(&self.single),
            "steps": self.steps, "checkpoint_every": self.every,
            "replicas": self.replicas().json(), "checkpoint_seconds": self.checkpoint_seconds().json(),
            "checkpoints_share": self.checkpointing(every).json(), "whole_share": self.whole(every).json(),
        })
    }
}

/// Processes that take turns, and what they say of their steps.
enum World {
    Bare { ranks: Vec<Child>, ends: Arc<Mutex<Vec<Timestamp>>> },
    System(Running),
}

impl World {
    async fn start(args: &Args, place: &Place, what: What) -> Self {
        let (replicas, every) = match what {
            What::Bare | What::Single => (0, 0),
            What::System => (1, 0),
            What::Checkpoints => (1, args.cost_every),
        };
        let sets = [
            "epochs=2".into(),
            "step_timeout_s=600".into(),
            format!("bank.replicas={replicas}"),
            format!("checkpoint.every_steps={every}"),
        ];
        let (name, config) = (what.name(), config(args, &sets));
        if what == What::Bare {
            return bare(place, name, config).await;
        }
        let launcher = ProcessLauncher::new(support::worker(), name.to_owned(), WORLD, 1).with_threads(1);
        Self::System(support::start_with(launcher, &place.bucket, &place.data, name, WORLD, 1, config).await)
    }

    fn signal(&self, name: &str, signal: Signal) {
        match self {
            Self::Bare { ranks, .. } => {
                for rank in ranks {
                    let pid = nix::unistd::Pid::from_raw(i32::try_from(rank.id()).unwrap());
                    nix::sys::signal::kill(pid, signal).unwrap();
                }
            }
            Self::System(_) => {
                let ranks = support::processes(name).into_iter().filter(|process| process.local_rank.is_some());
                ranks.for_each(|rank| assert!(rank.signal(signal)));
            }
        }
    }

    /// Steps finished, as far as they were told.
    fn steps(&self) -> u64 {
        match self {
            Self::Bare { ends, .. } => ends.lock().unwrap().len() as u64,
            Self::System(running) => running.view.borrow().step,
        }
    }

    /// Ends it; when each of its steps ended.
    async fn end(self, place: &Place, name: &str) -> Vec<Timestamp> {
        match self {
            Self::Bare { ranks, ends } => {
                for mut rank in ranks {
                    rank.kill().unwrap();
                    rank.wait().unwrap();
                }
                ends.lock().unwrap().clone()
            }
            Self::System(running) => {
                running.stop.cancel();
                running.outcome.await.unwrap();
                let steps = read_metrics(&RunName::new(name).unwrap().store(&place.bucket)).await.unwrap();
                assert!(steps.iter().all(|step| step.generation == 1), "a turn was taken for a loss");
                steps.iter().map(|metric| metric.time).collect()
            }
        }
    }
}

async fn bare(place: &Place, name: &str, config: RunConfig) -> World {
    let set = PatchSet::open(&place.data).await.unwrap();
    let run = RunName::new(name).unwrap();
    let store = run.store(&place.bucket);
    let id = set.manifest().content_id.clone();
    Spec::new(run, &place.data, id, WORLD, 1, 1, config, Timestamp::now()).create(&store).await.unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let rank = |rank: u32| {
        Command::new(support::worker())
            .args(["bare", "--run-url", store.url(), "--rank", &rank.to_string(), "--world", &WORLD.to_string()])
            .args(["--port", &port.to_string(), "--steps", &STEPS.to_string()])
            .env("OMP_NUM_THREADS", "1")
            .stdout(if rank == 0 { Stdio::piped() } else { Stdio::null() })
            .spawn()
            .unwrap()
    };
    let mut ranks: Vec<Child> = (0..WORLD).map(rank).collect();
    let ends = Arc::new(Mutex::new(Vec::new()));
    let (told, said) = (Arc::clone(&ends), ranks[0].stdout.take().unwrap());
    std::thread::spawn(move || {
        for line in BufReader::new(said).lines().map_while(Result::ok) {
            told.lock().unwrap().push(line.parse().unwrap());
        }
    });
    World::Bare { ranks, ends }
}

/// All of them by turns, for as long as asked.
pub async fn measure(args: &Args) -> Found {
    let place = Place::new(args, (STEPS + 1) * u64::from(WORLD) * args.batch as u64).await;
    let mut worlds: Vec<Turns> = Vec::new();
    for what in What::ALL {
        worlds.push((what, World::start(args, &place, what).await, Vec::new()));
    }
    let began = std::time::Instant::now();
    while let Some((what, ..)) = worlds.iter().find(|(_, world, _)| world.steps() < WARM) {
        assert!(began.elapsed() < PATIENCE, "{what:?} does not get on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("four worlds take turns of {SLICE:?} for {} s", args.cost_seconds);
    worlds.iter().for_each(|(what, world, _)| world.signal(what.name(), Signal::SIGSTOP));
    let mut draw = rng(args.seed, Purpose::Phantom, 6, 6);
    let length = Duration::from_secs(args.cost_seconds) / u32::try_from(args.repeat).unwrap();
    let mut marks = vec![Timestamp::now()];
    for _ in 0..args.repeat {
        take_turns(&mut worlds, length, &mut draw).await;
        marks.push(Timestamp::now());
    }
    let mut found = Found { every: args.cost_every, steps: u64::MAX, ..Found::default() };
    for (what, world, turns) in worlds {
        world.signal(what.name(), Signal::SIGCONT);
        let ends = world.end(&place, what.name()).await;
        for stretch in marks.windows(2) {
            let inside: Vec<Timestamp> =
                ends.iter().copied().filter(|end| (stretch[0]..stretch[1]).contains(end)).collect();
            let (first, last) = (inside[0], inside[inside.len() - 1]);
            found.of(what).push(computed(&turns, first, last) / (inside.len() - 1) as f64);
        }
        let counted = ends.iter().filter(|end| (marks[0]..marks[marks.len() - 1]).contains(end)).count();
        found.steps = found.steps.min(counted as u64);
    }
    found
}

/// A world, and the turns it had.
type Turns = (What, World, Vec<(Timestamp, Timestamp)>);

/// Each once a round, in an order of its own, until the time is over.
async fn take_turns(worlds: &mut [Turns], time: Duration, draw: &mut impl rand::Rng) {
    let began = std::time::Instant::now();
    let mut order: Vec<usize> = (0..worlds.len()).collect();
    while began.elapsed() < time {
        order.shuffle(draw);
        for &at in &order {
            let (what, world, turns) = &mut worlds[at];
            let from = Timestamp::now();
            world.signal(what.name(), Signal::SIGCONT);
            tokio::time::sleep(SLICE).await;
            world.signal(what.name(), Signal::SIGSTOP);
            turns.push((from, Timestamp::now()));
        }
    }
}

/// Seconds between two moments in which a world might compute.
fn computed(turns: &[(Timestamp, Timestamp)], from: Timestamp, to: Timestamp) -> f64 {
    turns.iter().map(|&(began, ended)| between(began.max(from), ended.min(to)).max(0.0)).sum()
}
