//! One evaluation or embedding of a finished run: its Job, and what Job and pods say of it. No input or output.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt;
use serde_json::json;
use sgcl_runstore::FollowUp;

use super::job::{self, CONTAINER, HOPELESS, HandedOn, Parts};
use super::plan::PodNeeds;
use super::pods::{container, waits};
use super::resource::{EvaluationKind, EvaluationPhase, EvaluationStatus, Phase, SgclRunStatus};
use super::{EVALUATES_LABEL, MANAGER};

/// A pod that fails is made anew so often: what fails thrice fails for a reason.
const RETRIES: u32 = 2;
/// Last words have room for so many characters.
const SAID_CHARS: usize = 300;

/// Whether evaluations of a finished run are still to be made.
#[must_use]
pub fn outstanding(status: &SgclRunStatus) -> bool {
    status.phase == Phase::Finished && status.evaluations.iter().any(|one| !one.phase.is_over())
}

/// All of them, none begun.
#[must_use]
pub fn to_come(wanted: &[FollowUp]) -> Vec<EvaluationStatus> {
    let begun = |one: &FollowUp| EvaluationStatus {
        name: one.name().to_owned(),
        kind: one.into(),
        ..EvaluationStatus::default()
    };
    wanted.iter().map(begun).collect()
}

/// Those that are not over come to wait, for this reason.
#[must_use]
pub fn put_off(known: &[EvaluationStatus], why: Option<&str>) -> Vec<EvaluationStatus> {
    let mut list = known.to_vec();
    for one in list.iter_mut().filter(|one| !one.phase.is_over()) {
        (one.phase, one.message) = (EvaluationPhase::Waiting, why.map(str::to_owned));
    }
    list
}

/// Those that are not over have failed, for this reason.
#[must_use]
pub fn given_up(known: &[EvaluationStatus], why: &str) -> Vec<EvaluationStatus> {
    let mut list = known.to_vec();
    list.iter_mut().filter(|one| !one.phase.is_over()).for_each(|one| one.failed(why.to_owned()));
    list
}

impl EvaluationStatus {
    /// It is made; `figures` are what came of it, in a line.
    pub fn done(&mut self, figures: String) {
        (self.phase, self.message, self.figures) = (EvaluationPhase::Done, None, Some(figures));
    }

    /// It is given up, for this reason.
    pub fn failed(&mut self, why: String) {
        (self.phase, self.message, self.figures) = (EvaluationPhase::Failed, Some(why), None);
    }
}

impl From<&FollowUp> for EvaluationKind {
    fn from(one: &FollowUp) -> Self {
        match one {
            FollowUp::Evaluation(_) => Self::Evaluation,
            FollowUp::Embedding(_) => Self::Embedding,
        }
    }
}

/// Name of its Job; `index` is its place among all that follows the run.
#[must_use]
pub fn name(run: &str, index: usize, kind: EvaluationKind) -> String {
    let word = match kind {
        EvaluationKind::Evaluation => "eval",
        EvaluationKind::Embedding => "embed",
    };
    format!("{run}-{word}-{index}")
}

/// An evaluation or embedding to be made, on one GPU.
#[derive(Clone, Debug)]
pub struct EvaluationJob<'a> {
    /// Name of the run.
    pub run: &'a str,
    /// Its place among all that follows the run.
    pub index: usize,
    /// What it is.
    pub wanted: &'a FollowUp,
    /// The bucket's URL.
    pub bucket: &'a str,
    /// The object that it goes with.
    pub owner: &'a OwnerReference,
    /// What its pod needs.
    pub needs: &'a PodNeeds,
    /// What that traces and logs with.
    pub handed: &'a HandedOn,
}

impl EvaluationJob<'_> {
    /// The object. It has no key to the coordinator: its results go to the bucket.
    ///
    /// # Errors
    /// Something in the run's spec is not what Kubernetes takes.
    pub fn build(&self) -> Result<Job, serde_json::Error> {
        let labels = json!({
            "app.kubernetes.io/name": format!("sgcl-{}", self.wanted.kind()),
            "app.kubernetes.io/managed-by": MANAGER,
            EVALUATES_LABEL: self.run,
        });
        // $(NAME) in an argument is a variable's value, $$ is a dollar.
        let words = self.wanted.words(self.run, self.bucket)?;
        let args = json!(words.iter().map(|word| word.replace('$', "$$")).collect::<Vec<_>>());
        // A pod that was taken away has not failed; what is the user's to mend would fail again.
        let failures = json!({ "rules": [
            { "action": "Ignore", "onPodConditions": [{ "type": "DisruptionTarget", "status": "True" }] },
            { "action": "FailJob", "onExitCodes": { "containerName": CONTAINER, "operator": "In", "values": HOPELESS } },
        ] });
        let parts = Parts {
            name: &name(self.run, self.index, self.wanted.into()),
            labels,
            owner: self.owner,
            retries: RETRIES,
            failures: Some(failures),
            pod: job::pod(self.needs, self.handed, 1, &[], &args),
        };
        parts.build(self.needs)
    }
}

