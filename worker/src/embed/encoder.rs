//! The encoder that slides are embedded with.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use sgcl::backbone::{Arch, Backbone};
use sgcl::weights::{self, LoadReport, WeightsError};
use sgcl_patchset::Store;
use sgcl_runstore::{RunName, Spec, export};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;

use super::EmbedArgs;

/// Sides that views may have.
const SIDES: std::ops::RangeInclusive<u32> = 32..=1024;
/// Missing weights that an error names.
const NAMED: usize = 5;

/// Weights that do not make an encoder.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {} weights of a {arch} are not in it ({}); give the right --arch, or a file that is whole", .lacking.len(), some(.lacking))]
pub(super) struct EncoderError {
    file: String,
    arch: Arch,
    lacking: Vec<String>,
}

fn some(names: &[String]) -> String {
    let more = if names.len() > NAMED { ", …" } else { "" };
    format!("{}{more}", names.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", "))
}

/// A loaded encoder.
pub(super) struct Encoder {
    pub(super) backbone: Backbone,
    /// What it is called unless the user calls it otherwise.
    pub(super) name: String,
    /// Hash of all its tensors: equal ids mean equal weights.
    pub(super) id: String,
    /// Side of its views, pixels.
    pub(super) px: u32,
}

/// Loads what `--weights` names.
///
/// # Errors
/// There is no such run or file, or it lacks what a forward pass needs.
pub(super) fn load(runtime: &Handle, args: &EmbedArgs, device: Device) -> Result<Encoder> {
    let (backbone, name, view) = if args.weights == "random" {
        let arch = args.arch.unwrap_or(Arch::ResNet18);
        let backbone = Backbone::new(arch, device);
        backbone.init(args.seed, 0);
        (backbone, format!("random-{arch}-{}", args.seed), None)
    } else if Path::new(&args.weights).is_file() {
        let path = Path::new(&args.weights);
        let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        (file(path, args.arch, device)?, stem, None)
    } else {
        let Some(bucket) = &args.bucket else {
            bail!("{} is neither `random` nor a file; for a run of that name add --bucket URL", args.weights);
        };
        let run = RunName::new(args.weights.as_str())?;
        let store = run.store(&Store::open(bucket)?);
        let spec = runtime.block_on(Spec::read(&store))?;
        let scratch = tempfile::tempdir().context("no folder for the run's weights")?;
        let folder = scratch.path().join("export");
        runtime.block_on(export::pull(&store, None, &folder, |_, _| {}))?;
        let arch = spec.config.backbone.arch.name().parse()?;
        (
            file(&folder.join("backbone.pth"), Some(arch), device)?,
            args.weights.clone(),
            Some(spec.config.views.global_px),
        )
    };
    let px = args.px.or(view).unwrap_or(224);
    ensure!(SIDES.contains(&px), "--px {px} is not in 32..=1024");
    let id = id(&backbone)?;
    Ok(Encoder { backbone, name, id, px })
}

/// A backbone from a weights file, of the architecture given or of the one that the file fills.
fn file(path: &Path, arch: Option<Arch>, device: Device) -> Result<Backbone> {
    let tensors = weights::read(path)?;
    // The largest first: a smaller one finds all it needs in a larger one's weights.
    let candidates = arch.map_or_else(|| vec![Arch::ResNet50, Arch::ResNet34, Arch::ResNet18], |arch| vec![arch]);
    let mut failed: Option<anyhow::Error> = None;
    for arch in candidates {
        let backbone = Backbone::new(arch, device);
        match weights::load_backbone_from(&backbone, &tensors) {
            Ok(report) if lacking(&report).is_empty() => {
                if !report.unexpected.is_empty() {
                    tracing::info!(unused = ?report.unexpected, "not all of {} is of a {arch}", path.display());
                }
                return Ok(backbone);
            }
            Ok(report) => {
                let (file, lacking) = (path.display().to_string(), lacking(&report));
                failed = Some(EncoderError { file, arch, lacking }.into());
            }
            // Of a file that holds none of our keys every architecture says the same.
            Err(error @ WeightsError::NoMatch { .. }) => {
                return Err(anyhow::Error::from(error).context(path.display().to_string()));
            }
            Err(error) => failed = Some(anyhow::Error::from(error).context(path.display().to_string())),
        }
    }
    Err(failed.unwrap_or_else(|| anyhow::anyhow!("{}: there is no architecture to try", path.display())))
}

/// What a forward pass would miss; counters of batches are not part of it.
fn lacking(report: &LoadReport) -> Vec<String> {
    report.missing.iter().filter(|name| !name.ends_with(".num_batches_tracked")).cloned().collect()
}

fn id(backbone: &Backbone) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let tensors: Vec<(String, Tensor)> = backbone.parameters().into_iter().chain(backbone.buffers()).collect();
    for (name, tensor) in tensors {
        let flat = tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?.f_reshape([-1_i64])?;
        let bytes: Vec<u8> = Vec::<f32>::try_from(flat)?.into_iter().flat_map(f32::to_le_bytes).collect();
        hasher.update(name.as_bytes());
        hasher.update(&bytes);
    }
    Ok(hasher.finalize().to_hex()[..32].to_owned())
}
