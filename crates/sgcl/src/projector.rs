//! The projection head: Linear(Db, Db) → ReLU → Linear(Db, D) → l2, or Linear(Db, D) → l2.

use tch::{Device, Kind, Tensor};

use crate::init::kaiming_normal_;

/// Divides rows (last dimension) by their l2 norm; a row of zeros stays zero. Same arithmetic as `torch.nn.functional.normalize`.
pub fn l2_normalize(x: &Tensor) -> Tensor {
    x / x.norm_scalaropt_dim(2, [-1], true).clamp_min(1e-12)
}

/// A perceptron onto the unit sphere, of two layers or one.
#[derive(Debug)]
pub struct Projector {
    /// Weight and bias of each; a ReLU between two.
    layers: Vec<(Tensor, Tensor)>,
}

impl Projector {
    /// Two layers from `input` to `output` dimensions with all weights zero: call [`Projector::init`] or load weights.
    #[must_use]
    pub fn new(input: i64, output: i64, device: Device) -> Self {
        Projector { layers: vec![zeros(input, input, device), zeros(input, output, device)] }
    }

    /// One layer, likewise.
    #[must_use]
    pub fn linear(input: i64, output: i64, device: Device) -> Self {
        Projector { layers: vec![zeros(input, output, device)] }
    }

    /// Weights Kaiming normal (fan-in, gain √2), biases 0. Tensor i of [`Projector::parameters`] is drawn from stream `first + i`.
    pub fn init(&self, seed: u64, first: u64) {
        for (item, (_, parameter)) in (first..).zip(self.parameters()) {
            let mut parameter = parameter.detach();
            match parameter.dim() {
                2 => kaiming_normal_(&parameter, seed, item),
                _ => drop(parameter.zero_()),
            }
        }
    }

    /// Pooled features (B, Db) → unit rows (B, D). Features of a map's positions, (…, Db), become (…, D): what 1×1 convolutions do.
    pub fn forward(&self, features: &Tensor) -> Tensor {
        l2_normalize(&self.project(features))
    }

    /// The same, before rows are divided by their length.
    pub fn project(&self, features: &Tensor) -> Tensor {
        let mut x = features.shallow_clone();
        for (at, (weight, bias)) in self.layers.iter().enumerate() {
            x = if at == 0 { x } else { x.relu() };
            x = x.linear(weight, Some(bias));
        }
        x
    }

    /// Trainable tensors, named as a `torch.nn.Sequential(Linear, ReLU, Linear)`, or `(Linear)`, names them, in its order.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        (0..)
            .step_by(2)
            .zip(&self.layers)
            .flat_map(|(i, (weight, bias))| {
                [(format!("{i}.weight"), weight.shallow_clone()), (format!("{i}.bias"), bias.shallow_clone())]
            })
            .collect()
    }
}

/// Weight and bias of a layer.
fn zeros(input: i64, output: i64, device: Device) -> (Tensor, Tensor) {
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, device)).set_requires_grad(true);
    (zeros(&[output, input]), zeros(&[output]))
}
