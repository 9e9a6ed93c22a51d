//! The projection head: Linear(Db, Db) → ReLU → Linear(Db, D) → l2.

use tch::{Device, Kind, Tensor};

use crate::init::kaiming_normal_;

/// Divides rows (last dimension) by their l2 norm; a row of zeros stays zero. Same arithmetic as `torch.nn.functional.normalize`.
pub fn l2_normalize(x: &Tensor) -> Tensor {
    x / x.norm_scalaropt_dim(2, [-1], true).clamp_min(1e-12)
}

/// A two-layer perceptron onto the unit sphere.
#[derive(Debug)]
pub struct Projector {
    layers: [(Tensor, Tensor); 2],
}

impl Projector {
    /// A projector from `input` to `output` dimensions with all weights zero: call [`Projector::init`] or load weights.
    #[must_use]
    pub fn new(input: i64, output: i64, device: Device) -> Self {
        let linear = |out: i64| {
            let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, device)).set_requires_grad(true);
            (zeros(&[out, input]), zeros(&[out]))
        };
        Projector { layers: [linear(input), linear(output)] }
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

    /// Pooled features (B, Db) → unit rows (B, D).
    pub fn forward(&self, features: &Tensor) -> Tensor {
        let [first, second] = &self.layers;
        let hidden = features.linear(&first.0, Some(&first.1)).relu();
        l2_normalize(&hidden.linear(&second.0, Some(&second.1)))
    }

    /// Trainable tensors, named as a `torch.nn.Sequential(Linear, ReLU, Linear)` names them, in its order.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        [0, 2]
            .iter()
            .zip(&self.layers)
            .flat_map(|(i, (weight, bias))| {
                [(format!("{i}.weight"), weight.shallow_clone()), (format!("{i}.bias"), bias.shallow_clone())]
            })
            .collect()
    }
}