/// Whether two Jobs do the same.
#[must_use]
pub fn same(one: &Job, other: &Job) -> bool {
    let args = |job: &Job| Some(job.spec.as_ref()?.template.spec.as_ref()?.containers.first()?.args.clone());
    args(one) == args(other)
}

/// How an evaluation stands by its Job and that Job's pods, and what keeps it from running. `Done` says that the Job has ended well.
#[must_use]
pub fn stands(job: &Job, pods: &[&Pod]) -> (EvaluationPhase, Option<String>) {
    let status = job.status.clone().unwrap_or_default();
    let conditions = status.conditions.unwrap_or_default();
    let is = |kind: &str| conditions.iter().find(|c| c.type_ == kind && c.status == "True");
    if is("Complete").is_some() {
        return (EvaluationPhase::Done, None);
    }
    if let Some(failed) = is("Failed") {
        return (EvaluationPhase::Failed, said(pods).or_else(|| failed.message.clone()));
    }
    let state = |pod: &Pod| container(pod).and_then(|container| container.state.clone()).unwrap_or_default();
    if pods.iter().any(|pod| state(pod).running.is_some()) {
        return (EvaluationPhase::Running, None);
    }
    if job.spec.as_ref().and_then(|spec| spec.suspend) == Some(true) {
        let why = match job.labels().get("kueue.x-k8s.io/queue-name") {
            Some(queue) => format!("waits for queue {queue} to admit it; `kubectl get workloads` says what that lacks"),
            None => "its Job is suspended".to_owned(),
        };
        return (EvaluationPhase::Waiting, Some(why));
    }
    let waiting = pods.iter().filter(|pod| state(pod).terminated.is_none()).find_map(|pod| waits(pod));
    let failed =
        || said(pods).filter(|_| status.failed > Some(0)).map(|said| format!("it failed, and is tried again: {said}"));
    (EvaluationPhase::Waiting, waiting.map(|waiting| waiting.message).or_else(failed))
}

