//! What the supervised protocols see of a patch, and the colour histogram that stands beside encoders as a baseline.

use rand::Rng as _;
use sgcl_draw::{Purpose, rng};

use crate::augment::Crop;
use crate::augment::draw::draw_crop;

/// Bins of a colour channel.
const BINS: usize = 8;
/// Width of a colour histogram.
pub const HISTOGRAM: usize = BINS * BINS * BINS;

/// What is cut from a patch in an epoch and whether it is mirrored: torchvision's `RandomResizedCrop` with its own defaults (8 to 100 %
/// of the area, sides as 3 to 4 at most) and a flip half of the time.
#[must_use]
pub fn train_crop(width: u32, height: u32, seed: u64, epoch: u64, patch: u64) -> (Crop, bool) {
    let mut rng = rng(seed, Purpose::Augment, epoch, patch);
    let whole = Crop { left: 0, top: 0, width, height };
    let crop = draw_crop(whole, (0.08, 1.0), (3.0 / 4.0, 4.0 / 3.0), &mut rng);
    (crop, rng.random::<f64>() < 0.5)
}

/// Side that a test view is resized to before its centre of `px` pixels is cut: 256 for 224.
#[must_use]
pub fn resize_before_crop(px: u32) -> u32 {
    (px * 256 + 112) / 224
}

/// Joint histogram of RGB bytes, 8 × 8 × 8 bins of 32 values each, red outermost; adds up to 1. An encoder that says no more than
/// this has learnt colours.
///
/// # Panics
/// If `out` has not [`HISTOGRAM`] values: a bug of the caller.
pub fn colour_histogram(pixels: &[u8], out: &mut [f32]) {
    assert_eq!(out.len(), HISTOGRAM, "a histogram has {HISTOGRAM} bins");
    let mut counts = [0_u32; HISTOGRAM];
    for pixel in pixels.chunks_exact(3) {
        let bin = |value: u8| usize::from(value) * BINS / 256;
        counts[(bin(pixel[0]) * BINS + bin(pixel[1])) * BINS + bin(pixel[2])] += 1;
    }
    let all = (pixels.len() / 3).max(1) as f64;
    out.iter_mut().zip(counts).for_each(|(to, count)| *to = (f64::from(count) / all) as f32);
}
