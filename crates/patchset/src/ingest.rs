//! Slides, images and tiles to a patch set.
//!
//! | source | recognised by | labels |
//! |---|---|---|
//! | slide | OpenSlide opens it | `<name>.labels.png` and `.labels.json` beside it |
//! | plain image (PNG, JPEG, TIFF, BMP) | its content | likewise |
//! | slides of Camelyon16 | `<name>.xml` of ASAP among the sources | its polygons; `normal_*` has none |
//! | coordinates of CLAM or TRIDENT | `<name>.h5`, `<name>_patches.h5` among the sources, with the slides | as the slide has them |
//! | folder of tiles | `<class>/<slide>/<slide>_<x>_<y>_<level>.png`, x and y counting tiles | the class's folder |
//! | class folders, as NCT-CRC's | `<class>/<image>` | the class's folder |
//! | WebDataset's shards | `.tar` of `<key>.jpg` (or .png, …) with `<key>.json`, `<key>.cls` | `class` or `label` in the json, or the cls |
//! | Parquet of images, as Hugging Face's | `.parquet` with a column of images | the column `label`, named by the metadata |
//! | a list of tiles | `list`: a path below the folder and perhaps a label, a line | the labels; without any, the folder above the slide's |
//!
//! Images of tars and Parquet whose slide, x and y are said lie on that slide; `x` and `y` count tiles.
//!
//! Images of class folders, and others of which nothing says it, have no known place: they are mixed in seeded random order into groups of [`GROUP`] that stand for
//! slides (`loose-000`, …), every class in each, and none is a neighbour of another. Splitting such a set "by slide" is a random
//! split.
//!
//! A slide that cannot be read is skipped and named in the report; the set holds the others. A finished slide is not read again
//! when the same call is repeated after an interruption.

mod container;
mod coords;
mod discover;
mod labels;
mod list;
mod parquet;
mod pixels;
mod polygons;
mod preview;
pub mod slides;
mod tiles;
mod tissue;
mod webdataset;
mod whole;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::index::{INDEX, Index};
use crate::manifest::{Manifest, SlideEntry};
use crate::split::{self, SPLIT};
use crate::store::Store;
use crate::writer::{Opened, PatchSetWriter, WriteError, WriterOptions};

use discover::Unit;

/// Images of class folders that stand for one slide.
pub const GROUP: usize = 512;

/// At which magnification slides are tiled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scale {
    /// Microns per pixel.
    Mpp(f64),
    /// A pyramid level as it is.
    Level(u32),
}

/// How to ingest.
#[derive(Clone, Debug, PartialEq)]
pub struct IngestOptions {
    /// Side of a patch in pixels.
    pub patch_px: u32,
    /// Magnification.
    pub scale: Scale,
    /// Microns per pixel of level 0 for slides that do not say.
    pub assume_mpp: Option<f64>,
    /// JPEG quality, 1 to 100.
    pub quality: u8,
    /// Share of a tile that tissue must cover.
    pub tissue_min: f64,
    /// Share of a tile that its class must cover.
    pub label_min: f64,
    /// Share of a tile that annotated tumour must cover.
    pub tumor_min: f64,
    /// Seed of the order of slides and patches.
    pub seed: u64,
    /// List of the tiles to take, below the one source.
    pub list: Option<PathBuf>,
    /// Folder for pictures of slides with kept and dropped tiles drawn on them.
    pub previews: Option<PathBuf>,
    /// Read and count, write no patch set.
    pub dry_run: bool,
}

impl Default for IngestOptions {
    fn default() -> Self {
        Self {
            patch_px: 256,
            scale: Scale::Mpp(0.5),
            assume_mpp: None,
            quality: 90,
            tissue_min: 0.5,
            label_min: 0.6,
            tumor_min: 0.5,
            seed: 0,
            list: None,
            previews: None,
            dry_run: false,
        }
    }
}

/// How far ingest is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A slide is read.
    Slide {
        /// Its name.
        name: String,
        /// Its number, from 0, of `slides`.
        number: usize,
        /// Slides in all.
        slides: usize,
        /// Tiles done.
        tiles: u64,
        /// Tiles to do.
        of: u64,
    },
    /// All slides are read, patches are dealt into shards.
    Deal {
        /// Patches dealt.
        patches: u64,
        /// Patches in all.
        of: u64,
    },
}

/// What came of a slide.
#[derive(Clone, Debug, PartialEq)]
pub struct SlideReport {
    /// Name.
    pub name: String,
    /// Tiles that became patches.
    pub kept: u64,
    /// Tiles without enough tissue; not known of a slide read before.
    pub dropped: Option<u64>,
    /// Patches with a label; not known of a slide read before.
    pub labelled: Option<u64>,
    /// Microns per pixel of the patches, where known.
    pub mpp: Option<f64>,
    /// Whether it had been read before.
    pub resumed: bool,
}

