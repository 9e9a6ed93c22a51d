//! `sgcl-worker embed`: features of slides with an encoder, written in the layouts of TRIDENT and CLAM.
//!
//! Patches come from `sgclctl embed` on standard input, which reads the slides ([`sgcl_runstore::features::wire`]), or from a patch
//! set. Prints one JSON object a line: `{"ready": …}` once the encoder is loaded, `{"progress": …}` while it works, `{"slide": …}` for
//! each that is written, complete already (`"resumed": true`) or left out (`"skipped": reason`).

mod encoder;
pub(crate) mod named;
mod source;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use crossbeam_channel::Receiver;
use serde_json::{Value, json};
use sgcl::backbone::Arch;
use sgcl_patchset::{IndexError, ManifestError, OpenError, PatchSet, Store, StoreError};
use sgcl_proto::exit;
use sgcl_runstore::features::{FeaturesError, Layout, Output, SlideFeatures};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;

use encoder::{Encoder, EncoderError};
use source::{Item, Slide};

/// Batches rendered ahead of the forward pass.
const AHEAD: usize = 3;
/// How often progress is told.
const TOLD_EVERY: Duration = Duration::from_millis(100);
/// Longest name of an encoder.
const MAX_NAME: usize = 100;

/// Arguments of `sgcl-worker embed`.
#[derive(Args, Debug)]
pub(crate) struct EmbedArgs {
    /// Patch set to embed; without it slides come on standard input
    #[arg(long)]
    data: Option<String>,
    /// Where features go: a folder or S3 URL
    #[arg(long)]
    to: String,
    /// The encoder: a run's name (with --bucket), a weights file (.pth, .safetensors) or `random`
    #[arg(long)]
    weights: String,
    /// Bucket that holds the run named in --weights
    #[arg(long)]
    bucket: Option<String>,
    /// Architecture of a weights file and of `random` [default: what the file fits, else resnet18]
    #[arg(long)]
    arch: Option<Arch>,
    /// Name of the encoder in the layout [default: the run's, the file's, or `random`]
    #[arg(long)]
    name: Option<String>,
    /// trident, clam or both
    #[arg(long, default_value = "trident")]
    layout: String,
    /// Side to which patches are resized, pixels [default: the run's global view, else 224]
    #[arg(long)]
    px: Option<u32>,
    /// Patches in one forward pass [default: 64, on a GPU 256]
    #[arg(long)]
    batch: Option<usize>,
    /// auto, cpu or cuda
    #[arg(long, default_value = "auto")]
    device: String,
    /// Seed of `random`
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How the slides on standard input are cut, as JSON: part of what a feature depends on
    #[arg(long, default_value = "{}")]
    settings: String,
}

/// Computes and writes until there are no more slides.
///
/// # Errors
/// The encoder cannot be loaded, the patch set or a patch cannot be read, or the features cannot be written; features made otherwise
/// are in their place.
pub(crate) fn main(runtime: &Handle, args: &EmbedArgs, mut emit: impl FnMut(Value)) -> Result<()> {
    let layouts = Layout::parse(&args.layout)
        .with_context(|| format!("--layout {}: there are trident, clam and both", args.layout))?;
    let device = device(&args.device)?;
    let encoder = encoder::load(runtime, args, device)?;
    let name = encoder_name(args.name.as_deref().unwrap_or(&encoder.name))?;
    let mut settings: BTreeMap<String, Value> = serde_json::from_str(&args.settings).context("--settings")?;
    settings.extend([
        ("arch".to_owned(), json!(encoder.backbone.arch().name())),
        ("weights".to_owned(), json!(encoder.id)),
        ("px".to_owned(), json!(encoder.px)),
    ]);
    let set = args.data.as_ref().map(|data| runtime.block_on(PatchSet::open(data))).transpose()?;
    if let Some(set) = &set {
        settings.insert("data".to_owned(), json!(set.manifest().content_id));
    }
    let output = Output::new(Store::open(&args.to)?, layouts, &name, settings.clone());
    emit(json!({"ready": {
        "encoder": name, "arch": encoder.backbone.arch().name(), "dim": encoder.backbone.arch().width(), "px": encoder.px,
        "device": if device.is_cuda() { "cuda" } else { "cpu" }, "settings": settings,
    }}));
    let batch = args.batch.unwrap_or(if device.is_cuda() { 256 } else { 64 }).max(1);
    let (sender, items) = crossbeam_channel::bounded(AHEAD);
    let (px, complete) = (encoder.px, output.clone());
    let reading = {
        let runtime = runtime.clone();
        std::thread::Builder::new().name("patches".into()).spawn(move || match set {
            Some(set) => source::patch_set(&runtime, &set, &complete, px, batch, &sender),
            None => source::stream(&mut std::io::stdin().lock(), px, batch, &sender),
        })
    }
    .context("cannot start the thread that reads patches")?;
    let worked = consume(runtime, &items, &encoder, device, &output, &mut emit);
    // A reader that waits for room is told that nobody takes any more.
    drop(items);
    match reading.join() {
        // What the reader met explains why patches broke off; where it met nothing, it stopped because nobody took them.
        Ok(read) => read.and(worked),
        Err(_) => bail!("reading patches ended abnormally"),
    }
}

/// An argument that cannot be.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct UsageError(String);

