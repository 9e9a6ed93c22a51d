//! A slide or image, tiled.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::coords::{self, Places};
use super::discover::{Given, Whole};
use super::labels::LabelMap;
use super::pixels::{Pixels, Rgb};
use super::polygons::{self, Polygons};
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
    labels: Labels,
    /// Where another program saw patches.
    places: Option<Places>,
    level: u32,
    /// Pixels of the level for one of a patch.
    factor: f64,
    /// Pixels of level 0 for one of a patch.
    downsample: f64,
}

/// What says which class a patch is of.
enum Labels {
    Nothing,
    Map(LabelMap),
    Polygons(Polygons),
    /// A slide of Camelyon16 that has no tumour.
    Normal,
}

impl Labels {
    fn of(slide: &Whole, name: &str) -> Result<Self, SlideError> {
        let map = LabelMap::beside(&slide.path)?;
        match (map, &slide.annotations) {
            (Some(_), Given::File(file)) => Err(SlideError::Skip(format!(
                "it has a label map beside it and annotations in {}; move one of them away",
                file.display()
            ))),
            (Some(map), _) => Ok(Self::Map(map)),
            (None, Given::File(file)) => Polygons::read(file)
                .map(Self::Polygons)
                .map_err(|reason| SlideError::Skip(format!("{}: {reason}", file.display()))),
            (None, Given::Missing) if name.to_lowercase().starts_with(polygons::NORMAL) => Ok(Self::Normal),
            (None, _) => Ok(Self::Nothing),
        }
    }

    /// The class of a square of level-0 pixels.
    fn class(&self, [x, y]: [f64; 2], side: f64, options: &IngestOptions) -> Option<&str> {
        match self {
            Self::Nothing => None,
            Self::Map(map) => map.class(x, y, side, options.label_min),
            Self::Polygons(polygons) => Some(polygons.class(x, y, side, options.tumor_min)),
            Self::Normal => Some(polygons::NORMAL),
        }
    }
}

/// The tiles of a grid.
pub(super) struct Tissue {
    /// Column and row of each, row-major.
    pub(super) all: Vec<(u32, u32)>,
    /// Whether it has tissue enough.
    pub(super) flags: Vec<bool>,
    /// Those that have.
    pub(super) kept: Vec<(u32, u32)>,
}

