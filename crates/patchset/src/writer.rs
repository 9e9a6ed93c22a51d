//! Writing a patch set: slides one by one into a staging area, then dealt into shards, then committed by the manifest.
//!
//! ```text
//! open ─▶ slide ─▶ push … push ─▶ finish ─┐ (any number of slides, in any order, several at once)
//!              resume (done before) ──────┴─▶ finish: deal ▸ index ▸ manifest ▸ clear staging
//! ```
//!
//! A finished slide is an object pair under `staging/`, written whole; an ingest that was interrupted and starts again with the same
//! settings skips it. Dealing takes slides in seeded random order, in groups of at most [`WriterOptions::group_bytes`], and
//! shuffles a group's patches across its shards, so that a shard is a fair sample. It is a pure function of the staged slides:
//! interrupted, it is done again with the same outcome. Memory is bounded by a few shards and 32 bytes a patch. One ingest at a
//! time may write to a URL.

mod deal;
mod staging;
mod webdataset;

use std::collections::{BTreeMap, HashMap};
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

use crate::lattice::{self, LatticeError};
use crate::manifest::{Manifest, ManifestError};
use crate::store::{Store, StoreError};
use staging::{Head, StagedPatch};

/// The largest image taken for a patch.
const MAX_JPEG_BYTES: usize = 64 << 20;

/// How a patch set is written. `patch_px`, `jpeg_quality`, `seed` and `settings` are its identity while it is being written: an
/// ingest continues only with the same.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    /// Side of a patch in pixels.
    pub patch_px: u32,
    /// JPEG quality, 1 to 100; 0 where images are taken as they come.
    pub jpeg_quality: u8,
    /// Seed of the order of slides and patches.
    pub seed: u64,
    /// Further settings of ingest, by the name a user knows them by.
    pub settings: BTreeMap<String, serde_json::Value>,
    /// Classes in their order; those found beyond them follow by name.
    pub classes: Vec<String>,
    /// Size a shard aims at, bytes.
    pub shard_bytes: u64,
    /// Bytes of the slides whose patches are shuffled together; scratch space of that size is needed for storage over a network.
    pub group_bytes: u64,
    /// Folder for scratch files; by default beside the set, or the system's for storage over a network.
    pub scratch: Option<PathBuf>,
}

impl WriterOptions {
    /// Options with shards of 64 MiB and groups of 4 GiB.
    #[must_use]
    pub fn new(patch_px: u32, jpeg_quality: u8, seed: u64) -> Self {
        Self {
            patch_px,
            jpeg_quality,
            seed,
            settings: BTreeMap::new(),
            classes: Vec::new(),
            shard_bytes: 64 << 20,
            group_bytes: 4 << 30,
            scratch: None,
        }
    }
}

/// A slide about to be written.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlideInfo {
    /// Unique name.
    pub name: String,
    /// Where it came from, for people.
    pub source: String,
    /// Tells one state of the source from another (size and time of change, say): a slide is skipped only if it is the same.
    pub fingerprint: String,
    /// Pyramid level read.
    pub level: u32,
    /// Microns per pixel of the patches, where known.
    pub mpp: Option<f64>,
    /// Width in pixels at the patches' magnification.
    pub width: u64,
    /// Height in pixels at the patches' magnification.
    pub height: u64,
    /// Columns and rows of the tile grid.
    pub grid: [u32; 2],
    /// Whether positions mean anything; false skips the check that patches have neighbours.
    pub spatial: bool,
}

