//! Procedurally drawn H&E-like slides with labels, for demos, tests and benchmarks where no slide may be shipped.
//!
//! Seven tissues lie in smooth regions on every slide. They differ in structure: nuclei, fibres, lumens, vacuoles. Stain, scanner
//! and amounts of dye vary between slides and between regions, so that colour says little about the tissue: see [`hardness`].
//!
//! A slide is a tiled pyramidal TIFF that OpenSlide opens, `<name>.tif`. Beside it lie its labels, which ingest finds by itself:
//! `<name>.labels.png`, 8-bit, the class of every 16th pixel (255: glass), and `<name>.labels.json` with the classes' names.

pub mod hardness;
mod layout;
mod noise;
mod stain;
mod tiff;
mod tissue;

use std::path::{Path, PathBuf};

use rand::Rng as _;
use rayon::prelude::*;
use sgcl_draw::{Purpose, rng};

use layout::Layout;
use stain::Stain;
use tissue::Tile;

pub use layout::{CLASSES, bcss, nucls};
pub use tiff::{TiffError, encode_pyramid};

/// Pixels of the slide for one pixel of the label raster.
pub const LABEL_DOWNSAMPLE: u32 = 16;
/// Label of glass.
pub const GLASS: u8 = 255;
/// Microns per pixel that the slides claim.
pub const MPP: f64 = 0.5;
/// Sides that are drawn, pixels.
pub const SIDES: std::ops::RangeInclusive<u32> = 256..=30_000;
/// Quality of the slides' JPEG tiles.
const QUALITY: u8 = 90;
/// Side of the tiles that are drawn in parallel.
const TILE: usize = 256;

/// A slide that cannot be drawn or written.
#[derive(Debug, thiserror::Error)]
pub enum PhantomError {
    /// A side that is not drawn.
    #[error("a phantom of {0} px a side is not drawn; choose 256 to 30000")]
    Side(u32),
    /// A field that does not fit its slide, or none's.
    #[error("a field of {px} px on a slide of {side} px is not drawn; choose 64 to 2048, and no more than the slide")]
    Field {
        /// The field's side.
        px: u32,
        /// The slide's.
        side: u32,
    },
    /// Too few slides to classify one by the others.
    #[error("hardness compares slides with each other and got {0}: draw 2 or more")]
    Series(u64),
    /// The slide's TIFF.
    #[error(transparent)]
    Tiff(#[from] TiffError),
    /// The label raster.
    #[error("{file}: {source}")]
    Labels {
        /// The file.
        file: String,
        /// Why.
        source: image::ImageError,
    },
    /// A file cannot be written.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
}

/// A drawn slide.
#[derive(Clone, Debug)]
pub struct Phantom {
    /// Side in pixels.
    pub side: u32,
    /// RGB, row-major.
    pub pixels: Vec<u8>,
    /// Class of every 16th pixel, row-major; [`GLASS`] where there is no tissue.
    pub labels: Vec<u8>,
}

impl Phantom {
    /// Draws slide number `slide` of a series: a pure function of its arguments.
    ///
    /// # Errors
    /// A side outside [`SIDES`].
    pub fn draw(seed: u64, slide: u64, side: u32) -> Result<Self, PhantomError> {
        if !SIDES.contains(&side) {
            return Err(PhantomError::Side(side));
        }
        let layout = Layout::new(seed, slide, side);
        let stain = Stain::new(seed, slide);
        let texture: u64 = rng(seed, Purpose::Phantom, slide, 2).random();
        let width = side as usize;
        let mut pixels = vec![0; 3 * width * width];
        // A strip of tiles at a time: its rows are contiguous, so strips can be filled in parallel.
        pixels.par_chunks_mut(3 * width * TILE).enumerate().for_each(|(strip, rows)| {
            for left in (0..width).step_by(TILE) {
                let tile = Tile::draw(&layout, texture, left as i64, (strip * TILE) as i64, TILE);
                for (y, row) in rows.chunks_exact_mut(3 * width).enumerate() {
                    let wide = TILE.min(width - left);
                    for (x, pixel) in row[3 * left..3 * (left + wide)].chunks_exact_mut(3).enumerate() {
                        let at = y * TILE + x;
                        pixel.copy_from_slice(&stain.colour(tile.haematoxylin[at], tile.eosin[at]));
                    }
                }
            }
        });
        let raster = side.div_ceil(LABEL_DOWNSAMPLE);
        let labels = (0..raster * raster)
            .map(|at| {
                let middle = |n: u32| (n * LABEL_DOWNSAMPLE + LABEL_DOWNSAMPLE / 2) as f32;
                layout.at(middle(at % raster), middle(at / raster)).map_or(GLASS, |region| region.class)
            })
            .collect();
        Ok(Phantom { side, pixels, labels })
    }

    /// Side of the label raster.
    #[must_use]
    pub fn raster_side(&self) -> u32 {
        self.side.div_ceil(LABEL_DOWNSAMPLE)
    }

    /// Writes `<folder>/<name>.tif` and its labels; the slide appears last and whole. Returns its path.
    ///
    /// # Errors
    /// [`PhantomError::Io`], [`PhantomError::Labels`], [`PhantomError::Tiff`].
    pub fn write(&self, folder: &Path, name: &str) -> Result<PathBuf, PhantomError> {
        let io = |file: &Path| {
            let file = file.display().to_string();
            move |source| PhantomError::Io { file, source }
        };
        std::fs::create_dir_all(folder).map_err(io(folder))?;
        let raster = folder.join(format!("{name}.labels.png"));
        let side = self.raster_side();
        image::save_buffer(&raster, &self.labels, side, side, image::ColorType::L8)
            .map_err(|source| PhantomError::Labels { file: raster.display().to_string(), source })?;
        let legend = folder.join(format!("{name}.labels.json"));
        let text = serde_json::json!({ "classes": CLASSES, "downsample": LABEL_DOWNSAMPLE }).to_string();
        std::fs::write(&legend, text).map_err(io(&legend))?;
        let slide = folder.join(format!("{name}.tif"));
        let partial = folder.join(format!(".{name}.tif.partial"));
        let bytes = encode_pyramid(&self.pixels, self.side, self.side, MPP, QUALITY)?;
        std::fs::write(&partial, bytes).map_err(io(&partial))?;
        std::fs::rename(&partial, &slide).map_err(io(&slide))?;
        Ok(slide)
    }
}
