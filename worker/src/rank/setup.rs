//! What a rank needs before its first step: once its data and model, and in every generation its ring.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use sgcl::augment::ViewParams;
use sgcl::bank::{Layout, Widths};
use sgcl::collective::Solo;
use sgcl::draws::HardRanks;
use sgcl::model::Model;
use sgcl::neighbours::Lattice;
use sgcl::objective::{Candidates, HardBy, Inter, Local, Params, Variant};
use sgcl::optim::Sgd;
use sgcl::schedule;
use sgcl::weights;
use sgcl_c10d::{Buckets, Interface, ProcessGroup, Reducer, Store as Rendezvous};
use sgcl_patchset::{CacheOptions, PatchSet, Store, Subset};
use sgcl_proto::v1;
use sgcl_runstore::{RunConfig, Spec, config};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;

use super::metrics::Metrics;
use super::probe::Probe;
use super::step::{Draws, Learner};
use super::train::{Place, Position, TracedSteps, Trainer};
use crate::session::Session;

/// Longest wait for the rendezvous store: it answers at once, or its host is gone.
const STORE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest collective. A peer may have to wait for the storage as long as that is away; one that hangs is noticed by its silence, and one
/// that is gone by its connection. Nobody would regroup without the coordinator anyway.
const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// A rank with everything but its place among others: data opened, model made, no state yet.
pub(crate) fn prepare(runtime: &Handle, local_rank: u32, address: &str, welcome: &v1::Welcome) -> Result<Trainer> {
    let spec: Spec = serde_json::from_str(&welcome.spec_json).context("the coordinator's spec is not readable")?;
    // Whoever started the run has seen both places work: what fails from now on passes, or is said to need somebody.
    let run = Store::open(&welcome.run_url)?.patient();
    let (set, subset) = runtime.block_on(data(&spec))?;
    let device = device(&spec.config, local_rank)?;
    let (layout, learner) = learner(&spec, &set, &subset, device)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = spec.config.loader.threads.or(cores / spec.ranks_per_node.max(1) as usize);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|n| format!("decode-{n}"))
        .build()
        .context("cannot start the decoding threads")?;
    let cache = cache(&set, &spec);
    // The reader of a remote set keeps the runtime it is made in.
    let reader = runtime.block_on(async { set.reader(cache) });
    let probe = Probe::open(runtime, &spec)?;
    Ok(Trainer {
        runtime: runtime.clone(),
        address: address.to_owned(),
        views: views(&spec.config),
        metrics: Metrics::new(runtime, &run, spec.run.as_str()),
        place: Place::default(),
        spec,
        run,
        set,
        subset,
        reader: Arc::new(reader),
        pool: Arc::new(pool),
        ring: Box::new(Solo),
        layout,
        learner,
        position: Position::default(),
        standing: false,
        labelled: None,
        before_move: None,
        spread: None,
        probe,
        writing: None,
        traced: TracedSteps::from_env(),
        committed: None,
    })
}

