//! `sgcl-worker eval`: frozen features of a labelled patch set, probed by kNN and a linear classifier.
//!
//! Prints one JSON object a line: `{"progress": …}` while it works, one `{"result": …}` for each encoder. `sgclctl eval` shows them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rayon::prelude::*;
use serde_json::json;
use sgcl::augment::Renderer;
use sgcl::backbone::{Arch, Backbone};
use sgcl::image::RgbImage;
use sgcl::probe::{self, LinearParams, Scores, Split};
use sgcl::weights;
use sgcl_patchset::{PatchSet, ShardReader, Store};
use sgcl_runstore::{RunName, Spec, export};
use tch::{Device, Kind, Tensor};

/// Neighbours of the kNN probe.
const NEIGHBOURS: [usize; 2] = [10, 20];
/// Temperature of the kNN votes, exp(cosine / T).
const KNN_TEMPERATURE: f64 = 0.07;
/// Patches in one forward pass.
const BATCH: usize = 64;

/// Arguments of `sgcl-worker eval`.
#[derive(Args, Debug)]
pub(crate) struct EvalArgs {
    /// Labelled patch set
    #[arg(long)]
    data: String,
    /// Encoders: a run's name (with --bucket), a weights file (.pth, .safetensors) or `random`
    #[arg(long, required = true, num_args = 1..)]
    weights: Vec<String>,
    /// Bucket that holds the runs named in --weights
    #[arg(long)]
    bucket: Option<String>,
    /// Architecture of weights files and of `random`; a run names its own
    #[arg(long)]
    arch: Option<Arch>,
    /// Side to which patches are resized, pixels [default: the run's global view, else 224]
    #[arg(long)]
    px: Option<u32>,
    /// Share of slides to test on, where no run among --weights held slides out
    #[arg(long, default_value_t = 0.3)]
    holdout_fraction: f64,
    /// Seed of the split and of `random`
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// An encoder to probe.
struct Encoder {
    name: String,
    source: Source,
}

enum Source {
    Random,
    File(PathBuf),
    Run(RunName, Box<Spec>),
}

/// Which patches are learnt from and which are tested on.
struct Task {
    set: PatchSet,
    /// Labelled patches.
    ids: Vec<u32>,
    labels: Vec<i64>,
    split: Split,
}

/// Probes every encoder; the slides tested on are the same for all.
///
/// # Errors
/// Whatever cannot be read, named; a set without labels or with too few slides; weights of which no key matched.
pub(crate) fn main(
    runtime: &tokio::runtime::Handle,
    args: &EvalArgs,
    mut emit: impl FnMut(serde_json::Value),
) -> Result<()> {
    let encoders = runtime.block_on(resolve(args))?;
    let spec =
        encoders.iter().find_map(|e| if let Source::Run(_, spec) = &e.source { Some(spec.as_ref()) } else { None });
    let arch = match (args.arch, spec) {
        (Some(arch), _) => arch,
        (None, Some(spec)) => spec.config.backbone.arch.name().parse()?,
        (None, None) => Arch::ResNet18,
    };
    let px = args.px.or(spec.map(|s| s.config.views.global_px)).unwrap_or(224);
    ensure!((32..=1024).contains(&px), "--px {px} is not in 32..=1024");
    let set = runtime.block_on(PatchSet::open(&args.data))?;
    let task = Task::new(set, spec, args)?;
    // The reader of a remote set keeps the runtime it is made in.
    let reader = runtime.block_on(async { task.set.reader(None) });
    for encoder in &encoders {
        let backbone = runtime.block_on(load(encoder, arch, args))?;
        let features = extract(&backbone, &reader, &task.ids, px, |done| {
            emit(
                json!({"progress": {"done": done, "total": task.ids.len(), "what": format!("features of {}", encoder.name)}}),
            );
        })?;
        emit(json!({"result": task.probe(&encoder.name, arch, px, &features)?}));
    }
    Ok(())
}

async fn resolve(args: &EvalArgs) -> Result<Vec<Encoder>> {
    let mut encoders = Vec::new();
    for name in &args.weights {
        let source = if name == "random" {
            Source::Random
        } else if Path::new(name).is_file() {
            Source::File(name.into())
        } else {
            let Some(bucket) = &args.bucket else {
                bail!("{name} is neither `random` nor a file; for a run of that name add --bucket URL");
            };
            let run = RunName::new(name.as_str())?;
            let spec = Spec::read(&run.store(&Store::open(bucket)?)).await?;
            Source::Run(run, Box::new(spec))
        };
        encoders.push(Encoder { name: name.clone(), source });
    }
    Ok(encoders)
}

async fn load(encoder: &Encoder, arch: Arch, args: &EvalArgs) -> Result<Backbone> {
    let backbone = Backbone::new(arch, Device::cuda_if_available());
    match &encoder.source {
        Source::Random => backbone.init(args.seed, 0),
        Source::File(path) => {
            weights::load_backbone(&backbone, path)?;
        }
        Source::Run(run, _) => {
            let bucket = args.bucket.as_deref().context("a run needs --bucket")?;
            let scratch = tempfile::tempdir().context("no folder for the run's weights")?;
            let folder = scratch.path().join("export");
            export::pull(&run.store(&Store::open(bucket)?), None, &folder, |_, _| {}).await?;
            weights::load_backbone(&backbone, &folder.join("backbone.pth"))?;
        }
    }
    Ok(backbone)
}

impl Task {
    fn new(set: PatchSet, spec: Option<&Spec>, args: &EvalArgs) -> Result<Self> {
        let manifest = set.manifest();
        ensure!(
            set.index().is_labelled(),
            "{}: no patch has a label; ingest class folders, or slides with label maps beside them",
            args.data
        );
        let held_out = spec.filter(|s| s.config.data.holdout_fraction > 0.0);
        let (train, test): (Vec<u32>, Vec<u32>) = if let Some(spec) = held_out {
            let names: Vec<&str> = manifest.slides.iter().map(|s| s.name.as_str()).collect();
            let split = spec.config.data.split(&names)?;
            let numbers = |side: &[usize]| side.iter().filter_map(|&i| u32::try_from(i).ok()).collect();
            (numbers(&split.train), numbers(&split.held_out))
        } else {
            let split = sgcl_patchset::split(manifest, set.index(), args.holdout_fraction, args.seed, 0)?;
            (split.train, split.test)
        };
        let (mut ids, mut labels, mut split) = (Vec::new(), Vec::new(), Split { train: Vec::new(), test: Vec::new() });
        for (slides, half) in [(train, &mut split.train), (test, &mut split.test)] {
            for id in set.subset(&slides)?.rows() {
                if let Some(label) = set.index().label(id) {
                    half.push(ids.len());
                    ids.push(id);
                    labels.push(i64::from(label));
                }
            }
        }
        Ok(Self { set, ids, labels, split })
    }

