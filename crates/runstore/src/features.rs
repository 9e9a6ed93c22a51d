//! Features of slides in the layouts that others read.
//!
//! ```text
//! <to>/features_<encoder>/<slide>.h5     TRIDENT: `features` (n, d) float32, `coords` (n, 2) int64 with its attributes
//! <to>/h5_files/<slide>.h5               CLAM: the same file
//! <to>/pt_files/<slide>.pt               CLAM: the features as a tensor, for `torch.load`
//! <to>/records/<layout>/<slide>.json     lengths, checksums and settings, written last: a slide without its record is not there
//! ```
//!
//! Names of slides that storage would not take as they are carry a hash ([`object_name`]).

mod hdf5;
pub mod wire;

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sgcl_patchset::{Store, StoreError, object_name};

use crate::RunStoreError;
use crate::checkpoint::{Dtype, Tensor};
use crate::export::{ExportError, torch};
use crate::record::{self, FORMAT_VERSION};

/// Whose layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `features_<encoder>/<slide>.h5`.
    Trident,
    /// `h5_files/<slide>.h5` and `pt_files/<slide>.pt`.
    Clam,
}

impl Layout {
    /// `trident`, `clam` or `both`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Vec<Layout>> {
        match text {
            "trident" => Some(vec![Layout::Trident]),
            "clam" => Some(vec![Layout::Clam]),
            "both" => Some(vec![Layout::Trident, Layout::Clam]),
            _ => None,
        }
    }
}

/// How the coordinates of a slide's patches are to be read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Geometry {
    /// Side of a patch in its own pixels.
    pub patch_px: u32,
    /// Microns per pixel of the patches, where known.
    pub mpp: Option<f64>,
    /// Pixels of the slide's level 0 for one of a patch. Where it is not known, coordinates are in pixels of the patches.
    pub downsample: Option<f64>,
    /// Width and height of level 0, where known.
    pub level0: Option<[u32; 2]>,
    /// Pixels of a patch by which it overlaps the next.
    #[serde(default)]
    pub overlap: u32,
    /// Whether the patches have places at all; images of class folders have none, and their coordinates only number them.
    pub spatial: bool,
}

/// The features of a slide.
#[derive(Clone, Debug, PartialEq)]
pub struct SlideFeatures {
    /// The slide's name.
    pub name: String,
    /// Tells one state of its source from another.
    pub fingerprint: String,
    /// Width d of a feature.
    pub dim: usize,
    /// (n, d), row-major.
    pub features: Vec<f32>,
    /// (n, 2): x and y of each patch's upper left corner.
    pub coords: Vec<[i64; 2]>,
    /// What the coordinates mean.
    pub geometry: Geometry,
}

/// A written file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRef {
    /// Object below `<to>`.
    pub path: String,
    /// Length.
    pub bytes: u64,
    /// Checksum (Castagnoli) of all bytes.
    pub crc32c: u32,
}

/// What says that a slide is complete in a layout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Version of the format.
    pub version: u32,
    /// The slide.
    pub slide: String,
    /// State of its source when it was read.
    pub fingerprint: String,
    /// The encoder's name.
    pub encoder: String,
    /// All that the features depend on besides the slide.
    pub settings: BTreeMap<String, Value>,
    /// Patches n.
    pub patches: usize,
    /// Width d.
    pub dim: usize,
    /// The files.
    pub files: Vec<FileRef>,
}