/// Opens a slide and lays the grid over it.
pub(crate) fn plan(
    slide: &Whole,
    name: &str,
    fingerprint: String,
    options: &IngestOptions,
) -> Result<Plan, SlideError> {
    let path = slide.path.as_path();
    let pixels = Pixels::open(path)?;
    let levels = pixels.levels();
    let mpp = pixels.mpp().or(options.assume_mpp);
    let places = places(slide, &levels, options)?;
    let finest = |downsample: f64| levels.iter().rposition(|&(_, _, d)| d <= downsample * 1.01).unwrap_or(0) as u32;
    let (level, downsample) = match (&places, options.scale) {
        (Some(places), _) => (places.level.unwrap_or_else(|| finest(places.downsample)), places.downsample),
        (None, Scale::Level(level)) => match levels.get(level as usize) {
            Some(&(_, _, downsample)) => (level, downsample),
            None => {
                return Err(SlideError::Skip(format!("it has {} level(s), --level {level} is not one", levels.len())));
            }
        },
        (None, Scale::Mpp(wanted)) => {
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
            (finest(downsample), downsample)
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
    let grid = match &places {
        None => [tiles(width) as u32, tiles(height) as u32],
        Some(places) => {
            let end = |of: fn(&(u32, u32)) -> u32| places.corners.keys().map(of).max().map_or(0, |most| most + 1);
            [end(|&(_, column)| column), end(|&(row, _)| row)]
        }
    };
    let info = SlideInfo {
        name: name.to_owned(),
        source: path.display().to_string(),
        fingerprint,
        level,
        mpp: mpp.map(|mpp| mpp * downsample),
        width,
        height,
        grid,
        spatial: true,
    };
    let overview = Overview::of(&pixels)?;
    let labels = Labels::of(slide, name)?;
    let grid = Grid { path: path.to_owned(), pixels, overview, labels, places, level, factor, downsample };
    Ok(Plan { info, work: Work::Grid(Box::new(grid)) })
}

/// Where another program saw patches, if it is to be asked.
fn places(slide: &Whole, levels: &[(u32, u32, f64)], options: &IngestOptions) -> Result<Option<Places>, SlideError> {
    let file = match &slide.places {
        Given::Nothing => return Ok(None),
        Given::Missing => {
            return Err(SlideError::Skip(
                "other slides were given with .h5 files of coordinates, and there is none for it".into(),
            ));
        }
        Given::File(file) => file,
    };
    let places =
        coords::read(file, levels).map_err(|reason| SlideError::Skip(format!("{}: {reason}", file.display())))?;
    let px = places.patch_px;
    if px != options.patch_px {
        return Err(SlideError::Skip(format!(
            "{}: its patches are {px} px; call with --patch-px {px}",
            file.display()
        )));
    }
    Ok(Some(places))
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
        let Tissue { all, flags, kept } = self.tissue(info.grid, options)?;
        // Where another program chose the places, columns and rows do not say where on the slide, or on a picture of it, they are.
        if let (Some(slide), None) = (&mut slide, &self.places) {
            slide.downsample(self.downsample);
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
                let class = self.labels.class(self.square(x, y, side), side, options);
                labelled += u64::from(class.is_some());
                if let Some(slide) = &mut slide {
                    slide.push(x as i32, y as i32, class, jpeg)?;
                }
            }
        }
        tell(kept.len() as u64, kept.len() as u64);
        if let (Some(slide), None) = (&mut slide, &self.places) {
            slide.preview(preview::plain(&self.overview)?);
        }
        if let Some(folder) = &options.previews {
            let tiles = all.iter().zip(&flags).map(|(&(x, y), &kept)| {
                let [left, top] = self.square(x, y, side);
                (left, top, kept)
            });
            let tiles: Vec<_> = tiles.collect();
            preview::save(folder, &info.name, preview::decorated(&self.overview, &tiles, side)?)?;
        }
        let report = SlideReport {
            name: info.name,
            kept: kept.len() as u64,
            dropped: Some((all.len() - kept.len()) as u64 + self.places.as_ref().map_or(0, |places| places.doubled)),
            labelled: Some(labelled),
            mpp: info.mpp,
            resumed: false,
        };
        Ok(Read { slide, report, damaged: Vec::new() })
    }

    /// Which tiles of a grid tissue covers.
    pub(super) fn tissue(&self, [columns, rows]: [u32; 2], options: &IngestOptions) -> Result<Tissue, SlideError> {
        if let Some(places) = &self.places {
            let all: Vec<(u32, u32)> = places.corners.keys().map(|&(row, column)| (column, row)).collect();
            return Ok(Tissue { flags: vec![true; all.len()], kept: all.clone(), all });
        }
        let side = f64::from(options.patch_px) * self.downsample;
        let corner = |n: u32| f64::from(n) * side;
        let all: Vec<(u32, u32)> = (0..rows).flat_map(|y| (0..columns).map(move |x| (x, y))).collect();
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
        Ok(Tissue { all, flags, kept })
    }

    /// The corner of a tile's square, in pixels of level 0.
    fn square(&self, x: u32, y: u32, side: f64) -> [f64; 2] {
        match self.place(x, y) {
            Some(corner) => corner.map(f64::from),
            None => [x, y].map(|n| f64::from(n) * side),
        }
    }

    /// Where another program saw the patch of a column and row.
    fn place(&self, x: u32, y: u32) -> Option<[u32; 2]> {
        self.places.as_ref().and_then(|places| places.corners.get(&(y, x)).copied())
    }

    /// Pixels by which neighbouring patches overlap.
    pub(super) fn overlap(&self) -> u32 {
        self.places.as_ref().map_or(0, |places| places.overlap)
    }

    /// Pixels of level 0 for one of a patch.
    pub(super) fn downsample(&self) -> f64 {
        self.downsample
    }

    /// Width and height of level 0.
    pub(super) fn level0(&self) -> [u32; 2] {
        self.pixels.levels().first().map_or([0, 0], |&(width, height, _)| [width, height])
    }

    /// The level-0 pixel a tile is read from.
    pub(super) fn corner(&self, x: u32, y: u32, options: &IngestOptions) -> [i64; 2] {
        if let Some(corner) = self.place(x, y) {
            return corner.map(i64::from);
        }
        let levels = self.pixels.levels();
        let downsample = levels.get(self.level as usize).map_or(1.0, |&(_, _, downsample)| downsample);
        [x, y].map(|n| (f64::from(self.at(n, options)) * downsample).round() as i64)
    }

    /// Where column or row `n` begins, in pixels of the level.
    fn at(&self, n: u32, options: &IngestOptions) -> u32 {
        (f64::from(n) * f64::from(options.patch_px) * self.factor).round() as u32
    }

    pub(super) fn tile(&self, x: u32, y: u32, options: &IngestOptions) -> Result<Rgb, SlideError> {
        let side = (f64::from(options.patch_px) * self.factor).round().max(1.0) as u32;
        let tile = match self.place(x, y) {
            Some(corner) => self.pixels.read_at(self.level, corner, side, side),
            None => self.pixels.read(self.level, self.at(x, options), self.at(y, options), side, side),
        };
        let tile = tile.map_err(|e| SlideError::Skip(format!("{}: tile {x}, {y}: {e}", self.path.display())))?;
        tile.resized(options.patch_px, options.patch_px)
    }
}
