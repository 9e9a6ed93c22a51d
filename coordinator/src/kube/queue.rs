//! Whether the queue that a run names is there. Without Kueue nobody would admit its nodes, nor hold them back.

use kube::api::DynamicObject;
use kube::error::DiscoveryError;
use kube::{Api, Client, Error, discovery};

/// Kueue's API.
const GROUP: &str = "kueue.x-k8s.io";

/// What is missing of LocalQueue `queue`, and what to do; none where it is there, or where that cannot be told.
pub async fn missing(client: &Client, namespace: &str, queue: &str) -> Option<String> {
    match find(client, namespace, queue).await {
        Ok(found) => said(&found, namespace, queue),
        Err(error) => {
            tracing::warn!(%error, queue, "whether the queue is there is not known");
            None
        }
    }
}

enum Found {
    Queue,
    NoQueue,
    NoKueue,
}

async fn find(client: &Client, namespace: &str, queue: &str) -> kube::Result<Found> {
    let group = match discovery::group(client, GROUP).await {
        Ok(group) => group,
        Err(Error::Discovery(DiscoveryError::MissingApiGroup(_))) => return Ok(Found::NoKueue),
        Err(error) => return Err(error),
    };
    let Some((resource, _)) = group.recommended_kind("LocalQueue") else { return Ok(Found::NoKueue) };
    let queues: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &resource);
    Ok(if queues.get_opt(queue).await?.is_some() { Found::Queue } else { Found::NoQueue })
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
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said_with_the_remedy() {
        assert_eq!(said(&Found::Queue, "sgcl", "lab"), None);
        let no_queue = said(&Found::NoQueue, "sgcl", "lab").unwrap_or_default();
        assert!(no_queue.contains("no LocalQueue") && no_queue.contains("get localqueues"), "{no_queue}");
        let no_kueue = said(&Found::NoKueue, "sgcl", "lab").unwrap_or_default();
        assert!(no_kueue.contains("queue lab") && no_kueue.contains("without a queue"), "{no_kueue}");
    }
}
