//! `patchset.json`: what a patch set holds. Written last, it commits the set; a set without it does not exist.
//!
//! Format version 1:
//!
//! ```text
//! <url>/patchset.json        this file
//! <url>/index.parquet        one row a patch, see [`crate::index`]
//! <url>/shards/00000.tar     WebDataset: <id>.jpg and <id>.json (slide, x, y, label) for each patch
//! <url>/previews/<slide>.jpg the slide with kept and dropped tiles drawn on it, where ingest made one
//! <url>/split.json           slides to learn from and to test on, of a labelled set, see [`crate::split`]
//! <url>/staging/…            only while ingest is under way
//! ```
//!
//! Patch ids run from 0, slide by slide in the order of `slides`, row-major (y, then x) in a slide. Positions are integers in tiles,
//! so a patch's neighbours are at distance 1 whatever the slide's pixels were. A set is never changed after it was committed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::store::{Store, StoreError};

/// Name of the manifest in a patch set.
pub const MANIFEST: &str = "patchset.json";
/// The format this code writes, and the only one it reads.
pub const VERSION: u32 = 1;

const FORMAT: &str = "sgcl-patchset";
const MAX_MANIFEST_BYTES: u64 = 256 << 20;
/// Bounds on what a manifest may claim, so that a damaged one cannot make us allocate without end.
const MAX_PATCHES: u64 = 1 << 31;
const MAX_SLIDES: usize = 1 << 22;
const MAX_SHARDS: usize = 1 << 20;
const MAX_CLASSES: usize = 1 << 16;
const MAX_PATCH_PX: u32 = 4096;

/// Contents of `patchset.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always `sgcl-patchset`.
    pub format: String,
    /// Format version.
    pub version: u32,
    /// blake3 over everything that training can see: equal ids mean equal data. Hexadecimal.
    pub content_id: String,
    /// Program and version that wrote the set.
    pub created_by: String,
    /// Side of a patch in pixels.
    pub patch_px: u32,
    /// JPEG quality, 1 to 100; 0 where the images were taken as they came.
    pub jpeg_quality: u8,
    /// Seed of the order of slides and patches.
    pub seed: u64,
    /// The settings of ingest (magnification, tissue detection, …) by name, for people and for resuming.
    pub settings: BTreeMap<String, serde_json::Value>,
    /// Patches in the set.
    pub patches: u64,
    /// Names of the classes; a label is an index into it. Empty where nothing is labelled.
    pub classes: Vec<String>,
    /// The index file.
    pub index: FileEntry,
    /// Slides in order of their first patch.
    pub slides: Vec<SlideEntry>,
    /// Shards in order of their number.
    pub shards: Vec<ShardEntry>,
}

/// A slide in the manifest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlideEntry {
    /// Unique name.
    pub name: String,
    /// Where it came from, for people.
    pub source: String,
    /// State of the source when it was read (size and time of change, say); empty where it is not known.
    #[serde(default)]
    pub fingerprint: String,
    /// Pyramid level the patches were read at.
    pub level: u32,
    /// Microns per pixel of the patches, where known.
    pub mpp: Option<f64>,
    /// Pixels of the slide's level 0 for one of a patch; not known of tiles, and of sets made before it was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downsample: Option<f64>,
    /// Width of the slide in pixels at the patches' magnification.
    pub width: u64,
    /// Height of the slide in pixels at the patches' magnification.
    pub height: u64,
    /// Columns and rows of the tile grid.
    pub grid: [u32; 2],
    /// Whether x, y say where patches lie to each other. False where the source has no positions: then they only number the patches.
    pub spatial: bool,
    /// Patches of this slide.
    pub patches: u32,
    /// Id of its first patch.
    pub first_id: u32,
    /// Path of its preview picture, where there is one.
    pub preview: Option<String>,
}

impl SlideEntry {
    /// Ids of the slide's patches.
    #[must_use]
    pub fn ids(&self) -> std::ops::Range<u32> {
        self.first_id..self.first_id + self.patches
    }
}

