//! What was predicted, as pictures: the classes of every pixel, and image, truth and prediction side by side.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use image::{GrayImage, Rgb, RgbImage, imageops};
use sgcl::segment::{IGNORED, Tile};

use super::tiles::Place;

/// Colours of the classes on pictures, by number.
pub(super) const COLOURS: [[u8; 3]; 5] = [[150, 150, 150], [214, 61, 56], [46, 139, 87], [58, 91, 204], [240, 190, 40]];
/// Longest side of each of the three pictures, pixels.
const SIDE: u32 = 800;
/// Pixels between them.
const GAP: u32 = 8;
/// Share of the class's colour over the image.
const STRENGTH: f32 = 0.55;

/// An image put together from its tiles.
pub(super) struct Canvas {
    width: u32,
    height: u32,
    /// Empty where no picture is wanted.
    rgb: Vec<u8>,
    pub(super) truth: Vec<u8>,
    pub(super) predicted: Vec<u8>,
}

impl Canvas {
    pub(super) fn new(width: u32, height: u32, pictures: bool) -> Self {
        let area = width as usize * height as usize;
        let rgb = if pictures { vec![0; 3 * area] } else { Vec::new() };
        Canvas { width, height, rgb, truth: vec![IGNORED; area], predicted: vec![0; area] }
    }

    /// Lays a tile down; `predicted` is of `px` pixels a row.
    pub(super) fn put(&mut self, place: Place, tile: &Tile, predicted: &[u8], px: usize) {
        let (wide, stride) = (place.width as usize, self.width as usize);
        for row in 0..place.height as usize {
            let to = (place.y as usize + row) * stride + place.x as usize;
            self.truth[to..to + wide].copy_from_slice(&tile.classes[row * wide..(row + 1) * wide]);
            self.predicted[to..to + wide].copy_from_slice(&predicted[row * px..row * px + wide]);
            if !self.rgb.is_empty() {
                let from = 3 * row * wide;
                self.rgb[3 * to..3 * (to + wide)].copy_from_slice(&tile.image.pixels()[from..from + 3 * wide]);
            }
        }
    }

    /// Image, truth and prediction, made small, side by side on white.
    fn side_by_side(&self) -> Option<RgbImage> {
        let whole = RgbImage::from_raw(self.width, self.height, self.rgb.clone())?;
        let shrink = (f64::from(SIDE) / f64::from(self.width.max(self.height))).min(1.0);
        let [w, h] = [self.width, self.height].map(|side| ((f64::from(side) * shrink).round() as u32).max(1));
        let small = imageops::thumbnail(&whole, w, h);
        let over = |classes: &[u8]| {
            let at = |x: u32, of: u32, to: u32| ((f64::from(x) + 0.5) * f64::from(of) / f64::from(to)) as usize;
            RgbImage::from_fn(w, h, |x, y| {
                let Rgb(below) = *small.get_pixel(x, y);
                let class = classes[at(y, self.height, h) * self.width as usize + at(x, self.width, w)];
                match COLOURS.get(usize::from(class)) {
                    None => Rgb(below),
                    Some(colour) => Rgb([0, 1, 2]
                        .map(|c| (f32::from(below[c]) * (1.0 - STRENGTH) + f32::from(colour[c]) * STRENGTH) as u8)),
                }
            })
        };
        let mut picture = RgbImage::from_pixel(3 * w + 2 * GAP, h, Rgb([255; 3]));
        for (part, left) in
            [small.clone(), over(&self.truth), over(&self.predicted)].iter().zip([0, w + GAP, 2 * (w + GAP)])
        {
            imageops::replace(&mut picture, part, i64::from(left), 0);
        }
        Some(picture)
    }
}

/// The folder of one encoder's pictures: `<number>-<encoder>/trial-<n>/<image>.png` holds classes, `…/pictures/<image>.png` those of the
/// first trial for people.
pub(super) struct Pictures {
    folder: PathBuf,
    /// Folder of this trial's classes, and of pictures where there are to be any.
    trial: Option<(PathBuf, Option<PathBuf>)>,
}

impl Pictures {
    pub(super) fn new(folder: &Path, number: usize, encoder: &str) -> Result<Self> {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' };
        let last = encoder.rsplit('/').next().unwrap_or(encoder);
        let name: String = last.chars().map(plain).take(100).collect();
        Ok(Pictures { folder: folder.join(format!("{number}-{name}")), trial: None })
    }

    pub(super) fn of_trial(&self, trial: u64) -> Result<Self> {
        let classes = self.folder.join(format!("trial-{trial}"));
        let pictures = (trial == 0).then(|| self.folder.join("pictures"));
        for folder in [Some(&classes), pictures.as_ref()].into_iter().flatten() {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        Ok(Pictures { folder: self.folder.clone(), trial: Some((classes, pictures)) })
    }

    /// Writes an image's classes and, in the first trial, its picture, whose path it gives.
    pub(super) fn save(&self, name: &str, canvas: &Canvas) -> Result<PathBuf> {
        let (classes, pictures) = self.trial.as_ref().context("pictures belong to a trial")?;
        let file = format!("{name}.png");
        let raw = GrayImage::from_raw(canvas.width, canvas.height, canvas.predicted.clone()).context("odd sizes")?;
        let path = classes.join(&file);
        raw.save(&path).with_context(|| path.display().to_string())?;
        let Some(pictures) = pictures else { return Ok(path) };
        let path = pictures.join(&file);
        canvas.side_by_side().context("odd sizes")?.save(&path).with_context(|| path.display().to_string())?;
        Ok(path)
    }
}
