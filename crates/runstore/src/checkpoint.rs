//! Checkpoint parts: `checkpoints/<generation>-<step>/<part>`, each with length and crc32c in the commit that names it.
//! A part without a commit counts for nothing.

use bytes::Bytes;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use sgcl_patchset::Store;

use crate::RunStoreError;

pub use safetensors::Dtype;

/// Largest part.
pub const MAX_PART_BYTES: u64 = 256 << 30;

/// A tensor as bytes, little-endian, contiguous.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Name.
    pub name: String,
    /// Number format.
    pub dtype: Dtype,
    /// Shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Elements.
    pub data: Bytes,
}

/// What a part holds. The names are stored: never rename one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PartKind {
    /// Weights and buffers of backbone and projector.
    Model,
    /// Optimiser state.
    Optimizer,
    /// Bank rows and their patch ids.
    Bank,
    /// Used patches.
    Ledger,
}

/// A written part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartRef {
    /// What it holds.
    pub kind: PartKind,
    /// Object below the run.
    pub path: String,
    /// Length.
    pub bytes: u64,
    /// Checksum (Castagnoli) of all bytes.
    pub crc32c: u32,
}

/// Folder of a checkpoint.
#[must_use]
pub fn folder(generation: u64, step: u64) -> String {
    format!("checkpoints/{generation}-{step}")
}

/// Generation and step of a part's path.
pub(crate) fn position(path: &str) -> Option<(u64, u64)> {
    let (generation, step) = path.strip_prefix("checkpoints/")?.split('/').next()?.split_once('-')?;
    Some((generation.parse().ok()?, step.parse().ok()?))
}

/// Writes the parts of one checkpoint.
#[derive(Clone, Debug)]
pub struct PartWriter {
    run: Store,
    folder: String,
}

impl PartWriter {
    /// For the checkpoint of `step` in `generation`.
    #[must_use]
    pub fn new(run_store: &Store, generation: u64, step: u64) -> Self {
        Self { run: run_store.clone(), folder: folder(generation, step) }
    }

    /// Writes tensors as `<name>.safetensors`. `name` is the writer's own, such as `model` or `bank-3`.
    ///
    /// # Errors
    /// The tensors are not what their shapes say; the storage.
    pub async fn put_tensors(&self, kind: PartKind, name: &str, tensors: &[Tensor]) -> Result<PartRef, RunStoreError> {
        let bytes = encode(tensors)?;
        self.put(kind, &format!("{name}.safetensors"), bytes).await
    }

    /// Writes bytes as they are, under the whole file name.
    ///
    /// # Errors
    /// The storage.
    pub async fn put(&self, kind: PartKind, file: &str, bytes: Bytes) -> Result<PartRef, RunStoreError> {
        let path = format!("{}/{file}", self.folder);
        let part = PartRef { kind, path, bytes: bytes.len() as u64, crc32c: crc32c::crc32c(&bytes) };
        if part.bytes > MAX_PART_BYTES {
            return Err(RunStoreError::Limit { what: part.path, found: part.bytes, limit: MAX_PART_BYTES });
        }
        self.run.put(&part.path, bytes).await?;
        Ok(part)
    }
}

/// Reads a part and compares it with what its commit says. One that differs is read again: a transfer may go wrong once, a damaged
/// object stays wrong.
///
/// # Errors
/// Missing, of another length or checksum, or the storage.
pub async fn read_part(run_store: &Store, part: &PartRef) -> Result<Bytes, RunStoreError> {
    check_path(run_store, part)?;
    let read = async || {
        let bytes = run_store.get(&part.path, part.bytes).await?;
        compare(run_store, part, bytes.len() as u64, crc32c::crc32c(&bytes))?;
        Ok(bytes)
    };
    match read().await {
        Err(RunStoreError::Damaged { .. }) => read().await,
        result => result,
    }
}

/// [`read_part`] and its tensors, which share the part's memory.
///
/// # Errors
/// As [`read_part`], or not safetensors.
pub async fn read_tensors(run_store: &Store, part: &PartRef) -> Result<Vec<Tensor>, RunStoreError> {
    let bytes = read_part(run_store, part).await?;
    decode(&bytes, &run_store.object(&part.path))
}

/// Compares a part with its commit without holding it in memory, likewise twice before it is called damaged.
///
/// # Errors
/// As [`read_part`].
pub async fn verify_part(run_store: &Store, part: &PartRef) -> Result<(), RunStoreError> {
    check_path(run_store, part)?;
    let verify = async || {
        let mut crc = 0;
        let bytes = run_store
            .get_streamed(&part.path, |chunk| {
                crc = crc32c::crc32c_append(crc, &chunk);
                Ok::<_, RunStoreError>(())
            })
            .await?;
        compare(run_store, part, bytes, crc)
    };
    match verify().await {
        Err(RunStoreError::Damaged { .. }) => verify().await,
        result => result,
    }
}

fn check_path(run_store: &Store, part: &PartRef) -> Result<(), RunStoreError> {
    let plain = position(&part.path).is_some() && !part.path.split('/').any(|p| p.is_empty() || p.starts_with('.'));
    if !plain || part.bytes > MAX_PART_BYTES {
        return Err(RunStoreError::damaged(run_store.object("commits"), format!("not a part: {:?}", part.path)));
    }
    Ok(())
}

fn compare(run_store: &Store, part: &PartRef, bytes: u64, crc: u32) -> Result<(), RunStoreError> {
    let object = run_store.object(&part.path);
    if bytes != part.bytes {
        return Err(RunStoreError::damaged(object, format!("{bytes} bytes, its commit says {}", part.bytes)));
    }
    if crc != part.crc32c {
        return Err(RunStoreError::damaged(object, format!("crc32c {crc:08x}, its commit says {:08x}", part.crc32c)));
    }
    Ok(())
}

/// Tensors as one safetensors file.
///
/// # Errors
/// A tensor's bytes are not what dtype and shape say.
pub fn encode(tensors: &[Tensor]) -> Result<Bytes, RunStoreError> {
    let views = tensors
        .iter()
        .map(|t| {
            TensorView::new(t.dtype, t.shape.clone(), &t.data)
                .map(|v| (t.name.as_str(), v))
                .map_err(|e| RunStoreError::damaged(format!("tensor {}", t.name), e))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let bytes = safetensors::serialize(views, None).map_err(|e| RunStoreError::damaged("safetensors", e))?;
    Ok(bytes.into())
}

/// Tensors of a safetensors file, by name, sharing its memory; `object` is what errors call it.
///
/// # Errors
/// Not safetensors.
pub fn decode(bytes: &Bytes, object: &str) -> Result<Vec<Tensor>, RunStoreError> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| RunStoreError::damaged(object, e))?;
    let mut tensors: Vec<_> = file
        .iter()
        .map(|(name, view)| Tensor {
            name: name.to_owned(),
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            data: bytes.slice_ref(view.data()),
        })
        .collect();
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(tensors)
}
