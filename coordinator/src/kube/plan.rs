//! A run with its defaults filled in: what to train, and what its pods need. No input or output.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use sgcl_runstore::{RunConfig, RunName};

use super::defaults::{self, Defaults};
use super::resource::{Resources, SgclRunSpec};

/// What is asked for, in full.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Name of the run.
    pub run: RunName,
    /// Where it is kept.
    pub bucket: String,
    /// Patch set.
    pub dataset: String,
    /// Configuration.
    pub config: RunConfig,
    /// Nodes wanted.
    pub nodes: u32,
    /// Fewest that train.
    pub min_nodes: u32,
    /// Ranks, and GPUs, on each.
    pub ranks_per_node: u32,
    /// What a pod needs.
    pub pods: PodNeeds,
}

/// What a node's pod needs, beside its name and place.
#[derive(Clone, Debug, PartialEq)]
pub struct PodNeeds {
    /// Image of the worker.
    pub image: String,
    /// When it is fetched.
    pub pull_policy: Option<String>,
    /// What nodes advertise their GPUs as.
    pub gpu_resource: String,
    /// Secret with the bucket's keys; may be missing where pods have an identity of their own.
    pub credentials_secret: String,
    /// `AWS_ENDPOINT_URL`.
    pub s3_endpoint: Option<String>,
    /// `AWS_REGION`.
    pub s3_region: Option<String>,
    /// Requests beside the GPUs.
    pub resources: Resources,
    /// Kueue's queue.
    pub queue: Option<String>,
    /// Variables beside our own.
    pub env: BTreeMap<String, String>,
    /// Further resources, requested and limited alike.
    pub extended: BTreeMap<String, String>,
    /// The rest goes into the pod as it is.
    pub spec: SgclRunSpec,
}

/// A run that cannot be as it is asked for. The user's to mend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PlanError(pub String);

impl Plan {
    /// The run's own fields, else the defaults'.
    ///
    /// # Errors
    /// [`PlanError`] naming the field and the remedy.
    pub fn of(name: &str, spec: &SgclRunSpec, defaults: &Defaults) -> Result<Self, PlanError> {
        let needed = |field: &str, own: &Option<String>, default: &Option<String>| {
            own.clone().or_else(|| default.clone()).ok_or_else(|| {
                PlanError(format!("no {field}: set spec.{field}, or {field} in the ConfigMap {}", defaults::NAME))
            })
        };
        let resources = spec.resources.clone().unwrap_or_default();
        let fallback = defaults.resources.clone();
        Ok(Self {
            run: RunName::new(name).map_err(|e| PlanError(e.to_string()))?,
            bucket: needed("bucket", &spec.bucket, &defaults.bucket)?,
            dataset: needed("dataset", &spec.dataset, &defaults.dataset)?,
            config: config(spec, defaults)?,
            nodes: spec.nodes,
            min_nodes: spec.min_nodes.unwrap_or(1),
            ranks_per_node: spec.gpus_per_node.unwrap_or(1),
            pods: PodNeeds {
                // Workers of this coordinator's version: an upgrade brings them along.
                image: (spec.image.clone().or_else(|| defaults.image.clone()))
                    .unwrap_or_else(|| concat!("ghcr.io/sgcl/sgcl-worker:", env!("CARGO_PKG_VERSION")).to_owned()),
                pull_policy: defaults.image_pull_policy.clone(),
                gpu_resource: defaults.gpu_resource.clone().unwrap_or_else(|| "nvidia.com/gpu".to_owned()),
                credentials_secret: (spec.credentials_secret.clone())
                    .or_else(|| defaults.credentials_secret.clone())
                    .unwrap_or_else(|| defaults::CREDENTIALS.to_owned()),
                s3_endpoint: defaults.s3_endpoint.clone(),
                s3_region: defaults.s3_region.clone(),
                resources: Resources {
                    cpu: resources.cpu.or(fallback.cpu),
                    memory: resources.memory.or(fallback.memory),
                    disk: resources.disk.or(fallback.disk),
                },
                queue: spec.queue.clone().or_else(|| defaults.queue.clone()),
                env: defaults.worker_env.clone(),
                extended: defaults.worker_resources.clone(),
                spec: spec.clone(),
            },
        })
    }

    /// Ranks when all nodes are there.
    #[must_use]
    pub fn world(&self) -> usize {
        self.nodes as usize * self.ranks_per_node as usize
    }
}

