//! What pods say: one watch over the workers of all runs, dealt out by run.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use tokio::sync::mpsc;

use super::{ATTEMPT_LABEL, MANAGER, RUN_LABEL, SLOT_LABEL};
use crate::machine::YIELDED;

/// Code of a pod that went without saying how: killed.
const KILLED: i32 = 137;

/// A worker's pod, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// Name of the pod.
    pub name: String,
    /// Its run.
    pub run: String,
    /// Place of the run that it fills.
    pub slot: u32,
    /// Number of its Job.
    pub number: u32,
    /// Machine, once there is one.
    pub machine: Option<String>,
    /// Its priority, as the cluster resolved it.
    pub priority: i32,
    /// The worker's process runs.
    pub running: bool,
    /// It runs or ran.
    pub started: bool,
    /// It was told to end.
    pub leaving: bool,
    /// It was evicted, preempted, or its machine is gone: no failure of the run's.
    pub disrupted: bool,
    /// Its machine does not answer: the kubelet that would say how it ended may be gone with it.
    pub lost: bool,
    /// Exit code, once it has ended.
    pub ended: Option<i32>,
    /// The last it wrote, where it failed.
    pub said: Option<String>,
    /// What keeps it from running.
    pub waiting: Option<Waiting>,
    /// The object is gone.
    pub gone: bool,
}

/// What keeps a pod from running, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// In one word.
    pub reason: String,
    /// In full.
    pub message: String,
}

impl PodFacts {
    /// Reads a worker's pod; none where it is not one.
    #[must_use]
    pub fn of(pod: &Pod) -> Option<Self> {
        let label = |name: &str| pod.labels().get(name).cloned();
        let status = pod.status.clone().unwrap_or_default();
        let conditions = status.conditions.unwrap_or_default();
        let is = |kind: &str, value: &str| conditions.iter().find(|c| c.type_ == kind && c.status == value);
        let state = container(pod).and_then(|c| c.state.clone()).unwrap_or_default();
        let disrupted = is("DisruptionTarget", "True").is_some();
        let phase = status.phase.unwrap_or_default();
        let exited = state.terminated.as_ref().map(|end| end.exit_code);
        let said = last_said(pod).map(last_words);
        let over = matches!(phase.as_str(), "Failed" | "Succeeded");
        let ended = exited.or(over.then_some(if phase == "Succeeded" { 0 } else { KILLED }));
        let runs = state.running.is_some() && ended.is_none();
        // Workers have no readiness probe: one that runs is not ready only where its machine is not.
        let lost = runs && is("Ready", "False").is_some();
        Some(Self {
            name: pod.name_any(),
            run: label(RUN_LABEL)?,
            slot: label(SLOT_LABEL)?.parse().ok()?,
            number: label(ATTEMPT_LABEL)?.parse().ok()?,
            machine: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            priority: pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0),
            running: runs && !lost && pod.metadata.deletion_timestamp.is_none(),
            leaving: pod.metadata.deletion_timestamp.is_some(),
            started: phase == "Running" || ended.is_some(),
            disrupted,
            lost,
            ended,
            said: said.filter(|said| !said.is_empty()),
            waiting: if ended.is_some() { None } else { waits(pod) },
            gone: false,
        })
    }

    /// The exit code as it counts: a pod that was taken away has yielded, whatever its process made of that.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        match self.ended {
            Some(0) => Some(0),
            Some(_) | None if self.disrupted && (self.ended.is_some() || self.gone) => Some(YIELDED),
            Some(code) => Some(code),
            None if self.lost => Some(YIELDED),
            // A queue or a person took it away before its process was there to be told.
            None if self.gone => Some(if self.started { KILLED } else { YIELDED }),
            None => None,
        }
    }
}

/// What a pod that has ended said of it: its termination message, which is the end of its log where it failed.
pub(super) fn last_said(pod: &Pod) -> Option<&str> {
    container(pod)?.state.as_ref()?.terminated.as_ref()?.message.as_deref()
}

