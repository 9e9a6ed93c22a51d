//! The half of MoCo that is not trained: an encoder that follows the trained one slowly, and which bank rows it wrote last.

use tch::{Device, Kind, Tensor};

use crate::backbone::{Arch, Backbone, pool};
use crate::dense;
use crate::draws;
use crate::projector::{Projector, l2_normalize};

/// A key encoder and its queue. A key is written to its patch's bank row; the queue names the rows written last, so keys lie where every
/// bank row lies: dealt over the ranks, with second copies.
#[derive(Debug)]
pub struct Momentum {
    pub(crate) backbone: Backbone,
    projector: Projector,
    /// Where positions of the map have keys too.
    dense: Option<Projector>,
    /// (K) i64 bank rows, the newest first; in host memory.
    queue: Tensor,
}

/// What the key encoder makes of views.
#[derive(Debug)]
pub struct Keys {
    /// Unit rows (B, D).
    pub global: Tensor,
    /// Of a key encoder with a dense head.
    pub dense: Option<DenseKeys>,
}

/// Keys of a map's P positions.
#[derive(Debug)]
pub struct DenseKeys {
    /// The backbone's features, (B, P, Db).
    pub features: Tensor,
    /// Unit rows (B, P, D).
    pub positions: Tensor,
    /// Their mean before it was normalised, normalised: unit rows (B, D).
    pub pooled: Tensor,
}

impl Momentum {
    /// All weights zero, a queue of `length` rows that names row 0 alone: call [`Momentum::begin`] or load state before use.
    #[must_use]
    pub fn new(arch: Arch, dim: i64, length: i64, device: Device) -> Self {
        Self {
            backbone: Backbone::new(arch, device),
            projector: Projector::new(arch.width(), dim, device),
            dense: None,
            queue: Tensor::zeros([length], (Kind::Int64, Device::Cpu)),
        }
    }

    /// The same with a dense head.
    #[must_use]
    pub fn with_dense(arch: Arch, dim: i64, length: i64, device: Device) -> Self {
        Self { dense: Some(Projector::new(arch.width(), dim, device)), ..Self::new(arch, dim, length, device) }
    }

    /// Takes the trained encoder's weights, and as queue random rows of a bank of `n`: their keys are the rows' first values, until
    /// patches have been trained on.
    pub fn begin(&self, trained: &[(String, Tensor)], seed: u64, n: i64) {
        self.follow(trained, 0.0);
        let rows = draws::candidates(seed, 0, u64::MAX, self.queue.numel(), n);
        self.queue.shallow_clone().copy_(&Tensor::from_slice(&rows));
    }

    /// weight ← `keep` · weight + (1 − `keep`) · the trained encoder's, whose parameters have the same names in the same order.
    pub fn follow(&self, trained: &[(String, Tensor)], keep: f64) {
        tch::no_grad(|| {
            for ((_, mine), (_, trained)) in self.parameters().into_iter().zip(trained) {
                mine.detach().copy_(&(mine.detach() * keep + trained.detach() * (1.0 - keep)));
            }
        });
    }

    /// Keys of views (B, 3, G, G), without gradient. BatchNorm takes the batch's own statistics, as in training; the running ones are
    /// never read.
    pub fn keys(&self, views: &Tensor) -> Keys {
        tch::no_grad(|| {
            let map = self.backbone.feature_map(views, true);
            let dense = self.dense.as_ref().map(|dense| {
                let features = dense::positions(&map);
                let keys = dense.project(&features);
                let pooled = l2_normalize(&keys.mean_dim([1_i64].as_slice(), false, Kind::Float));
                DenseKeys { features, positions: l2_normalize(&keys), pooled }
            });
            Keys { global: self.projector.forward(&pool(&map)), dense }
        })
    }

    /// Rows written last, the newest first.
    #[must_use]
    pub fn queue(&self) -> Vec<i64> {
        let mut rows = vec![0; self.queue.numel()];
        self.queue.copy_data(&mut rows, self.queue.numel());
        rows
    }

    /// Puts the rows of a step in front; the oldest leave.
    pub fn enqueue(&self, rows: &[i64]) {
        let all = Tensor::cat(&[&Tensor::from_slice(rows), &self.queue], 0);
        self.queue.shallow_clone().copy_(&all.narrow(0, 0, self.queue.numel() as i64));
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        let named = |part: &'static str, tensors: Vec<(String, Tensor)>| {
            tensors.into_iter().map(move |(name, tensor)| (format!("{part}.{name}"), tensor))
        };
        let dense = self.dense.as_ref().map(Projector::parameters).unwrap_or_default();
        named("backbone", self.backbone.parameters())
            .chain(named("projector", self.projector.parameters()))
            .chain(named("dense", dense))
            .collect()
    }

    /// What a checkpoint must hold: weights and queue.
    #[must_use]
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let queue = ("queue".to_owned(), self.queue.shallow_clone());
        self.parameters().into_iter().chain([queue]).collect()
    }
}
