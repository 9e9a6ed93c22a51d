//! What losing ranks and nodes costs, beside torchrun elastic under the same kills, and what readiness for it costs a step.
//!
//! ```text
//! make bench-preemption [ARGS="--quick"]
//! ```
//!
//! Three parts in one call. `ours`: a run of real workers under a coordinator in this process, over a bucket in a folder (or S3 over HTTP), to its
//! end; its metrics, events and commits are read back from the bucket, and `verify` proves its samples. `torchrun`: a DDP script that checkpoints
//! as often, hit at the same steps in the same way. `cost`: the step time of the same learner bare, in a world formed over c10d alone, and in
//! the system with and without checkpoints and replicas, all alive at once and by turns. Bars are printed beside what was measured, never asserted.
//! The last line is one JSON object.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, unreachable_pub)]

#[path = "preemption/cost.rs"]
mod cost;
#[path = "preemption/faults.rs"]
mod faults;
#[path = "preemption/figures.rs"]
mod figures;
#[path = "preemption/ours.rs"]
mod ours;
#[path = "preemption/table.rs"]
mod table;
#[path = "preemption/torchrun.rs"]
mod torchrun;

#[allow(unused_imports)]
#[path = "../tests/support/mod.rs"]
mod support;

use std::process::Command;
use std::time::Duration;

use faults::{Fault, Kind};
use serde_json::json;

const HELP: &str = "\
preemption [--quick]             small sizes: under three minutes, for development; its figures mean little
           [--parts NAMES]       of ours,torchrun,cost; all by default
           [--faults KINDS]      of notice,rank,node,away,all,hang,silent, in the order to apply them [default: twelve, mixed]
           [--steps COUNT]       steps of the run that is hit [1600]
           [--every STEPS]       between checkpoints [400]
           [--ranks COUNT]       ranks of each of the two nodes [1]
           [--method NAME]       sgcl (one global and four local views a sample) or npid (the global one alone) [sgcl]
           [--px SIDE]           of a view [32]
           [--batch COUNT]       samples of a rank's step [8]
           [--step-timeout S]    ours: silence that counts as a hang [4]
           [--away S]            how long a node of the fault `away` stays away [20]
           [--hang-wait S]       how long torchrun is given to notice a hang or a silent node [60]
           [--cost-seconds S]    that four worlds of two ranks on two nodes take turns in `cost` [600]
           [--cost-every STEPS]  between checkpoints there [50]
           [--repeat TIMES]      stretches of that time, each compared for itself [10]
           [--s3]                the bucket is S3 over HTTP, served by this program
           [--log FILE]          everything that coordinator and workers say, with times
SGCL_SEED decides which ranks and nodes are hit, and when within a step.";

/// What to measure.
#[derive(Clone, Debug)]
struct Args {
    parts: Vec<String>,
    faults: Vec<Kind>,
    steps: u64,
    every: u64,
    ranks: u32,
    method: String,
    px: u32,
    batch: usize,
    step_timeout: u64,
    away: Duration,
    hang_wait: Duration,
    repeat: usize,
    cost_seconds: u64,
    cost_every: u64,
    seed: u64,
    s3: bool,
    bucket: Option<String>,
    log: Option<String>,
}

impl Args {
    fn world(&self) -> u32 {
        faults::NODES * self.ranks
    }

    /// Views of a sample.
    fn views(&self) -> u32 {
        if self.method == "npid" { 1 } else { 5 }
    }

    fn schedule(&self) -> Vec<Fault> {
        faults::schedule(&self.faults, self.steps, self.seed)
    }

    fn has(&self, part: &str) -> bool {
        self.parts.iter().any(|named| named == part)
    }
}

