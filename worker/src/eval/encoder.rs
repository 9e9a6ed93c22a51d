//! What is evaluated: a run's backbone, a weights file, random weights, or no network at all.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sgcl::backbone::{Arch, Backbone};
use sgcl::probe::views::HISTOGRAM;
use sgcl::weights::{self, LoadReport, WeightsError};
use sgcl_patchset::Store;
use sgcl_runstore::{RunName, Spec, export};
use tch::{Device, Kind, Tensor};

use super::EvalArgs;

/// Name of the baseline without a network.
const COLOUR: &str = "colour-histogram";

/// An encoder by name.
pub(super) struct Encoder {
    pub(super) name: String,
    source: Source,
}

enum Source {
    Random,
    Colour,
    File(PathBuf),
    Run(RunName, Box<Spec>),
}

/// An encoder ready for work.
pub(super) enum Loaded {
    /// The joint colour histogram.
    Colour,
    Network {
        backbone: Backbone,
        /// What was found in a file; nothing for random weights.
        keys: Option<LoadReport>,
    },
}

impl Encoder {
    /// Finds out what each name is.
    pub(super) async fn resolve(args: &EvalArgs) -> Result<Vec<Self>> {
        let mut encoders = Vec::new();
        for name in &args.weights {
            let source = if name == "random" {
                Source::Random
            } else if name == COLOUR {
                Source::Colour
            } else if Path::new(name).is_file() {
                Source::File(name.into())
            } else {
                let Some(bucket) = &args.bucket else {
                    bail!("{name} is neither `random`, `{COLOUR}` nor a file; for a run of that name add --bucket URL");
                };
                let run = RunName::new(name.as_str())?;
                let spec = Spec::read(&run.store(&Store::open(bucket)?)).await?;
                Source::Run(run, Box::new(spec))
            };
            encoders.push(Self { name: name.clone(), source });
        }
        Ok(encoders)
    }

    /// What its run was made with, where it is one.
    pub(super) fn spec(&self) -> Option<&Spec> {
        if let Source::Run(_, spec) = &self.source { Some(spec) } else { None }
    }

    /// Makes it ready. What a file lacks keeps the weights that `random` has.
    pub(super) async fn load(&self, arch: Arch, args: &EvalArgs) -> Result<Loaded> {
        if matches!(self.source, Source::Colour) {
            return Ok(Loaded::Colour);
        }
        let backbone = Backbone::new(arch, Device::cuda_if_available());
        backbone.init(args.seed, 0);
        let keys = match &self.source {
            Source::Random | Source::Colour => None,
            Source::File(path) => Some(read(&backbone, path)?),
            Source::Run(run, _) => {
                let bucket = args.bucket.as_deref().context("a run needs --bucket")?;
                let scratch = tempfile::tempdir().context("no folder for the run's weights")?;
                let folder = scratch.path().join("export");
                export::pull(&run.store(&Store::open(bucket)?), None, &folder, |_, _| {}).await?;
                let report = weights::load_backbone(&backbone, &folder.join("backbone.pth"));
                Some(report.with_context(|| format!("the weights of run {run}"))?)
            }
        };
        Ok(Loaded::Network { backbone, keys })
    }
}

/// Reads a file; every error names it, those about its keys too.
fn read(backbone: &Backbone, path: &Path) -> Result<LoadReport> {
    weights::load_backbone(backbone, path).map_err(|error| match error {
        WeightsError::NoMatch { .. } | WeightsError::Shape { .. } | WeightsError::Strict { .. } => {
            anyhow::Error::new(error).context(path.display().to_string())
        }
        error => error.into(),
    })
}

impl Loaded {
    /// Width of its features.
    pub(super) fn width(&self) -> i64 {
        match self {
            Self::Colour => HISTOGRAM as i64,
            Self::Network { backbone, .. } => backbone.arch().width(),
        }
    }

    pub(super) fn device(&self) -> Device {
        match self {
            Self::Colour => Device::Cpu,
            Self::Network { .. } => Device::cuda_if_available(),
        }
    }

    /// Hash of all that its features depend on: names, shapes and values of its weights.
    pub(super) fn content(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        match self {
            Self::Colour => {
                hasher.update(COLOUR.as_bytes());
            }
            Self::Network { backbone, .. } => {
                hasher.update(backbone.arch().name().as_bytes());
                for (name, tensor) in backbone.parameters().into_iter().chain(backbone.buffers()) {
                    hasher.update(format!("{name} {:?}", tensor.size()).as_bytes());
                    hasher.update(&bytes(&tensor)?);
                }
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Features (B, width) of what [`super::views::Patches`] made: images through the network, histograms as they are.
    pub(super) fn features(&self, views: &Tensor) -> Tensor {
        match self {
            Self::Colour => views.shallow_clone(),
            Self::Network { backbone, .. } => tch::no_grad(|| backbone.features(views, false)),
        }
    }
}

/// A tensor's values as little-endian float32, row-major.
pub(super) fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let flat = tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float).contiguous().flatten(0, -1);
    let values = Vec::<f32>::try_from(flat).context("a tensor cannot be read")?;
    Ok(values.into_iter().flat_map(f32::to_le_bytes).collect())
}
