//! `exports/<commit>/`: the backbone's weights in the formats that pathology users load.
//!
//! | file | loads with |
//! |---|---|
//! | `backbone.pth` | `torch.load`, torchvision keys without a prefix |
//! | `model.safetensors`, `config.json`, `README.md` | timm's `local-dir:` |
//! | `backbone.detectron2.pkl` | detectron2 |
//! | `export.json` | the manifest, written last: without it the folder counts for nothing |

mod card;
mod detectron2;
mod pickle;
mod pull;
pub(crate) mod torch;

use std::collections::HashMap;

use bytes::Bytes;
use jiff::Timestamp;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use sgcl_patchset::{Store, StoreError};
use sha2::{Digest, Sha256};

use crate::checkpoint::Tensor;
use crate::record::{self, FORMAT_VERSION};
use crate::{Commit, RunStoreError, Spec};

pub use pull::{Pulled, pull, verify_export};

/// Name of the manifest.
pub const MANIFEST: &str = "export.json";
/// Largest file of an export.
const MAX_FILE_BYTES: u64 = 4 << 30;

/// An export that cannot be made, fetched or trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// A record or object of the run.
    #[error(transparent)]
    Run(#[from] RunStoreError),
    /// A number format that the files cannot hold.
    #[error("tensor {name}: {dtype} cannot be exported; weights are F32, counters I64")]
    Dtype {
        /// The tensor.
        name: String,
        /// Its format.
        dtype: String,
    },
    /// A set of tensors that is not a backbone.
    #[error("not a backbone: {0}")]
    NotABackbone(String),
    /// The zip of `backbone.pth` could not be made.
    #[error("backbone.pth: {0}")]
    Zip(String),
    /// The run has none.
    #[error("{run} has no export yet; it is written when the run finishes")]
    None {
        /// The run's URL.
        run: String,
    },
    /// The place for a pull is taken.
    #[error("{dir} exists and is not an empty folder; choose another or remove it")]
    Occupied {
        /// The folder.
        dir: String,
    },
    /// A file is not what the manifest says.
    #[error("{file}: {reason}; fetch the export again")]
    Mismatch {
        /// The file.
        file: String,
        /// What differs.
        reason: String,
    },
    /// A local file cannot be read or written.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
}

impl From<StoreError> for ExportError {
    fn from(e: StoreError) -> Self {
        Self::Run(e.into())
    }
}

/// Where weights come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// The run.
    pub run: String,
    /// Number of the commit.
    pub commit: u64,
    /// Write id of the commit.
    pub commit_write_id: String,
    /// Steps trained.
    pub step: u64,
    /// Epochs trained, the last one perhaps in part.
    pub epochs: u32,
    /// URL of the patch set.
    pub data: String,
    /// Content id of the patch set.
    pub data_id: String,
    /// SHA-256 over names and bytes of all tensors, in order of name.
    pub weights_sha256: String,
    /// Version of sgcl.
    pub software: String,
}

impl Provenance {
    /// Of `tensors` as `commit` holds them.
    #[must_use]
    pub fn new(spec: &Spec, commit: &Commit, tensors: &[Tensor]) -> Self {
        Self {
            run: spec.run.to_string(),
            commit: commit.seq,
            commit_write_id: commit.write_id.clone(),
            step: commit.progress.step,
            epochs: commit.progress.epoch + 1,
            data: spec.data.clone(),
            data_id: spec.data_id.clone(),
            weights_sha256: weights_sha256(tensors),
            software: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    fn author(&self) -> String {
        format!(
            "sgcl {} run {} commit {} ({}) data {} weights sha256 {}",
            self.software, self.run, self.commit, self.commit_write_id, self.data_id, self.weights_sha256
        )
    }
}

/// SHA-256 over names and bytes of tensors, in order of name.
#[must_use]
pub fn weights_sha256(tensors: &[Tensor]) -> String {
    let mut sorted: Vec<_> = tensors.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name));
    let mut hash = Sha256::new();
    for tensor in sorted {
        hash.update(tensor.name.as_bytes());
        hash.update([0]);
        hash.update(&tensor.data);
    }
    torch::hex(&hash.finalize())
}

/// A file of an export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportFile {
    /// Name in the folder.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// SHA-256, hex.
    pub sha256: String,
}

/// `export.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Format version.
    pub version: u32,
    /// Where the weights come from.
    pub from: Provenance,
    /// The other files.
    pub files: Vec<ExportFile>,
    /// When.
    pub created: Timestamp,
}