/// What keeps a pod from running.
pub(super) fn waits(pod: &Pod) -> Option<Waiting> {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let unscheduled = conditions.into_iter().flatten().find(|c| c.type_ == "PodScheduled" && c.status == "False");
    let unscheduled = unscheduled.map(|condition| Waiting {
        reason: "Unschedulable".into(),
        message: unschedulable(condition.message.as_deref().unwrap_or("no reason was given")),
    });
    unscheduled.or_else(|| container_waits(container(pod)?))
}

/// The state of its only container, once it has one.
pub(super) fn container(pod: &Pod) -> Option<&ContainerStatus> {
    pod.status.as_ref()?.container_statuses.as_ref()?.first()
}

/// The last line, as far as a message has room.
pub(super) fn last_words(text: &str) -> String {
    let last = text.trim_end().lines().next_back().unwrap_or_default();
    sgcl_telemetry::plain(last).trim_start().chars().take(300).collect()
}

fn unschedulable(message: &str) -> String {
    format!("no machine takes this node: {}", message.trim_end_matches('.'))
}

fn container_waits(container: &ContainerStatus) -> Option<Waiting> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let said = waiting.message.clone().unwrap_or_default();
    let image = &container.image;
    let (reason, message) = match waiting.reason.as_deref()? {
        "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" => {
            ("ImagePull", format!("the image {image} cannot be fetched: {said}; check spec.image and sgcl-defaults"))
        }
        "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => ("Container", said),
        // On its way.
        _ => return None,
    };
    Some(Waiting { reason: reason.into(), message })
}

/// The workers' pods of all runs, from one watch.
#[derive(Clone, Default)]
pub struct Pods {
    shared: Arc<Mutex<Shared>>,
    /// Whether all are known.
    listed: Arc<tokio::sync::watch::Sender<bool>>,
}

#[derive(Default)]
struct Shared {
    pods: BTreeMap<String, PodFacts>,
    listeners: BTreeMap<String, mpsc::UnboundedSender<PodFacts>>,
    /// The names seen in a list under way.
    listing: Option<Vec<String>>,
}

impl Pods {
    /// Watches until the process ends; the watch is made anew when it breaks.
    ///
    /// # Errors
    /// Never by itself.
    pub async fn watch(self, api: Api<Pod>) -> Result<(), watcher::Error> {
        let of_ours = watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by={MANAGER}"));
        let mut events = watcher(api, of_ours).default_backoff().boxed();
        loop {
            match events.try_next().await {
                Ok(Some(event)) => self.take(event),
                Ok(None) => return Ok(()),
                Err(error) => tracing::warn!(%error, "the watch over pods broke, it is made anew"),
            }
        }
    }

    /// Waits until every pod that there is, is known.
    pub async fn listed(&self) {
        // The sender is ours.
        let _ = self.listed.subscribe().wait_for(|listed| *listed).await;
    }

