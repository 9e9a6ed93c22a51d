//! Reading encoder weights that others wrote: `.pth` (zip and legacy) and `.safetensors`. Nothing in a file is ever executed.

mod archive;
mod pickle;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use crate::backbone::Backbone;

/// Why weights could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file cannot be opened or read.
    #[error("cannot read weights {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is none of the formats.
    #[error(
        "{path} holds no weights we can read ({reason}): give a .pth written by torch.save, or a .safetensors file"
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// The pickle names something that is not tensor data.
    #[error(
        "{path} is refused: its pickle calls `{global}`, which is not tensor data; load it where you trust it and save \
         `model.state_dict()` alone"
    )]
    Unsafe {
        /// The file.
        path: PathBuf,
        /// Module and name of the callable.
        global: String,
    },
    /// The format is known, the content is broken.
    #[error("{path} is damaged or truncated: {reason}; fetch it again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What broke.
        reason: String,
    },
    /// Not one of our keys is in the source.
    #[error("no weight matches: expected keys such as `{expected}`, found {found}")]
    NoMatch {
        /// One of our keys.
        expected: String,
        /// A few of theirs.
        found: String,
    },
    /// A key matches, its shape does not.
    #[error("weight `{key}` has shape {found:?}, expected {expected:?}: is it another architecture?")]
    Shape {
        /// The key in the source.
        key: String,
        /// Its shape.
        found: Vec<i64>,
        /// Ours.
        expected: Vec<i64>,
    },
    /// Strict loading found a difference.
    #[error("keys differ: missing {missing:?}, unexpected {unexpected:?}")]
    Strict {
        /// Ours that the source lacks.
        missing: Vec<String>,
        /// The source's that we lack.
        unexpected: Vec<String>,
    },
}

/// What was taken from a source, and what was not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadReport {
    /// Keys copied.
    pub matched: usize,
    /// What stood before our keys in the source, such as `state_dict.module.`.
    pub prefix: String,
    /// Our keys that the source lacks.
    pub missing: Vec<String>,
    /// The source's keys that were not used, under their own names.
    pub unexpected: Vec<String>,
}

/// Every tensor of a weights file, by its path inside the file: nested dictionaries join with a dot, as in
/// `state_dict.module.conv1.weight`. The format is told by content, not by extension.
///
/// # Errors
/// [`WeightsError::Io`], [`WeightsError::Format`], [`WeightsError::Unsafe`] or [`WeightsError::Damaged`].
pub fn read(path: &Path) -> Result<BTreeMap<String, Tensor>, WeightsError> {
    let io = |source| WeightsError::Io { path: path.to_owned(), source };
    let mut head = Vec::new();
    fs::File::open(path).map_err(io)?.take(16).read_to_end(&mut head).map_err(io)?;
    let tensors = if head.starts_with(b"PK\x03\x04") {
        archive::read_zip(path)
    } else if head.starts_with(&archive::LEGACY_MAGIC) {
        fs::read(path).map_err(archive::Fault::Io).and_then(|bytes| archive::read_legacy(&bytes))
    } else if head.get(8) == Some(&b'{') {
        fs::read(path).map_err(archive::Fault::Io).and_then(|bytes| read_safetensors(&bytes))
    } else if head.is_empty() {
        Err(archive::Fault::Format("the file is empty".to_owned()))
    } else {
        Err(archive::Fault::Format("neither zip, torch pickle nor safetensors".to_owned()))
    };
    tensors.map_err(|fault| fault.at(path))
}

fn read_safetensors(bytes: &[u8]) -> Result<BTreeMap<String, Tensor>, archive::Fault> {
    let damaged = |error: &dyn std::fmt::Display| archive::Fault::Damaged(error.to_string());
    let file = safetensors::SafeTensors::deserialize(bytes).map_err(|error| damaged(&error))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let Some(kind) = safetensors_kind(view.dtype()) else { continue };
        let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
        let tensor = Tensor::f_from_data_size(view.data(), &shape, kind).map_err(|error| damaged(&error))?;
        tensors.insert(name.to_owned(), tensor);
    }
    Ok(tensors)
}

fn safetensors_kind(dtype: safetensors::Dtype) -> Option<Kind> {
    use safetensors::Dtype;
    Some(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        _ => return None,
    })
}