/// A source that is not in the set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The source.
    pub source: String,
    /// Why, and what to do.
    pub reason: String,
}

/// What came of an ingest.
#[derive(Clone, Debug)]
pub struct IngestReport {
    /// Slides that are in the set.
    pub slides: Vec<SlideReport>,
    /// Sources that are not.
    pub skipped: Vec<Skipped>,
    /// The set's manifest; none after a dry run.
    pub manifest: Option<Manifest>,
}

/// An ingest that cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IngestError {
    /// A source that is not there.
    #[error("{path}: {reason}")]
    Source {
        /// The path.
        path: String,
        /// Why.
        reason: String,
    },
    /// Two sources of one name.
    #[error("{first} and {second} are both called {name:?}; a slide's name must be its own: rename one")]
    Twins {
        /// The name.
        name: String,
        /// One source.
        first: String,
        /// The other.
        second: String,
    },
    /// A setting out of range.
    #[error("{0}")]
    Setting(String),
    /// Nothing is left to write.
    #[error("none of the {sources} source(s) could be read, no patch set was written:\n{reasons}")]
    Nothing {
        /// Sources given.
        sources: usize,
        /// A line for each.
        reasons: String,
    },
    /// The set could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A file that is ours to write.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// A bug.
    #[error("reading {name} ended abnormally: {reason}")]
    Crashed {
        /// The slide.
        name: String,
        /// The panic.
        reason: String,
    },
}

/// Why one slide cannot be taken; the others can.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SlideError {
    /// It is skipped with this reason.
    #[error("{0}")]
    Skip(String),
    /// Writing failed: nothing else would succeed either.
    #[error(transparent)]
    Fatal(#[from] IngestError),
}

impl From<WriteError> for SlideError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Lattice { .. } | WriteError::NoPatches { .. } | WriteError::Patch { .. } => {
                Self::Skip(error.to_string())
            }
            other => Self::Fatal(other.into()),
        }
    }
}

/// Hears of progress, from any thread.
pub type Listener = Arc<dyn Fn(Progress) + Send + Sync>;

/// Reads `sources` into a patch set at `dest`.
///
/// # Errors
/// See [`IngestError`]; a source that cannot be read is not one, unless all are such.
pub async fn ingest(
    sources: &[PathBuf],
    dest: &Store,
    options: &IngestOptions,
    listener: Listener,
) -> Result<IngestReport, IngestError> {
    check(options)?;
    let units = discover::discover(sources, options.list.as_deref(), options.seed)?;
    let mut report = IngestReport { slides: Vec::new(), skipped: Vec::new(), manifest: None };
    let writer = if options.dry_run {
        None
    } else {
        match PatchSetWriter::open(dest.clone(), writer_options(options, units.iter().any(Unit::is_annotated))).await? {
            Opened::Writer(writer) => Some(writer),
            Opened::Complete(manifest) => {
                write_split(dest, &manifest, options.seed).await?;
                return Ok(complete(*manifest, &units));
            }
        }
    };
    let slides = units.len();
    for (number, unit) in units.into_iter().enumerate() {
        if let Some(kept) = writer.as_ref().and_then(|w| w.resume(&unit.name, &unit.fingerprint)) {
            report.skipped.extend(unit.left_out(kept));
            report.slides.push(SlideReport {
                name: unit.name,
                kept: kept.into(),
                dropped: None,
                labelled: None,
                mpp: None,
                resumed: true,
            });
            continue;
        }
        let (name, source) = (unit.name.clone(), unit.source.clone());
        let said = Arc::clone(&listener);
        let tell = {
            let name = name.clone();
            move |tiles, of| said(Progress::Slide { name: name.clone(), number, slides, tiles, of })
        };
        tell(0, 0);
        match read(unit, writer.as_ref(), options, tell).await {
            Ok((slide, damaged)) => {
                report.slides.push(slide);
                report.skipped.extend(damaged);
            }
            Err(SlideError::Skip(reason)) => {
                tracing::warn!(source, reason, "skipped");
                report.skipped.push(Skipped { source, reason });
            }
            Err(SlideError::Fatal(error)) => return Err(error),
        }
    }
    if report.slides.is_empty() {
        let reasons: Vec<String> = report.skipped.iter().map(|s| format!("  {}: {}", s.source, s.reason)).collect();
        return Err(IngestError::Nothing { sources: slides, reasons: reasons.join("\n") });
    }
    if let Some(writer) = writer {
        let manifest = writer.finish(move |patches, of| listener(Progress::Deal { patches, of })).await?;
        write_split(dest, &manifest, options.seed).await?;
        report.manifest = Some(manifest);
    }
    Ok(report)
}

