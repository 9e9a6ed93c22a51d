//! ConfigMap `sgcl-defaults`: what the platform's people decide once, so that a user need not.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use sgcl_runstore::config::nearest;

use super::resource::Resources;

/// Name of the ConfigMap.
pub const NAME: &str = "sgcl-defaults";
/// Secret with the bucket's keys, where neither a run nor the ConfigMap names another.
pub const CREDENTIALS: &str = "sgcl-bucket";

const KEYS: [&str; 13] = [
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
];

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
    fn empty_values_count_as_left_out_and_config_is_yaml() {
        let read = Defaults::read(&map(&[("bucket", " "), ("config", "batch:\n  per_rank: 8\n")])).unwrap();
        assert_eq!(read.bucket, None);
        assert_eq!(read.config["batch"]["per_rank"], 8);
        assert!(Defaults::read(&map(&[("config", "- 1")])).is_err());
    }
}
