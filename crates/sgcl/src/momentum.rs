//! The half of MoCo that is not trained: an encoder that follows the trained one slowly, and which bank rows it wrote last.

use tch::{Device, Kind, Tensor};

use crate::backbone::{Arch, Backbone};
use crate::draws;
use crate::projector::Projector;

/// A key encoder and its queue. A key is written to its patch's bank row; the queue names the rows written last, so keys lie where every
/// bank row lies: dealt over the ranks, with second copies.
#[derive(Debug)]
pub struct Momentum {
    backbone: Backbone,
    projector: Projector,
    /// (K) i64 bank rows, the newest first; in host memory.
    queue: Tensor,
}

impl Momentum {
    /// All weights zero, a queue of `length` rows that names row 0 alone: call [`Momentum::begin`] or load state before use.
    #[must_use]
    pub fn new(arch: Arch, dim: i64, length: i64, device: Device) -> Self {
        Self {
            backbone: Backbone::new(arch, device),
            projector: Projector::new(arch.width(), dim, device),
            queue: Tensor::zeros([length], (Kind::Int64, Device::Cpu)),
        }
    }

    /// Takes the trained encoder's weights, and as queue random rows of a bank of `n`: their keys are the rows' first values, until
    /// patches have been trained on.
    pub fn begin(&self, backbone: &Backbone, projector: &Projector, seed: u64, n: i64) {
        self.follow(backbone, projector, 0.0);
        let rows = draws::candidates(seed, 0, u64::MAX, self.queue.numel(), n);
        self.queue.shallow_clone().copy_(&Tensor::from_slice(&rows));
    }

    /// weight ← `keep` · weight + (1 − `keep`) · the trained encoder's.
    pub fn follow(&self, backbone: &Backbone, projector: &Projector, keep: f64) {
        let trained = backbone.parameters().into_iter().chain(projector.parameters());
        tch::no_grad(|| {
            for ((_, mine), (_, trained)) in self.parameters().into_iter().zip(trained) {
                mine.detach().copy_(&(mine.detach() * keep + trained.detach() * (1.0 - keep)));
            }
        });
    }

    /// Keys of views (B, 3, G, G): unit rows (B, D) without gradient. BatchNorm takes the batch's own statistics, as in training; the
    /// running ones are never read.
    pub fn keys(&self, views: &Tensor) -> Tensor {
        tch::no_grad(|| self.projector.forward(&self.backbone.features(views, true)))
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
        named("backbone", self.backbone.parameters()).chain(named("projector", self.projector.parameters())).collect()
    }

    /// What a checkpoint must hold: weights and queue.
    #[must_use]
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let queue = ("queue".to_owned(), self.queue.shallow_clone());
        self.parameters().into_iter().chain([queue]).collect()
    }
}
