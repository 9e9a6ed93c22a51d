//! The encoder that slides are embedded with.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use sgcl::backbone::{Arch, Backbone};
use sgcl::weights::{self, LoadReport, WeightsError};
use tch::{Device, Tensor};
use tokio::runtime::Handle;

use super::EmbedArgs;
use crate::encoder::{Source, content};

/// Sides that views may have.
const SIDES: std::ops::RangeInclusive<u32> = 32..=1024;
/// Characters of an encoder's id.
const ID_CHARS: usize = 32;
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
    let bucket = args.bucket.as_deref();
    let source = runtime.block_on(Source::find(&args.weights, bucket))?;
    let (backbone, name) = match (runtime.block_on(source.tensors(bucket))?, &source) {
        (None, _) => {
            let arch = args.arch.unwrap_or(Arch::ResNet18);
            let backbone = Backbone::new(arch, device);
            backbone.init(args.seed, 0);
            (backbone, format!("random-{arch}-{}", args.seed))
        }
        (Some(tensors), Source::File(path)) => {
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            (filled(&source, &tensors, args.arch, device)?, stem)
        }
        (Some(tensors), _) => {
            let arch = source.spec().map(|spec| spec.config.backbone.arch.name().parse()).transpose()?;
            (filled(&source, &tensors, arch, device)?, args.weights.clone())
        }
    };
    let px = args.px.or(source.spec().map(|spec| spec.config.views.global_px)).unwrap_or(224);
    ensure!(SIDES.contains(&px), "--px {px} is not in 32..=1024");
    let id = content(&backbone)?[..ID_CHARS].to_owned();
    Ok(Encoder { backbone, name, id, px })
}

/// A backbone with these weights, of the architecture given or of the one that they fill.
fn filled(source: &Source, tensors: &BTreeMap<String, Tensor>, arch: Option<Arch>, device: Device) -> Result<Backbone> {
    // The largest first: a smaller one finds all it needs in a larger one's weights.
    let candidates = arch.map_or_else(|| vec![Arch::ResNet50, Arch::ResNet34, Arch::ResNet18], |arch| vec![arch]);
    let mut failed: Option<anyhow::Error> = None;
    for arch in candidates {
        let backbone = Backbone::new(arch, device);
        match weights::load_backbone_from(&backbone, tensors) {
            Ok(report) if lacking(&report).is_empty() => {
                if !report.unexpected.is_empty() {
                    tracing::info!(unused = ?report.unexpected, "not all of {source} is of a {arch}");
                }
                return Ok(backbone);
            }
            Ok(report) => {
                failed = Some(EncoderError { file: source.to_string(), arch, lacking: lacking(&report) }.into());
            }
            // Of a file that holds none of our keys every architecture says the same.
            Err(error @ WeightsError::NoMatch { .. }) => {
                return Err(anyhow::Error::from(error).context(source.to_string()));
            }
            Err(error) => failed = Some(anyhow::Error::from(error).context(source.to_string())),
        }
    }
    Err(failed.unwrap_or_else(|| anyhow::anyhow!("{source}: there is no architecture to try")))
}

/// What a forward pass would miss; counters of batches are not part of it.
fn lacking(report: &LoadReport) -> Vec<String> {
    report.missing.iter().filter(|name| !name.ends_with(".num_batches_tracked")).cloned().collect()
}