/// Loads a backbone from a weights file, whatever stands before its keys: of all prefixes under which the file holds our keys
/// the one with the most of them counts; of equals the online network goes before a momentum copy.
///
/// # Errors
/// As [`read`]; [`WeightsError::NoMatch`] when nothing matched; [`WeightsError::Shape`]. The backbone is unchanged after an error.
pub fn load_backbone(backbone: &Backbone, path: &Path) -> Result<LoadReport, WeightsError> {
    load_backbone_from(backbone, &read(path)?)
}

/// As [`load_backbone`], from tensors already in memory.
///
/// # Errors
/// [`WeightsError::NoMatch`], [`WeightsError::Shape`].
pub fn load_backbone_from(backbone: &Backbone, source: &BTreeMap<String, Tensor>) -> Result<LoadReport, WeightsError> {
    let targets = backbone.state();
    let prefix = best_prefix(&targets, source);
    let report = copy_into(&targets, source, &prefix, false)?;
    backbone.set_batches_tracked(batches_tracked(source, &prefix));
    Ok(report)
}

/// Copies `source[prefix + name]` into each target, converting to the target's kind and device. All shapes are checked before
/// anything is written.
pub(crate) fn copy_into(
    targets: &[(String, Tensor)],
    source: &BTreeMap<String, Tensor>,
    prefix: &str,
    strict: bool,
) -> Result<LoadReport, WeightsError> {
    let mut missing = Vec::new();
    let mut pairs = Vec::new();
    let mut used = BTreeSet::new();
    for (name, target) in targets {
        let key = format!("{prefix}{name}");
        match source.get(&key) {
            None => missing.push(name.clone()),
            Some(tensor) if tensor.size() == target.size() => {
                pairs.push((target, tensor));
                used.insert(key);
            }
            Some(tensor) => {
                return Err(WeightsError::Shape { key, found: tensor.size(), expected: target.size() });
            }
        }
    }
    if pairs.is_empty() {
        let expected = targets.first().map(|(name, _)| name.clone()).unwrap_or_default();
        return Err(WeightsError::NoMatch { expected, found: sample(source) });
    }
    let unexpected: Vec<String> = source.keys().filter(|key| !used.contains(*key)).cloned().collect();
    if strict && !(missing.is_empty() && unexpected.is_empty()) {
        return Err(WeightsError::Strict { missing, unexpected });
    }
    for (target, tensor) in &pairs {
        target.detach().copy_(tensor);
    }
    Ok(LoadReport { matched: pairs.len(), prefix: prefix.to_owned(), missing, unexpected })
}

/// The largest `num_batches_tracked` under a prefix, 0 without one.
pub(crate) fn batches_tracked(source: &BTreeMap<String, Tensor>, prefix: &str) -> i64 {
    let counters = source.iter().filter(|(key, tensor)| {
        key.starts_with(prefix) && key.ends_with(".num_batches_tracked") && tensor.numel() == 1
    });
    counters
        .filter_map(|(_, tensor)| i64::try_from(tensor.to_kind(Kind::Int64).reshape([1]).get(0)).ok())
        .max()
        .unwrap_or(0)
}

fn best_prefix(targets: &[(String, Tensor)], source: &BTreeMap<String, Tensor>) -> String {
    // `bn1.weight` alone would find `layer1.0.` as a prefix too; the count settles it.
    let prefixes: BTreeSet<&str> = targets
        .iter()
        .take(2)
        .flat_map(|(name, _)| source.keys().filter_map(move |key| key.strip_suffix(name)))
        .collect();
    let rank = |prefix: &str| {
        let matched = targets.iter().filter(|(name, _)| source.contains_key(&format!("{prefix}{name}"))).count();
        let copy = ["encoder_k", "momentum", "teacher", "target", "ema"].iter().any(|word| prefix.contains(word));
        (matched, !copy, std::cmp::Reverse(prefix.len()))
    };
    prefixes.into_iter().max_by_key(|prefix| rank(prefix)).unwrap_or_default().to_owned()
}

fn sample(source: &BTreeMap<String, Tensor>) -> String {
    if source.is_empty() {
        return "no tensors at all".to_owned();
    }
    let names: Vec<String> = source.keys().take(3).map(|key| format!("`{key}`")).collect();
    format!("{} ({} tensors)", names.join(", "), source.len())
}
