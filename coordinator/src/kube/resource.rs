//! `SgclRun`: what a user asks for, and what came of it. `deploy/base/crd.yaml` is printed from these types.

// The derived schema has a public twin of the spec.
#![allow(unreachable_pub)]

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, CustomResourceExt, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A pretraining run. Fields that are left out are taken from the ConfigMap `sgcl-defaults`.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "sgcl.dev",
    version = "v1alpha1",
    kind = "SgclRun",
    namespaced,
    status = "SgclRunStatus",
    derive = "PartialEq",
    derive = "Default",
    shortname = "sgcl",
    doc = "A pretraining run of sgcl over whole-slide images.",
    validation = Rule::new("self.metadata.name.size() <= 50 && self.metadata.name.matches('^[a-z]([a-z0-9-]*[a-z0-9])?$')")
        .message("a run's name is at most 50 of a-z, 0-9 and '-', begins with a letter and does not end with '-'"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Nodes", type_ = "string", json_path = ".status.nodes"),
    printcolumn(name = "Epoch", type_ = "string", json_path = ".status.epochs"),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress"),
    printcolumn(name = "ETA", type_ = "string", json_path = ".status.eta"),
    printcolumn(name = "Restarts", type_ = "integer", json_path = ".status.restarts"),
    printcolumn(name = "Queue", type_ = "string", json_path = ".spec.queue", priority = 1),
    printcolumn(name = "Probe", type_ = "string", json_path = ".status.probe", priority = 1),
    printcolumn(name = "Goodput", type_ = "string", json_path = ".status.goodput", priority = 1),
    printcolumn(name = "Last-Commit", type_ = "integer", json_path = ".status.lastCommit", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.nodes >= 1 && self.nodes <= 1024").message("nodes is the number of nodes wanted: 1 to 1024"),
    validation = Rule::new("!has(self.minNodes) || self.minNodes >= 1 && self.minNodes <= self.nodes")
        .message("minNodes is the fewest nodes that train: at least 1, and no more than nodes"),
    validation = Rule::new("!has(self.gpusPerNode) || self.gpusPerNode >= 1 && self.gpusPerNode <= 64")
        .message("gpusPerNode is the number of GPUs, and ranks, on each node: 1 to 64"),
    validation = Rule::new("has(self.gpusPerNode) == has(oldSelf.gpusPerNode) && (!has(self.gpusPerNode) || self.gpusPerNode == oldSelf.gpusPerNode)")
        .message("gpusPerNode cannot change; scale by nodes, or submit a new run"),
    validation = Rule::new("has(self.bucket) == has(oldSelf.bucket) && (!has(self.bucket) || self.bucket == oldSelf.bucket)")
        .message("bucket cannot change: the run lives there; submit a new run"),
    validation = Rule::new("has(self.dataset) == has(oldSelf.dataset) && (!has(self.dataset) || self.dataset == oldSelf.dataset)")
        .message("dataset cannot change: the run has learnt from it; submit a new run"),
    validation = Rule::new("!has(self.bucket) || self.bucket.matches('^s3://[^@]+$')")
        .message("bucket is a URL such as s3://lab/runs, without credentials"),
    validation = Rule::new("!has(self.dataset) || self.dataset.matches('^s3://[^@]+$')")
        .message("dataset is the URL of a patch set such as s3://lab/patches, without credentials")
)]
pub struct SgclRunSpec {
    /// Patch set to train on, s3://…; made by `sgclctl ingest`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1000))]
    pub dataset: Option<String>,
    /// Where the run is kept, s3://…; it stays when this object is deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1000))]
    pub bucket: Option<String>,
    /// Configuration, as in the files under configs/: only what differs from the defaults. Fixed once the run has begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub config: Option<Map<String, Value>>,
    /// Nodes wanted.
    #[schemars(with = "i32")]
    pub nodes: u32,
    /// Fewest nodes that train [default: 1].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    pub min_nodes: Option<u32>,
    /// GPUs, and ranks, on each node [default: 1].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>")]
    pub gpus_per_node: Option<u32>,
    /// Image of the workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Kueue's LocalQueue that admits the nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<String>,
    /// PriorityClass of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<String>,
    /// Failures after which the run fails; preemptions do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 0))]
    pub max_restarts: Option<u32>,
    /// When to commit and what to keep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Checkpoint>,
    /// What a node takes beside its GPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// Taints that the pods tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<TolerationSchema>")]
    pub tolerations: Vec<Toleration>,
    /// Labels that a machine must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Label of machines within which the nodes should lie together, e.g. topology.kubernetes.io/zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology_key: Option<String>,
    /// Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for the workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret: Option<String>,
    /// Commit, then give the nodes back until this is false again.
    #[serde(default)]
    pub suspend: bool,
    /// Commit and end for good.
    #[serde(default)]
    pub cancel: bool,
}