/// A patch set that cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// Begun with other settings.
    #[error("{url}: was begun with other settings ({differences}); use those, another URL, or delete {url}/{what}")]
    Settings {
        /// The patch set.
        url: String,
        /// Name, value there and value now of each.
        differences: String,
        /// What to delete to begin anew.
        what: &'static str,
    },
    /// The set is there already, with other slides.
    #[error("{url}: holds a finished patch set with other data; write to another URL")]
    Committed {
        /// The patch set.
        url: String,
    },
    /// No slide was finished.
    #[error("{url}: no slide was written, so there is no patch set")]
    NoSlides {
        /// The patch set.
        url: String,
    },
    /// A slide without a patch.
    #[error("slide {slide:?}: no patches")]
    NoPatches {
        /// Name of the slide.
        slide: String,
    },
    /// Positions that are not tiles.
    #[error("slide {slide:?}: {source}")]
    Lattice {
        /// Name of the slide.
        slide: String,
        /// What is wrong with them.
        source: LatticeError,
    },
    /// An image that cannot be a patch.
    #[error("slide {slide:?}, x {x}, y {y}: {reason}")]
    Patch {
        /// Name of the slide.
        slide: String,
        /// Column in tiles.
        x: i32,
        /// Row in tiles.
        y: i32,
        /// What is wrong.
        reason: &'static str,
    },
    /// More than the format holds.
    #[error("{url}: {reason}")]
    TooMany {
        /// The patch set.
        url: String,
        /// Of what.
        reason: String,
    },
    /// Staged data that is not as it was written.
    #[error("{object}: {reason}; delete it and ingest again")]
    Staged {
        /// Full name of the object.
        object: String,
        /// What is wrong.
        reason: String,
    },
    /// A scratch file failed.
    #[error("scratch file in {}: {source}; free space, or set TMPDIR to another folder", folder.display())]
    Scratch {
        /// Folder of the file.
        folder: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The index could not be written as Parquet, or the manifest as JSON.
    #[error("{object}: cannot be encoded: {reason}")]
    Encode {
        /// Full name of the object.
        object: String,
        /// Why.
        reason: String,
    },
    /// What is at the URL is not readable.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What [`PatchSetWriter::open`] found.
#[derive(Debug)]
pub enum Opened {
    /// A set to be written, or to be continued.
    Writer(PatchSetWriter),
    /// A finished set with the same settings. Compare its slides with what was asked for.
    Complete(Box<Manifest>),
}

/// A patch set being written.
#[derive(Debug)]
pub struct PatchSetWriter {
    shared: Arc<Shared>,
    /// Slides found staged when the writer was opened, by name.
    earlier: HashMap<String, Head>,
}

#[derive(Debug)]
struct Shared {
    store: Store,
    options: WriterOptions,
    scratch: PathBuf,
    /// Slides that will be in the set, by name.
    included: Mutex<BTreeMap<String, Head>>,
}

impl Shared {
    fn include(&self, head: Head) {
        // Nothing panics while the lock is held; a poisoned map is whole.
        let mut included = self.included.lock().unwrap_or_else(PoisonError::into_inner);
        included.insert(head.info.name.clone(), head);
    }

    fn scratch_file(&self) -> Result<std::fs::File, WriteError> {
        tempfile::tempfile_in(&self.scratch).map_err(|source| self.scratch_error(source))
    }

    fn scratch_error(&self, source: std::io::Error) -> WriteError {
        WriteError::Scratch { folder: self.scratch.clone(), source }
    }
}

impl PatchSetWriter {
    /// Begins a patch set at `store`, or continues one.
    ///
    /// # Errors
    /// What is there was begun with other settings (they are named), or storage fails.
    pub async fn open(store: Store, options: WriterOptions) -> Result<Opened, WriteError> {
        match Manifest::load(&store).await {
            Ok(manifest) => {
                staging::same_settings(&store, &staging::identity_of(&manifest), &options, "")?;
                // Left behind by an ingest that ended between its commit and here.
                staging::clear(&store).await?;
                return Ok(Opened::Complete(Box::new(manifest)));
            }
            Err(ManifestError::Missing { .. }) => {}
            Err(e) => return Err(e.into()),
        }
        let earlier = staging::begin(&store, &options).await?;
        let beside = || store.local_path(staging::FOLDER);
        let scratch = options.scratch.clone().or_else(beside).unwrap_or_else(std::env::temp_dir);
        std::fs::create_dir_all(&scratch).map_err(|source| WriteError::Scratch { folder: scratch.clone(), source })?;
        let shared = Arc::new(Shared { store, options, scratch, included: Mutex::default() });
        Ok(Opened::Writer(Self { shared, earlier }))
    }

    /// Takes over a slide that an earlier, interrupted ingest finished. Returns its patches, or `None`: then write it.
    #[must_use]
    pub fn resume(&self, name: &str, fingerprint: &str) -> Option<u32> {
        let head = self.earlier.get(name).filter(|head| head.info.fingerprint == fingerprint)?;
        self.shared.include(head.clone());
        Some(head.patches)
    }

    /// Begins a slide. Several may be written at the same time, from different threads.
    ///
    /// # Errors
    /// No scratch file can be made.
    pub fn slide(&self, info: SlideInfo) -> Result<SlideWriter, WriteError> {
        let spool = BufWriter::with_capacity(1 << 20, self.shared.scratch_file()?);
        Ok(SlideWriter {
            shared: Arc::clone(&self.shared),
            info,
            spool,
            spooled: 0,
            patches: Vec::new(),
            classes: Vec::new(),
            preview: None,
            downsample: None,
        })
    }

    /// Deals all slides finished or resumed into shards, writes the index and commits the set. `progress` hears patches dealt and
    /// patches in all.
    ///
    /// # Errors
    /// No slide at all, staged data damaged, another set committed here meanwhile, or storage fails. What was staged stays.
    pub async fn finish(self, progress: impl Fn(u64, u64) + Send) -> Result<Manifest, WriteError> {
        let included = std::mem::take(&mut *self.shared.included.lock().unwrap_or_else(PoisonError::into_inner));
        let manifest = deal::deal(&self.shared, included.into_values().collect(), progress).await?;
        staging::clear(&self.shared.store).await?;
        Ok(manifest)
    }
}

/// A slide's name as the name of an object: safe in any storage, and different for different slides (one that had to be escaped
/// carries a hash of the original).
#[must_use]
pub fn object_name(slide: &str) -> String {
    staging::file_name(slide)
}

/// A slide being written: push its patches in any order, then finish it.
#[derive(Debug)]
pub struct SlideWriter {
    shared: Arc<Shared>,
    info: SlideInfo,
    spool: BufWriter<std::fs::File>,
    spooled: u64,
    patches: Vec<StagedPatch>,
    classes: Vec<String>,
    preview: Option<Bytes>,
    downsample: Option<f64>,
}

impl SlideWriter {
    /// Adds the patch at column `x`, row `y` of the tile grid, as a JPEG, with the name of its class if it has one.
    ///
    /// # Errors
    /// Not a JPEG, or the scratch file fails.
    pub fn push(&mut self, x: i32, y: i32, class: Option<&str>, jpeg: &[u8]) -> Result<(), WriteError> {
        let reject = |reason| WriteError::Patch { slide: self.info.name.clone(), x, y, reason };
        if !jpeg.starts_with(&[0xff, 0xd8]) || !jpeg.ends_with(&[0xff, 0xd9]) {
            return Err(reject("not a whole JPEG"));
        }
        let length = match u32::try_from(jpeg.len()) {
            Ok(length) if jpeg.len() <= MAX_JPEG_BYTES => length,
            _ => return Err(reject("the JPEG is larger than 64 MiB")),
        };
        let label = class.map(|class| {
            self.classes.iter().position(|known| known == class).unwrap_or_else(|| {
                self.classes.push(class.to_owned());
                self.classes.len() - 1
            })
        });
        let label = match label.map(u16::try_from) {
            None => None,
            Some(Ok(label)) => Some(label),
            Some(Err(_)) => return Err(reject("more than 65,536 classes")),
        };
        self.spool.write_all(jpeg).map_err(|e| self.shared.scratch_error(e))?;
        self.patches.push(StagedPatch { x, y, label, offset: self.spooled, length });
        self.spooled += u64::from(length);
        Ok(())
    }

    /// Sets the preview picture, a JPEG: the slide with kept and dropped tiles drawn on it.
    pub fn preview(&mut self, jpeg: impl Into<Bytes>) {
        self.preview = Some(jpeg.into());
    }

    /// Says how many pixels of the slide's level 0 there are for one of a patch: what positions on the slide are computed from.
    pub fn downsample(&mut self, downsample: f64) {
        self.downsample = Some(downsample);
    }

    /// Patches so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.patches.len()
    }

    /// Whether there is none yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.patches.is_empty()
    }

    /// Checks the positions and stages the slide whole. Returns its patches.
    ///
    /// # Errors
    /// No patches, positions that are not a tile lattice or taken twice, or storage fails: then the slide is not in the set.
    pub async fn finish(mut self) -> Result<u32, WriteError> {
        let name = self.info.name.clone();
        if self.patches.is_empty() {
            return Err(WriteError::NoPatches { slide: name });
        }
        let positions: Vec<_> = self.patches.iter().map(|patch| (patch.x, patch.y)).collect();
        match lattice::check(&positions) {
            Ok(()) => {}
            Err(LatticeError::Pixels { .. } | LatticeError::NoNeighbours { .. }) if !self.info.spatial => {}
            Err(source) => return Err(WriteError::Lattice { slide: name, source }),
        }
        self.patches.sort_unstable_by_key(|patch| (patch.y, patch.x));

        let rows = staging::encode(&self.patches);
        self.spool.write_all(&rows).map_err(|e| self.shared.scratch_error(e))?;
        let spool = self.spool.into_inner().map_err(|e| self.shared.scratch_error(e.into_error()))?;
        let patches = u32::try_from(self.patches.len()).map_err(|_| WriteError::TooMany {
            url: self.shared.store.url().to_owned(),
            reason: format!("slide {name:?} has more patches than fit in 32 bits"),
        })?;
        let head = Head {
            info: self.info,
            patches,
            jpeg_bytes: self.spooled,
            rows_crc32c: crc32c::crc32c(&rows),
            classes: self.classes,
            preview: self.preview.as_ref().map(|_| format!("previews/{}.jpg", staging::file_name(&name))),
            downsample: self.downsample,
        };
        if let (Some(preview), Some(path)) = (self.preview, &head.preview) {
            self.shared.store.put(path, preview).await?;
        }
        staging::put(&self.shared.store, &head, spool).await?;
        self.shared.include(head);
        Ok(patches)
    }
}
