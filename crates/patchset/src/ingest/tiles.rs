//! Tiles that were cut by somebody else.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::pixels::{Pixels, Rgb};
use super::whole::{Plan, Work};
use super::{IngestOptions, SlideError, SlideReport};
use crate::writer::{SlideInfo, SlideWriter};

const CHUNK: usize = 512;
/// Largest tile file.
const MAX_BYTES: u64 = 64 << 20;

/// An image and where it lies.
#[derive(Debug)]
pub(crate) struct Tile {
    pub(crate) path: PathBuf,
    pub(crate) x: i32,
    pub(crate) y: i32,
    pub(crate) class: String,
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

/// Reads tiles into `slide`. JPEGs go in as they are, others are encoded.
pub(crate) fn read(
    info: SlideInfo,
    tiles: &[Tile],
    mut slide: Option<SlideWriter>,
    options: &IngestOptions,
    tell: &(impl Fn(u64, u64) + Sync),
) -> Result<(Option<SlideWriter>, SlideReport), SlideError> {
    let done = AtomicU64::new(0);
    for chunk in tiles.chunks(CHUNK) {
        let jpegs = chunk
            .par_iter()
            .map(|tile| {
                let jpeg = jpeg(tile, options)?;
                tell(done.fetch_add(1, Ordering::Relaxed) + 1, tiles.len() as u64);
                Ok(jpeg)
            })
            .collect::<Result<Vec<_>, SlideError>>()?;
        for (tile, jpeg) in chunk.iter().zip(&jpegs) {
            if let Some(slide) = &mut slide {
                slide.push(tile.x, tile.y, Some(&tile.class), jpeg)?;
            }
        }
    }
    let kept = tiles.len() as u64;
    Ok((slide, SlideReport { name: info.name, kept, dropped: 0, labelled: kept, mpp: info.mpp, resumed: false }))
}

fn jpeg(tile: &Tile, options: &IngestOptions) -> Result<Vec<u8>, SlideError> {
    let skip = |reason: String| SlideError::Skip(format!("{}: {reason}", tile.path.display()));
    let size = tile.path.metadata().map_err(|e| skip(e.to_string()))?.len();
    if size > MAX_BYTES {
        return Err(skip(format!("{size} bytes are too many for a tile")));
    }
    let bytes = std::fs::read(&tile.path).map_err(|e| skip(e.to_string()))?;
    let is_jpeg = bytes.starts_with(&[0xff, 0xd8]) && bytes.ends_with(&[0xff, 0xd9]);
    let (width, height, encoded) = if is_jpeg {
        let image = crate::decode::decode(&bytes).map_err(|e| skip(e.to_string()))?;
        (image.width, image.height, bytes)
    } else {
        let Pixels::Image(image) = Pixels::open(&tile.path).map_err(|e| skip(e.to_string()))? else {
            return Err(skip("a tile is an image, not a slide".into()));
        };
        let Rgb { width, height, .. } = image;
        (width, height, image.jpeg(options.quality)?)
    };
    if (width, height) != (options.patch_px, options.patch_px) {
        return Err(skip(format!("the tile is {width}×{height} px; call ingest with --patch-px {width}")));
    }
    Ok(encoded)
}
