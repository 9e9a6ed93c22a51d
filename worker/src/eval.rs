//! `sgcl-worker eval`: encoders under labelled patches, by nearest neighbours, linear classifiers and fine-tuning.
//!
//! Prints one JSON object a line: `{"progress": …}` while it works, one `{"result": …}` for each encoder. `sgclctl eval` shows them.

mod cache;
mod encoder;
pub(crate) mod named;
pub(crate) mod protocol;
mod result;
pub(crate) mod segmentation;
mod task;
pub(crate) mod views;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;
use serde_json::{Map, Value, json};
use sgcl::backbone::Arch;
use sgcl::weights::LoadReport;
use sgcl_patchset::PatchSet;
use sgcl_proto::exit;
use tch::{Device, Kind, Tensor};

use cache::{Cache, Key};
use encoder::{Encoder, Loaded};
use protocol::{Bench, Family, LinearRecipe, Protocol, share};
use task::Task;
use views::{Patches, View};

/// Patches in one forward pass.
const BATCH: usize = 64;

/// Arguments of `sgcl-worker eval`.
#[derive(Args, Debug)]
pub(crate) struct EvalArgs {
    /// Labelled patch set
    #[arg(long)]
    data: String,
    /// Encoders: a run's name (with --bucket), a weights file (.pth, .safetensors), `random` or `colour-histogram`
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
    #[arg(long, default_value_t = Self::HOLDOUT_FRACTION)]
    holdout_fraction: f64,
    /// Seed of all that is drawn
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// What to do with the encoders
    #[arg(long, value_delimiter = ',', default_values = ["knn", "linear"])]
    protocol: Vec<Family>,
    /// How `linear` is trained
    #[arg(long, value_delimiter = ',', default_values = ["lbfgs"])]
    recipe: Vec<LinearRecipe>,
    /// Shares of the training labels that `finetune` uses
    #[arg(long, value_delimiter = ',', default_values = ["100%"], value_parser = share)]
    labels: Vec<f64>,
    /// Trainings of each protocol that draws
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100))]
    trials: u64,
    /// Epochs of the recipes that train on views [default: as published]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    epochs: Option<u64>,
    /// Folder that keeps features
    #[arg(long)]
    cache: Option<PathBuf>,
}

impl EvalArgs {
    /// Share of slides to test on unless another is given.
    const HOLDOUT_FRACTION: f64 = 0.3;
}

/// Evaluates every encoder; the slides tested on are the same for all.
///
/// # Errors
/// Whatever cannot be read, named; a set without labels or with too few slides; weights of which no key matched.
pub(crate) fn main(runtime: &tokio::runtime::Handle, args: &EvalArgs, mut emit: impl FnMut(Value)) -> Result<()> {
    let encoders = runtime.block_on(Encoder::resolve(args))?;
    let spec = encoders.iter().find_map(Encoder::spec);
    let arch = match (args.arch, spec) {
        (Some(arch), _) => arch,
        (None, Some(spec)) => spec.config.backbone.arch.name().parse()?,
        (None, None) => Arch::ResNet18,
    };
    let px = args.px.or(spec.map(|s| s.config.views.global_px)).unwrap_or(224);
    ensure!((32..=1024).contains(&px), "--px {px} is not in 32..=1024");
    let protocols = Protocol::asked(args);
    let set = runtime.block_on(PatchSet::open(&args.data))?;
    let task = Task::new(set, spec, args)?;
    // The reader of a remote set keeps the runtime it is made in.
    let patches = Patches { reader: runtime.block_on(async { task.set.reader(None) }), px };
    let cache = Cache::new(args.cache.as_deref());
    let work = Work { task, patches, protocols, cache, args };
    for encoder in &encoders {
        let loaded = runtime.block_on(encoder.load(arch, args))?;
        let result = work.evaluate(&encoder.name, &loaded, &mut emit)?;
        emit(json!({ "result": result }));
    }
    Ok(())
}

/// What all encoders share.
struct Work<'a> {
    task: Task,
    patches: Patches,
    protocols: Vec<Protocol>,
    cache: Option<Cache>,
    args: &'a EvalArgs,
}

