//! Tiles that were cut by somebody else.

use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::container::{MAX_IMAGE, Origin};
use super::pixels::{Pixels, Rgb};
use super::preview::{self, Mosaic};
use super::whole::{Plan, Read, Work};
use super::{IngestOptions, Skipped, SlideError, SlideReport};
use crate::lattice;
use crate::writer::{SlideInfo, SlideWriter};

const CHUNK: usize = 512;

/// An image and where it lies.
#[derive(Debug)]
pub(crate) struct Tile {
    pub(crate) origin: Origin,
    pub(crate) x: i32,
    pub(crate) y: i32,
    pub(crate) class: Option<String>,
}

/// Tiles that make a slide, or stand for one.
#[derive(Debug)]
pub(crate) struct Tiles {
    pub(crate) tiles: Vec<Tile>,
    pub(crate) spatial: bool,
}

impl Tiles {
    pub(crate) fn plan(
        self,
        name: String,
        source: String,
        fingerprint: String,
        options: &IngestOptions,
    ) -> Result<Plan, SlideError> {
        if self.spatial {
            // Before anything is read, so that a dry run hears of it too.
            let places: Vec<_> = self.tiles.iter().map(|tile| (tile.x, tile.y)).collect();
            lattice::check(&places).map_err(|e| SlideError::Skip(e.to_string()))?;
        }
        let reach = |at: fn(&Tile) -> i32| self.tiles.iter().map(at).max().map_or(0, |most| most.max(0) as u32 + 1);
        let grid = [reach(|tile| tile.x), reach(|tile| tile.y)];
        let side = u64::from(options.patch_px);
        let info = SlideInfo {
            name,
            source,
            fingerprint,
            level: 0,
            mpp: options.assume_mpp,
            width: u64::from(grid[0]) * side,
            height: u64::from(grid[1]) * side,
            grid,
            spatial: self.spatial,
        };
        Ok(Plan { info, work: Work::Files(self.tiles) })
    }
}

/// Reads tiles into `slide`. JPEGs go in as they are, others are encoded. Damaged ones are left out and named.
pub(crate) fn read(
    info: SlideInfo,
    tiles: &[Tile],
    mut slide: Option<SlideWriter>,
    options: &IngestOptions,
    tell: &(impl Fn(u64, u64) + Sync),
) -> Result<Read, SlideError> {
    let done = AtomicU64::new(0);
    let mut mosaic = if info.spatial { Mosaic::new(tiles.iter().map(|tile| (tile.x, tile.y))) } else { None };
    let (mut damaged, mut labelled) = (Vec::new(), 0);
    for chunk in tiles.chunks(CHUNK) {
        let loaded: Vec<_> = chunk
            .par_iter()
            .map(|tile| {
                let loaded = load(tile, options, mosaic.as_ref());
                tell(done.fetch_add(1, Ordering::Relaxed) + 1, tiles.len() as u64);
                loaded
            })
            .collect();
        for (tile, loaded) in chunk.iter().zip(loaded) {
            match loaded {
                Ok((jpeg, small)) => {
                    if let Some((mosaic, small)) = mosaic.as_mut().zip(small) {
                        mosaic.put(tile.x, tile.y, &small);
                    }
                    labelled += u64::from(tile.class.is_some());
                    if let Some(slide) = &mut slide {
                        slide.push(tile.x, tile.y, tile.class.as_deref(), &jpeg)?;
                    }
                }
                Err(SlideError::Skip(reason)) => {
                    damaged.push(Skipped { source: tile.origin.describe(), reason });
                }
                Err(fatal) => return Err(fatal),
            }
        }
    }
    let kept = (tiles.len() - damaged.len()) as u64;
    if kept == 0 {
        let first =
            damaged.first().map_or_else(String::new, |d| format!(", the first because {}: {}", d.source, d.reason));
        return Err(SlideError::Skip(format!("none of its {} images could be taken{first}", tiles.len())));
    }
    if let Some(mosaic) = mosaic {
        let picture = mosaic.jpeg()?;
        if let Some(folder) = &options.previews {
            preview::save(folder, &info.name, picture.clone())?;
        }
        if let Some(slide) = &mut slide {
            slide.preview(picture);
        }
    }
    let (mpp, labelled) = (info.mpp, Some(labelled));
    let report = SlideReport { name: info.name, kept, dropped: Some(0), labelled, mpp, resumed: false };
    Ok(Read { slide, report, damaged })
}

/// A tile's JPEG, and the tile made small for a picture of the slide.
fn load(tile: &Tile, options: &IngestOptions, mosaic: Option<&Mosaic>) -> Result<(Vec<u8>, Option<Rgb>), SlideError> {
    let skip = |reason: String| SlideError::Skip(reason);
    let bytes = match &tile.origin {
        Origin::File(path) => {
            let size = path.metadata().map_err(|e| skip(e.to_string()))?.len();
            if size > MAX_IMAGE {
                return Err(skip(format!("{size} bytes are too many for a tile")));
            }
            std::fs::read(path).map_err(|e| skip(e.to_string()))?
        }
        Origin::Part(container, item) => container.read(*item).map_err(skip)?,
    };
    let is_jpeg = bytes.starts_with(&[0xff, 0xd8]) && bytes.ends_with(&[0xff, 0xd9]);
    let image = if is_jpeg {
        let image = crate::decode::decode(&bytes).map_err(|e| skip(e.to_string()))?;
        Rgb { width: image.width, height: image.height, pixels: image.pixels }
    } else {
        match &tile.origin {
            Origin::Part(..) => Rgb::decode(&bytes)?,
            Origin::File(path) => match Pixels::open(path)? {
                Pixels::Image(image) => image,
                #[cfg(feature = "openslide")]
                Pixels::Slide(_) => return Err(skip("a tile is an image, not a slide".into())),
            },
        }
    };
    if (image.width, image.height) != (options.patch_px, options.patch_px) {
        let (width, height) = (image.width, image.height);
        return Err(skip(format!("the tile is {width}×{height} px; call ingest with --patch-px {width}")));
    }
    let jpeg = if is_jpeg { bytes } else { image.jpeg(options.quality)? };
    let small = mosaic.map(|mosaic| mosaic.small(image)).transpose()?;
    Ok((jpeg, small))
}
