//! The tissue patches of slides, read where they lie: what embedding needs. Grid, tissue and resizing are those of ingest, so a
//! patch is the same pixels as in a patch set made with the same options, before JPEG.

use std::path::PathBuf;

use rayon::prelude::*;

use super::discover::{self, Unit};
use super::whole::{Grid, Plan, Work};
use super::{IngestError, IngestOptions, Skipped, check};
use crate::decode::{Rgb8, decode};

/// A slide, not yet opened.
#[derive(Debug)]
pub struct SlideSource {
    unit: Unit,
}

/// The slides and plain images that `sources` name: files, or folders of them.
///
/// # Errors
/// A source that is not there, two of one name, tiles instead of slides, or an option out of range.
pub fn find(sources: &[PathBuf], options: &IngestOptions) -> Result<Vec<SlideSource>, IngestError> {
    check(options)?;
    let units = discover::discover(sources, None, options.seed)?;
    match units.iter().find(|unit| unit.is_tiles()) {
        Some(tiles) => Err(IngestError::Source {
            path: tiles.source.clone(),
            reason: "holds tiles, not slides; make a patch set of them with `sgclctl ingest` and embed that".into(),
        }),
        None => Ok(units.into_iter().map(|unit| SlideSource { unit }).collect()),
    }
}

impl SlideSource {
    /// Its name: that of the file, without the extension.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.unit.name
    }

    /// The file.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.unit.source
    }

    /// Tells one state of the file from another.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.unit.fingerprint
    }

    /// Opens the slide and finds its tissue.
    ///
    /// # Errors
    /// Why it has to be left out: it cannot be read, does not say its resolution, or has no tissue.
    pub fn open(self, options: &IngestOptions) -> Result<SlidePatches, Skipped> {
        let source = self.unit.source.clone();
        let skipped = |reason: String| Skipped { source: source.clone(), reason };
        let Plan { info, work } = self.unit.plan(options).map_err(|e| skipped(e.to_string()))?;
        let Work::Grid(grid) = work else { return Err(skipped("it is a folder of tiles".into())) };
        let kept = grid.tissue(info.grid, options).map_err(|e| skipped(e.to_string()))?.kept;
        Ok(SlidePatches { source, mpp: info.mpp, level: info.level, kept, grid, options: options.clone() })
    }
}

/// An open slide and the tiles of it that tissue covers, row-major. Patches may be read from several threads at once.
pub struct SlidePatches {
    source: String,
    mpp: Option<f64>,
    level: u32,
    kept: Vec<(u32, u32)>,
    grid: Box<Grid>,
    options: IngestOptions,
}

impl SlidePatches {
    /// Patches.
    #[must_use]
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Never: a slide without tissue does not open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Microns per pixel of the patches, where known.
    #[must_use]
    pub fn mpp(&self) -> Option<f64> {
        self.mpp
    }

    /// Pyramid level they are read from.
    #[must_use]
    pub fn level(&self) -> u32 {
        self.level
    }

    /// Pixels of level 0 for one of a patch.
    #[must_use]
    pub fn downsample(&self) -> f64 {
        self.grid.downsample()
    }

    /// Pixels by which neighbouring patches overlap.
    #[must_use]
    pub fn overlap(&self) -> u32 {
        self.grid.overlap()
    }

    /// Width and height of level 0.
    #[must_use]
    pub fn level0(&self) -> [u32; 2] {
        self.grid.level0()
    }

    /// x and y of each patch's upper left corner, in pixels of level 0.
    #[must_use]
    pub fn coords(&self) -> Vec<[i64; 2]> {
        self.kept.iter().map(|&(x, y)| self.grid.corner(x, y, &self.options)).collect()
    }

    /// Reads patches on all cores.
    ///
    /// # Errors
    /// As [`SlidePatches::read`].
    pub fn read_all(&self, numbers: &[usize], jpeg: Option<u8>) -> Result<Vec<Rgb8>, Skipped> {
        numbers.par_iter().map(|&number| self.read(number, jpeg)).collect()
    }

    /// Reads a patch of `patch_px` × `patch_px` pixels; with `jpeg` as it comes out of a JPEG of that quality.
    ///
    /// # Errors
    /// The slide is damaged there.
    ///
    /// # Panics
    /// If there is no patch of this number.
    pub fn read(&self, number: usize, jpeg: Option<u8>) -> Result<Rgb8, Skipped> {
        let (x, y) = self.kept[number];
        let skipped = |reason: String| Skipped { source: self.source.clone(), reason };
        let tile = self.grid.tile(x, y, &self.options).map_err(|e| skipped(e.to_string()))?;
        match jpeg {
            None => Ok(Rgb8 { width: tile.width, height: tile.height, pixels: tile.pixels }),
            Some(quality) => {
                let bytes = tile.jpeg(quality).map_err(|e| skipped(e.to_string()))?;
                decode(&bytes).map_err(|e| skipped(e.to_string()))
            }
        }
    }
}
