//! One Job a node slot and attempt: completions 1, no retry of its own, under the restricted pod standard.
//!
//! Not one Indexed Job for all: its back-off counts preempted pods too (kubernetes#130881), and the tenth replacement would wait minutes.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::{Value, json};

use super::plan::PodNeeds;
use sgcl_proto::{CERTIFICATE_VARIABLE, TOKEN_VARIABLE};
use sgcl_telemetry::Traceparent;

use super::{ATTEMPT_LABEL, MANAGER, RUN_LABEL, SLOT_LABEL};

/// Time from a pod's SIGTERM to its end. The supervisor wants ten seconds.
const GRACE_S: u32 = 20;
/// An ended Job is kept so long, for its logs.
const KEPT_S: u32 = 3600;

/// The kubelet makes tokens anew at four fifths of this.
const TOKEN_S: u32 = 3600;
/// Where a worker's pod answers Prometheus, its container's port `metrics`.
pub const METRICS_PORT: u16 = 9464;
/// The only container of a worker's pod.
pub(super) const CONTAINER: &str = "worker";
/// Exit codes of what is the user's to mend.
pub(super) const HOPELESS: [i32; 5] = [64, 65, 69, 73, 78];
/// Folder of the token in a worker.
const TOKEN_FOLDER: &str = "/var/run/sgcl/token";

/// What a run's pods trace and log with, as this coordinator does.
#[derive(Clone, Debug, Default)]
pub struct HandedOn {
    /// The run's trace, for whoever is started while no span of it is under way.
    pub trace: Option<Traceparent>,
    /// Variables of this coordinator's own environment.
    pub environment: Vec<(String, String)>,
}

/// How a run's workers come to trust the coordinator, and it them.
#[derive(Clone, Debug)]
pub struct WorkerLine {
    /// The authority's certificate, PEM.
    pub certificate: String,
    /// Whom their tokens are made out to, see [`crate::trust::audience`].
    pub audience: String,
    /// What they trace and log with.
    pub handed: HandedOn,
}

/// A node to be started.
#[derive(Clone, Debug)]
pub struct NodeJob<'a> {
    /// Name of the run.
    pub run: &'a str,
    /// The object that everything goes with.
    pub owner: &'a OwnerReference,
    /// What its pod needs.
    pub needs: &'a PodNeeds,
    /// How it speaks with the coordinator.
    pub line: &'a WorkerLine,
    /// Ranks, and GPUs.
    pub ranks: u32,
    /// Place of the run.
    pub slot: u32,
    /// Count of the Jobs of this slot before.
    pub number: u32,
    /// Where the node joins.
    pub coordinator: &'a str,
    /// Machines that must not be used.
    pub never: &'a [String],
    /// Machines that had better not be used.
    pub rather_not: &'a [String],
}

/// Name of a slot's Job, which is the node's name too.
#[must_use]
pub fn name(run: &str, slot: u32, number: u32) -> String {
    format!("{run}-{slot}-{number}")
}

/// Whether a Job's last pod has ended.
pub(super) fn has_ended(job: &Job) -> bool {
    let status = job.status.clone().unwrap_or_default();
    let failed = status.conditions.iter().flatten().any(|c| c.type_ == "Failed" && c.status == "True");
    let tries = job.spec.as_ref().and_then(|spec| spec.backoff_limit).unwrap_or(0);
    status.completion_time.is_some() || failed || status.failed > Some(tries)
}

/// A Job and what goes into it, of nodes and of evaluations.
pub(super) struct Parts<'a> {
    /// Its name.
    pub(super) name: &'a str,
    /// Labels of the Job and of its pod.
    pub(super) labels: Value,
    /// The object that it goes with.
    pub(super) owner: &'a OwnerReference,
    /// How often its pod is made anew when it fails.
    pub(super) retries: u32,
    /// Which of its pod's ends count as what, where that is not left to `retries` alone.
    pub(super) failures: Option<Value>,
    /// Its pod, see [`pod`].
    pub(super) pod: Value,
}

