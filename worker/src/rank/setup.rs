//! Everything a rank needs before its first step: data, ring, learner, and where the run had stopped.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use sgcl::augment::ViewParams;
use sgcl::bank::{Banks, ShardPlan, Widths};
use sgcl::collective::{Collective, Solo};
use sgcl::draws::HardRanks;
use sgcl::model::Model;
use sgcl::neighbours::Lattice;
use sgcl::objective::{Candidates, HardBy, Params, Variant};
use sgcl::optim::Sgd;
use sgcl::weights;
use sgcl_c10d::{Buckets, Interface, ProcessGroup, Reducer, Store as Rendezvous};
use sgcl_patchset::{CacheOptions, PatchSet, Store, Subset};
use sgcl_proto::v1;
use sgcl_runstore::metrics::MetricsWriter;
use sgcl_runstore::{Commits, RunConfig, Spec, config};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;

use super::ring::Ring;
use super::step::{Draws, Learner};
use super::train::{Place, Position, Trainer};
use crate::session::Session;

/// A rank ready to train. Blocks until all ranks of the generation are.
pub(crate) fn trainer(
    runtime: &Handle,
    local_rank: u32,
    address: &str,
    session: &mut Session,
    assignment: &v1::Assignment,
) -> Result<Trainer> {
    let spec: Spec = serde_json::from_str(&assignment.spec_json).context("the coordinator's spec is not readable")?;
    let run = Store::open(&assignment.run_url)?;
    let (rank, world) = (assignment.rank as usize, assignment.world as usize);
    let (set, subset) = runtime.block_on(data(&spec))?;
    spec.config.check_against(subset.len() as u64, world)?;
    let device = device(&spec.config, local_rank)?;

    let ring = ring(session, assignment, address, device, &spec.config)?;
    let mut learner = learner(&spec, &set, &subset, ring.as_deref(), device)?;
    let mut position = Position::default();
    if let Some(seq) = assignment.commit {
        let commit = runtime.block_on(Commits::new(&run).read(seq))?;
        runtime.block_on(learner.restore(&run, &commit, &subset))?;
        position = runtime.block_on(Position::of(&run, &commit))?;
        tracing::info!(commit = seq, step = position.step, "resumed");
    }

    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = spec.config.loader.threads.or(cores / spec.ranks_per_node.max(1) as usize);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|n| format!("decode-{n}"))
        .build()
        .context("cannot start the decoding threads")?;
    let cache = cache(&set, &spec)?;
    // The reader of a remote set keeps the runtime it is made in.
    let reader = runtime.block_on(async { set.reader(cache) });
    let ring: Box<dyn Collective> = match ring {
        Some(ring) => ring,
        None => Box::new(Solo),
    };
    Ok(Trainer {
        runtime: runtime.clone(),
        views: views(&spec.config),
        metrics: MetricsWriter::new(&run, spec.run.as_str()),
        place: Place { rank, world, generation: assignment.generation },
        spec,
        run,
        set,
        subset,
        reader: Arc::new(reader),
        pool: Arc::new(pool),
        ring,
        learner,
        position,
        spread: None,
    })
}

/// The patch set, and the patches of it that are trained on.
async fn data(spec: &Spec) -> Result<(PatchSet, Subset)> {
    let set = PatchSet::open(&spec.data).await?;
    let manifest = set.manifest();
    ensure!(
        manifest.content_id == spec.data_id,
        "{}: the patch set was changed after the run began ({}, the run has {})",
        spec.data,
        manifest.content_id,
        spec.data_id
    );
    let names: Vec<&str> = manifest.slides.iter().map(|slide| slide.name.as_str()).collect();
    let train = spec.config.data.split(&names)?.train;
    let slides = train.into_iter().map(u32::try_from).collect::<Result<Vec<_>, _>>()?;
    let subset = set.subset(&slides)?;
    Ok((set, subset))
}

