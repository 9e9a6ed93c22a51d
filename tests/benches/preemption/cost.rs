//! What it costs a step to be ready for losses: the same learner, data and world of two, bare and in the system, by turns.

use std::process::{Command, Stdio};
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use sgcl_coordinator::ProcessLauncher;
use sgcl_patchset::PatchSet;
use sgcl_runstore::metrics::read_metrics;
use sgcl_runstore::{RunConfig, RunName, Spec};

use crate::Args;
use crate::figures::{Figure, between};
use crate::ours::{Place, config};
use crate::support;

/// Ranks, each on a node of its own: this machine has as many cores.
const WORLD: u32 = 2;
/// Steps at the beginning that do not count.
const WARM: u64 = 20;

/// Seconds of a step, turn by turn.
#[derive(Default)]
pub struct Found {
    /// Of the loader and the learner in a world formed over c10d alone, without second copies of the bank.
    pub bare: Vec<f64>,
    /// In the system, with second copies, without checkpoints.
    pub system: Vec<f64>,
    /// The same with checkpoints.
    pub checkpoints: Vec<f64>,
    /// In the system without checkpoints and without second copies.
    pub single: Vec<f64>,
    /// Checkpoints in the steps that count.
    pub made: u64,
    pub steps: u64,
}

impl Found {
    /// Share of a step that `one` takes longer than `other`, turn by turn.
    fn more(one: &[f64], other: &[f64]) -> Figure {
        one.iter().zip(other).map(|(one, other)| one / other - 1.0).collect()
    }

    pub fn replicas(&self) -> Figure {
        Self::more(&self.system, &self.single)
    }

    /// Seconds that one checkpoint takes from training.
    pub fn checkpoint_seconds(&self) -> Figure {
        let both = self.checkpoints.iter().zip(&self.system);
        both.map(|(with, without)| (with - without) * self.steps as f64 / self.made as f64).collect()
    }

    /// Share of step time for checkpoints `every` so many steps.
    pub fn checkpointing(&self, every: u64) -> Figure {
        let both = self.checkpoints.iter().zip(&self.system);
        let share = |(with, without): (&f64, &f64)| {
            (with - without) * self.steps as f64 / self.made as f64 / (every as f64 * without)
        };
        both.map(share).collect()
    }

    /// Everything over the bare loop: second copies, line to the coordinator, metrics, and checkpoints `every` so many steps.
    pub fn whole(&self, every: u64) -> Figure {
        let turns = self.checkpoints.iter().zip(&self.system).zip(&self.bare);
        let share = |((with, without), bare): ((&f64, &f64), &f64)| {
            (without + (with - without) * self.steps as f64 / self.made as f64 / every as f64) / bare - 1.0
        };
        turns.map(share).collect()
    }

    pub fn json(&self, every: u64) -> Value {
        let figure = |values: &[f64]| values.iter().copied().collect::<Figure>().json();
        json!({
            "bare_step_seconds": figure(&self.bare), "system_step_seconds": figure(&self.system),
            "with_checkpoints_step_seconds": figure(&self.checkpoints), "without_replicas_step_seconds": figure(&self.single),
            "steps": self.steps, "checkpoints": self.made,
            "replicas": self.replicas().json(), "checkpoint_seconds": self.checkpoint_seconds().json(),
            "checkpoints_share": self.checkpointing(every).json(), "whole_share": self.whole(every).json(),
        })
    }
}

/// Every configuration once a turn.
pub async fn measure(args: &Args) -> Found {
    // One epoch is longer than a run: no k-means within it.
    let patches = (args.cost_steps + 60) * u64::from(WORLD) * args.batch as u64;
    let place = Place::new(args, patches).await;
    let mut found = Found { steps: args.cost_steps - WARM, ..Found::default() };
    found.made = (WARM..args.cost_steps).filter(|step| step.is_multiple_of(args.cost_every)).count() as u64;
    let sets = |replicas: u32, every: u64| {
        config(
            args,
            &["epochs=2".into(), format!("bank.replicas={replicas}"), format!("checkpoint.every_steps={every}")],
        )
    };
    for turn in 0..args.repeat {
        // Every other turn backwards: what drifts hits all alike.
        let mut order = [0, 1, 2, 3];
        if turn % 2 == 1 {
            order.reverse();
        }
        for which in order {
            let name = format!("cost-{turn}-{which}");
            let (what, taken) = match which {
                0 => ("bare", &mut found.bare),
                1 => ("system, one copy", &mut found.single),
                2 => ("system, two copies", &mut found.system),
                _ => ("system, two copies, checkpoints", &mut found.checkpoints),
            };
            let seconds = match which {
                0 => bare(args, &place, &name, sets(0, 0)).await,
                1 => system(args, &place, &name, sets(0, 0)).await,
                2 => system(args, &place, &name, sets(1, 0)).await,
                _ => system(args, &place, &name, sets(1, args.cost_every)).await,
            };
            println!("turn {turn}, {what}: {seconds:.4} s a step");
            taken.push(seconds);
        }
    }
    found
}

/// Mean seconds of the steps that count, in a run.
async fn system(args: &Args, place: &Place, name: &str, config: RunConfig) -> f64 {
    let launcher = ProcessLauncher::new(support::worker(), name.to_owned(), WORLD, 1).with_threads(1);
    let mut running = support::start_with(launcher, &place.bucket, &place.data, name, WORLD, 1, config).await;
    // Metrics are written every 20 steps.
    let far = running.view.wait_for(|view| view.step > args.cost_steps + 20);
    tokio::time::timeout(Duration::from_secs(600), far).await.expect("the run does not get on").unwrap();
    running.stop.cancel();
    running.outcome.await.unwrap();
    let steps = read_metrics(&RunName::new(name).unwrap().store(&place.bucket)).await.unwrap();
    let ended = |step: u64| steps.iter().find(|metric| metric.step == step).unwrap().time;
    between(ended(WARM), ended(args.cost_steps)) / (args.cost_steps - WARM) as f64
}

/// The same without a system.
async fn bare(args: &Args, place: &Place, name: &str, config: RunConfig) -> f64 {
    let set = PatchSet::open(&place.data).await.unwrap();
    let run = RunName::new(name).unwrap();
    let store = run.store(&place.bucket);
    let id = set.manifest().content_id.clone();
    Spec::new(run, &place.data, id, WORLD, 1, 1, config, Timestamp::now()).create(&store).await.unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let rank = |rank: u32| {
        Command::new(support::worker())
            .args(["bare", "--run-url", store.url(), "--rank", &rank.to_string(), "--world", &WORLD.to_string()])
            .args(["--port", &port.to_string(), "--steps", &args.cost_steps.to_string()])
            .env("OMP_NUM_THREADS", "1")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let ranks: Vec<_> = (0..WORLD).map(rank).collect();
    let said: Vec<_> = ranks.into_iter().map(|rank| rank.wait_with_output().unwrap()).collect();
    assert!(said.iter().all(|rank| rank.status.success()), "{said:?}");
    let text = String::from_utf8(said[0].stdout.clone()).unwrap();
    let ends: Vec<f64> = text.lines().map(|line| line.parse().unwrap()).collect();
    let at = |step: u64| ends[usize::try_from(step).unwrap() - 1];
    (at(args.cost_steps) - at(WARM)) / (args.cost_steps - WARM) as f64
}
