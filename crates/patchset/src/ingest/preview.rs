//! Pictures of a slide: as it is, for reports, and with its tiles drawn on it, for whoever checks an ingest.

use std::path::Path;

use super::pixels::Rgb;
use super::tissue::Overview;
use super::{IngestError, SlideError};

/// Longest side of a stored picture.
const SIDE: u32 = 1024;
/// Longest side of a tile on a picture made of tiles.
const MAX_CELL: u32 = 64;
const QUALITY: u8 = 85;
const OUTLINE: [u8; 3] = [0, 140, 60];

/// The slide as it is.
pub(crate) fn plain(overview: &Overview) -> Result<Vec<u8>, SlideError> {
    let Rgb { width, height, .. } = overview.picture;
    let shrink = f64::from(SIDE) / f64::from(width.max(height));
    let side = |px: u32| ((f64::from(px) * shrink.min(1.0)).round() as u32).max(1);
    overview.picture.clone().resized(side(width), side(height))?.jpeg(QUALITY)
}

/// The picture that tiles of a slide make together, where their grid is small enough for one.
pub(crate) struct Mosaic {
    cell: u32,
    origin: [i32; 2],
    picture: Rgb,
}

impl Mosaic {
    /// A white picture for tiles at `places`.
    pub(crate) fn new(places: impl Iterator<Item = (i32, i32)> + Clone) -> Option<Self> {
        let span = |of: fn((i32, i32)) -> i32| {
            let (low, high) = (places.clone().map(of).min()?, places.clone().map(of).max()?);
            Some((low, high.abs_diff(low).checked_add(1)?))
        };
        let ((left, columns), (top, rows)) = (span(|p| p.0)?, span(|p| p.1)?);
        let cell = (SIDE / columns.max(rows)).min(MAX_CELL);
        let [width, height] = [columns, rows].map(|n| n.saturating_mul(cell));
        let pixels = vec![255; 3 * width as usize * height as usize];
        (cell > 0).then_some(Self { cell, origin: [left, top], picture: Rgb { width, height, pixels } })
    }

    /// A tile as it goes into the picture.
    pub(crate) fn small(&self, tile: Rgb) -> Result<Rgb, SlideError> {
        tile.resized(self.cell, self.cell)
    }

    /// Puts a small tile at its place.
    pub(crate) fn put(&mut self, x: i32, y: i32, small: &Rgb) {
        let at = |place: i32, origin: i32| place.abs_diff(origin) as usize * self.cell as usize;
        let (left, top) = (at(x, self.origin[0]), at(y, self.origin[1]));
        for (row, line) in small.pixels.chunks_exact(3 * self.cell as usize).enumerate() {
            let to = 3 * ((top + row) * self.picture.width as usize + left);
            self.picture.pixels[to..to + line.len()].copy_from_slice(line);
        }
    }

    pub(crate) fn jpeg(&self) -> Result<Vec<u8>, SlideError> {
        self.picture.jpeg(QUALITY)
    }
}

/// Writes a picture into the folder that the user wants them in.
pub(crate) fn save(folder: &Path, slide: &str, picture: Vec<u8>) -> Result<(), IngestError> {
    let file = folder.join(format!("{slide}.jpg"));
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&file, picture));
    written.map_err(|source| IngestError::Io { file: file.display().to_string(), source })
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
