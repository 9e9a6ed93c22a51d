//! A slide or image, tiled.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::labels::LabelMap;
use super::pixels::{Pixels, Rgb};
use super::tiles::Tile;
use super::tissue::Overview;
use super::{IngestOptions, Scale, Skipped, SlideError, SlideReport, preview};
use crate::writer::{SlideInfo, SlideWriter};

/// Tiles encoded before they are handed on: bounds the memory.
const CHUNK: usize = 512;
/// Most tiles of a slide.
const MAX_TILES: u64 = 100_000_000;

/// What will be read of a slide.
pub(crate) struct Plan {
    pub(crate) info: SlideInfo,
    pub(crate) work: Work,
}

pub(crate) enum Work {
    Grid(Box<Grid>),
    Files(Vec<Tile>),
}

/// A slide with its tile grid.
pub(crate) struct Grid {
    path: PathBuf,
    pixels: Pixels,
    overview: Overview,
    labels: Option<LabelMap>,
    level: u32,
    /// Pixels of the level for one of a patch.
    factor: f64,
    /// Pixels of level 0 for one of a patch.
    downsample: f64,
}

/// Opens a slide and lays the grid over it.
pub(crate) fn plan(path: &Path, name: &str, fingerprint: String, options: &IngestOptions) -> Result<Plan, SlideError> {
    let pixels = Pixels::open(path)?;
    let levels = pixels.levels();
    let mpp = pixels.mpp().or(options.assume_mpp);
    let (level, downsample) = match options.scale {
        Scale::Level(level) => match levels.get(level as usize) {
            Some(&(_, _, downsample)) => (level, downsample),
            None => {
                return Err(SlideError::Skip(format!("it has {} level(s), --level {level} is not one", levels.len())));
            }
        },
        Scale::Mpp(wanted) => {
            let Some(mpp) = mpp else {
                return Err(SlideError::Skip(
                    "it does not say its resolution (no mpp property); give --level 0 to tile it as it is, or --assume-mpp \
                     with its microns per pixel if you know them"
                        .into(),
                ));
            };
            let downsample = wanted / mpp;
            if downsample < 0.5 {
                return Err(SlideError::Skip(format!("its pixels are {mpp} µm, too coarse for --mpp {wanted}")));
            }
            let best = levels.iter().rposition(|&(_, _, d)| d <= downsample * 1.01).unwrap_or(0);
            (best as u32, downsample)
        }
    };
    let Some(&(w0, h0, _)) = levels.first() else { return Err(SlideError::Skip("it has no pixels".into())) };
    let factor = downsample / levels[level as usize].2;
    let side = |px: u32| (f64::from(px) / downsample).floor() as u64;
    let (width, height) = (side(w0), side(h0));
    let tiles = |px: u64| px / u64::from(options.patch_px);
    if tiles(width) == 0 || tiles(height) == 0 {
        return Err(SlideError::Skip(format!(
            "at this magnification it is {width}×{height} px, smaller than one patch"
        )));
    }
    if tiles(width) * tiles(height) > MAX_TILES {
        return Err(SlideError::Skip(format!(
            "it has more than {MAX_TILES} tiles; choose larger patches or a coarser level"
        )));
    }
    let info = SlideInfo {
        name: name.to_owned(),
        source: path.display().to_string(),
        fingerprint,
        level,
        mpp: mpp.map(|mpp| mpp * downsample),
        width,
        height,
        grid: [tiles(width) as u32, tiles(height) as u32],
        spatial: true,
    };
    let overview = Overview::of(&pixels)?;
    let labels = LabelMap::beside(path)?;
    let grid = Grid { path: path.to_owned(), pixels, overview, labels, level, factor, downsample };
    Ok(Plan { info, work: Work::Grid(Box::new(grid)) })
}

/// What came of reading a slide.
pub(crate) struct Read {
    /// The slide that was written into, if there is one.
    pub(crate) slide: Option<SlideWriter>,
    pub(crate) report: SlideReport,
    /// Files of it that could not be read.
    pub(crate) damaged: Vec<Skipped>,
}