fn device(wanted: &str) -> Result<Device> {
    match (wanted, Device::cuda_if_available()) {
        ("cpu", _) => Ok(Device::Cpu),
        ("auto", device) => Ok(device),
        ("cuda", device) if device.is_cuda() => Ok(device),
        ("cuda", _) => Err(UsageError(
            "--device cuda: libtorch sees no GPU here; give --device cpu, or a worker built for one".into(),
        )
        .into()),
        _ => Err(UsageError(format!("--device {wanted}: there are auto, cpu and cuda")).into()),
    }
}

/// The name is part of a path: letters, digits and a few signs.
fn encoder_name(name: &str) -> Result<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(plain) || name.starts_with('.') {
        let remedy = "give --name with letters, digits, '-', '_' and '.'";
        return Err(UsageError(format!("{name:?} cannot name an encoder; {remedy}")).into());
    }
    Ok(name.to_owned())
}

/// Forward passes and files, slide by slide.
fn consume(
    runtime: &Handle,
    items: &Receiver<Item>,
    encoder: &Encoder,
    device: Device,
    output: &Output,
    emit: &mut impl FnMut(Value),
) -> Result<()> {
    let mut open: Option<Open> = None;
    let mut told = Instant::now();
    for item in items {
        match item {
            Item::Begin(slide) => open = Some(Open::new(*slide)),
            Item::Batch { views, patches } => {
                let Some(slide) = &mut open else { bail!("patches came before their slide") };
                slide.add(&encoder.forward(&views, device)?, patches);
                if told.elapsed() >= TOLD_EVERY || slide.done == slide.head.coords.len() {
                    told = Instant::now();
                    emit(
                        json!({"progress": {"slide": slide.head.name, "done": slide.done, "of": slide.head.coords.len()}}),
                    );
                }
            }
            Item::End => {
                let Some(slide) = open.take() else { bail!("a slide ended before it began") };
                let (name, took) = (slide.head.name.clone(), slide.began.elapsed().as_secs_f64());
                let features = slide.close(usize::try_from(encoder.backbone.arch().width())?)?;
                let files = runtime.block_on(output.write(&features))?;
                emit(json!({"slide": {
                    "name": name, "patches": features.coords.len(), "seconds": took,
                    "files": files.iter().map(|file| &file.path).collect::<Vec<_>>(),
                }}));
            }
            Item::Abandoned => drop(open.take()),
            Item::Resumed { name, patches } => {
                emit(json!({"slide": {"name": name, "patches": patches, "resumed": true}}));
            }
        }
    }
    match open {
        None => Ok(()),
        Some(slide) => bail!("{}: its patches broke off after {}", slide.head.name, slide.done),
    }
}

/// A slide whose features are being computed.
struct Open {
    head: Slide,
    features: Vec<f32>,
    done: usize,
    began: Instant,
}

impl Open {
    fn new(head: Slide) -> Self {
        Self { head, features: Vec::new(), done: 0, began: Instant::now() }
    }

    fn add(&mut self, features: &[f32], patches: usize) {
        self.features.extend_from_slice(features);
        self.done += patches;
    }

    fn close(self, dim: usize) -> Result<SlideFeatures> {
        let Slide { name, fingerprint, geometry, coords } = self.head;
        if self.features.len() != coords.len() * dim {
            bail!("{name}: {} features for {} patches", self.features.len() / dim.max(1), coords.len());
        }
        Ok(SlideFeatures { name, fingerprint, dim, features: self.features, coords, geometry })
    }
}

impl Encoder {
    /// (n, 3, px, px) views, normalised, to (n, d) pooled features, both row-major in host memory.
    fn forward(&self, views: &[f32], device: Device) -> Result<Vec<f32>> {
        let side = i64::from(self.px);
        let input = Tensor::f_from_slice(views)?.f_view([-1, 3, side, side])?.f_to_device(device)?;
        let features = tch::no_grad(|| self.backbone.features(&input, false));
        let features =
            features.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?.f_reshape([-1_i64])?;
        Ok(Vec::try_from(features)?)
    }
}

/// The exit code of what only this command runs into.
pub(crate) fn exit_code(error: &anyhow::Error) -> Option<u8> {
    error.chain().find_map(|cause| {
        if let Some(error) = cause.downcast_ref::<FeaturesError>() {
            return match error {
                FeaturesError::Settings { .. } => Some(exit::CANNOT_CREATE),
                FeaturesError::Store(store) => of_store(store),
                _ => None,
            };
        }
        match cause.downcast_ref::<OpenError>() {
            Some(OpenError::Store(store)) => of_store(store),
            Some(OpenError::Manifest(ManifestError::Store(store)) | OpenError::Index(IndexError::Store(store))) => {
                of_store(store)
            }
            Some(_) => Some(exit::DATA),
            None if cause.is::<UsageError>() => Some(exit::USAGE),
            None => cause.is::<EncoderError>().then_some(exit::DATA),
        }
    })
}

fn of_store(error: &StoreError) -> Option<u8> {
    match error {
        StoreError::NoSpace { .. } => Some(exit::CANNOT_CREATE),
        StoreError::NoBucket { .. } | StoreError::NoCredentials { .. } => Some(exit::UNAVAILABLE),
        StoreError::NotFound { .. } => Some(exit::DATA),
        _ => None,
    }
}