fn device(config: &RunConfig, local_rank: u32) -> Result<Device> {
    let gpus = tch::Cuda::device_count();
    let gpu = Device::Cuda(local_rank as usize);
    match config.device {
        config::Device::Cpu => Ok(Device::Cpu),
        config::Device::Auto if gpus == 0 => Ok(Device::Cpu),
        _ if i64::from(local_rank) < gpus => Ok(gpu),
        _ => bail!(
            "local rank {local_rank} wants a GPU and this node has {gpus}; use fewer ranks a node, or device: cpu"
        ),
    }
}

/// Finds the other ranks. A world of one needs none, but reports like the others.
fn ring(
    session: &mut Session,
    assignment: &v1::Assignment,
    address: &str,
    device: Device,
    config: &RunConfig,
) -> Result<Option<Box<Ring>>> {
    let timeout = Duration::from_secs(config.startup_timeout_s);
    let hosted = if assignment.rank == 0 {
        let (store, port) = Rendezvous::listen(address, 0, timeout)?;
        session.store_listening(port);
        Some(store)
    } else {
        None
    };
    let (host, port) = session.rendezvous()?;
    if assignment.world == 1 {
        return Ok(None);
    }
    let store = match hosted {
        Some(store) => store,
        None => Rendezvous::connect(&host, port, timeout)?,
    };
    let store = store.prefix(&format!("generation-{}", assignment.generation))?;
    let (rank, world) = (assignment.rank as usize, assignment.world as usize);
    let timeout = Duration::from_secs(config.step_timeout_s);
    let group = match device {
        #[cfg(feature = "nccl")]
        Device::Cuda(index) => ProcessGroup::nccl(&store, rank, world, timeout, index)?,
        #[cfg(not(feature = "nccl"))]
        Device::Cuda(_) => bail!("this sgcl-worker was built without NCCL; build it with --features nccl"),
        _ => ProcessGroup::gloo(&store, rank, world, timeout, &Interface::Address(address.to_owned()))?,
    };
    Ok(Some(Box::new(Ring(group))))
}

fn learner(spec: &Spec, set: &PatchSet, subset: &Subset, ring: Option<&Ring>, device: Device) -> Result<Learner> {
    let config = &spec.config;
    let n = i64::try_from(subset.len())?;
    let params = params(config)?;
    params.check(n)?;
    let arch = config.backbone.arch.name().parse()?;
    let model = Model::new(arch, i64::try_from(config.projector.dim)?, device);
    model.init(config.seed);
    if let Some(file) = &config.backbone.pretrained {
        let report = weights::load_backbone(&model.backbone, std::path::Path::new(file))?;
        if !report.missing.is_empty() || !report.unexpected.is_empty() {
            tracing::warn!(missing = ?report.missing, unexpected = ?report.unexpected, "keys of {file} that did not match");
        }
    }
    let parameters = model.parameters();
    let reducer = match ring {
        Some(ring) => {
            let tensors: Vec<Tensor> = parameters.iter().map(|(_, parameter)| parameter.shallow_clone()).collect();
            Some(Reducer::new(&tensors, &ring.0, Buckets::default())?)
        }
        None => None,
    };
    let sgd = Sgd::new(parameters, config.optimizer.momentum, config.optimizer.weight_decay);
    let (rank, world) = ring.map_or((0, 1), |ring| (ring.rank(), ring.world()));
    let banks = banks(config, n, arch.width(), &nodes(spec, world), rank, device)?;
    let index = set.index();
    let rows = subset.rows();
    let column = |values: &[i32]| rows.iter().map(|&id| values[id as usize]).collect::<Vec<_>>();
    let slides: Vec<u32> = rows.iter().map(|&id| index.slides()[id as usize]).collect();
    let lattice = Lattice::new(&slides, &column(index.xs()), &column(index.ys()))?;
    let candidates = match config.objective.sample(n.try_into()?, world) {
        Some(rows) => {
            tracing::info!(rows, patches = n, world, "a step looks through a sample of the bank");
            Candidates::Sampled(i64::try_from(rows)?)
        }
        None => Candidates::Exact,
    };
    let looked_through = match candidates {
        Candidates::Sampled(rows) => rows,
        Candidates::Exact => n,
    };
    let top = usize::try_from(params.top(looked_through))?;
    let hard_ranks = HardRanks::new(top, usize::try_from(params.hard)?, config.objective.hard_beta);
    let labels = Tensor::zeros([i64::try_from(config.kmeans.runs)?, banks.held()], (Kind::Int64, device));
    let clusters = Tensor::zeros([banks.held()], (Kind::Int64, device));
    let draws = Draws { seed: config.seed, hard_ranks, candidates };
    Ok(Learner { model, sgd, banks, labels, clusters, lattice, params, draws, device, reducer })
}