/// Writes `split.json` where the set has labels and the file is not there.
async fn write_split(dest: &Store, manifest: &Manifest, seed: u64) -> Result<(), IngestError> {
    if manifest.classes.is_empty() || dest.exists(SPLIT).await.map_err(WriteError::from)? {
        return Ok(());
    }
    let index = Index::load(dest, manifest)
        .await
        .map_err(|e| IngestError::Source { path: dest.object(INDEX), reason: e.to_string() })?;
    if let Some(file) = split::file(manifest, &index, seed) {
        dest.put(SPLIT, file).await.map_err(WriteError::from)?;
    }
    Ok(())
}

/// Reads one slide on a thread that may block, then stages it. Names the files of it that are damaged.
async fn read(
    unit: Unit,
    writer: Option<&PatchSetWriter>,
    options: &IngestOptions,
    tell: impl Fn(u64, u64) + Send + Sync + 'static,
) -> Result<(SlideReport, Vec<Skipped>), SlideError> {
    let name = unit.name.clone();
    let options = options.clone();
    // Held by the thread that reads, given back to be finished here.
    let plan = tokio::task::spawn_blocking({
        let options = options.clone();
        move || unit.plan(&options)
    });
    let crashed = |reason: tokio::task::JoinError| {
        SlideError::Fatal(IngestError::Crashed { name: name.clone(), reason: reason.to_string() })
    };
    let plan = plan.await.map_err(crashed)??;
    let slide = writer.map(|writer| writer.slide(plan.info.clone())).transpose()?;
    let read = tokio::task::spawn_blocking(move || plan.read(slide, &options, &tell));
    let read = read.await.map_err(crashed)??;
    if let Some(slide) = read.slide {
        slide.finish().await?;
    }
    Ok((read.report, read.damaged))
}

fn check(options: &IngestOptions) -> Result<(), IngestError> {
    let wrong = |text: String| Err(IngestError::Setting(text));
    let share = |value: f64| (0.0..=1.0).contains(&value);
    let positive = |value: f64| value.is_finite() && value > 0.0;
    if !(16..=4096).contains(&options.patch_px) {
        return wrong(format!("--patch-px {} is not in 16..=4096", options.patch_px));
    }
    if !(1..=100).contains(&options.quality) {
        return wrong(format!("--quality {} is not in 1..=100", options.quality));
    }
    if !share(options.tissue_min) || !share(options.label_min) || !share(options.tumor_min) {
        return wrong("--tissue-min, --label-min and --tumor-min are shares, 0 to 1".into());
    }
    match (options.scale, options.assume_mpp) {
        (Scale::Mpp(mpp), _) if !positive(mpp) => wrong(format!("--mpp {mpp} must be above 0")),
        (_, Some(mpp)) if !positive(mpp) => wrong(format!("--assume-mpp {mpp} must be above 0")),
        _ => Ok(()),
    }
}

fn writer_options(options: &IngestOptions, annotated: bool) -> WriterOptions {
    let mut writer = WriterOptions::new(options.patch_px, options.quality, options.seed);
    let mut set = |name: &str, value: serde_json::Value| drop(writer.settings.insert(name.into(), value));
    match options.scale {
        Scale::Mpp(mpp) => set("mpp", mpp.into()),
        Scale::Level(level) => set("level", level.into()),
    }
    set("assume_mpp", options.assume_mpp.into());
    set("tissue_min", options.tissue_min.into());
    set("label_min", options.label_min.into());
    // Only where it says anything, so that sets made before there were annotations go on as they were begun.
    if annotated {
        set("tumor_min", options.tumor_min.into());
    }
    writer
}

/// The same call again, after it had succeeded. A source that the set does not hold could not be read then; one that changed
/// since is named, for a finished set never changes.
fn complete(manifest: Manifest, units: &[Unit]) -> IngestReport {
    let held: HashMap<&str, &SlideEntry> = manifest.slides.iter().map(|slide| (slide.name.as_str(), slide)).collect();
    let skipped = units.iter().filter_map(|unit| {
        let skipped = |reason: &str| Some(Skipped { source: unit.source.clone(), reason: reason.to_owned() });
        match held.get(unit.name.as_str()) {
            None => skipped("the finished set is without it; to try it again write to another URL"),
            Some(slide) if !slide.fingerprint.is_empty() && slide.fingerprint != unit.fingerprint => skipped(
                "it changed since the finished set was made of it; to take it as it is now write to another URL",
            ),
            Some(slide) => unit.left_out(slide.patches),
        }
    });
    let slides = manifest.slides.iter().map(|slide| SlideReport {
        name: slide.name.clone(),
        kept: slide.patches.into(),
        dropped: None,
        labelled: None,
        mpp: slide.mpp,
        resumed: true,
    });
    let (skipped, slides) = (skipped.collect(), slides.collect());
    IngestReport { slides, skipped, manifest: Some(manifest) }
}
