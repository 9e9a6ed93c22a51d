//! What is evaluated: an encoder, or no network at all.

use anyhow::{Context, Result};
use sgcl::backbone::{Arch, Backbone};
use sgcl::probe::views::HISTOGRAM;
use sgcl::weights::{self, LoadReport};
use sgcl_runstore::Spec;
use tch::{Device, Tensor};

use super::EvalArgs;
use crate::encoder::{Source, content};

/// Name of the baseline without a network.
const COLOUR: &str = "colour-histogram";

/// What is evaluated, by name.
pub(super) struct Encoder {
    pub(super) name: String,
    /// None for the colour histogram.
    source: Option<Source>,
}

/// An encoder ready for work.
pub(super) enum Loaded {
    /// The joint colour histogram.
    Colour,
    Network {
        backbone: Box<Backbone>,
        /// What was found in a file; nothing for random weights.
        keys: Option<LoadReport>,
    },
}

impl Encoder {
    /// Finds out what each name is.
    pub(super) async fn resolve(args: &EvalArgs) -> Result<Vec<Self>> {
        let mut encoders = Vec::new();
        for name in &args.weights {
            let source = match name.as_str() {
                COLOUR => None,
                _ => Some(Source::find(name, args.bucket.as_deref()).await?),
            };
            encoders.push(Self { name: name.clone(), source });
        }
        Ok(encoders)
    }

    /// What its run was made with, where it is one.
    pub(super) fn spec(&self) -> Option<&Spec> {
        self.source.as_ref().and_then(Source::spec)
    }

    /// Makes it ready. What a file lacks keeps the weights that `random` has.
    pub(super) async fn load(&self, arch: Arch, args: &EvalArgs) -> Result<Loaded> {
        let Some(source) = &self.source else { return Ok(Loaded::Colour) };
        let backbone = Backbone::new(arch, Device::cuda_if_available());
        backbone.init(args.seed, 0);
        let keys = match source.tensors(args.bucket.as_deref()).await? {
            Some(tensors) => {
                Some(weights::load_backbone_from(&backbone, &tensors).with_context(|| source.to_string())?)
            }
            None => None,
        };
        Ok(Loaded::Network { backbone: Box::new(backbone), keys })
    }
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

    /// Hash of all that its features depend on.
    pub(super) fn content(&self) -> Result<String> {
        match self {
            Self::Colour => Ok(COLOUR.to_owned()),
            Self::Network { backbone, .. } => content(backbone),
        }
    }

    /// Features (B, width) of what [`super::views::Patches`] made: images through the network, histograms as they are.
    pub(super) fn features(&self, views: &Tensor) -> Tensor {
        match self {
            Self::Colour => views.shallow_clone(),
            Self::Network { backbone, .. } => tch::no_grad(|| backbone.features(views, false)),
        }
    }
}