/// The node of each rank: ranks are numbered node by node.
fn nodes(spec: &Spec, world: usize) -> Vec<usize> {
    (0..world).map(|rank| rank / spec.ranks_per_node.max(1) as usize).collect()
}

fn banks(config: &RunConfig, n: i64, backbone: i64, nodes: &[usize], rank: usize, device: Device) -> Result<Banks> {
    let dtype = match config.bank.dtype {
        config::BankDtype::Fp32 => Kind::Float,
        config::BankDtype::Bf16 => Kind::BFloat16,
        config::BankDtype::Fp16 => Kind::Half,
    };
    let plan = ShardPlan::new(nodes, config.bank.replicas > 0);
    let dim = i64::try_from(config.projector.dim)?;
    let widths = Widths {
        dim,
        backbone: if config.method.has_inter() { backbone } else { 0 },
        local: if config.method.has_local_views() { dim } else { 0 },
    };
    Ok(Banks::random(config.seed, n, widths, plan, rank, (dtype, device)))
}

fn params(config: &RunConfig) -> Result<Params> {
    let objective = &config.objective;
    Ok(Params {
        variant: match config.variant {
            config::Variant::Exact => Variant::Exact,
            config::Variant::Released => Variant::Released,
        },
        inter: config.method.has_inter(),
        inner: config.method.has_local_views(),
        radius: objective.radius,
        auxiliary: i64::try_from(objective.aux)?,
        nearest: i64::try_from(objective.nearest)?,
        negatives: i64::try_from(objective.negatives)?,
        hard: i64::try_from(objective.hard)?,
        hard_by: HardBy::Auto,
        top_fraction: objective.top_fraction,
        t_instance: objective.t_instance,
        t_spatial: objective.t_spatial,
        clusters: i64::try_from(config.kmeans.clusters)?,
        double: objective.double,
        // Configured as the share of the old row that stays.
        bank_momentum: 1.0 - config.bank.momentum,
    })
}

fn views(config: &RunConfig) -> ViewParams {
    let views = &config.views;
    ViewParams {
        global_px: views.global_px,
        local_px: if config.method.has_local_views() { views.local_px } else { 0 },
        global_scale: views.global_scale.into(),
        local_scale: views.local_scale.into(),
        ..ViewParams::default()
    }
}

/// A set in a folder is read where it lies; one on S3 goes through the node's disk, shared by its ranks.
fn cache(set: &PatchSet, spec: &Spec) -> Result<Option<CacheOptions>> {
    if set.store().local_path("").is_some() || spec.config.loader.cache_bytes == 0 {
        return Ok(None);
    }
    let folder = match std::env::var_os("SGCL_SHARD_CACHE") {
        Some(folder) => folder.into(),
        None => std::env::temp_dir().join("sgcl-shards"),
    };
    std::fs::create_dir_all(&folder).with_context(|| format!("{}: cannot make the shard cache", folder.display()))?;
    Ok(Some(CacheOptions { dir: folder, max_bytes: spec.config.loader.cache_bytes }))
}