/// When to commit and what to keep.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Checkpoint {
    /// After so many epochs; 0: never for this reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 0))]
    pub every_epochs: Option<u32>,
    /// After so many steps; 0: never for this reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>", range(min = 0))]
    pub every_steps: Option<u64>,
    /// After so many seconds; 0: never for this reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>", range(min = 0))]
    pub every_seconds: Option<u64>,
    /// Newest commits that are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i32>", range(min = 1))]
    pub keep_last: Option<u32>,
}

/// What a node takes beside its GPUs: requests, and for memory the limit too.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Resources {
    /// Cores, e.g. 8 or 500m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// Memory, e.g. 64Gi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// Disk for cached shards, e.g. 100Gi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}

/// A core/v1 toleration, for the schema alone.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase")]
#[allow(dead_code)]
struct TolerationSchema {
    effect: Option<String>,
    key: Option<String>,
    operator: Option<String>,
    toleration_seconds: Option<i64>,
    value: Option<String>,
}

/// What a run is doing.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Seen; nothing is started.
    #[default]
    Pending,
    /// Nodes are asked for; too few are there to train.
    Waiting,
    /// Training.
    Running,
    /// Stopped after a commit; goes on when `suspend` is false.
    Suspended,
    /// All epochs are trained, weights are exported.
    Finished,
    /// Ended on request.
    Cancelled,
    /// Given up; `message` says why and what to do.
    Failed,
}

impl Phase {
    /// Whether nothing more will come of it.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Finished | Self::Cancelled | Self::Failed)
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// How an evaluation stands.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum EvaluationPhase {
    /// Its Job is asked for; nothing runs.
    #[default]
    Waiting,
    /// It is being made.
    Running,
    /// Its results are in the bucket.
    Done,
    /// Given up; `message` says why and what to do.
    Failed,
}

impl EvaluationPhase {
    /// Whether nothing more will come of it.
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed)
    }
}

impl std::fmt::Display for EvaluationPhase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// What is made of a run's weights.
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum EvaluationKind {
    /// Figures on a labelled patch set.
    #[default]
    Evaluation,
    /// Features of a patch set.
    Embedding,
}

/// What came of an evaluation or an embedding that the configuration names.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EvaluationStatus {
    /// Its name in the configuration.
    pub name: String,
    /// Which of the two.
    #[serde(default)]
    pub kind: EvaluationKind,
    /// How it stands.
    pub phase: EvaluationPhase,
    /// Why, and what to do where something is to be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Accuracies of the run's weights, or how many features there are, in a line; the bucket has all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub figures: Option<String>,
}

/// What came of a run.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SgclRunStatus {
    /// What it is doing.
    #[serde(default)]
    pub phase: Phase,
    /// Why, and what to do where something is to be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Nodes that have joined, of those wanted: 3/4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<String>,
    /// Nodes that have joined.
    #[serde(default)]
    #[schemars(with = "i32")]
    pub nodes_ready: u32,
    /// Epoch under way, from 1, of those wanted: 3/100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epochs: Option<String>,
    /// Steps finished.
    #[serde(default)]
    #[schemars(with = "i64")]
    pub step: u64,
    /// Share done, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<String>,
    /// Time left at the present pace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta: Option<String>,
    /// Failures survived.
    #[serde(default)]
    #[schemars(with = "i32")]
    pub restarts: u32,
    /// Newest commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>")]
    pub last_commit: Option<u64>,
    /// Share of the time since training began that was not spent on changes of membership, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goodput: Option<String>,
    /// Patches a second, all ranks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub patches_per_second: Option<String>,
    /// Accuracy of the newest online probe, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probe: Option<String>,
    /// Evaluations and embeddings that the configuration names, once the run is finished.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub evaluations: Vec<EvaluationStatus>,
    /// The run's part of the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// The leader's term that wrote this: the transitions of the coordinator's Lease.
    #[serde(default)]
    #[schemars(with = "i64")]
    pub lease_epoch: u64,
    /// The spec's generation that this speaks of.
    #[serde(default)]
    pub observed_generation: i64,
    /// Admitted, Training, Finished; Evaluated where the configuration names evaluations or embeddings.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<ConditionSchema>")]
    pub conditions: Vec<Condition>,
}

/// A meta/v1 condition, for the schema alone.
#[derive(JsonSchema)]
#[schemars(rename_all = "camelCase")]
#[allow(dead_code)]
struct ConditionSchema {
    #[schemars(rename = "type")]
    type_: String,
    status: String,
    reason: String,
    message: String,
    last_transition_time: String,
    observed_generation: Option<i64>,
}

/// The custom resource's definition, as a manifest.
///
/// # Errors
/// It cannot be written as YAML.
pub fn definition() -> anyhow::Result<String> {
    let text = serde_saphyr::to_string(&SgclRun::crd())?;
    Ok(format!("# Printed from coordinator/src/kube/resource.rs by `sgcl-coordinator crd`.\n{text}"))
}

fn any_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "nullable": true, "x-kubernetes-preserve-unknown-fields": true })
}