/// The files of an export, in memory, the manifest last.
///
/// `tensors`: torchvision's names without a prefix, in torchvision's order, no `fc`; F32, and I64 for `num_batches_tracked`.
///
/// # Errors
/// The tensors are not a backbone's.
pub fn files(
    spec: &Spec,
    commit: &Commit,
    tensors: &[Tensor],
    now: Timestamp,
) -> Result<Vec<(String, Bytes)>, ExportError> {
    check(tensors)?;
    let from = Provenance::new(spec, commit, tensors);
    let author = from.author();
    let config = record::to_json(&card::timm_config(&spec.config, &from), "config.json")?;
    let mut files: Vec<(String, Bytes)> = vec![
        ("backbone.pth".into(), torch::pth(tensors, &author)?.into()),
        ("model.safetensors".into(), safetensors_file(tensors, &from)?),
        ("config.json".into(), config.into()),
        ("backbone.detectron2.pkl".into(), detectron2::pkl(tensors, &author)?.into()),
        ("README.md".into(), card::readme(&spec.config, &from).into_bytes().into()),
    ];
    let listed = files
        .iter()
        .map(|(name, bytes)| ExportFile {
            name: name.clone(),
            bytes: bytes.len() as u64,
            sha256: torch::hex(&Sha256::digest(bytes)),
        })
        .collect();
    let manifest = Manifest { version: FORMAT_VERSION, from, files: listed, created: now };
    files.push((MANIFEST.into(), record::to_json(&manifest, MANIFEST)?.into()));
    Ok(files)
}

/// Writes an export below the run; returns its folder. The manifest goes last.
///
/// # Errors
/// The tensors are not a backbone's; the storage.
pub async fn write_export(
    run_store: &Store,
    spec: &Spec,
    commit: &Commit,
    tensors: &[Tensor],
    now: Timestamp,
) -> Result<String, ExportError> {
    let folder = folder(commit.seq);
    for (name, bytes) in files(spec, commit, tensors, now)? {
        run_store.put(&format!("{folder}/{name}"), bytes).await?;
    }
    Ok(folder)
}

/// Numbers of the commits that have an export, ascending.
///
/// # Errors
/// The storage.
pub async fn list_exports(run_store: &Store) -> Result<Vec<u64>, RunStoreError> {
    let found = run_store.list("exports").await?;
    let mut seqs: Vec<u64> = found
        .iter()
        .filter_map(|o| o.rel.strip_prefix("exports/")?.strip_suffix(MANIFEST)?.strip_suffix('/')?.parse().ok())
        .collect();
    seqs.sort_unstable();
    Ok(seqs)
}

/// Reads an export's manifest.
///
/// # Errors
/// Missing or damaged; the storage.
pub async fn read_manifest(run_store: &Store, commit: u64) -> Result<Manifest, RunStoreError> {
    record::read(run_store, &format!("{}/{MANIFEST}", folder(commit))).await
}

fn folder(commit: u64) -> String {
    format!("exports/{commit:08}")
}

fn check(tensors: &[Tensor]) -> Result<(), ExportError> {
    let bad = |why: String| Err(ExportError::NotABackbone(why));
    if !tensors.iter().any(|t| t.name == "conv1.weight") {
        return bad("there is no conv1.weight; keys must be torchvision's, without a prefix".into());
    }
    for t in tensors {
        let elements: usize = t.shape.iter().product();
        if elements * t.dtype.bitsize() != t.data.len() * 8 {
            return bad(format!("{} has {} bytes, its shape {:?} says otherwise", t.name, t.data.len(), t.shape));
        }
        if t.data.len() as u64 >= u64::from(u32::MAX) {
            return bad(format!("{} is larger than 4 GiB", t.name));
        }
    }
    Ok(())
}

fn safetensors_file(tensors: &[Tensor], from: &Provenance) -> Result<Bytes, ExportError> {
    let broken = |e: safetensors::SafeTensorError| RunStoreError::damaged("model.safetensors", e);
    let mut views = Vec::with_capacity(tensors.len());
    for t in tensors {
        views.push((t.name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.data).map_err(broken)?));
    }
    // Loaders of the Hugging Face family want "format".
    let metadata = HashMap::from([
        ("format".to_owned(), "pt".to_owned()),
        ("run".to_owned(), from.run.clone()),
        ("commit".to_owned(), from.commit.to_string()),
        ("data_id".to_owned(), from.data_id.clone()),
        ("weights_sha256".to_owned(), from.weights_sha256.clone()),
    ]);
    Ok(safetensors::serialize(views, Some(metadata)).map_err(broken)?.into())
}