/// What the last of some pods that has failed said of it: its error where it wrote one, else its last line, else how it ended.
#[must_use]
pub fn said(pods: &[&Pod]) -> Option<String> {
    let ended = |pod: &&Pod| {
        let end = container(pod)?.state.as_ref()?.terminated.clone().filter(|end| end.exit_code != 0)?;
        Some((pod.metadata.creation_timestamp.clone(), end))
    };
    let (_, end) = pods.iter().filter_map(ended).max_by(|(one, _), (other, _)| one.cmp(other))?;
    let text = end.message.as_deref().map(|text| sgcl_telemetry::plain(text.trim()).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let from = lines.iter().rposition(|line| line.starts_with("error: ")).unwrap_or(lines.len().saturating_sub(1));
    let said = lines[from..].join(" ");
    let said = said.strip_prefix("error: ").unwrap_or(&said);
    Some(if said.is_empty() {
        format!(
            "its container ended with code {}{}",
            end.exit_code,
            end.reason.map(|why| format!(", {why}")).unwrap_or_default()
        )
    } else {
        said.chars().take(SAID_CHARS).collect()
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::Value;
    use sgcl_runstore::config::{Embedding, Evaluation};

    use super::*;
    use crate::kube::defaults::Defaults;
    use crate::kube::plan::Plan;
    use crate::kube::resource::SgclRunSpec;
    use crate::kube::{RUN_LABEL, SLOT_LABEL};

    fn evaluation(dataset: &str) -> Evaluation {
        Evaluation { name: "grain".into(), dataset: dataset.into(), ..Evaluation::default() }
    }

    fn built(wanted: impl Into<FollowUp>) -> Job {
        let wanted = &wanted.into();
        let defaults = Defaults {
            bucket: Some("s3://lab/runs".into()),
            dataset: Some("s3://lab/patches".into()),
            image: Some("sgcl-worker:1".into()),
            s3_endpoint: Some("http://s3:7070".into()),
            ..Defaults::default()
        };
        let spec = SgclRunSpec {
            nodes: 2,
            gpus_per_node: Some(4),
            queue: Some("lab".into()),
            node_selector: [("gpu".to_owned(), "h100".to_owned())].into(),
            ..SgclRunSpec::default()
        };
        let plan = Plan::of("first", &spec, &defaults).unwrap();
        let owner = OwnerReference { name: "first".into(), uid: "u".into(), ..OwnerReference::default() };
        let handed = HandedOn::default();
        let (bucket, needs) = (plan.bucket.as_str(), &plan.pods);
        EvaluationJob { run: "first", index: 1, wanted, bucket, owner: &owner, needs, handed: &handed }.build().unwrap()
    }

    fn job(status: Value) -> Job {
        let mut job = built(evaluation("s3://lab/labelled"));
        job.status = serde_json::from_value(status).unwrap();
        job
    }

    fn pod(minute: u8, state: Value) -> Pod {
        let status = json!({ "phase": "Pending", "containerStatuses": [{ "name": "worker", "image": "i", "imageID": "",
            "ready": false, "restartCount": 0, "state": state }] });
        let made = format!("2026-01-01T00:{minute:02}:00Z");
        serde_json::from_value(json!({ "metadata": { "creationTimestamp": made }, "status": status })).unwrap()
    }

    fn ended(minute: u8, text: &str) -> Pod {
        pod(minute, json!({ "terminated": { "exitCode": 65, "reason": "Error", "message": text } }))
    }

    #[test]
    fn its_job_is_no_node_of_the_run_and_takes_one_gpu_beside_what_nodes_take() {
        let job = serde_json::to_value(built(evaluation("s3://lab/labelled"))).unwrap();
        assert_eq!(job["metadata"]["name"], "first-eval-1");
        assert_eq!(job["metadata"]["ownerReferences"][0]["uid"], "u");
        assert_eq!(job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], "lab");
        for labels in [&job["metadata"]["labels"], &job["spec"]["template"]["metadata"]["labels"]] {
            assert_eq!(labels[EVALUATES_LABEL], "first");
            assert_eq!(labels["app.kubernetes.io/managed-by"], MANAGER);
            assert!(labels.get(RUN_LABEL).is_none() && labels.get(SLOT_LABEL).is_none(), "{labels}");
        }
        assert_eq!(job["spec"]["backoffLimit"], 2);
        assert_eq!(job["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"], json!(HOPELESS));
        let pod = &job["spec"]["template"]["spec"];
        assert_eq!((&pod["restartPolicy"], &pod["nodeSelector"]), (&json!("Never"), &json!({ "gpu": "h100" })));
        assert_eq!(pod["automountServiceAccountToken"], false);
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        let text = pod.to_string();
        assert!(!text.contains("serviceAccountToken\"") && !text.contains("SGCL_COORDINATOR_CA"), "{text}");
        let container = &pod["containers"][0];
        assert_eq!(container["image"], "sgcl-worker:1");
        assert_eq!(container["resources"]["limits"], json!({ "nvidia.com/gpu": "1" }));
        assert_eq!(container["envFrom"][0]["secretRef"]["name"], "sgcl-bucket");
        assert!(
            container["env"]
                .as_array()
                .unwrap()
                .contains(&json!({ "name": "AWS_ENDPOINT_URL", "value": "http://s3:7070" }))
        );
    }

    #[test]
    fn its_worker_is_told_all_of_the_evaluation() {
        let wanted = Evaluation { labels: vec![1.0, 12.5], epochs: Some(3), ..evaluation("s3://lab/$(HOME)/$x") };
        let built = built(wanted.clone());
        let args = built.spec.unwrap().template.spec.unwrap().containers[0].args.clone().unwrap();
        assert_eq!(args[..6], ["evaluation", "--run", "first", "--bucket", "s3://lab/runs", "--evaluation"]);
        assert!(!args[6].replace("$$", "").contains('$'), "Kubernetes would put a variable there: {}", args[6]);
        assert_eq!(args[6].replace("$$", "$").parse::<Evaluation>().unwrap(), wanted);
    }

    #[test]
    fn an_embeddings_job_is_like_an_evaluations_but_for_its_name_and_what_its_worker_does() {
        let atlas = Embedding { name: "atlas".into(), dataset: "s3://lab/$atlas".into(), ..Embedding::default() };
        let job = built(FollowUp::Embedding(atlas.clone()));
        assert_eq!(job.name_any(), "first-embed-1");
        assert_eq!(
            (&job.labels()[EVALUATES_LABEL], &job.labels()["app.kubernetes.io/name"]),
            (&"first".into(), &"sgcl-embedding".into())
        );
        let args = job.spec.unwrap().template.spec.unwrap().containers[0].args.clone().unwrap();
        assert_eq!(args[0], "embedding");
        assert_eq!(args[6].replace("$$", "$").parse::<Embedding>().unwrap(), atlas);
    }

    #[test]
    fn a_job_of_another_evaluation_is_told_from_it() {
        let ours = built(evaluation("s3://lab/labelled"));
        assert!(same(&ours, &job(json!({ "active": 1 }))));
        assert!(!same(&ours, &built(evaluation("s3://lab/others"))));
    }

    #[test]
    fn it_stands_as_its_job_and_pods_say() {
        use EvaluationPhase as P;
        let (fresh, running) = (job(json!({})), pod(1, json!({ "running": {} })));
        assert_eq!(stands(&fresh, &[]), (P::Waiting, None));
        assert_eq!(stands(&fresh, &[&running]), (P::Running, None));
        let unfetched = pod(1, json!({ "waiting": { "reason": "ErrImagePull", "message": "not found" } }));
        let (phase, why) = stands(&fresh, &[&unfetched]);
        assert!(phase == P::Waiting && why.as_ref().unwrap().contains("cannot be fetched"), "{why:?}");
        let torn = ended(1, "INFO begins\nerror: s3://lab/labelled: the shard is torn\n");
        let (phase, why) = stands(&job(json!({ "failed": 1 })), &[&torn]);
        assert!(
            phase == P::Waiting && why.as_ref().unwrap().ends_with("tried again: s3://lab/labelled: the shard is torn"),
            "{why:?}"
        );
        assert_eq!(stands(&job(json!({ "failed": 1 })), &[&torn, &running]).0, P::Running);
        let over =
            |kind: &str| job(json!({ "conditions": [{ "type": kind, "status": "True", "message": "backoff" }] }));
        assert_eq!(stands(&over("Complete"), &[&torn]), (P::Done, None));
        assert_eq!(stands(&over("Failed"), &[&torn]), (P::Failed, Some("s3://lab/labelled: the shard is torn".into())));
        assert_eq!(stands(&over("Failed"), &[]), (P::Failed, Some("backoff".into())));
        let mut held = fresh;
        held.spec.as_mut().unwrap().suspend = Some(true);
        let (phase, why) = stands(&held, &[]);
        assert!(phase == P::Waiting && why.as_ref().unwrap().contains("queue lab"), "{why:?}");
    }

    #[test]
    fn the_last_of_its_pods_that_failed_has_the_word() {
        let (first, last) = (ended(1, "error: one"), ended(2, "error: two\nhint: three\n"));
        assert_eq!(said(&[&last, &first]).unwrap(), "two hint: three");
        assert_eq!(said(&[&ended(1, "killed by hand")]).unwrap(), "killed by hand");
        let silent = pod(1, json!({ "terminated": { "exitCode": 137, "reason": "OOMKilled" } }));
        assert_eq!(said(&[&silent]).unwrap(), "its container ended with code 137, OOMKilled");
        let well = pod(1, json!({ "terminated": { "exitCode": 0, "message": "fine" } }));
        assert_eq!(said(&[&well]), None);
    }

    #[test]
    fn what_is_over_is_not_put_off_and_what_is_not_keeps_a_finished_run_busy() {
        let mut list = to_come(&[
            FollowUp::Evaluation(evaluation("s3://a")),
            FollowUp::Embedding(Embedding { name: "atlas".into(), ..Embedding::default() }),
        ]);
        assert_eq!(
            list.iter().map(|one| one.kind).collect::<Vec<_>>(),
            [EvaluationKind::Evaluation, EvaluationKind::Embedding]
        );
        list[0].done("knn-20 52.4%, linear 64.5%".to_owned());
        let after = put_off(&list, Some("the bucket does not answer"));
        assert_eq!((&after[0], after[1].message.as_deref()), (&list[0], Some("the bucket does not answer")));
        let mut status = SgclRunStatus { phase: Phase::Finished, evaluations: after, ..SgclRunStatus::default() };
        assert!(outstanding(&status));
        status.phase = Phase::Suspended;
        assert!(!outstanding(&status));
        status.phase = Phase::Finished;
        status.evaluations = given_up(&status.evaluations, "the run is gone");
        assert!(!outstanding(&status));
        assert_eq!((&status.evaluations[0], status.evaluations[1].phase), (&list[0], EvaluationPhase::Failed));
    }
}