    /// A run's pods, as they are and as they change.
    #[must_use]
    pub fn of_run(&self, run: &str) -> mpsc::UnboundedReceiver<PodFacts> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut shared = self.lock();
        for pod in shared.pods.values().filter(|pod| pod.run == run) {
            // The receiver is right here.
            let _ = sender.send(pod.clone());
        }
        shared.listeners.insert(run.to_owned(), sender);
        receiver
    }

    fn take(&self, event: Event<Pod>) {
        let mut shared = self.lock();
        match event {
            Event::Init => shared.listing = Some(Vec::new()),
            Event::InitApply(pod) => {
                if let Some(listing) = &mut shared.listing {
                    listing.push(pod.name_any());
                }
                shared.apply(&pod);
            }
            Event::Apply(pod) => shared.apply(&pod),
            Event::Delete(pod) => {
                shared.apply(&pod);
                shared.remove(&pod.name_any());
            }
            Event::InitDone => {
                let seen = shared.listing.take().unwrap_or_default();
                let missed: Vec<String> = shared.pods.keys().filter(|name| !seen.contains(name)).cloned().collect();
                missed.iter().for_each(|name| shared.remove(name));
                self.listed.send_replace(true);
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn apply(&mut self, pod: &Pod) {
        let Some(facts) = PodFacts::of(pod) else { return };
        if self.pods.get(&facts.name) != Some(&facts) {
            self.tell(&facts);
            self.pods.insert(facts.name.clone(), facts);
        }
    }

    fn remove(&mut self, name: &str) {
        if let Some(facts) = self.pods.remove(name) {
            self.tell(&PodFacts { gone: true, running: false, waiting: None, ..facts });
        }
    }

    fn tell(&mut self, facts: &PodFacts) {
        let heard = self.listeners.get(&facts.run).is_none_or(|listener| listener.send(facts.clone()).is_ok());
        if !heard {
            self.listeners.remove(&facts.run);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn facts(status: Value) -> PodFacts {
        let pod = json!({
            "metadata": { "name": "first-1-3-abcde",
                "labels": { "sgcl.dev/run": "first", "sgcl.dev/slot": "1", "sgcl.dev/attempt": "3" } },
            "status": status,
        });
        PodFacts::of(&serde_json::from_value(pod).unwrap()).unwrap()
    }

    fn exited(code: i32, more: Value) -> PodFacts {
        let mut status = json!({ "phase": "Failed", "containerStatuses": [{
            "name": "worker", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
            "state": { "terminated": { "exitCode": code } } }] });
        status["conditions"] = more;
        facts(status)
    }

    #[test]
    fn a_pods_exit_code_counts_unless_it_was_taken_away() {
        assert_eq!(exited(70, json!([])).code(), Some(70));
        let taken = json!([{ "type": "DisruptionTarget", "status": "True" }]);
        assert_eq!(exited(137, taken.clone()).code(), Some(75));
        assert_eq!(exited(0, taken).code(), Some(0), "it had finished");
    }

    #[test]
    fn a_pod_whose_machine_does_not_answer_counts_as_taken_away() {
        let status = |ready: &str| {
            json!({ "phase": "Running", "conditions": [{ "type": "Ready", "status": ready }], "containerStatuses": [{
                "name": "worker", "image": "i", "imageID": "", "ready": true, "restartCount": 0,
                "state": { "running": {} } }] })
        };
        let (well, lost) = (facts(status("True")), facts(status("False")));
        assert_eq!((well.running, well.code()), (true, None));
        assert_eq!((lost.running, lost.code()), (false, Some(75)));
    }

    #[test]
    fn a_pod_that_vanishes_was_killed() {
        let running = facts(json!({ "phase": "Running" }));
        assert_eq!(running.code(), None);
        assert_eq!(PodFacts { gone: true, ..running }.code(), Some(137));
        let waiting = facts(json!({ "phase": "Pending" }));
        assert_eq!(
            PodFacts { gone: true, ..waiting }.code(),
            Some(75),
            "it was taken away before it began: nothing failed"
        );
    }

    #[test]
    fn what_keeps_a_pod_waiting_is_said_with_the_remedy() {
        let unscheduled = facts(json!({ "phase": "Pending", "conditions": [
            { "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available." }] }));
        assert_eq!(unscheduled.waiting.unwrap().message, "no machine takes this node: 0/3 nodes are available");
        let unfetched = facts(json!({ "phase": "Pending", "containerStatuses": [{
            "name": "worker", "image": "sgcl-wroker:1", "imageID": "", "ready": false, "restartCount": 0,
            "state": { "waiting": { "reason": "ErrImagePull", "message": "not found" } } }] }));
        let waiting = unfetched.waiting.unwrap();
        assert_eq!(waiting.reason, "ImagePull");
        assert!(waiting.message.contains("sgcl-wroker:1") && waiting.message.contains("spec.image"), "{waiting:?}");
    }
}
