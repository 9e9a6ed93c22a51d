//! A rank's steps and nothing around them: a world formed over c10d alone, the same loader and learner, no coordinator, no metrics, no
//! commits. What the whole system costs a step is measured against it (`make bench-preemption`).

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use jiff::Timestamp;
use sgcl::kmeans::{self, KMeans};
use sgcl::schedule;
use sgcl_c10d::{Interface, ProcessGroup, Store as Rendezvous};
use sgcl_patchset::{EpochPlan, Store};
use sgcl_proto::v1;
use sgcl_runstore::Spec;
use tokio::runtime::Handle;

use super::loader::{EpochLoad, LaneBatch, Loader};
use super::ring::Ring;
use super::setup;
use super::step::{Asked, StepPlan};
use super::train::Place;

/// Longest wait for the other ranks.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Arguments of `sgcl-worker bare`.
#[derive(Args, Debug)]
pub(crate) struct BareArgs {
    /// The run's part of the bucket: its spec is read
    #[arg(long)]
    run_url: String,
    /// Number of this rank, from 0
    #[arg(long)]
    rank: usize,
    /// Ranks, each as if on a node of its own
    #[arg(long)]
    world: usize,
    /// Port of 127.0.0.1 at which rank 0 serves the store
    #[arg(long)]
    port: u16,
    /// Steps to train, of the first epoch
    #[arg(long)]
    steps: usize,
}

/// Trains; writes a line at each step's end, the time (RFC 3339).
pub(crate) fn main(runtime: &Handle, args: &BareArgs, out: &mut impl Write) -> Result<()> {
    let run = Store::open(&args.run_url)?;
    let spec = runtime.block_on(Spec::find(&run))?.context("there is no run at this address")?;
    let welcome = v1::Welcome { run_url: args.run_url.clone(), spec_json: serde_json::to_string(&spec)? };
    let mut trainer = setup::prepare(runtime, 0, "127.0.0.1", &welcome)?;
    let (rank, world) = (args.rank, args.world);
    trainer.place = Place { rank, generation: 1, nodes: (0..world).collect() };
    let store = match rank {
        0 => Rendezvous::listen("127.0.0.1", args.port, TIMEOUT)?.0,
        _ => Rendezvous::connect("127.0.0.1", args.port, TIMEOUT)?,
    };
    let interface = Interface::Address("127.0.0.1".to_owned());
    let group = Arc::new(ProcessGroup::gloo(&store, rank, world, TIMEOUT, &interface)?);
    trainer.ring = Box::new(Ring(Arc::clone(&group)));
    trainer.learner.draws = setup::draws(&spec.config, &trainer.learner.params, trainer.layout.n, world)?;
    trainer.fresh()?;
    if spec.config.backbone.sync_norm {
        trainer.learner.model.normalise_with(Some(Arc::clone(&group)));
    }
    trainer.learner.reducer = Some(setup::reducer(&trainer.learner.model, &group)?);

    let config = &spec.config;
    if config.method.has_inter() {
        let size = KMeans {
            runs: i64::try_from(config.kmeans.runs)?,
            clusters: i64::try_from(config.kmeans.clusters)?,
            iterations: i64::try_from(config.kmeans.iterations)?,
        };
        let labels = kmeans::cluster(&trainer.learner.held.banks, size, config.seed, 0, trainer.ring.as_ref())?;
        trainer.learner.label(labels);
    }
    let accumulate = config.batch.accumulate;
    let (lanes, unused) = (world * accumulate, trainer.subset.unused());
    let (batch, window) = (config.batch.per_rank, config.loader.window_shards);
    let plan = EpochPlan::new(trainer.set.index(), config.seed, 0, &unused, lanes, batch, window)?;
    ensure!(args.steps <= plan.steps(), "the epoch has {} steps", plan.steps());
    let plan = Arc::new(plan);
    let mine = rank * accumulate;
    let load = EpochLoad {
        plan: Arc::clone(&plan),
        lanes: mine..mine + accumulate,
        from_step: 0,
        seed: config.seed,
        epoch: 0,
        device: trainer.learner.device,
    };
    let loader = Loader::start(Arc::clone(&trainer.reader), Arc::clone(&trainer.pool), trainer.views.clone(), load)?;
    let lr = schedule::cosine(config.base_lr(world), 0, u64::from(config.epochs));
    for at in 0..args.steps {
        let row = |&id: &u32| trainer.subset.row_of(id).map(i64::from).context("a patch that is not trained on");
        let rows = (0..lanes)
            .map(|lane| plan.batch_of(lane, at).iter().map(row).collect::<Result<Vec<i64>>>())
            .collect::<Result<Vec<_>>>()?;
        let step = StepPlan {
            epoch: 0,
            step: at as u64,
            total: at as u64,
            lr,
            inter_weight: setup::inter_weight(config, 0),
            rows,
            lanes_per_rank: accumulate,
        };
        let batches: Vec<LaneBatch> = (0..accumulate).map(|_| loader.next(|| Ok(()))).collect::<Result<_>>()?;
        trainer.learner.step(trainer.ring.as_ref(), &step, batches, Asked::default())?;
        writeln!(out, "{}", Timestamp::now())?;
    }
    trainer.ring.barrier()?;
    Ok(())
}
