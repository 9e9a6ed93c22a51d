//! The linear classifier that is trained by steps.

use rand::Rng as _;
use sgcl_draw::{Purpose, rng};
use tch::{Device, Tensor};

/// x (B, d) → logits (B, classes), one linear layer.
#[derive(Debug)]
pub struct Head {
    /// (classes, d)
    pub weight: Tensor,
    /// (classes)
    pub bias: Tensor,
}

impl Head {
    /// Weights and biases uniform in ±1/√d, as `torch.nn.Linear` begins; both want gradients.
    #[must_use]
    pub fn new(width: i64, classes: usize, seed: u64, device: Device) -> Self {
        let mut rng = rng(seed, Purpose::Evaluate, 0, 2);
        let bound = 1.0 / (width.max(1) as f64).sqrt();
        let mut draw = |count: usize| -> Vec<f32> {
            (0..count).map(|_| (bound * (2.0 * rng.random::<f64>() - 1.0)) as f32).collect()
        };
        let weight = Tensor::from_slice(&draw(width as usize * classes)).view([classes as i64, width]);
        let bias = Tensor::from_slice(&draw(classes));
        let own = |tensor: Tensor| tensor.to_device(device).set_requires_grad(true);
        Head { weight: own(weight), bias: own(bias) }
    }

    /// Logits (B, classes) of x (B, d).
    pub fn logits(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, Some(&self.bias))
    }

    /// Its tensors by name; they share storage with the head.
    pub fn parameters(&self) -> [(String, Tensor); 2] {
        [("fc.weight".to_owned(), self.weight.shallow_clone()), ("fc.bias".to_owned(), self.bias.shallow_clone())]
    }
}