/// A shard in the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// Path in the patch set.
    pub path: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Patches in it.
    pub patches: u32,
    /// Checksum of the whole file.
    pub crc32c: u32,
}

/// Another file of the set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Path in the patch set.
    pub path: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Checksum of the whole file.
    pub crc32c: u32,
}

/// A patch set that cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// There is no manifest.
    #[error("{object}: no patch set here; check the URL, or finish `sgclctl ingest` (it writes this file last)")]
    Missing {
        /// Full name of the manifest.
        object: String,
    },
    /// Not a manifest.
    #[error("{object}: not a patch-set manifest: {reason}")]
    Malformed {
        /// Full name of the file.
        object: String,
        /// What is wrong.
        reason: String,
    },
    /// Written by a later program.
    #[error(
        "{object}: format version {found}, but this program reads version {VERSION}; use the version of sgcl that wrote it, or later"
    )]
    Version {
        /// Full name of the manifest.
        object: String,
        /// The version it has.
        found: u64,
    },
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Deserialize)]
struct Head {
    format: String,
    version: u64,
}

impl Manifest {
    /// An empty manifest of this format.
    pub(crate) fn new(patch_px: u32, jpeg_quality: u8, seed: u64) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            content_id: String::new(),
            created_by: concat!("sgcl ", env!("CARGO_PKG_VERSION")).to_owned(),
            patch_px,
            jpeg_quality,
            seed,
            settings: BTreeMap::new(),
            patches: 0,
            classes: Vec::new(),
            index: FileEntry { path: crate::index::INDEX.to_owned(), bytes: 0, crc32c: 0 },
            slides: Vec::new(),
            shards: Vec::new(),
        }
    }

    /// Reads and validates the manifest of the set at `store`.
    ///
    /// # Errors
    /// There is none, it is damaged, its version is unknown, or storage fails.
    pub async fn load(store: &Store) -> Result<Self, ManifestError> {
        let object = store.object(MANIFEST);
        match store.get(MANIFEST, MAX_MANIFEST_BYTES).await {
            Ok(bytes) => Self::parse(&bytes, &object),
            Err(e) if e.is_not_found() => Err(ManifestError::Missing { object }),
            Err(e) => Err(e.into()),
        }
    }

    /// Parses and validates a manifest; `object` is what errors call it.
    ///
    /// # Errors
    /// It is damaged or its version is unknown.
    pub fn parse(bytes: &[u8], object: &str) -> Result<Self, ManifestError> {
        let malformed = |reason: String| ManifestError::Malformed { object: object.to_owned(), reason };
        let head: Head = serde_json::from_slice(bytes).map_err(|e| malformed(e.to_string()))?;
        if head.format != FORMAT {
            return Err(malformed(format!("its format is {:?}, not {FORMAT:?}", head.format)));
        }
        if head.version != u64::from(VERSION) {
            return Err(ManifestError::Version { object: object.to_owned(), found: head.version });
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| malformed(e.to_string()))?;
        manifest.validate().map_err(malformed)?;
        Ok(manifest)
    }

    fn validate(&self) -> Result<(), String> {
        let within = |what: &str, found: u64, limit: u64| {
            if found <= limit { Ok(()) } else { Err(format!("{found} {what}, more than the limit of {limit}")) }
        };
        within("patches", self.patches, MAX_PATCHES)?;
        within("slides", self.slides.len() as u64, MAX_SLIDES as u64)?;
        within("shards", self.shards.len() as u64, MAX_SHARDS as u64)?;
        within("classes", self.classes.len() as u64, MAX_CLASSES as u64)?;
        within("pixels a patch side", u64::from(self.patch_px), u64::from(MAX_PATCH_PX))?;
        if self.patches == 0 {
            return Err("it holds no patches".to_owned());
        }
        let mut next = 0_u64;
        let mut names = std::collections::HashSet::with_capacity(self.slides.len());
        for slide in &self.slides {
            if slide.downsample.is_some_and(|downsample| !(downsample.is_finite() && downsample > 0.0)) {
                return Err(format!("slide {:?}: a downsample is above 0", slide.name));
            }
            if !names.insert(slide.name.as_str()) {
                return Err(format!("slide {:?} is listed twice", slide.name));
            }
            if u64::from(slide.first_id) != next {
                return Err(format!("slide {:?} starts at id {} instead of {next}", slide.name, slide.first_id));
            }
            next += u64::from(slide.patches);
        }
        if next != self.patches {
            return Err(format!("its slides hold {next} patches, but it says {}", self.patches));
        }
        let dealt: u64 = self.shards.iter().map(|shard| u64::from(shard.patches)).sum();
        if dealt != self.patches {
            return Err(format!("its shards hold {dealt} patches, but it says {}", self.patches));
        }
        for path in self.shards.iter().map(|s| &s.path).chain([&self.index.path]) {
            // A path from outside must stay inside the set.
            let inside = object_store::path::Path::parse(path).is_ok() && !path.starts_with('/');
            if !inside {
                return Err(format!("{path:?} is not a path inside the set"));
            }
        }
        Ok(())
    }

    /// The manifest as it is stored.
    ///
    /// # Errors
    /// Never for a manifest made here; settings could hold what JSON cannot.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Number of the slide called `name`.
    #[must_use]
    pub fn slide_number(&self, name: &str) -> Option<u32> {
        self.slides.iter().position(|slide| slide.name == name).and_then(|at| u32::try_from(at).ok())
    }

    /// Total bytes of the shards.
    #[must_use]
    pub fn shard_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn small() -> Manifest {
        let mut manifest = Manifest::new(256, 90, 1);
        manifest.patches = 3;
        let slide = |name: &str, first_id, patches| SlideEntry {
            name: name.to_owned(),
            source: "here".to_owned(),
            fingerprint: "9 bytes".to_owned(),
            level: 0,
            mpp: Some(0.5),
            downsample: Some(2.0),
            width: 512,
            height: 512,
            grid: [2, 2],
            spatial: true,
            patches,
            first_id,
            preview: None,
        };
        manifest.slides = vec![slide("a", 0, 2), slide("b", 2, 1)];
        manifest.shards = vec![ShardEntry { path: "shards/00000.tar".to_owned(), bytes: 9, patches: 3, crc32c: 1 }];
        manifest
    }

    #[test]
    fn a_manifest_survives_being_written_and_read() {
        let manifest = small();
        assert_eq!(Manifest::parse(&manifest.to_json().unwrap(), "m").unwrap(), manifest);
    }

    #[test]
    fn a_later_version_is_refused_by_its_number() {
        let mut manifest = small();
        manifest.version = 2;
        let error = Manifest::parse(&manifest.to_json().unwrap(), "s3://b/patchset.json").unwrap_err().to_string();
        assert!(error.contains("s3://b/patchset.json: format version 2"), "{error}");
    }

    #[rstest::rstest]
    #[case::gap(|m: &mut Manifest| m.slides[1].first_id = 3, "starts at id 3 instead of 2")]
    #[case::twice(|m: &mut Manifest| m.slides[1].name = "a".into(), "listed twice")]
    #[case::count(|m: &mut Manifest| m.patches = 4, "its slides hold 3 patches")]
    #[case::shards(|m: &mut Manifest| m.shards[0].patches = 2, "its shards hold 2 patches")]
    #[case::escape(|m: &mut Manifest| m.shards[0].path = "../other".into(), "not a path inside the set")]
    #[case::huge(|m: &mut Manifest| m.patches = u64::MAX, "more than the limit")]
    fn a_manifest_that_contradicts_itself_is_refused(#[case] damage: fn(&mut Manifest), #[case] says: &str) {
        let mut manifest = small();
        damage(&mut manifest);
        let error = Manifest::parse(&manifest.to_json().unwrap(), "m").unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn a_misspelt_field_is_named() {
        let text = String::from_utf8(small().to_json().unwrap()).unwrap().replace("\"seed\"", "\"sede\"");
        let error = Manifest::parse(text.as_bytes(), "m").unwrap_err().to_string();
        assert!(error.contains("sede"), "{error}");
    }
}