/// Features that cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FeaturesError {
    /// Features of the same slide are there, made otherwise.
    #[error(
        "{object}: was made with other settings ({differences}); write to another --to, give another --name, or delete it with its record"
    )]
    Settings {
        /// The record.
        object: String,
        /// Name, value there and value now of each.
        differences: String,
    },
    /// A file that cannot be made.
    #[error("{file}: {reason}")]
    File {
        /// The file.
        file: String,
        /// Why.
        reason: String,
    },
    /// A record that cannot be made or read.
    #[error(transparent)]
    Record(#[from] RunStoreError),
    /// The storage.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Where features go, and what they are made with.
#[derive(Clone, Debug)]
pub struct Output {
    store: Store,
    layouts: Vec<Layout>,
    encoder: String,
    settings: BTreeMap<String, Value>,
}

impl Output {
    /// Features of `encoder` into `store`. `settings` are all that they depend on besides the slides.
    #[must_use]
    pub fn new(store: Store, layouts: Vec<Layout>, encoder: &str, settings: BTreeMap<String, Value>) -> Self {
        Self { store, layouts, encoder: encoder.to_owned(), settings }
    }

    /// The record of a slide that is there, whole, in every layout asked for. A record without its files, files of other lengths
    /// or a source that changed count as nothing.
    ///
    /// # Errors
    /// It was made with other settings, or storage fails.
    pub async fn complete(&self, slide: &str, fingerprint: &str) -> Result<Option<Record>, FeaturesError> {
        let mut found = None;
        for &layout in &self.layouts {
            let rel = self.record_path(layout, slide);
            let record: Record = match record::read(&self.store, &rel).await {
                Ok(record) => record,
                Err(RunStoreError::Store(e)) if !e.is_not_found() => return Err(e.into()),
                Err(RunStoreError::Store(_) | RunStoreError::Damaged { .. }) => return Ok(None),
                Err(e) => return Err(e.into()),
            };
            self.same_settings(&rel, &record)?;
            if record.fingerprint != fingerprint {
                return Ok(None);
            }
            for file in &record.files {
                if self.store.size(&file.path).await? != Some(file.bytes) {
                    return Ok(None);
                }
            }
            found = Some(record);
        }
        Ok(found)
    }

    fn same_settings(&self, rel: &str, record: &Record) -> Result<(), FeaturesError> {
        let names: std::collections::BTreeSet<_> = record.settings.keys().chain(self.settings.keys()).collect();
        let shown = |value: Option<&Value>| value.map_or_else(|| "unset".to_owned(), Value::to_string);
        let mut differences: Vec<_> = names
            .into_iter()
            .map(|name| (name, record.settings.get(name), self.settings.get(name)))
            .filter(|(_, there, now)| there != now)
            .map(|(name, there, now)| format!("{name}: {} there, {} now", shown(there), shown(now)))
            .collect();
        if record.encoder != self.encoder {
            differences.insert(0, format!("encoder: {} there, {} now", record.encoder, self.encoder));
        }
        if differences.is_empty() {
            return Ok(());
        }
        Err(FeaturesError::Settings { object: self.store.object(rel), differences: differences.join("; ") })
    }

    /// Writes a slide in every layout: first its files, each whole or not at all, then the record.
    ///
    /// # Errors
    /// A file cannot be made, or storage fails. Then the slide is not complete, and whoever comes next writes it anew.
    pub async fn write(&self, slide: &SlideFeatures) -> Result<Vec<FileRef>, FeaturesError> {
        let failed = |file: &str, reason: String| FeaturesError::File { file: self.store.object(file), reason };
        let mut all = Vec::new();
        let name = object_name(&slide.name);
        let h5 = Bytes::from(
            hdf5::encode(slide, &self.encoder, &self.root())
                .map_err(|e| failed(&format!("{name}.h5"), e.to_string()))?,
        );
        for &layout in &self.layouts {
            let record = self.record_path(layout, &slide.name);
            // From here on the old files may be replaced by new ones.
            if self.store.exists(&record).await? {
                self.store.delete(&record).await?;
            }
            let files = match layout {
                Layout::Trident => vec![(format!("features_{}/{name}.h5", self.encoder), h5.clone())],
                Layout::Clam => {
                    let pt = format!("pt_files/{name}.pt");
                    let bytes = tensor(slide).map_err(|e| failed(&pt, e.to_string()))?;
                    vec![(format!("h5_files/{name}.h5"), h5.clone()), (pt, bytes.into())]
                }
            };
            let mut written = Vec::new();
            for (path, bytes) in files {
                written.push(FileRef { path: path.clone(), bytes: bytes.len() as u64, crc32c: crc32c::crc32c(&bytes) });
                self.store.put(&path, bytes).await?;
            }
            let value = Record {
                version: FORMAT_VERSION,
                slide: slide.name.clone(),
                fingerprint: slide.fingerprint.clone(),
                encoder: self.encoder.clone(),
                settings: self.settings.clone(),
                patches: slide.coords.len(),
                dim: slide.dim,
                files: written.clone(),
            };
            self.store.put(&record, record::to_json(&value, &self.store.object(&record))?).await?;
            all.extend(written);
        }
        Ok(all)
    }

    fn record_path(&self, layout: Layout, slide: &str) -> String {
        let folder = match layout {
            Layout::Trident => format!("features_{}", self.encoder),
            // One encoder at a time: CLAM's folders do not name theirs.
            Layout::Clam => "clam".to_owned(),
        };
        format!("records/{folder}/{}.json", object_name(slide))
    }

    /// The place as TRIDENT's attribute `savetodir` has it.
    fn root(&self) -> String {
        self.store.local_path("").map_or_else(|| self.store.url().to_owned(), |path| path.display().to_string())
    }
}

fn tensor(slide: &SlideFeatures) -> Result<Vec<u8>, ExportError> {
    torch::pt(&Tensor {
        name: "features".to_owned(),
        dtype: Dtype::F32,
        shape: vec![slide.coords.len(), slide.dim],
        data: Bytes::copy_from_slice(bytemuck::cast_slice(&slide.features)),
    })
}
