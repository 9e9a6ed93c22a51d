//! What is trained: backbone and projector.

use std::collections::BTreeMap;

use tch::{Device, Tensor};

use crate::backbone::{Arch, Backbone};
use crate::momentum::Momentum;
use crate::projector::{Projector, l2_normalize};
use crate::weights::{self, LoadReport, WeightsError};

/// Batches of normalised views, on the model's device.
#[derive(Debug)]
pub struct Views {
    /// (B, 3, G, G)
    pub global: Tensor,
    /// (4B, 3, L, L), corner-major: all tl, then tr, bl, br. `None` where a method has no local views.
    pub local: Option<Tensor>,
    /// (B, 3, G, G): a second global view, for the key encoder where there is one.
    pub key: Option<Tensor>,
}

/// What a forward pass gives the objective.
#[derive(Debug)]
pub struct Outputs {
    /// Projected global views, unit rows (B, D).
    pub q: Tensor,
    /// Pooled backbone features of the global views, unit rows (B, Db), without gradient.
    pub x: Tensor,
    /// Projected local views, unit rows (4B, D), corner-major.
    pub ql: Option<Tensor>,
    /// Keys of the second global views, unit rows (B, D), without gradient.
    pub keys: Option<Tensor>,
}

/// A backbone and its projector.
#[derive(Debug)]
pub struct Model {
    /// The encoder that is exported.
    pub backbone: Backbone,
    /// The head that training alone uses.
    pub projector: Projector,
    /// The encoder of keys, of methods that have one.
    pub key: Option<Momentum>,
}

impl Model {
    /// A model with all weights zero, projecting to `dim`: call [`Model::init`] or [`Model::load_state`] before use.
    #[must_use]
    pub fn new(arch: Arch, dim: i64, device: Device) -> Self {
        Model { backbone: Backbone::new(arch, device), projector: Projector::new(arch.width(), dim, device), key: None }
    }

    /// The same with a projector of one linear layer.
    #[must_use]
    pub fn with_linear_projector(arch: Arch, dim: i64, device: Device) -> Self {
        Model {
            backbone: Backbone::new(arch, device),
            projector: Projector::linear(arch.width(), dim, device),
            key: None,
        }
    }

    /// The same with a key encoder, and a queue of `queue` bank rows.
    #[must_use]
    pub fn with_keys(arch: Arch, dim: i64, queue: i64, device: Device) -> Self {
        Model { key: Some(Momentum::new(arch, dim, queue, device)), ..Self::new(arch, dim, device) }
    }

    /// Draws the initial weights: a pure function of `seed`. A key encoder begins with [`Momentum::begin`].
    pub fn init(&self, seed: u64) {
        self.backbone.init(seed, 0);
        self.projector.init(seed, self.backbone.parameters().len() as u64);
    }

    /// One pass. Globals go through the backbone together, then locals together, so BatchNorm sees them apart.
    #[must_use]
    pub fn forward(&self, views: &Views, train: bool) -> Outputs {
        let pooled = self.backbone.features(&views.global, train);
        Outputs {
            q: self.projector.forward(&pooled),
            x: l2_normalize(&pooled.detach()),
            ql: views.local.as_ref().map(|local| self.projector.forward(&self.backbone.features(local, train))),
            keys: self.key.as_ref().zip(views.key.as_ref()).map(|(key, views)| key.keys(views)),
        }
    }

    /// Trainable tensors in a fixed order: `backbone.*` as torchvision orders them, then `projector.*`.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        prefixed("backbone", self.backbone.parameters())
            .chain(prefixed("projector", self.projector.parameters()))
            .collect()
    }

    /// BatchNorm's running means and variances.
    #[must_use]
    pub fn buffers(&self) -> Vec<(String, Tensor)> {
        prefixed("backbone", self.backbone.buffers()).collect()
    }

    /// Everything a checkpoint must hold to continue bit for bit.
    #[must_use]
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let key = self.key.as_ref().map(Momentum::state).unwrap_or_default();
        prefixed("backbone", self.backbone.state())
            .chain(prefixed("projector", self.projector.parameters()))
            .chain(prefixed("key", key))
            .collect()
    }

    /// Copies tensors named as [`Model::state`] names them.
    ///
    /// # Errors
    /// A wrong shape; no key matched; with `strict`, any key missing or unexpected. The model is unchanged after an error.
    pub fn load_state(&self, state: &BTreeMap<String, Tensor>, strict: bool) -> Result<LoadReport, WeightsError> {
        let report = weights::copy_into(&self.state(), state, "", strict)?;
        self.backbone.set_batches_tracked(weights::batches_tracked(state, "backbone."));
        Ok(report)
    }
}

fn prefixed(prefix: &str, tensors: Vec<(String, Tensor)>) -> impl Iterator<Item = (String, Tensor)> {
    tensors.into_iter().map(move |(name, tensor)| (format!("{prefix}.{name}"), tensor))
}