impl Parts<'_> {
    /// The object.
    ///
    /// # Errors
    /// Something in the run's spec is not what Kubernetes takes.
    pub(super) fn build(self, needs: &PodNeeds) -> Result<Job, serde_json::Error> {
        let mut labels = self.labels.clone();
        if let Some(queue) = &needs.queue {
            labels["kueue.x-k8s.io/queue-name"] = json!(queue);
        }
        serde_json::from_value(json!({
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": { "name": self.name, "labels": labels, "ownerReferences": [self.owner] },
            "spec": {
                "completions": 1,
                "parallelism": 1,
                "backoffLimit": self.retries,
                "podFailurePolicy": self.failures,
                "ttlSecondsAfterFinished": KEPT_S,
                "template": { "metadata": { "labels": self.labels }, "spec": self.pod },
            },
        }))
    }
}

/// The spec of a pod of one container that runs `sgcl-worker` with `args`, under the restricted pod standard. It has the bucket's keys and
/// no others. `env` comes before what the bucket and the platform bring and what this coordinator hands on.
pub(super) fn pod(needs: &PodNeeds, handed: &HandedOn, gpus: u32, env: &[Value], args: &Value) -> Value {
    let variable = |name: &str, value: &Option<String>| value.as_ref().map(|v| json!({ "name": name, "value": v }));
    let trace = sgcl_telemetry::current().or(handed.trace).map(|here| here.to_string());
    let ours = [
        Some(json!({ "name": "HOME", "value": "/tmp" })),
        variable("AWS_ENDPOINT_URL", &needs.s3_endpoint),
        variable("AWS_REGION", &needs.s3_region),
        variable(sgcl_telemetry::VARIABLE, &trace),
    ];
    let theirs = needs.env.iter().chain(handed.environment.iter().map(|(name, value)| (name, value)));
    let env: Vec<Value> = (env.iter().cloned())
        .chain(ours.into_iter().flatten())
        .chain(theirs.map(|(name, value)| json!({ "name": name, "value": value })))
        .collect();
    let mut shm = json!({ "medium": "Memory" });
    if let Some(memory) = &needs.resources.memory {
        shm["sizeLimit"] = json!(memory);
    }
    let disk = needs.resources.disk.as_ref().map_or(json!({}), |size| json!({ "sizeLimit": size }));
    json!({
        "serviceAccountName": "sgcl-worker",
        // The API server takes this account's own token.
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_S,
        "priorityClassName": needs.spec.priority,
        "nodeSelector": needs.spec.node_selector,
        "tolerations": needs.spec.tolerations,
        "securityContext": {
            "runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
            "seccompProfile": { "type": "RuntimeDefault" },
        },
        "containers": [{
            "name": CONTAINER,
            "image": needs.image,
            "imagePullPolicy": needs.pull_policy,
            "args": args,
            "env": env,
            // May be missing where the pods' account itself opens the bucket.
            "envFrom": [{ "secretRef": { "name": needs.credentials_secret, "optional": true } }],
            "resources": resources(needs, gpus),
            "securityContext": {
                "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                "capabilities": { "drop": ["ALL"] },
            },
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "volumeMounts": [{ "name": "tmp", "mountPath": "/tmp" }, { "name": "shm", "mountPath": "/dev/shm" }],
        }],
        "volumes": [{ "name": "tmp", "emptyDir": disk }, { "name": "shm", "emptyDir": shm }],
    })
}

fn resources(needs: &PodNeeds, gpus: u32) -> Value {
    let mut requests = json!({});
    let mut limits = json!({});
    if let Some(cpu) = &needs.resources.cpu {
        requests["cpu"] = json!(cpu);
    }
    if let Some(memory) = &needs.resources.memory {
        requests["memory"] = json!(memory);
        limits["memory"] = json!(memory);
    }
    if let Some(disk) = &needs.resources.disk {
        requests["ephemeral-storage"] = json!(disk);
    }
    for all in [&mut requests, &mut limits] {
        for (name, quantity) in &needs.extended {
            all[name] = json!(quantity);
        }
        all[&needs.gpu_resource] = json!(gpus.to_string());
    }
    json!({ "requests": requests, "limits": limits })
}

