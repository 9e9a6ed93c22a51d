//! Encoders by name: a run's backbone, a weights file, random weights.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sgcl::backbone::Backbone;
use sgcl::weights;
use sgcl_patchset::Store;
use sgcl_runstore::export::ExportError;
use sgcl_runstore::{RunName, Spec, export};
use tch::{Device, Kind, Tensor};

/// Where an encoder's weights are.
pub(crate) enum Source {
    Random,
    File(PathBuf),
    Run(RunName, Box<Spec>),
}

impl Source {
    /// Finds out what a name is; runs are looked for in `bucket`.
    ///
    /// # Errors
    /// It is neither `random` nor a file, and there is no such run.
    pub(crate) async fn find(name: &str, bucket: Option<&str>) -> Result<Self> {
        if name == "random" {
            return Ok(Self::Random);
        }
        if Path::new(name).is_file() {
            return Ok(Self::File(name.into()));
        }
        let Some(bucket) = bucket else {
            bail!("{name} is neither `random` nor a file; for a run of that name add --bucket URL");
        };
        let run = RunName::new(name)?;
        let spec = Spec::read(&run.store(&Store::open(bucket)?)).await?;
        Ok(Self::Run(run, Box::new(spec)))
    }

    /// What its run was made with, where it is one.
    pub(crate) fn spec(&self) -> Option<&Spec> {
        if let Self::Run(_, spec) = &self { Some(spec) } else { None }
    }

    /// Its tensors by the names they have there; none for random weights.
    ///
    /// # Errors
    /// The file, or the run's newest export, cannot be read or is damaged.
    pub(crate) async fn tensors(&self, bucket: Option<&str>) -> Result<Option<BTreeMap<String, Tensor>>> {
        match self {
            Self::Random => Ok(None),
            Self::File(path) => Ok(Some(weights::read(path)?)),
            Self::Run(run, _) => {
                let bucket = bucket.context("a run needs --bucket")?;
                let scratch = tempfile::tempdir().context("no folder for the run's weights")?;
                let folder = scratch.path().join("export");
                export::pull(&run.store(&Store::open(bucket)?), None, &folder, |_, _| {}).await?;
                Ok(Some(weights::read(&folder.join("backbone.pth"))?))
            }
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Random => f.write_str("random weights"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Run(run, _) => write!(f, "the weights of run {run}"),
        }
    }
}

/// Hash of all that a backbone's features depend on: architecture, names, shapes and values of its weights.
///
/// # Errors
/// A tensor cannot be read from its device.
pub(crate) fn content(backbone: &Backbone) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(backbone.arch().name().as_bytes());
    for (name, tensor) in backbone.parameters().into_iter().chain(backbone.buffers()) {
        hasher.update(format!("{name} {:?}", tensor.size()).as_bytes());
        hasher.update(&bytes(&tensor)?);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// A tensor's values as little-endian float32, row-major.
///
/// # Errors
/// It cannot be read from its device.
pub(crate) fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let flat = tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float).contiguous().flatten(0, -1);
    let values = Vec::<f32>::try_from(flat).context("a tensor cannot be read")?;
    Ok(values.into_iter().flat_map(f32::to_le_bytes).collect())
}

/// A run's part of a bucket, and the commit of its newest export.
///
/// # Errors
/// The run has no export; the storage.
pub(crate) async fn newest_export(run: &RunName, bucket: &str) -> Result<(Store, u64)> {
    let run = run.store(&Store::open(bucket)?);
    let commit = export::list_exports(&run).await?.last().copied();
    let commit = commit.ok_or_else(|| ExportError::None { run: run.url().to_owned() })?;
    Ok((run, commit))
}
