//! ConfigMap `sgcl-defaults`: what the platform's people decide once, so that a user need not.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use sgcl_runstore::config::nearest;

use super::resource::Resources;

/// Name of the ConfigMap.
pub const NAME: &str = "sgcl-defaults";
/// Secret with the bucket's keys, where neither a run nor the ConfigMap names another.
pub const CREDENTIALS: &str = "sgcl-bucket";

/// What it may say.
pub const KEYS: [&str; 16] = [
    "bucket",
    "dataset",
    "image",
    "imagePullPolicy",
    "device",
    "config",
    "gpuResource",
    "credentialsSecret",
    "s3Endpoint",
    "s3Region",
    "cpu",
    "memory",
    "disk",
    "queue",
    "workerEnv",
    "workerResources",
];

/// What a variable that `workerEnv` sets begins with: how ranks find and speak with each other, and nothing that opens anything.
const TUNABLE: [&str; 6] = ["NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_NCCL_", "OMP_"];

/// The ConfigMap, read and checked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Defaults {
    /// Where runs are kept.
    pub bucket: Option<String>,
    /// Patch set to train on.
    pub dataset: Option<String>,
    /// Image of the workers.
    pub image: Option<String>,
    /// When a node fetches that image: Always, IfNotPresent or Never.
    pub image_pull_policy: Option<String>,
    /// `device` of a run's configuration: auto, cpu or cuda.
    pub device: Option<String>,
    /// Configuration beneath every run's own.
    pub config: Map<String, Value>,
    /// What nodes advertise their GPUs as.
    pub gpu_resource: Option<String>,
    /// Secret with the bucket's keys.
    pub credentials_secret: Option<String>,
    /// `AWS_ENDPOINT_URL` of the workers.
    pub s3_endpoint: Option<String>,
    /// `AWS_REGION` of the workers.
    pub s3_region: Option<String>,
    /// What a node takes beside its GPUs.
    pub resources: Resources,
    /// Kueue's queue for runs that name none.
    pub queue: Option<String>,
    /// Variables of the workers: NCCL's and the like.
    pub worker_env: BTreeMap<String, String>,
    /// Further resources that a node takes, by name: rdma/hca, say.
    pub worker_resources: BTreeMap<String, String>,
}

impl Defaults {
    /// Reads the ConfigMap's data. Empty values count as left out.
    ///
    /// # Errors
    /// A key that is none, or a `config` that is no mapping, with the remedy.
    pub fn read(data: &BTreeMap<String, String>) -> Result<Self, String> {
        if let Some(odd) = data.keys().find(|key| !KEYS.contains(&key.as_str())) {
            let near = nearest(odd, KEYS).map(|key| format!("; did you mean {key:?}?")).unwrap_or_default();
            return Err(format!("ConfigMap {NAME} has no key {odd:?}{near}"));
        }
        let get = |key: &str| data.get(key).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let config = match get("config") {
            Some(text) => serde_saphyr::from_str::<Map<String, Value>>(&text)
                .map_err(|e| format!("ConfigMap {NAME}, key config: {e}"))?,
            None => Map::new(),
        };
        let words = |key: &str| -> Result<BTreeMap<String, String>, String> {
            let Some(text) = get(key) else { return Ok(BTreeMap::new()) };
            let values = serde_saphyr::from_str::<BTreeMap<String, Value>>(&text)
                .map_err(|e| format!("ConfigMap {NAME}, key {key}: {e}"))?;
            // A number or a truth is as good as its text.
            let word = |value: Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            Ok(values.into_iter().map(|(name, value)| (name, word(value))).collect())
        };
        let worker_env = words("workerEnv")?;
        if let Some(odd) = worker_env.keys().find(|name| !TUNABLE.iter().any(|start| name.starts_with(start))) {
            return Err(format!(
                "ConfigMap {NAME}, key workerEnv: {odd} cannot be set here, only what begins with {}",
                TUNABLE.join(", ")
            ));
        }
        let worker_resources = words("workerResources")?;
        if let Some(odd) = worker_resources.keys().find(|name| !name.contains('/')) {
            return Err(format!(
                "ConfigMap {NAME}, key workerResources: {odd:?} is no extended resource (as rdma/hca is); cpu, memory and disk are keys of their own"
            ));
        }
        Ok(Self {
            bucket: get("bucket"),
            dataset: get("dataset"),
            image: get("image"),
            image_pull_policy: get("imagePullPolicy"),
            device: get("device"),
            config,
            gpu_resource: get("gpuResource"),
            credentials_secret: get("credentialsSecret"),
            s3_endpoint: get("s3Endpoint"),
            s3_region: get("s3Region"),
            resources: Resources { cpu: get("cpu"), memory: get("memory"), disk: get("disk") },
            queue: get("queue"),
            worker_env,
            worker_resources,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_misspelt_key_is_named_with_the_right_one() {
        let error = Defaults::read(&map(&[("buket", "s3://lab/runs")])).unwrap_err();
        assert!(error.contains("\"buket\"") && error.contains("\"bucket\""), "{error}");
    }

    #[test]
    fn variables_and_resources_of_workers_are_mappings_of_what_may_be_set() {
        let read = Defaults::read(&map(&[
            ("workerEnv", "NCCL_IB_HCA: mlx5\nNCCL_IB_GID_INDEX: 3\n"),
            ("workerResources", "rdma/hca: 1\n"),
            ("queue", "lab"),
        ]))
        .unwrap();
        assert_eq!(read.worker_env["NCCL_IB_GID_INDEX"], "3");
        assert_eq!(read.worker_resources["rdma/hca"], "1");
        assert_eq!(read.queue.as_deref(), Some("lab"));
        let error = Defaults::read(&map(&[("workerEnv", "AWS_SECRET_ACCESS_KEY: x")])).unwrap_err();
        assert!(error.contains("AWS_SECRET_ACCESS_KEY cannot be set here"), "{error}");
        let error = Defaults::read(&map(&[("workerResources", "memory: 4Gi")])).unwrap_err();
        assert!(error.contains("\"memory\"") && error.contains("keys of their own"), "{error}");
    }

    #[test]
    fn empty_values_count_as_left_out_and_config_is_yaml() {
        let read = Defaults::read(&map(&[("bucket", " "), ("config", "batch:\n  per_rank: 8\n")])).unwrap();
        assert_eq!(read.bucket, None);
        assert_eq!(read.config["batch"]["per_rank"], 8);
        assert!(Defaults::read(&map(&[("config", "- 1")])).is_err());
    }
}
