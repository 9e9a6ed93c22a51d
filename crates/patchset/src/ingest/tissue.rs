//! Where tissue is: saturation of a small picture of the slide, against the colour of its glass, cut by Otsu's threshold.

use super::SlideError;
use super::pixels::{Pixels, Rgb};

/// Longest side of the picture that tissue is found in.
pub(crate) const OVERVIEW: u32 = 2048;
/// Pixels of a slide read at once for it.
const BLOCK: u32 = 2048;
/// Saturation below which nothing is tissue, and above which everything is: guards slides that are all glass or all tissue, where Otsu's
/// cut would part nuclei from pale stroma.
const BOUNDS: (u8, u8) = (10, 20);
/// Pixels either side that saturation is averaged over: nuclei and what lies between them count alike.
const BLUR: usize = 2;
/// The glass is as bright as the brightest pixels but these (in 1,000), and at least so bright.
const BRIGHTEST: usize = 50;
const GLASS: u8 = 200;

/// A small picture of the whole slide and what is tissue on it.
pub(crate) struct Overview {
    pub(crate) picture: Rgb,
    /// One flag a pixel.
    tissue: Vec<bool>,
    /// Pixels of level 0 for one of the picture.
    pub(crate) scale: f64,
}

impl Overview {
    /// Reads the best level block by block, so that a slide with one huge level needs no more memory than others.
    pub(crate) fn of(pixels: &Pixels) -> Result<Self, SlideError> {
        let levels = pixels.levels();
        let Some(&(w0, h0, _)) = levels.first() else { return Err(SlideError::Skip("it has no pixels".into())) };
        if w0 == 0 || h0 == 0 {
            return Err(SlideError::Skip(format!("it is {w0}×{h0} px")));
        }
        let scale = (f64::from(w0.max(h0)) / f64::from(OVERVIEW)).max(1.0);
        let best = levels.iter().rposition(|&(_, _, downsample)| downsample <= scale * 1.001).unwrap_or(0);
        let (lw, lh, downsample) = levels[best];
        let factor = scale / downsample;
        let side = |px: u32| ((f64::from(px) / factor).floor() as u32).max(1);
        let (width, height) = (side(lw), side(lh));
        let step = ((f64::from(BLOCK) / factor).floor() as u32).max(1);
        let mut picture = vec![255_u8; 3 * width as usize * height as usize];
        for top in (0..height).step_by(step as usize) {
            for left in (0..width).step_by(step as usize) {
                let (w, h) = (step.min(width - left), step.min(height - top));
                let at = |v: u32| (f64::from(v) * factor).round() as u32;
                let (x, y) = (at(left), at(top));
                let block = pixels
                    .read(best as u32, x, y, (at(left + w) - x).max(1), (at(top + h) - y).max(1))?
                    .resized(w, h)?;
                for (row, line) in block.pixels.chunks_exact(3 * w as usize).enumerate() {
                    let to = 3 * ((top as usize + row) * width as usize + left as usize);
                    picture[to..to + line.len()].copy_from_slice(line);
                }
            }
        }
        let glass = glass(&picture);
        let saturation: Vec<u8> = picture.chunks_exact(3).map(|pixel| saturation(pixel, glass)).collect();
        let saturation = blurred(&saturation, width as usize);
        let cut = otsu(&saturation).clamp(BOUNDS.0, BOUNDS.1);
        let tissue = saturation.iter().map(|&s| s > cut).collect();
        Ok(Self { picture: Rgb { width, height, pixels: picture }, tissue, scale })
    }

    /// Share of tissue in a square of level-0 pixels.
    pub(crate) fn share(&self, x: f64, y: f64, side: f64) -> f64 {
        let cell = |v: f64, end: u32| ((v / self.scale).floor() as u32).min(end);
        let (x0, y0) = (cell(x, self.picture.width - 1), cell(y, self.picture.height - 1));
        let x1 = cell(x + side, self.picture.width).max(x0 + 1);
        let y1 = cell(y + side, self.picture.height).max(y0 + 1);
        let row = |y: u32| (y * self.picture.width) as usize;
        let found: usize = (y0..y1)
            .map(|y| self.tissue[row(y) + x0 as usize..row(y) + x1 as usize].iter().filter(|&&t| t).count())
            .sum();
        found as f64 / f64::from((x1 - x0) * (y1 - y0))
    }
}

/// The colour of bare glass, which scanners tint; white where nothing on the slide is bright enough to be glass.
fn glass(picture: &[u8]) -> [u8; 3] {
    let bright = [0, 1, 2].map(|channel| {
        let mut histogram = [0_usize; 256];
        picture.chunks_exact(3).for_each(|pixel| histogram[usize::from(pixel[channel])] += 1);
        let mut brighter = picture.len() / 3 * BRIGHTEST / 1000;
        (0_u8..=255).rev().find(|&value| {
            let count = histogram[usize::from(value)];
            let found = count > brighter;
            brighter = brighter.saturating_sub(count);
            found
        })
    });
    let bright = bright.map(|value| value.unwrap_or(255));
    if bright.iter().all(|&value| value >= GLASS) { bright } else { [255; 3] }
}