/// The patch set, and the patches of it that are trained on.
async fn data(spec: &Spec) -> Result<(PatchSet, Subset)> {
    let set = PatchSet::load(Store::open(&spec.data)?.patient()).await?;
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
pub(crate) fn ring(
    session: &mut Session,
    place: &Place,
    address: &str,
    device: Device,
    config: &RunConfig,
) -> Result<Option<Arc<ProcessGroup>>> {
    let hosted = if place.rank == 0 {
        let (store, port) = Rendezvous::listen(address, 0, STORE_TIMEOUT)?;
        session.store_listening(port);
        Some(store)
    } else {
        None
    };
    let (host, port) = session.rendezvous()?;
    if place.world() == 1 {
        return Ok(None);
    }
    let store = match hosted {
        Some(store) => store,
        None => Rendezvous::connect(&host, port, STORE_TIMEOUT)?,
    };
    let store = store.prefix(&format!("generation-{}", place.generation))?;
    // Forming a group waits for every rank and cannot be broken off, so it begins when all are known to be here.
    let world = i64::try_from(place.world())?;
    store.add("here", 1)?;
    while store.add("here", 0)? < world {
        session.check()?;
        std::thread::sleep(Duration::from_millis(2));
    }
    let (rank, world) = (place.rank, place.world());
    let timeout = Duration::from_secs(config.step_timeout_s);
    let group = match device {
        #[cfg(feature = "nccl")]
        Device::Cuda(index) => ProcessGroup::nccl(&store, rank, world, timeout, index)?,
        #[cfg(not(feature = "nccl"))]
        Device::Cuda(_) => bail!("this sgcl-worker was built without NCCL; build it with --features nccl"),
        _ => ProcessGroup::gloo(&store, rank, world, timeout, &Interface::Address(address.to_owned()))?,
    };
    group.set_timeout(COLLECTIVE_TIMEOUT)?;
    let group = Arc::new(group);
    session.hold(&group)?;
    Ok(Some(group))
}

fn learner(spec: &Spec, set: &PatchSet, subset: &Subset, device: Device) -> Result<(Layout, Learner)> {
    let config = &spec.config;
    let n = i64::try_from(subset.len())?;
    let params = params(config)?;
    params.check(n)?;
    let arch: sgcl::backbone::Arch = config.backbone.arch.name().parse()?;
    let dim = i64::try_from(config.projector.dim)?;
    let mut model = if config.method.has_dense() {
        Model::with_dense_keys(arch, dim, params.negatives, device)
    } else if config.method.has_keys() {
        Model::with_keys(arch, dim, params.negatives, device)
    } else if config.projector.layers == 1 {
        Model::with_linear_projector(arch, dim, device)
    } else {
        Model::new(arch, dim, device)
    };
    model.compute_in(match config.precision {
        config::Precision::Fp32 => Kind::Float,
        config::Precision::Bf16 => Kind::BFloat16,
    });
    let sgd = Sgd::new(model.parameters(), config.optimizer.momentum, config.optimizer.weight_decay);
    let index = set.index();
    let rows = subset.rows();
    let column = |values: &[i32]| rows.iter().map(|&id| values[id as usize]).collect::<Vec<_>>();
    let slides: Vec<u32> = rows.iter().map(|&id| index.slides()[id as usize]).collect();
    let lattice = Lattice::new(&slides, &column(index.xs()), &column(index.ys()))?;
    let layout = layout(config, n, arch.width(), device)?;
    let held = layout.nothing();
    let clusters = Tensor::zeros([0], (Kind::Int64, device));
    let hard_ranks = HardRanks::new(0, 0, config.objective.hard_beta);
    let draws = Draws { seed: config.seed, hard_ranks, candidates: Candidates::Exact };
    let key_momentum = config.objective.key_momentum;
    let last = Vec::new();
    let learner =
        Learner { model, sgd, held, clusters, last, lattice, params, draws, key_momentum, device, reducer: None };
    Ok((layout, learner))
}

/// Random weights or those of a file: where a run begins.
pub(crate) fn first_weights(model: &Model, config: &RunConfig, n: i64) -> Result<()> {
    model.init(config.seed);
    if let Some(file) = &config.backbone.pretrained {
        let report = weights::load_backbone(&model.backbone, std::path::Path::new(file))?;
        if !report.missing.is_empty() || !report.unexpected.is_empty() {
            tracing::warn!(missing = ?report.missing, unexpected = ?report.unexpected, "keys of {file} that did not match");
        }
    }
    if let Some(key) = &model.key {
        key.begin(&model.parameters(), config.seed, n);
    }
    Ok(())
}

/// What a step draws depends on the world where `auto` picks by it.
pub(crate) fn draws(config: &RunConfig, params: &Params, n: i64, world: usize) -> Result<Draws> {
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
    Ok(Draws { seed: config.seed, hard_ranks, candidates })
}

/// Weight of the terms that neighbours make, in an epoch.
pub(crate) fn inter_weight(config: &RunConfig, epoch: u64) -> f64 {
    if config.method.ramps_up() { schedule::rampup(epoch as f64) } else { 1.0 }
}

/// Gradients averaged over the ring while backward runs.
pub(crate) fn reducer(model: &Model, ring: &ProcessGroup) -> Result<Reducer> {
    let tensors: Vec<Tensor> = model.parameters().into_iter().map(|(_, parameter)| parameter).collect();
    Ok(Reducer::new(&tensors, ring, Buckets::default())?)
}

fn layout(config: &RunConfig, n: i64, backbone: i64, device: Device) -> Result<Layout> {
    let dtype = match config.bank.dtype {
        config::BankDtype::Fp32 => Kind::Float,
        config::BankDtype::Bf16 => Kind::BFloat16,
        config::BankDtype::Fp16 => Kind::Half,
    };
    let dim = i64::try_from(config.projector.dim)?;
    let widths = Widths {
        dim,
        // Where nothing is ranked a dense head's pooled keys lie there.
        backbone: match config.method {
            method if method.has_hard() => backbone,
            method if method.has_dense() => dim,
            _ => 0,
        },
        local: if config.method.has_local_views() { dim } else { 0 },
    };
    Ok(Layout { n, widths, runs: i64::try_from(config.kmeans.runs)?, dtype, device })
}

fn params(config: &RunConfig) -> Result<Params> {
    let objective = &config.objective;
    Ok(Params {
        variant: match config.variant {
            config::Variant::Exact => Variant::Exact,
            config::Variant::Released => Variant::Released,
        },
        intra: config.method.terms().contains(&"intra"),
        inter: match config.method {
            config::Method::Sgcl => Inter::United,
            config::Method::LocalAggregation => Inter::Aggregated,
            config::Method::Sslp => Inter::Apart,
            config::Method::Npid | config::Method::NpidMcrop | config::Method::MocoV2 | config::Method::Densecl => {
                Inter::None
            }
        },
        local: match config.method {
            method if method.has_local_views() => Local::Corners,
            // A ResNet's last map is 32 times smaller than its view, rounded up.
            method if method.has_dense() => {
                let side = i64::from(config.views.global_px.div_ceil(32));
                Local::Dense { positions: side * side, share: objective.dense_share }
            }
            _ => Local::None,
        },
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
        key: config.method.has_keys(),
        global_scale: views.global_scale.into(),
        local_scale: views.local_scale.into(),
        ..ViewParams::default()
    }
}

/// A set in a folder is read where it lies; one on S3 goes through the node's disk, shared by its ranks. A cache that cannot be used is
/// done without by the reader, which says so.
pub(super) fn cache(set: &PatchSet, spec: &Spec) -> Option<CacheOptions> {
    if set.store().local_path("").is_some() || spec.config.loader.cache_bytes == 0 {
        return None;
    }
    let folder = match std::env::var_os("SGCL_SHARD_CACHE") {
        Some(folder) => folder.into(),
        None => std::env::temp_dir().join("sgcl-shards"),
    };
    Some(CacheOptions { dir: folder, max_bytes: spec.config.loader.cache_bytes })
}
