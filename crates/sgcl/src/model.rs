//! What is trained: backbone and projector.

use std::collections::BTreeMap;
use std::sync::Arc;

use sgcl_c10d::ProcessGroup;
use tch::{Device, Kind, Tensor};

use crate::backbone::{Arch, Backbone, pool};
use crate::dense;
use crate::momentum::{Keys, Momentum};
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
    /// Pooled backbone features of the global views, unit rows (B, Db), without gradient; of a model with a dense head the pooled dense
    /// keys, (B, D).
    pub x: Tensor,
    /// Projected local views, unit rows (4B, D), corner-major; of a model with a dense head the positions of the global views' maps,
    /// (P·B, D), position-major.
    pub ql: Option<Tensor>,
    /// Of each of those the key that it is matched with, (P·B, D), without gradient.
    pub dense_keys: Option<Tensor>,
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
    /// The head over a map's positions, of methods that have one.
    pub dense: Option<Projector>,
    /// The encoder of keys, of methods that have one.
    pub key: Option<Momentum>,
}

impl Model {
    /// A model with all weights zero, projecting to `dim`: call [`Model::init`] or [`Model::load_state`] before use.
    #[must_use]
    pub fn new(arch: Arch, dim: i64, device: Device) -> Self {
        Model {
            backbone: Backbone::new(arch, device),
            projector: Projector::new(arch.width(), dim, device),
            dense: None,
            key: None,
        }
    }

    /// The same with a projector of one linear layer.
    #[must_use]
    pub fn with_linear_projector(arch: Arch, dim: i64, device: Device) -> Self {
        Model { projector: Projector::linear(arch.width(), dim, device), ..Self::new(arch, dim, device) }
    }

    /// The same with a key encoder, and a queue of `queue` bank rows.
    #[must_use]
    pub fn with_keys(arch: Arch, dim: i64, queue: i64, device: Device) -> Self {
        Model { key: Some(Momentum::new(arch, dim, queue, device)), ..Self::new(arch, dim, device) }
    }

    /// The same with a second head over the positions of the last feature map, trained and of keys.
    #[must_use]
    pub fn with_dense_keys(arch: Arch, dim: i64, queue: i64, device: Device) -> Self {
        Model {
            dense: Some(Projector::new(arch.width(), dim, device)),
            key: Some(Momentum::with_dense(arch, dim, queue, device)),
            ..Self::new(arch, dim, device)
        }
    }

    /// What convolutions are computed in, `Float` or `BFloat16`: see [`Backbone::compute_in`]. Heads and losses stay in 32 bits.
    pub fn compute_in(&mut self, kind: Kind) {
        self.backbone.compute_in(kind);
        if let Some(key) = &mut self.key {
            key.backbone.compute_in(kind);
        }
    }

    /// See [`Backbone::normalise_with`]; keys are normalised over all ranks too.
    pub fn normalise_with(&mut self, group: Option<Arc<ProcessGroup>>) {
        if let Some(key) = &mut self.key {
            key.backbone.normalise_with(group.clone());
        }
        self.backbone.normalise_with(group);
    }

    /// Whether batches are normalised with those of other ranks, which then wait for a batch of none too.
    #[must_use]
    pub fn normalises_together(&self) -> bool {
        self.backbone.normalises_together()
    }

    /// See [`Backbone::check_ranks`].
    ///
    /// # Errors
    /// A peer was lost in a forward pass.
    pub fn check_ranks(&self) -> Result<(), sgcl_c10d::Error> {
        self.backbone.check_ranks()?;
        self.key.as_ref().map_or(Ok(()), |key| key.backbone.check_ranks())
    }

    /// Draws the initial weights: a pure function of `seed`. A key encoder begins with [`Momentum::begin`].
    pub fn init(&self, seed: u64) {
        self.backbone.init(seed, 0);
        let backbone = self.backbone.parameters().len();
        self.projector.init(seed, backbone as u64);
        if let Some(dense) = &self.dense {
            dense.init(seed, (backbone + self.projector.parameters().len()) as u64);
        }
    }

    /// One pass. Globals go through the backbone together, then locals together, so BatchNorm sees them apart.
    #[must_use]
    pub fn forward(&self, views: &Views, train: bool) -> Outputs {
        let map = self.backbone.feature_map(&views.global, train);
        let pooled = pool(&map);
        let mut outputs = Outputs {
            q: self.projector.forward(&pooled),
            x: l2_normalize(&pooled.detach()),
            ql: views.local.as_ref().map(|local| self.projector.forward(&self.backbone.features(local, train))),
            dense_keys: None,
            keys: None,
        };
        let keys = self.key.as_ref().zip(views.key.as_ref()).map(|(key, views)| key.keys(views));
        let Some(Keys { global, dense: keys }) = keys else {
            return outputs;
        };
        outputs.keys = Some(global);
        if let (Some(head), Some(keys)) = (&self.dense, keys) {
            let features = dense::positions(&map);
            let matched = dense::matches(&features.detach(), &keys.features).unsqueeze(2);
            let [b, p, d] = [0, 1, 2].map(|at| keys.positions.size()[at]);
            let own = keys.positions.gather(1, &matched.expand([b, p, d], false), false);
            outputs.ql = Some(dense::by_position(&head.forward(&features)));
            outputs.dense_keys = Some(dense::by_position(&own));
            outputs.x = keys.pooled;
        }
        outputs
    }

    /// Trainable tensors in a fixed order: `backbone.*` as torchvision orders them, then `projector.*`, then `dense.*`.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        prefixed("backbone", self.backbone.parameters())
            .chain(prefixed("projector", self.projector.parameters()))
            .chain(prefixed("dense", self.dense()))
            .collect()
    }

    fn dense(&self) -> Vec<(String, Tensor)> {
        self.dense.as_ref().map(Projector::parameters).unwrap_or_default()
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
            .chain(prefixed("dense", self.dense()))
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
