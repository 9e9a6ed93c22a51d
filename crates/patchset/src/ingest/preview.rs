//! Pictures of a slide: as it is, for reports, and with its tiles drawn on it, for whoever checks an ingest.

use super::SlideError;
use super::pixels::Rgb;
use super::tissue::Overview;

/// Longest side of a stored picture.
const SIDE: u32 = 1024;
const QUALITY: u8 = 85;
const OUTLINE: [u8; 3] = [0, 140, 60];

/// The slide as it is.
pub(crate) fn plain(overview: &Overview) -> Result<Vec<u8>, SlideError> {
    let Rgb { width, height, .. } = overview.picture;
    let shrink = f64::from(SIDE) / f64::from(width.max(height));
    let side = |px: u32| ((f64::from(px) * shrink.min(1.0)).round() as u32).max(1);
    overview.picture.clone().resized(side(width), side(height))?.jpeg(QUALITY)
}

/// Kept tiles outlined, dropped ones paled. `tiles` are (x, y, kept) of squares of `side` level-0 pixels.
pub(crate) fn decorated(overview: &Overview, tiles: &[(f64, f64, bool)], side: f64) -> Result<Vec<u8>, SlideError> {
    let mut picture = overview.picture.clone();
    let (width, height) = (picture.width, picture.height);
    let cell = |v: f64, end: u32| ((v / overview.scale).round() as u32).min(end);
    for &(x, y, kept) in tiles {
        let (x0, x1) = (cell(x, width), cell(x + side, width));
        let (y0, y1) = (cell(y, height), cell(y + side, height));
        for row in y0..y1 {
            for column in x0..x1 {
                let at = 3 * (row as usize * width as usize + column as usize);
                let pixel = &mut picture.pixels[at..at + 3];
                let rim = row == y0 || column == x0 || row + 1 == y1 || column + 1 == x1;
                if kept && rim {
                    pixel.copy_from_slice(&OUTLINE);
                } else if !kept {
                    pixel.iter_mut().for_each(|c| *c = 255 - (255 - *c) / 3);
                }
            }
        }
    }
    picture.jpeg(QUALITY)
}
