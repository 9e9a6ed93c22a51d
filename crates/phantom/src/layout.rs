//! Where which tissue lies: warped Voronoi regions inside an irregular outline.

pub mod bcss;
pub mod nucls;

use rand::Rng as _;
use sgcl_draw::{Purpose, rng};

use crate::noise::smooth;

/// Tissues, in the order of their labels.
pub const CLASSES: [&str; 7] = ["stroma", "tumour", "lymphocytes", "fat", "glands", "necrosis", "muscle"];

/// Mean side of a region in pixels.
const REGION: f32 = 850.0;

/// A region of one tissue. What varies within a tissue varies from region to region, so that no colour belongs to a class.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    x: f32,
    y: f32,
    pub(crate) class: u8,
    /// Direction of fibres, radians.
    pub(crate) angle: f32,
    /// Amount of haematoxylin and eosin.
    pub(crate) haematoxylin: f32,
    pub(crate) eosin: f32,
    /// Spacing of nuclei.
    pub(crate) spacing: f32,
}

/// The layout of one slide.
#[derive(Debug)]
pub(crate) struct Layout {
    seed: u64,
    size: f32,
    regions: Vec<Region>,
}

impl Layout {
    pub(crate) fn new(seed: u64, slide: u64, size: u32) -> Self {
        let mut rng = rng(seed, Purpose::Phantom, slide, 0);
        let size = size as f32;
        let count = ((size / REGION).powi(2).round() as usize).max(CLASSES.len());
        // Classes are dealt in turn, none more often than another; a slide below 4096 px may still lose one to the glass.
        let first = rng.random_range(0..CLASSES.len());
        let regions = (0..count)
            .map(|at| Region {
                x: rng.random::<f32>() * size,
                y: rng.random::<f32>() * size,
                class: ((first + at) % CLASSES.len()) as u8,
                angle: rng.random::<f32>() * std::f32::consts::PI,
                haematoxylin: rng.random_range(0.75..1.3),
                eosin: rng.random_range(0.7..1.35),
                spacing: rng.random_range(0.9..1.15),
            })
            .collect();
        Layout { seed: rng.random(), size, regions }
    }

    /// The region at a place, or none where there is glass.
    pub(crate) fn at(&self, x: f32, y: f32) -> Option<&Region> {
        let half = self.size / 2.0;
        let (dx, dy) = ((x - half) / half, (y - half) / half);
        let reach = 0.8 + 0.3 * smooth(self.seed, x / 600.0, y / 600.0);
        if dx.abs().powi(4) + dy.abs().powi(4) > reach.powi(4) {
            return None;
        }
        let warp = |seed: u64| 260.0 * (smooth(seed, x / 240.0, y / 240.0) - 0.5);
        let (wx, wy) = (x + warp(self.seed ^ 1), y + warp(self.seed ^ 2));
        let distance = |r: &Region| (r.x - wx).powi(2) + (r.y - wy).powi(2);
        self.regions.iter().min_by(|a, b| distance(a).total_cmp(&distance(b)))
    }
}