impl NodeJob<'_> {
    /// The object.
    ///
    /// # Errors
    /// Something in the run's spec is not what Kubernetes takes.
    pub fn build(&self) -> Result<Job, serde_json::Error> {
        let name = name(self.run, self.slot, self.number);
        let labels = json!({
            "app.kubernetes.io/name": "sgcl-worker",
            "app.kubernetes.io/managed-by": MANAGER,
            RUN_LABEL: self.run,
            SLOT_LABEL: self.slot.to_string(),
            ATTEMPT_LABEL: self.number.to_string(),
        });
        let env = [
            json!({ "name": "POD_IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } }),
            json!({ "name": CERTIFICATE_VARIABLE, "value": self.line.certificate }),
            json!({ "name": TOKEN_VARIABLE, "value": format!("{TOKEN_FOLDER}/token") }),
        ];
        let args = json!([
            "node",
            "--coordinator",
            self.coordinator,
            "--run",
            self.run,
            "--node",
            name,
            "--slot",
            self.slot.to_string(),
            "--ranks",
            self.ranks.to_string(),
            "--address",
            "$(POD_IP)",
            "--metrics-port",
            METRICS_PORT.to_string(),
        ]);
        let mut pod = pod(self.needs, &self.line.handed, self.ranks, &env, &args);
        pod["affinity"] = self.affinity();
        let container = &mut pod["containers"][0];
        container["ports"] = json!([{ "name": "metrics", "containerPort": METRICS_PORT }]);
        // Of one audience, for this pod alone, gone with it.
        let token = json!({ "audience": self.line.audience, "expirationSeconds": TOKEN_S, "path": "token" });
        add(&mut container["volumeMounts"], json!({ "name": "token", "mountPath": TOKEN_FOLDER, "readOnly": true }));
        let sources = json!([{ "serviceAccountToken": token }]);
        add(&mut pod["volumes"], json!({ "name": "token", "projected": { "sources": sources } }));
        Parts { name: &name, labels, owner: self.owner, retries: 0, failures: None, pod }.build(self.needs)
    }

    /// The run's nodes on different machines where there are enough (a bank shard's copies are on two nodes), and near each other where
    /// the run says what near is.
    fn affinity(&self) -> Value {
        let of_this_run = json!({ "matchLabels": { RUN_LABEL: self.run } });
        let mut affinity = json!({ "podAntiAffinity": { "preferredDuringSchedulingIgnoredDuringExecution": [{
            "weight": 100,
            "podAffinityTerm": { "topologyKey": "kubernetes.io/hostname", "labelSelector": of_this_run },
        }] } });
        if let Some(key) = &self.needs.spec.topology_key {
            affinity["podAffinity"] = json!({ "preferredDuringSchedulingIgnoredDuringExecution": [{
                "weight": 50, "podAffinityTerm": { "topologyKey": key, "labelSelector": of_this_run },
            }] });
        }
        // A field takes one value an expression.
        let not_in = |machines: &[String]| -> Value {
            let fields: Vec<Value> = machines
                .iter()
                .map(|machine| json!({ "key": "metadata.name", "operator": "NotIn", "values": [machine] }))
                .collect();
            json!({ "matchFields": fields })
        };
        if !self.never.is_empty() {
            affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] =
                json!({ "nodeSelectorTerms": [not_in(self.never)] });
        }
        if !self.rather_not.is_empty() {
            affinity["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] =
                json!([{ "weight": 100, "preference": not_in(self.rather_not) }]);
        }
        affinity
    }
}

fn add(list: &mut Value, value: Value) {
    if let Value::Array(values) = list {
        values.push(value);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::kube::defaults::Defaults;
    use crate::kube::plan::Plan;
    use crate::kube::resource::{Resources, SgclRunSpec};

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn built(spec: &SgclRunSpec, never: &[String]) -> Value {
        let defaults = Defaults {
            bucket: Some("s3://lab/runs".into()),
            dataset: Some("s3://lab/patches".into()),
            image: Some("sgcl-worker:1".into()),
            s3_endpoint: Some("http://s3:7070".into()),
            worker_env: [("NCCL_IB_HCA".to_owned(), "mlx5".to_owned())].into(),
            worker_resources: [("rdma/hca".to_owned(), "1".to_owned())].into(),
            ..Defaults::default()
        };
        let plan = Plan::of("first", spec, &defaults).unwrap();
        let owner = OwnerReference { name: "first".into(), uid: "u".into(), ..OwnerReference::default() };
        let job = NodeJob {
            run: "first",
            owner: &owner,
            needs: &plan.pods,
            line: &WorkerLine {
                certificate: "PEM".into(),
                audience: "sgcl.dev/sgcl/first".into(),
                handed: HandedOn {
                    trace: TRACE.parse().ok(),
                    environment: vec![("OTEL_EXPORTER_OTLP_ENDPOINT".into(), "http://collector:4317".into())],
                },
            },
            ranks: plan.ranks_per_node,
            slot: 1,
            number: 3,
            coordinator: "https://sgcl-coordinator.sgcl.svc:7443",
            never,
            rather_not: &[],
        };
        serde_json::to_value(job.build().unwrap()).unwrap()
    }

    #[test]
    fn a_nodes_job_runs_one_pod_once_and_asks_for_its_gpus() {
        let spec = SgclRunSpec {
            nodes: 2,
            gpus_per_node: Some(4),
            queue: Some("lab".into()),
            resources: Some(Resources { memory: Some("8Gi".into()), ..Resources::default() }),
            ..SgclRunSpec::default()
        };
        let job = built(&spec, &[]);
        assert_eq!(job["metadata"]["name"], "first-1-3");
        assert_eq!(job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], "lab");
        assert_eq!(job["metadata"]["ownerReferences"][0]["uid"], "u");
        assert_eq!(job["spec"]["backoffLimit"], 0);
        let pod = &job["spec"]["template"]["spec"];
        assert_eq!(pod["restartPolicy"], "Never");
        assert_eq!(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"], "4");
        assert_eq!(pod["containers"][0]["resources"]["limits"]["memory"], "8Gi");
    }

    #[test]
    fn its_pod_meets_the_restricted_standard_and_its_only_token_is_made_out_to_the_run() {
        let job = built(&SgclRunSpec { nodes: 1, ..SgclRunSpec::default() }, &[]);
        let pod = &job["spec"]["template"]["spec"];
        assert_eq!(pod["automountServiceAccountToken"], false);
        let sources = &pod["volumes"][2]["projected"]["sources"];
        assert_eq!(sources.as_array().unwrap().len(), 1);
        assert_eq!(sources[0]["serviceAccountToken"]["audience"], "sgcl.dev/sgcl/first");
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        let container = &pod["containers"][0]["securityContext"];
        assert_eq!(container["allowPrivilegeEscalation"], false);
        assert_eq!(container["capabilities"]["drop"], json!(["ALL"]));
    }

    #[test]
    fn its_worker_goes_on_with_the_runs_trace_and_knows_the_collector() {
        let job = built(&SgclRunSpec { nodes: 1, ..SgclRunSpec::default() }, &[]);
        let env = &job["spec"]["template"]["spec"]["containers"][0]["env"];
        let value = |name: &str| env.as_array().unwrap().iter().find(|v| v["name"] == name).unwrap()["value"].clone();
        assert_eq!(value("TRACEPARENT"), TRACE);
        assert_eq!(value("OTEL_EXPORTER_OTLP_ENDPOINT"), "http://collector:4317");
    }

    #[test]
    fn what_the_platform_gives_every_worker_is_in_its_pod() {
        let job = built(&SgclRunSpec { nodes: 1, gpus_per_node: Some(4), ..SgclRunSpec::default() }, &[]);
        let container = &job["spec"]["template"]["spec"]["containers"][0];
        for all in ["requests", "limits"] {
            assert_eq!(container["resources"][all], json!({ "rdma/hca": "1", "nvidia.com/gpu": "4" }));
        }
        let env = container["env"].as_array().unwrap();
        assert!(env.contains(&json!({ "name": "NCCL_IB_HCA", "value": "mlx5" })), "{env:?}");
        assert_eq!(container["ports"][0], json!({ "name": "metrics", "containerPort": METRICS_PORT }));
    }

    #[test]
    fn a_job_has_ended_with_its_last_pod() {
        let ended = |retries: i32, status: Value| {
            let job = json!({ "spec": { "backoffLimit": retries, "template": {} }, "status": status });
            has_ended(&serde_json::from_value(job).unwrap())
        };
        assert!(!ended(0, json!({ "active": 1 })));
        assert!(ended(0, json!({ "failed": 1 })));
        assert!(!ended(2, json!({ "failed": 2 })), "it is tried once more");
        assert!(ended(2, json!({ "failed": 1, "conditions": [{ "type": "Failed", "status": "True" }] })));
        assert!(ended(2, json!({ "completionTime": "2026-01-01T00:00:00Z" })));
    }

    #[test]
    fn excluded_machines_are_ruled_out_one_by_one() {
        let job = built(&SgclRunSpec { nodes: 1, ..SgclRunSpec::default() }, &["a".into(), "b".into()]);
        let terms = &job["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
        let fields = terms["nodeSelectorTerms"][0]["matchFields"].as_array().unwrap();
        assert_eq!(fields.len(), 2);
        assert_eq!(fields[1]["values"], json!(["b"]));
    }
}