fn args() -> Args {
    let mut args = Args {
        parts: ["ours", "torchrun", "cost"].map(String::from).into(),
        faults: faults::MIXED.to_vec(),
        steps: 1600,
        every: 400,
        ranks: 1,
        method: "sgcl".into(),
        px: 32,
        batch: 8,
        step_timeout: 4,
        away: Duration::from_secs(20),
        hang_wait: Duration::from_secs(60),
        repeat: 10,
        cost_seconds: 600,
        cost_every: 50,
        seed: std::env::var("SGCL_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1),
        s3: false,
        bucket: None,
        log: None,
    };
    let mut given = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(arg) = given.next() {
        let mut value = || given.next().unwrap_or_else(|| panic!("{arg} wants a value\n{HELP}"));
        match arg.as_str() {
            "--quick" => {
                args.faults = vec![Kind::Notice, Kind::Rank, Kind::All, Kind::Hang];
                (args.steps, args.every, args.ranks, args.method) = (160, 40, 1, "npid".into());
                args.hang_wait = Duration::from_secs(5);
                (args.repeat, args.cost_seconds, args.cost_every) = (1, 40, 20);
            }
            "--parts" => args.parts = value().split(',').map(String::from).collect(),
            "--faults" => args.faults = value().split(',').map(|kind| kind.parse().expect(HELP)).collect(),
            "--steps" => args.steps = value().parse().expect(HELP),
            "--every" => args.every = value().parse().expect(HELP),
            "--ranks" => args.ranks = value().parse().expect(HELP),
            "--method" => args.method = value(),
            "--px" => args.px = value().parse().expect(HELP),
            "--batch" => args.batch = value().parse().expect(HELP),
            "--step-timeout" => args.step_timeout = value().parse().expect(HELP),
            "--away" => args.away = Duration::from_secs(value().parse().expect(HELP)),
            "--hang-wait" => args.hang_wait = Duration::from_secs(value().parse().expect(HELP)),
            "--repeat" => args.repeat = value().parse().expect(HELP),
            "--cost-seconds" => args.cost_seconds = value().parse().expect(HELP),
            "--cost-every" => args.cost_every = value().parse().expect(HELP),
            "--s3" => args.s3 = true,
            "--bucket" => args.bucket = Some(value()),
            "--log" => args.log = Some(value()),
            _ => {
                println!("{HELP}");
                std::process::exit(if arg == "--help" { 0 } else { 64 });
            }
        }
    }
    args
}

fn main() {
    let args = args();
    if args.s3 && args.bucket.is_none() {
        over_s3();
        return;
    }
    println!("seed {}, {} rank(s) on each of {} nodes, {args:?}", args.seed, args.ranks, faults::NODES);
    let log = figures::Log::install(args.log.as_deref());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let ours = args.has("ours").then(|| runtime.block_on(ours::measure(&args, &log)));
    if let Some(found) = &ours {
        println!("\nsgcl: each fault (seconds)");
        found.effects.iter().for_each(|(fault, effect)| table::one(fault, effect));
    }
    let torchrun = args.has("torchrun").then(|| torchrun::measure(&args));
    let cost = args.has("cost").then(|| runtime.block_on(cost::measure(&args)));
    let bars = table::print(&args, ours.as_ref(), torchrun.as_ref(), cost.as_ref());
    println!(
        "{}",
        json!({
            "seed": args.seed, "steps": args.steps, "every": args.every, "nodes": faults::NODES, "ranks_per_node": args.ranks,
            "method": args.method, "px": args.px, "batch": args.batch,
            "ours": ours.map(|found| found.json()), "torchrun": torchrun.map(|found| found.json()),
            "cost": cost.map(|found| found.json(args.every)), "bars": bars,
        })
    );
}

/// The same call once more, with a bucket on a server that lives here: the environment of a process says where S3 is.
fn over_s3() {
    let folder = tempfile::tempdir().unwrap();
    let server = sgcl_tests::S3Server::start(folder.path(), &["bench"]).unwrap();
    let status = Command::new(std::env::current_exe().unwrap())
        .args(std::env::args().skip(1).filter(|arg| arg != "--bench"))
        .args(["--bucket", "s3://bench"])
        .envs(server.environment())
        .status()
        .unwrap();
    std::process::exit(status.code().unwrap_or(1));
}