    fn probe(&self, name: &str, arch: Arch, px: u32, features: &Tensor) -> Result<serde_json::Value> {
        let classes = &self.set.manifest().classes;
        let mut knn = serde_json::Map::new();
        let mut best: Option<Scores> = None;
        for k in NEIGHBOURS {
            let scores = probe::knn(features, &self.labels, classes.len(), &self.split, k, KNN_TEMPERATURE)?;
            knn.insert(k.to_string(), json!(scores.accuracy));
            best = Some(scores);
        }
        let linear = probe::linear(features, &self.labels, classes.len(), &self.split, &LinearParams::default())?;
        let knn_scores = best.context("no neighbours asked for")?;
        Ok(json!({
            "weights": name,
            "arch": arch.name(),
            "px": px,
            "train_patches": self.split.train.len(),
            "test_patches": self.split.test.len(),
            "knn": knn,
            "linear": linear.scores.accuracy,
            "balanced": { "knn": knn_scores.balanced_accuracy, "linear": linear.scores.balanced_accuracy },
            "macro_f1": { "knn": knn_scores.macro_f1, "linear": linear.scores.macro_f1 },
            "classes": classes,
            "confusion": linear.scores.confusion,
        }))
    }
}

/// (n, Db) pooled features, in host memory.
fn extract(
    backbone: &Backbone,
    reader: &ShardReader,
    ids: &[u32],
    px: u32,
    mut progress: impl FnMut(usize),
) -> Result<Tensor> {
    let values = 3 * (px * px) as usize;
    let side = i64::from(px);
    let mut features = Vec::new();
    let mut done = 0;
    for batch in ids.chunks(BATCH) {
        let mut views = vec![0_f32; batch.len() * values];
        views.par_chunks_mut(values).zip(batch).try_for_each_init(
            Renderer::new,
            |renderer, (view, &id)| -> Result<()> {
                let image = reader.decode_blocking(id)?;
                renderer.eval_view(&RgbImage::new(image.width, image.height, image.pixels)?, px, view);
                Ok(())
            },
        )?;
        let input = Tensor::from_slice(&views).view([-1, 3, side, side]).to_device(Device::cuda_if_available());
        features.push(tch::no_grad(|| backbone.features(&input, false)).to_device(Device::Cpu).to_kind(Kind::Float));
        done += batch.len();
        progress(done);
    }
    ensure!(!features.is_empty(), "the set has no labelled patch to extract features from");
    Ok(Tensor::cat(&features, 0))
}