impl Plan {
    /// Reads the patches into `slide`, if there is one, and gives it back.
    pub(crate) fn read(
        self,
        slide: Option<SlideWriter>,
        options: &IngestOptions,
        tell: &(impl Fn(u64, u64) + Sync),
    ) -> Result<Read, SlideError> {
        match self.work {
            Work::Grid(grid) => grid.read(self.info, slide, options, tell),
            Work::Files(tiles) => super::tiles::read(self.info, &tiles, slide, options, tell),
        }
    }
}

impl Grid {
    fn read(
        &self,
        info: SlideInfo,
        mut slide: Option<SlideWriter>,
        options: &IngestOptions,
        tell: &(impl Fn(u64, u64) + Sync),
    ) -> Result<Read, SlideError> {
        let side = f64::from(options.patch_px) * self.downsample;
        let [columns, rows] = info.grid;
        let all: Vec<(u32, u32)> = (0..rows).flat_map(|y| (0..columns).map(move |x| (x, y))).collect();
        let corner = |n: u32| f64::from(n) * side;
        let flags: Vec<bool> = all
            .par_iter()
            .map(|&(x, y)| self.overview.share(corner(x), corner(y), side) >= options.tissue_min)
            .collect();
        let kept: Vec<(u32, u32)> = all.iter().zip(&flags).filter(|(_, kept)| **kept).map(|(&at, _)| at).collect();
        if kept.is_empty() {
            return Err(SlideError::Skip(format!(
                "none of its {} tiles is covered with tissue to {} %; look at it, or lower --tissue-min",
                all.len(),
                options.tissue_min * 100.0
            )));
        }
        let done = AtomicU64::new(0);
        let mut labelled = 0;
        for chunk in kept.chunks(CHUNK) {
            let jpegs = chunk
                .par_iter()
                .map(|&(x, y)| {
                    let jpeg = self.tile(x, y, options)?.jpeg(options.quality)?;
                    let now = done.fetch_add(1, Ordering::Relaxed) + 1;
                    if now.is_multiple_of(16) {
                        tell(now, kept.len() as u64);
                    }
                    Ok(jpeg)
                })
                .collect::<Result<Vec<_>, SlideError>>()?;
            for (&(x, y), jpeg) in chunk.iter().zip(&jpegs) {
                let class =
                    self.labels.as_ref().and_then(|map| map.class(corner(x), corner(y), side, options.label_min));
                labelled += u64::from(class.is_some());
                if let Some(slide) = &mut slide {
                    slide.push(x as i32, y as i32, class, jpeg)?;
                }
            }
        }
        tell(kept.len() as u64, kept.len() as u64);
        if let Some(slide) = &mut slide {
            slide.preview(preview::plain(&self.overview)?);
        }
        if let Some(folder) = &options.previews {
            let tiles: Vec<_> = all.iter().zip(&flags).map(|(&(x, y), &kept)| (corner(x), corner(y), kept)).collect();
            preview::save(folder, &info.name, preview::decorated(&self.overview, &tiles, side)?)?;
        }
        let report = SlideReport {
            name: info.name,
            kept: kept.len() as u64,
            dropped: Some((all.len() - kept.len()) as u64),
            labelled: Some(labelled),
            mpp: info.mpp,
            resumed: false,
        };
        Ok(Read { slide, report, damaged: Vec::new() })
    }

    fn tile(&self, x: u32, y: u32, options: &IngestOptions) -> Result<Rgb, SlideError> {
        let at = |n: u32| (f64::from(n) * f64::from(options.patch_px) * self.factor).round() as u32;
        let side = (f64::from(options.patch_px) * self.factor).round().max(1.0) as u32;
        let tile = self.pixels.read(self.level, at(x), at(y), side, side);
        let tile = tile.map_err(|e| SlideError::Skip(format!("{}: tile {x}, {y}: {e}", self.path.display())))?;
        tile.resized(options.patch_px, options.patch_px)
    }
}
