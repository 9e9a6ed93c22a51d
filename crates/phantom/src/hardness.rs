//! How much colour alone tells of the tissue: kNN over colour histograms, across slides.

use crate::{CLASSES, GLASS, LABEL_DOWNSAMPLE, Phantom, PhantomError};

/// Bins of a channel's histogram.
const BINS: usize = 16;
/// Neighbours that vote.
const NEIGHBOURS: usize = 10;
/// Share of a patch that its class must cover.
const PURE: f64 = 0.6;

/// What colour alone achieves on a series of slides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hardness {
    /// Share of patches whose class a histogram finds among the other slides' patches.
    pub accuracy: f64,
    /// Share of the most frequent class: what guessing achieves.
    pub chance: f64,
    /// Labelled patches.
    pub patches: usize,
}

struct Patch {
    slide: usize,
    class: u8,
    histogram: Vec<f32>,
}

/// Draws `slides` slides and classifies each labelled patch of `patch_px` pixels by the histograms of the other slides' patches.
///
/// # Errors
/// A side that is not drawn; fewer than two slides.
pub fn hardness(seed: u64, slides: u64, side: u32, patch_px: u32) -> Result<Hardness, PhantomError> {
    if slides < 2 {
        return Err(PhantomError::Series(slides));
    }
    let mut patches = Vec::new();
    for slide in 0..slides {
        let phantom = Phantom::draw(seed, slide, side)?;
        for y in (0..side.saturating_sub(patch_px - 1)).step_by(patch_px as usize) {
            for x in (0..side.saturating_sub(patch_px - 1)).step_by(patch_px as usize) {
                if let Some(class) = label(&phantom, x, y, patch_px) {
                    patches.push(Patch {
                        slide: slide as usize,
                        class,
                        histogram: histogram(&phantom, x, y, patch_px),
                    });
                }
            }
        }
    }
    let mut counts = [0_usize; CLASSES.len()];
    patches.iter().for_each(|patch| counts[usize::from(patch.class)] += 1);
    let hits = patches.iter().filter(|patch| vote(patch, &patches) == patch.class).count();
    let all = patches.len().max(1) as f64;
    let most = counts.iter().copied().max().unwrap_or(0);
    Ok(Hardness { accuracy: hits as f64 / all, chance: most as f64 / all, patches: patches.len() })
}

fn label(phantom: &Phantom, x: u32, y: u32, px: u32) -> Option<u8> {
    let raster = phantom.raster_side();
    let mut counts = [0_u32; CLASSES.len()];
    let mut all = 0;
    for row in (y / LABEL_DOWNSAMPLE)..((y + px) / LABEL_DOWNSAMPLE) {
        for column in (x / LABEL_DOWNSAMPLE)..((x + px) / LABEL_DOWNSAMPLE) {
            all += 1;
            match phantom.labels[(row * raster + column) as usize] {
                GLASS => {}
                class => counts[usize::from(class)] += 1,
            }
        }
    }
    let (class, count) = (0_u8..).zip(counts).max_by_key(|&(_, count)| count)?;
    (f64::from(count) >= PURE * f64::from(all)).then_some(class)
}

/// Three channels of [`BINS`] bins, each channel summing to 1.
fn histogram(phantom: &Phantom, x: u32, y: u32, px: u32) -> Vec<f32> {
    let mut bins = vec![0_f32; 3 * BINS];
    let share = 1.0 / (px * px) as f32;
    for row in y..y + px {
        let from = 3 * (row * phantom.side + x) as usize;
        for pixel in phantom.pixels[from..from + 3 * px as usize].chunks_exact(3) {
            for (channel, &value) in pixel.iter().enumerate() {
                bins[channel * BINS + usize::from(value) * BINS / 256] += share;
            }
        }
    }
    bins
}

fn vote(query: &Patch, patches: &[Patch]) -> u8 {
    let distance = |other: &Patch| {
        let pairs = query.histogram.iter().zip(&other.histogram);
        pairs.map(|(a, b)| (a - b).abs()).sum::<f32>()
    };
    let mut near: Vec<(f32, u8)> =
        patches.iter().filter(|p| p.slide != query.slide).map(|p| (distance(p), p.class)).collect();
    near.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut votes = [0_u32; CLASSES.len()];
    near.iter().take(NEIGHBOURS).for_each(|&(_, class)| votes[usize::from(class)] += 1);
    (0_u8..).zip(votes).max_by_key(|&(class, votes)| (votes, u8::MAX - class)).map_or(0, |(class, _)| class)
}
