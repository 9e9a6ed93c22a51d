//! What a queue has to say of a run's nodes: that it is not there, and what it lacks for those that it holds back. Without Kueue nobody
//! would admit them, nor hold them back.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{ApiResource, DynamicObject};
use kube::error::DiscoveryError;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Error, discovery};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// Kueue's API.
const GROUP: &str = "kueue.x-k8s.io";
/// Characters kept of what Kueue says: it has a clause a flavour.
const SAID_CHARS: usize = 300;

/// What Kueue says of the Jobs that it holds back, by their names.
pub type Held = BTreeMap<String, String>;

/// The queues of a namespace. Nothing is asked of Kueue before a run names a queue.
#[derive(Clone)]
pub struct Queues {
    client: Client,
    namespace: String,
    held: watch::Sender<Held>,
    watching: Arc<OnceLock<AbortOnDropHandle<()>>>,
}

impl Queues {
    /// Of `namespace`.
    #[must_use]
    pub fn of(client: Client, namespace: String) -> Self {
        Self { client, namespace, held: watch::Sender::default(), watching: Arc::default() }
    }

    /// What is held back, from the first [`Self::missing`] on that found a queue, as it changes.
    #[must_use]
    pub fn held(&self) -> watch::Receiver<Held> {
        self.held.subscribe()
    }

    /// What is missing of LocalQueue `queue`, and what to do; none where it is there, or where that cannot be told.
    pub async fn missing(&self, queue: &str) -> Option<String> {
        match self.find(queue).await {
            Ok(found) => said(&found, &self.namespace, queue),
            Err(error) => {
                tracing::warn!(%error, queue, "whether the queue is there is not known");
                None
            }
        }
    }

    async fn find(&self, queue: &str) -> kube::Result<Found> {
        let group = match discovery::group(&self.client, GROUP).await {
            Ok(group) => group,
            Err(Error::Discovery(DiscoveryError::MissingApiGroup(_))) => return Ok(Found::NoKueue),
            Err(error) => return Err(error),
        };
        let Some((resource, _)) = group.recommended_kind("LocalQueue") else { return Ok(Found::NoKueue) };
        if self.api(&resource).get_opt(queue).await?.is_none() {
            return Ok(Found::NoQueue);
        }
        if let Some((resource, _)) = group.recommended_kind("Workload") {
            self.watching
                .get_or_init(|| AbortOnDropHandle::new(tokio::spawn(follow(self.api(&resource), self.held.clone()))));
        }
        Ok(Found::Queue)
    }

    fn api(&self, resource: &ApiResource) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), &self.namespace, resource)
    }
}

/// Keeps `held` up to date; the watch is made anew when it breaks.
async fn follow(workloads: Api<DynamicObject>, held: watch::Sender<Held>) {
    let mut events = watcher(workloads, watcher::Config::default()).default_backoff().boxed();
    let mut listing = Held::new();
    loop {
        match events.try_next().await {
            Ok(Some(event)) => drop(held.send_if_modified(|held| take(held, &mut listing, event))),
            Ok(None) => return,
            Err(error) => tracing::warn!(%error, "the watch over Kueue's workloads broke, it is made anew"),
        }
    }
}

/// Whether an event changed what is held.
fn take(held: &mut Held, listing: &mut Held, event: Event<DynamicObject>) -> bool {
    let put = |held: &mut Held, workload: &DynamicObject| {
        let Some(job) = job(workload) else { return false };
        match lacks(workload) {
            Some(said) => held.insert(job, said.clone()) != Some(said),
            None => held.remove(&job).is_some(),
        }
    };
    match event {
        Event::Init => {
            listing.clear();
            false
        }
        Event::InitApply(workload) => {
            put(listing, &workload);
            false
        }
        Event::InitDone => {
            let known = std::mem::replace(held, std::mem::take(listing));
            known != *held
        }
        Event::Apply(workload) => put(held, &workload),
        Event::Delete(workload) => job(&workload).is_some_and(|job| held.remove(&job).is_some()),
    }
}

/// The Job that a Workload stands for.
fn job(workload: &DynamicObject) -> Option<String> {
    let owners = workload.metadata.owner_references.iter().flatten();
    owners.filter(|owner| owner.kind == "Job").map(|owner| owner.name.clone()).next()
}