impl Work<'_> {
    /// One encoder under every protocol.
    fn evaluate(&self, name: &str, encoder: &Loaded, emit: &mut impl FnMut(Value)) -> Result<Value> {
        let task = &self.task;
        let mut progress = |what: String, done: u64, total: u64| {
            emit(json!({ "progress": { "done": done, "total": total, "what": what } }));
        };
        let (arch, keys) = match encoder {
            Loaded::Colour => (None, None),
            Loaded::Network { backbone, keys } => (Some(backbone.arch().name()), keys.as_ref()),
        };
        let mut result = Map::new();
        result.insert("weights".into(), json!(name));
        result.insert("arch".into(), json!(arch));
        result.insert("px".into(), json!(self.patches.px));
        result.insert("classes".into(), json!(task.classes()));
        for (half, rows) in [("train", &task.split.train), ("test", &task.split.test)] {
            result.insert(format!("{half}_patches"), json!(rows.len()));
            result.insert(format!("{half}_slides"), json!(task.slides_of(rows)));
        }
        result.insert("keys".into(), keys.map_or(Value::Null, keys_json));
        let features = if self.protocols.iter().any(Protocol::is_frozen) {
            let told = |done, total| progress(format!("features of {name}"), done, total);
            let (features, id) = self.features(encoder, told)?;
            result.insert("features".into(), json!({ "width": encoder.width(), "id": id }));
            Some(features)
        } else {
            None
        };
        let bench = Bench { task, encoder, patches: &self.patches, args: self.args };
        let (mut found, mut skipped) = (Vec::new(), Vec::new());
        for protocol in &self.protocols {
            let what = format!("{} of {name}", protocol.name());
            match bench.run(protocol, features.as_ref(), |done, total| progress(what.clone(), done, total))? {
                Ok(outcome) => found.push((protocol.clone(), result::of(&outcome, task, self.args.seed))),
                Err(why) => skipped.push(json!({ "protocol": protocol.name(), "why": why })),
            }
        }
        result::summary(&found, &mut result);
        result.insert("bootstrap".into(), result::bootstrap(task));
        result.insert("protocols".into(), found.into_iter().map(|(_, value)| value).collect());
        result.insert("skipped".into(), Value::Array(skipped));
        Ok(Value::Object(result))
    }

    /// (rows, width) frozen features of all labelled patches in host memory, from the cache where it has them, and their id.
    fn features(&self, encoder: &Loaded, mut progress: impl FnMut(u64, u64)) -> Result<(Tensor, String)> {
        let ids = &self.task.ids;
        let device = if encoder.device() == Device::Cpu { "cpu" } else { "cuda" };
        let (weights, data) = (encoder.content()?, &self.task.set.manifest().content_id);
        let key = Key::new(&weights, data, self.patches.px, device, ids.len(), encoder.width());
        if let Some(features) = self.cache.as_ref().and_then(|cache| cache.read(&key)) {
            return Ok((features, key.id));
        }
        let mut parts = Vec::new();
        let mut done = 0;
        for batch in ids.chunks(BATCH) {
            let views = self.patches.views(batch, View::Whole, encoder)?;
            parts.push(encoder.features(&views).to_device(Device::Cpu).to_kind(Kind::Float));
            done += batch.len() as u64;
            progress(done, ids.len() as u64);
        }
        ensure!(!parts.is_empty(), "the set has no labelled patch to extract features from");
        let features = Tensor::cat(&parts, 0);
        if let Some(cache) = &self.cache {
            cache.write(&key, &features);
        }
        Ok((features, key.id))
    }
}

/// The exit code of what only these commands run into.
pub(crate) fn exit_code(error: &anyhow::Error) -> Option<u8> {
    error.chain().find_map(|cause| {
        let full = |error: &std::io::Error| error.kind() == std::io::ErrorKind::StorageFull;
        if cause.downcast_ref::<std::io::Error>().is_some_and(full) {
            return Some(exit::CANNOT_CREATE);
        }
        cause.is::<segmentation::SegmentationError>().then_some(exit::DATA)
    })
}

fn keys_json(report: &LoadReport) -> Value {
    json!({ "matched": report.matched, "prefix": report.prefix, "missing": report.missing, "unexpected": report.unexpected })
}