fn saturation(pixel: &[u8], glass: [u8; 3]) -> u8 {
    let against = |channel: usize| (u32::from(pixel[channel]) * 255 / u32::from(glass[channel])).min(255) as u8;
    let pixel = [0, 1, 2].map(against);
    let (low, high) = (pixel.iter().min().copied().unwrap_or(0), pixel.iter().max().copied().unwrap_or(0));
    // Near black (pen, edges of the scan) hue and saturation mean nothing.
    if high < 30 { 0 } else { ((u32::from(high - low) * 255) / u32::from(high)) as u8 }
}

/// Means over squares of 2 [`BLUR`] + 1 pixels, smaller ones at the edges.
fn blurred(values: &[u8], width: usize) -> Vec<u8> {
    let along = |values: &[u8], width: usize| -> Vec<u8> {
        let mean = |window: &[u8]| (window.iter().map(|&v| usize::from(v)).sum::<usize>() / window.len()) as u8;
        let line = |row: &[u8]| -> Vec<u8> {
            (0..row.len()).map(|x| mean(&row[x.saturating_sub(BLUR)..(x + BLUR + 1).min(row.len())])).collect()
        };
        values.chunks_exact(width).flat_map(line).collect()
    };
    let turned = |values: &[u8], width: usize| -> Vec<u8> {
        (0..width).flat_map(|x| values.iter().skip(x).step_by(width).copied()).collect()
    };
    let rows = along(values, width);
    let height = values.len() / width;
    turned(&along(&turned(&rows, width), height), height)
}

/// The cut that separates two groups best.
fn otsu(values: &[u8]) -> u8 {
    let mut histogram = [0_f64; 256];
    values.iter().for_each(|&v| histogram[usize::from(v)] += 1.0);
    let all = values.len() as f64;
    let sum: f64 = histogram.iter().enumerate().map(|(v, n)| v as f64 * n).sum();
    let (mut below, mut below_sum, mut best, mut cut) = (0.0, 0.0, -1.0, 0_u8);
    for (value, count) in (0_u8..=255).zip(histogram) {
        below += count;
        below_sum += f64::from(value) * count;
        let above = all - below;
        if below > 0.0 && above > 0.0 {
            let gap = below_sum / below - (sum - below_sum) / above;
            let between = below * above * gap * gap;
            if between > best {
                (best, cut) = (between, value);
            }
        }
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::{BOUNDS, blurred, glass, otsu, saturation};

    #[test]
    fn the_cut_lies_between_two_groups() {
        let values: Vec<u8> = (0..100).map(|i| 10 + i % 5).chain((0..60).map(|i| 120 + i % 9)).collect();
        assert!((14..120).contains(&otsu(&values)), "{}", otsu(&values));
    }

    #[test]
    fn tinted_glass_is_not_tissue_and_pale_tissue_is() {
        let (tinted, pale, nucleus) = ([232, 240, 226], [214, 200, 212], [110, 90, 160]);
        let side = 40;
        let picture: Vec<u8> = (0..side * side)
            .flat_map(|at| match (at % side, at / side) {
                (x, y) if x < 6 || y < 6 => tinted,
                (x, y) if x % 5 == 0 && y % 5 == 0 => nucleus,
                _ => pale,
            })
            .collect();
        let glass = glass(&picture);
        assert_eq!(glass, tinted);
        let found: Vec<u8> = picture.chunks_exact(3).map(|pixel| saturation(pixel, glass)).collect();
        let found = blurred(&found, side);
        let cut = otsu(&found).clamp(BOUNDS.0, BOUNDS.1);
        let tissue = |x: usize, y: usize| found[y * side + x] > cut;
        assert!((10..side).all(|x| tissue(x, 12) && tissue(12, x)), "cut {cut}");
        assert!((0..side).all(|x| !tissue(x, 2) && !tissue(2, x)), "cut {cut}");
    }

    #[test]
    fn a_slide_without_glass_is_measured_against_white() {
        assert_eq!(glass(&[180, 120, 170].repeat(400)), [255; 3]);
    }

    #[test]
    fn blurring_takes_means_along_rows_and_columns() {
        // One bright pixel of a 3 × 5 picture: each square holds it.
        let mut values = [0; 15];
        values[7] = 150;
        let blurred = blurred(&values, 3);
        assert_eq!(blurred.len(), 15);
        assert!(blurred.iter().all(|&v| v > 0), "{blurred:?}");
        assert_eq!(blurred[7], 10);
    }
}
