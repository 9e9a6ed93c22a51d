//! Initial weights, drawn in Rust: libtorch's global generator is shared and its stream is not part of our contract.

use rand_distr::{Distribution, StandardNormal};
use sgcl_draw::{Purpose, rng};
use tch::Tensor;

/// Fills a linear (out, in) or convolution (out, in, k, k) weight from N(0, 2 / fan-in), stream `item` of [`Purpose::Weights`].
pub(crate) fn kaiming_normal_(weight: &Tensor, seed: u64, item: u64) {
    let size = weight.size();
    let fan_in: i64 = size[1..].iter().product();
    let std = (2.0 / fan_in as f64).sqrt();
    let mut stream = rng(seed, Purpose::Weights, 0, item);
    let normal = StandardNormal.sample_iter(&mut stream).take(weight.numel());
    let values: Vec<f32> = normal.map(|z: f64| (z * std) as f32).collect();
    weight.detach().copy_(&Tensor::from_slice(&values).view(size.as_slice()));
}
