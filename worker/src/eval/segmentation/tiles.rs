//! Images and masks cut into tiles without overlap. Every file is decoded once; the tiles lie in a scratch file, for a training
//! comes back to each of them many times, and all of them together need not fit the memory.

use std::fs::File;
use std::io::Write as _;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context, Result};
use rayon::prelude::*;
use sgcl::image::RgbImage;
use sgcl::segment::{IGNORED, Tile};

use super::bcss::{Pair, bad};
use super::mask;

/// Largest file of an image.
const MAX_FILE: u64 = 1 << 30;

/// A tile's place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) x: u32,
    pub(super) y: u32,
    pub(super) width: u32,
    pub(super) height: u32,
    /// Where its bytes begin: RGB, then classes.
    offset: u64,
    /// Whether a pixel of it counts.
    labelled: bool,
}

/// An image that was cut.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) name: String,
    pub(super) slide: String,
    pub(super) width: u32,
    pub(super) height: u32,
    tiles: Range<usize>,
}

impl Image {
    /// Numbers of its tiles, row by row.
    pub(super) fn tiles(&self) -> Range<usize> {
        self.tiles.clone()
    }
}

/// All tiles of some images.
#[derive(Debug)]
pub(super) struct Tiles {
    file: File,
    places: Vec<Place>,
    pub(super) images: Vec<Image>,
}

impl Tiles {
    /// Reads and cuts `pairs` on all cores. Tiles at the right and lower edge are as small as what is left.
    pub(super) fn read(
        pairs: &[Pair],
        px: u32,
        scratch: Option<&Path>,
        mut told: impl FnMut(u64, u64),
    ) -> Result<Self> {
        let folder = scratch.map_or_else(std::env::temp_dir, Path::to_path_buf);
        let in_folder = || format!("tiles are kept in {} meanwhile; --scratch names another folder", folder.display());
        let mut tiles = Tiles {
            file: tempfile::tempfile_in(&folder).with_context(in_folder)?,
            places: Vec::new(),
            images: Vec::new(),
        };
        let mut offset = 0;
        told(0, pairs.len() as u64);
        // A few at a time: decoded images are large.
        for some in pairs.chunks(rayon::current_num_threads()) {
            let decoded = some.par_iter().map(decode).collect::<Result<Vec<Tile>>>()?;
            for (pair, whole) in some.iter().zip(decoded) {
                let (width, height) = (whole.image.width(), whole.image.height());
                let first = tiles.places.len();
                for y in (0..height).step_by(px as usize) {
                    for x in (0..width).step_by(px as usize) {
                        let (w, h) = (px.min(width - x), px.min(height - y));
                        let (bytes, labelled) = cut(&whole, [x, y, w, h]);
                        tiles.file.write_all(&bytes).with_context(in_folder)?;
                        tiles.places.push(Place { x, y, width: w, height: h, offset, labelled });
                        offset += bytes.len() as u64;
                    }
                }
                let (name, slide) = (pair.name.clone(), pair.slide.clone());
                tiles.images.push(Image { name, slide, width, height, tiles: first..tiles.places.len() });
            }
            told(tiles.images.len() as u64, pairs.len() as u64);
        }
        Ok(tiles)
    }

    /// Where a tile lies in its image.
    pub(super) fn place(&self, number: usize) -> Place {
        self.places[number]
    }

    /// Numbers of the tiles with a pixel that counts.
    pub(super) fn labelled(&self) -> Vec<usize> {
        (0..self.places.len()).filter(|&number| self.places[number].labelled).collect()
    }

    /// A tile. May be called from several threads.
    pub(super) fn tile(&self, number: usize) -> Result<Tile> {
        let Place { width, height, offset, .. } = self.places[number];
        let area = width as usize * height as usize;
        let mut pixels = vec![0; 4 * area];
        self.file.read_exact_at(&mut pixels, offset).context("the scratch file of tiles")?;
        let classes = pixels.split_off(3 * area);
        Ok(Tile { image: RgbImage::new(width, height, pixels)?, classes })
    }
}

/// An image with the classes of its pixels.
fn decode(pair: &Pair) -> Result<Tile> {
    let length = pair.image.metadata().map_err(|e| bad(&pair.image, &e.to_string()))?.len();
    if length > MAX_FILE {
        return Err(bad(&pair.image, &format!("has {length} bytes; at most {MAX_FILE} are read")));
    }
    let bytes = std::fs::read(&pair.image).map_err(|e| bad(&pair.image, &format!("cannot be read: {e}")))?;
    let image = RgbImage::decode(&bytes).map_err(|e| bad(&pair.image, &format!("cannot be read: {e}")))?;
    let (width, height, classes) = mask::read(&pair.mask)?;
    if (width, height) != (image.width(), image.height()) {
        return Err(bad(
            &pair.mask,
            &format!(
                "is {width}×{height} px, its image {} is {}×{}; both must be of one size",
                pair.image.display(),
                image.width(),
                image.height()
            ),
        ));
    }
    Ok(Tile { image, classes })
}

/// RGB and classes of a rectangle, and whether one of its pixels counts.
fn cut(whole: &Tile, [x, y, width, height]: [u32; 4]) -> (Vec<u8>, bool) {
    let stride = whole.image.width() as usize;
    let (x, y, width, height) = (x as usize, y as usize, width as usize, height as usize);
    let rows = (y..y + height).map(|row| row * stride + x);
    let mut bytes = Vec::with_capacity(4 * width * height);
    for from in rows.clone() {
        bytes.extend_from_slice(&whole.image.pixels()[3 * from..3 * (from + width)]);
    }
    let mut labelled = false;
    for from in rows {
        let classes = &whole.classes[from..from + width];
        labelled |= classes.iter().any(|&class| class != IGNORED);
        bytes.extend_from_slice(classes);
    }
    (bytes, labelled)
}
