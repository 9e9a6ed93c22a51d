//! The fully convolutional head: mmsegmentation's `FCNHead` as its `fcn_*-d8` configurations use it, with its names of tensors.

use rand_distr::{Distribution, StandardNormal};
use sgcl_draw::{Purpose, rng};
use tch::{Device, Kind, Tensor};

use crate::backbone::{Pass, Unit};
use crate::init::kaiming_normal_;

/// Spread of the last layer's first weights.
const LAST_STD: f64 = 0.01;
/// Stream of the first convolution's weights: behind those of backbone and projector.
const FIRST_STREAM: u64 = 1_000;

/// Map (B, Db, h, w) → logits (B, classes, h, w): two 3×3 convolutions to Db/4 channels, a third over their output beside the map
/// itself, each with BatchNorm and ReLU, then a 1×1 convolution.
#[derive(Debug)]
pub struct FcnHead {
    convs: Vec<Unit>,
    join: Unit,
    weight: Tensor,
    bias: Tensor,
    channels: i64,
}

impl FcnHead {
    /// Convolutions Kaiming normal, the last layer N(0, 0.01²) with zero biases.
    #[must_use]
    pub fn new(width: i64, classes: usize, seed: u64, device: Device) -> Self {
        let channels = (width / 4).max(1);
        let unit = |name: &str, input: i64| {
            let (conv, norm) = (format!("decode_head.{name}.conv"), format!("decode_head.{name}.bn"));
            Unit::new(conv, norm, [channels, input, 3, 3], 1, 1, device)
        };
        let convs = vec![unit("convs.0", width), unit("convs.1", channels)];
        let join = unit("conv_cat", width + channels);
        for (unit, stream) in convs.iter().chain([&join]).zip(FIRST_STREAM..) {
            kaiming_normal_(&unit.parameters()[0].1, seed, stream);
        }
        let mut draws = rng(seed, Purpose::Evaluate, 0, 5);
        let last: Vec<f32> = StandardNormal
            .sample_iter(&mut draws)
            .take(classes * channels as usize)
            .map(|z: f64| (LAST_STD * z) as f32)
            .collect();
        let weight = Tensor::from_slice(&last).view([classes as i64, channels, 1, 1]).to_device(device);
        let bias = Tensor::zeros([classes as i64], (Kind::Float, device));
        let (weight, bias) = (weight.set_requires_grad(true), bias.set_requires_grad(true));
        FcnHead { convs, join, weight, bias, channels }
    }

    /// Logits, as coarse as the map. `kept` (B, channels, 1, 1) multiplies the channels before the last layer: dropout.
    pub fn logits(&self, map: &Tensor, train: bool, kept: Option<&Tensor>) -> Tensor {
        let pass = Pass::alone(train);
        let mut inner = map.shallow_clone();
        for conv in &self.convs {
            inner = conv.forward(&inner, pass).relu();
        }
        let joined = self.join.forward(&Tensor::cat(&[map, &inner], 1), pass).relu();
        // Not in place: ReLU's backward pass reads what it gave.
        let joined = match kept {
            Some(kept) => joined * kept,
            None => joined,
        };
        joined.conv2d(&self.weight, Some(&self.bias), [1, 1], [0, 0], [1, 1], 1)
    }

    /// Width of what the last layer sees.
    #[must_use]
    pub fn channels(&self) -> i64 {
        self.channels
    }

    /// Trainable tensors by mmsegmentation's names; they share storage with the head.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let units = self.convs.iter().chain([&self.join]);
        let last = [
            ("decode_head.conv_seg.weight".to_owned(), self.weight.shallow_clone()),
            ("decode_head.conv_seg.bias".to_owned(), self.bias.shallow_clone()),
        ];
        units.flat_map(Unit::parameters).chain(last).collect()
    }

    /// Running statistics; they share storage with the head.
    #[must_use]
    pub fn buffers(&self) -> Vec<(String, Tensor)> {
        self.convs.iter().chain([&self.join]).flat_map(Unit::buffers).collect()
    }
}
