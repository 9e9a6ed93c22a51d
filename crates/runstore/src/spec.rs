//! `runs/<run>/spec.json`: what a run is. Created once, never changed; resuming compares with it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sgcl_patchset::Store;

use crate::config::RunConfig;
use crate::record::{self, FORMAT_VERSION, new_write_id};
use crate::{ConfigError, RunStoreError};

const SPEC: &str = "spec.json";

/// Configuration sections that change how a run is carried out, never what it computes: they may differ on resume.
const ELASTIC: [&str; 9] = [
    "device",
    "loader",
    "checkpoint",
    "step_timeout_s",
    "startup_timeout_s",
    "max_restarts",
    "probe",
    "evaluations",
    "embeddings",
];

/// Name of a run: also a Kubernetes object and a folder, so a DNS label with room for suffixes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunName(String);

impl RunName {
    /// # Errors
    /// [`RunStoreError::RunName`].
    pub fn new(name: impl Into<String>) -> Result<Self, RunStoreError> {
        let name = name.into();
        let ok = (1..=50).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && !name.ends_with('-');
        if ok { Ok(Self(name)) } else { Err(RunStoreError::RunName { name }) }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The run's part of a bucket: `runs/<run>`.
    #[must_use]
    pub fn store(&self, bucket: &Store) -> Store {
        bucket.child(&format!("runs/{}", self.0))
    }
}

impl std::fmt::Display for RunName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for RunName {
    type Error = RunStoreError;
    fn try_from(name: String) -> Result<Self, RunStoreError> {
        Self::new(name)
    }
}

impl std::str::FromStr for RunName {
    type Err = RunStoreError;
    fn from_str(name: &str) -> Result<Self, RunStoreError> {
        Self::new(name)
    }
}

impl From<RunName> for String {
    fn from(name: RunName) -> Self {
        name.0
    }
}

/// What a run is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// Format version.
    pub version: u32,
    /// Tells this writer from another.
    pub write_id: String,
    /// Name.
    pub run: RunName,
    /// URL of the patch set.
    pub data: String,
    /// The patch set's content id: the same patches wherever they lie.
    pub data_id: String,
    /// Nodes wanted.
    pub nodes: u32,
    /// Ranks on each.
    pub ranks_per_node: u32,
    /// Fewest nodes that train.
    pub min_nodes: u32,
    /// Configuration.
    pub config: RunConfig,
    /// When it was made.
    pub created: Timestamp,
    /// Version of sgcl that made it.
    pub software: String,
}

impl Spec {
    /// A new spec.
    #[must_use]
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        run: RunName,
        data: impl Into<String>,
        data_id: impl Into<String>,
        nodes: u32,
        ranks_per_node: u32,
        min_nodes: u32,
        config: RunConfig,
        created: Timestamp,
    ) -> Self {
        Self {
            version: FORMAT_VERSION,
            write_id: new_write_id(),
            run,
            data: data.into(),
            data_id: data_id.into(),
            nodes,
            ranks_per_node,
            min_nodes,
            config,
            created,
            software: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// Creates the spec of a new run.
    ///
    /// # Errors
    /// [`RunStoreError::SpecDiffers`] naming that the run exists already; the storage.
    pub async fn create(&self, run_store: &Store) -> Result<(), RunStoreError> {
        if record::create(run_store, SPEC, self, &self.write_id).await?.is_some() {
            return Err(RunStoreError::SpecDiffers {
                object: run_store.object(SPEC),
                differences: vec![format!("a run named {} exists already; --resume goes on with it", self.run)],
            });
        }
        Ok(())
    }

    /// Reads a run's spec.
    ///
    /// # Errors
    /// No such run, or its spec is damaged.
    pub async fn read(run_store: &Store) -> Result<Self, RunStoreError> {
        let spec: Self = record::read(run_store, SPEC).await?;
        spec.config.validate().map_err(|e: ConfigError| RunStoreError::damaged(run_store.object(SPEC), e))?;
        Ok(spec)
    }

    /// The stored spec, if the run exists.
    ///
    /// # Errors
    /// Its spec is damaged; the storage.
    pub async fn find(run_store: &Store) -> Result<Option<Self>, RunStoreError> {
        match Self::read(run_store).await {
            Ok(spec) => Ok(Some(spec)),
            Err(RunStoreError::Store(e)) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Whether this sgcl deals epochs as the run began to, so that it can go on with it or prove what it read.
    ///
    /// # Errors
    /// [`RunStoreError::PastVersion`].
    pub fn check_version(&self) -> Result<(), RunStoreError> {
        if self.version < FORMAT_VERSION {
            return Err(RunStoreError::PastVersion {
                run: self.run.to_string(),
                version: self.version,
                ours: FORMAT_VERSION,
            });
        }
        Ok(())
    }

    /// Whether `wanted` may go on with this run: what is computed must be the same; nodes, ranks, the data's URL and how the run is
    /// carried out may change.
    ///
    /// # Errors
    /// [`RunStoreError::SpecDiffers`] with each difference; [`RunStoreError::PastVersion`].
    pub fn check_resume(&self, wanted: &Self, run_store: &Store) -> Result<(), RunStoreError> {
        self.check_version()?;
        let mut differences = Vec::new();
        if self.run != wanted.run {
            differences.push(format!("run: {} is not {}", self.run, wanted.run));
        }
        if self.data_id != wanted.data_id {
            differences.push(format!(
                "data: {} ({}) holds other patches than {} ({})",
                wanted.data, wanted.data_id, self.data, self.data_id
            ));
        }
        let as_tree = |config: &RunConfig| serde_json::to_value(config).unwrap_or_default();
        let (mut old, mut new) = (as_tree(&self.config), as_tree(&wanted.config));
        for key in ELASTIC {
            for tree in [&mut old, &mut new] {
                if let Some(fields) = tree.as_object_mut() {
                    fields.remove(key);
                }
            }
        }
        compare("config", &old, &new, &mut differences);
        if differences.is_empty() {
            Ok(())
        } else {
            Err(RunStoreError::SpecDiffers { object: run_store.object(SPEC), differences })
        }
    }
}

fn compare(name: &str, old: &Value, new: &Value, out: &mut Vec<String>) {
    match (old, new) {
        (Value::Object(a), Value::Object(b)) => {
            for (key, value) in a {
                compare(&format!("{name}.{key}"), value, b.get(key).unwrap_or(&Value::Null), out);
            }
        }
        _ if old != new => out.push(format!("{name}: the run has {old}, asked for is {new}")),
        _ => {}
    }
}
