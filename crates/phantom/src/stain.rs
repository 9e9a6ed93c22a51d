//! A slide's stain and scanner: what turns densities into colours. Between slides it varies as between laboratories.

use rand::Rng as _;
use sgcl_draw::{Purpose, rng};

/// Optical density per unit of stain, and the light behind it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stain {
    haematoxylin: [f32; 3],
    eosin: [f32; 3],
    white: [f32; 3],
}

impl Stain {
    pub(crate) fn new(seed: u64, slide: u64) -> Self {
        let mut rng = rng(seed, Purpose::Phantom, slide, 1);
        // Ruifrok and Johnston's vectors, turned a little; amounts from pale to overstained.
        let mut vector = |base: [f32; 3], spread: f32, (low, high): (f32, f32)| {
            let amount = rng.random_range(low..high);
            base.map(|value| ((value + rng.random_range(-spread..spread)).max(0.02)) * amount)
        };
        let haematoxylin = vector([0.65, 0.70, 0.29], 0.14, (0.75, 1.7));
        let eosin = vector([0.10, 0.85, 0.25], 0.16, (0.45, 1.3));
        let white = [0, 1, 2].map(|_| rng.random_range(222.0..252.0));
        Stain { haematoxylin, eosin, white }
    }

    /// Beer and Lambert.
    pub(crate) fn colour(&self, haematoxylin: f32, eosin: f32) -> [u8; 3] {
        [0, 1, 2].map(|c| {
            let density = haematoxylin * self.haematoxylin[c] + eosin * self.eosin[c];
            (self.white[c] * (-density).exp()).round() as u8
        })
    }
}