/// What keeps a Workload from its quota, where something does.
fn lacks(workload: &DynamicObject) -> Option<String> {
    let conditions = workload.data.get("status")?.get("conditions")?.clone();
    let conditions: Vec<Condition> = serde_json::from_value(conditions).ok()?;
    let waits = conditions.into_iter().find(|c| c.type_ == "QuotaReserved" && c.status == "False")?;
    let said: String = waits.message.chars().take(SAID_CHARS).collect();
    Some(said.trim_end_matches('.').to_owned()).filter(|said| !said.is_empty())
}

enum Found {
    Queue,
    NoQueue,
    NoKueue,
}

fn said(found: &Found, namespace: &str, queue: &str) -> Option<String> {
    match found {
        Found::Queue => None,
        Found::NoQueue => Some(format!(
            "queue {queue}: namespace {namespace} has no LocalQueue of that name; `kubectl -n {namespace} get localqueues` lists those there are, \
             spec.queue (or `queue` in sgcl-defaults) names one"
        )),
        Found::NoKueue => Some(format!(
            "queue {queue}: Kueue is not installed in this cluster; install it, or submit without a queue (spec.queue, or `queue` in sgcl-defaults)"
        )),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_missing_is_said_with_the_remedy() {
        assert_eq!(said(&Found::Queue, "sgcl", "lab"), None);
        let no_queue = said(&Found::NoQueue, "sgcl", "lab").unwrap_or_default();
        assert!(no_queue.contains("no LocalQueue") && no_queue.contains("get localqueues"), "{no_queue}");
        let no_kueue = said(&Found::NoKueue, "sgcl", "lab").unwrap_or_default();
        assert!(no_kueue.contains("queue lab") && no_kueue.contains("without a queue"), "{no_kueue}");
    }

    fn workload(job: &str, conditions: serde_json::Value) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "Workload",
            "metadata": {
                "name": format!("job-{job}-1a2b3"),
                "ownerReferences": [{ "apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": "u", "controller": true }],
            },
            "spec": { "queueName": "sgcl" },
            "status": { "conditions": conditions },
        }))
        .unwrap()
    }

    fn waits(message: &str) -> serde_json::Value {
        json!([{ "type": "QuotaReserved", "status": "False", "reason": "Pending", "message": message, "lastTransitionTime": "2026-01-01T00:00:00Z" }])
    }

    fn admitted() -> serde_json::Value {
        let condition = |kind: &str| {
            json!({ "type": kind, "status": "True", "reason": "Admitted", "message": "in ClusterQueue sgcl",
                    "lastTransitionTime": "2026-01-01T00:00:00Z" })
        };
        json!([condition("QuotaReserved"), condition("Admitted")])
    }

    #[test]
    fn what_a_queue_lacks_is_kept_until_it_admits() {
        let (mut held, mut listing) = (Held::new(), Held::new());
        let mut take = |event| take(&mut held, &mut listing, event).then(|| held.clone());
        assert_eq!(take(Event::Apply(workload("a-0-0", admitted()))), None, "nothing is news of what was not held");
        let lacking =
            || Event::Apply(workload("a-1-0", waits("insufficient unused quota for nvidia.com/gpu, 2 more needed.")));
        let known = take(lacking()).unwrap();
        assert_eq!(known["a-1-0"], "insufficient unused quota for nvidia.com/gpu, 2 more needed");
        assert_eq!(take(lacking()), None, "the same again is no news");
        assert_eq!(take(Event::Apply(workload("a-1-0", admitted()))), Some(Held::new()));
        take(lacking()).unwrap();
        assert_eq!(take(Event::Delete(workload("a-1-0", waits("whatever")))), Some(Held::new()));
    }

    #[test]
    fn a_watch_that_is_made_anew_forgets_what_is_not_there_any_more() {
        let (mut held, mut listing) = (Held::from([("a-0-0".into(), "old".into())]), Held::new());
        for event in [Event::Init, Event::InitApply(workload("a-1-0", waits("new"))), Event::InitDone] {
            take(&mut held, &mut listing, event);
        }
        assert_eq!(held, Held::from([("a-1-0".into(), "new".into())]));
    }

    #[test]
    fn what_is_no_workload_of_a_job_is_passed_over() {
        let mut odd = workload("a", waits("x"));
        odd.metadata.owner_references = None;
        let (mut held, mut listing) = (Held::new(), Held::new());
        assert!(!take(&mut held, &mut listing, Event::Apply(odd)));
        assert!(!take(&mut held, &mut listing, Event::Apply(workload("a", json!("no list")))));
        assert_eq!(held, Held::new());
    }
}