/// Built-in defaults, then the ConfigMap's, then the run's own, then the fields that have a name in the resource.
fn config(spec: &SgclRunSpec, defaults: &Defaults) -> Result<RunConfig, PlanError> {
    let mut tree = Value::Object(defaults.config.clone());
    if let Some(device) = &defaults.device {
        merge(&mut tree, json!({ "device": device }));
    }
    merge(&mut tree, Value::Object(spec.config.clone().unwrap_or_default()));
    if let Some(max_restarts) = spec.max_restarts {
        merge(&mut tree, json!({ "max_restarts": max_restarts }));
    }
    if let Some(checkpoint) = &spec.checkpoint {
        let named = [
            ("every_epochs", checkpoint.every_epochs.map(u64::from)),
            ("every_steps", checkpoint.every_steps),
            ("every_seconds", checkpoint.every_seconds),
            ("keep_last", checkpoint.keep_last.map(u64::from)),
        ];
        let set: Map<_, _> = named.into_iter().filter_map(|(key, n)| Some((key.to_owned(), n?.into()))).collect();
        merge(&mut tree, json!({ "checkpoint": set }));
    }
    // JSON is YAML.
    let text = tree.to_string();
    RunConfig::from_yaml(&text, "spec.config", &[]).map_err(|e| PlanError(e.to_string()))
}

/// Mappings key by key, all else as a whole.
fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::kube::resource::Checkpoint;

    fn defaults() -> Defaults {
        Defaults {
            bucket: Some("s3://lab/runs".into()),
            dataset: Some("s3://lab/patches".into()),
            image: Some("sgcl-worker:1".into()),
            device: Some("cpu".into()),
            config: json!({ "epochs": 7, "batch": { "per_rank": 8 } }).as_object().unwrap().clone(),
            ..Defaults::default()
        }
    }

    #[test]
    fn a_run_of_two_numbers_takes_everything_else_from_the_defaults() {
        let spec = SgclRunSpec { nodes: 2, gpus_per_node: Some(4), ..SgclRunSpec::default() };
        let plan = Plan::of("first", &spec, &defaults()).unwrap();
        assert_eq!((plan.nodes, plan.min_nodes, plan.ranks_per_node, plan.world()), (2, 1, 4, 8));
        assert_eq!(plan.dataset, "s3://lab/patches");
        assert_eq!(plan.config.epochs, 7);
        assert_eq!(plan.config.batch.per_rank, 8);
        assert_eq!(plan.pods.credentials_secret, "sgcl-bucket");
    }

    #[test]
    fn the_runs_own_configuration_lies_over_the_defaults_key_by_key() {
        let own = json!({ "batch": { "accumulate": 2 }, "epochs": 3 });
        let spec = SgclRunSpec {
            nodes: 1,
            config: own.as_object().cloned(),
            max_restarts: Some(9),
            checkpoint: Some(Checkpoint { every_steps: Some(5), ..Checkpoint::default() }),
            ..SgclRunSpec::default()
        };
        let config = Plan::of("first", &spec, &defaults()).unwrap().config;
        assert_eq!((config.epochs, config.batch.per_rank, config.batch.accumulate), (3, 8, 2));
        assert_eq!((config.max_restarts, config.checkpoint.every_steps), (9, 5));
    }

    #[test]
    fn what_is_missing_is_named_with_both_places_to_put_it() {
        let none = Defaults { bucket: None, ..defaults() };
        let error = Plan::of("first", &SgclRunSpec { nodes: 1, ..SgclRunSpec::default() }, &none).unwrap_err();
        assert!(error.0.contains("spec.bucket") && error.0.contains("sgcl-defaults"), "{error}");
    }

    #[test]
    fn evaluations_are_the_runs_own_or_those_of_the_defaults() {
        let named = |name: &str| json!({ "evaluations": [{ "name": name, "dataset": "s3://lab/labelled" }] });
        let defaults = Defaults { config: named("grain").as_object().unwrap().clone(), ..defaults() };
        let found = |spec: &SgclRunSpec| {
            let config = Plan::of("first", spec, &defaults).unwrap().config;
            config.evaluations.into_iter().map(|one| one.name).collect::<Vec<_>>()
        };
        let spec = SgclRunSpec { nodes: 1, ..SgclRunSpec::default() };
        assert_eq!(found(&spec), ["grain"]);
        assert_eq!(found(&SgclRunSpec { config: named("tumour").as_object().cloned(), ..spec }), ["tumour"]);
    }

    #[test]
    fn a_misspelt_key_of_the_configuration_is_named() {
        let own = json!({ "epoch": 3 });
        let spec = SgclRunSpec { nodes: 1, config: own.as_object().cloned(), ..SgclRunSpec::default() };
        let error = Plan::of("first", &spec, &defaults()).unwrap_err();
        assert!(error.0.contains("epochs"), "{error}");
    }
}
