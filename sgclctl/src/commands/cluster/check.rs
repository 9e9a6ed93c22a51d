//! `check`: whether this cluster is ready for a run, each answer with its remedy. It changes nothing but a small object in the bucket, which
//! it writes and takes away again.

use anyhow::Result;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::Api;
use kube::api::{ListParams, PostParams};
use serde::Serialize;
use sgcl_coordinator::kube::SERVICE;
use sgcl_coordinator::kube::defaults::{self, Defaults};
use sgcl_patchset::{Created, PatchSet, Store, StoreError};
use sgcl_runstore::new_write_id;

use super::access::Cluster;
use crate::cli::cluster::CheckArgs;
use crate::exit::Exit;
use crate::output::{Out, count};
use crate::{error, table};

/// What nodes advertise where the defaults name nothing else.
const GPU: &str = "nvidia.com/gpu";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Good,
    /// It may still work, or this user cannot see.
    Unsure,
    Bad,
}

#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    answer: Answer,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

fn good(what: &'static str, found: impl Into<String>) -> Finding {
    Finding { what, answer: Answer::Good, found: found.into(), remedy: None }
}

fn unsure(what: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { what, answer: Answer::Unsure, found: found.into(), remedy: Some(remedy.into()) }
}

fn bad(what: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { what, answer: Answer::Bad, found: found.into(), remedy: Some(remedy.into()) }
}

pub(crate) async fn check(args: CheckArgs, out: Out) -> Result<Exit> {
    let cluster = Cluster::open(&args.cluster).await?;
    // Where nobody answers nothing else can be asked.
    let version = cluster.client.apiserver_version().await.map_err(|error| cluster.told(error, None))?;
    let mut findings = vec![good("cluster", format!("Kubernetes {}", version.git_version))];
    findings.push(resource(&cluster).await);
    findings.push(coordinator(&cluster).await);
    for (verb, group, resource, sub) in [
        ("create", "sgcl.dev", "sgclruns", None),
        ("patch", "sgcl.dev", "sgclruns", None),
        ("delete", "sgcl.dev", "sgclruns", None),
        ("get", "", "pods", Some("log")),
    ] {
        findings.push(permission(&cluster, verb, group, resource, sub).await);
    }
    let (finding, read) = defaults_of(&cluster).await;
    findings.push(finding);
    findings.push(gpus(&cluster, read.gpu_resource.as_deref().unwrap_or(GPU)).await);
    let open = |url: &str| {
        // What workers are told, unless this terminal says otherwise.
        let environment = |name: &str| {
            std::env::var(name).ok().or_else(|| match name {
                "AWS_ENDPOINT_URL" => read.s3_endpoint.clone(),
                "AWS_REGION" => read.s3_region.clone(),
                _ => None,
            })
        };
        Store::open_with_env(url, &environment)
    };
    match args.bucket.or_else(|| read.bucket.clone()) {
        Some(url) => findings.push(bucket(&url, open(&url)).await),
        None => {
            findings.push(bad("bucket", "none is named", "set `bucket` in sgcl-defaults, or give --bucket to submit"))
        }
    }
    match args.data.or_else(|| read.dataset.clone()) {
        Some(url) => findings.push(patches(&url, open(&url)).await),
        None => findings.push(unsure(
            "patch set",
            "none is named",
            "`sgclctl ingest … --to s3://…`, then set `dataset` in sgcl-defaults or give --data to submit",
        )),
    }
    show(&findings, out)?;
    Ok(if findings.iter().any(|finding| finding.answer == Answer::Bad) { Exit::Unavailable } else { Exit::Done })
}

fn show(findings: &[Finding], out: Out) -> Result<()> {
    if out.json() {
        return findings.iter().try_for_each(|finding| out.json_line(finding));
    }
    let sign = |answer| match answer {
        Answer::Good => "✓",
        Answer::Unsure => "?",
        Answer::Bad => "✗",
    };
    let rows = findings.iter().map(|f| {
        let remedy = f.remedy.as_ref().map(|remedy| format!("\n→ {remedy}")).unwrap_or_default();
        [sign(f.answer).to_owned(), f.what.to_owned(), format!("{}{remedy}", f.found)]
    });
    out.data(table::text(&["", "what", "found"], rows.collect()))
}

async fn resource(cluster: &Cluster) -> Finding {
    match cluster.runs().list(&ListParams::default().limit(1)).await {
        Ok(_) => good("SgclRun", format!("runs may be read in namespace {}", cluster.namespace)),
        Err(error) => {
            let told = error::tell(&cluster.told(error, None));
            bad("SgclRun", told.message, told.hint.unwrap_or_else(|| "kubectl apply -f deploy/".to_owned()))
        }
    }
}

/// The coordinator's replicas, and whether they are of this version.
async fn coordinator(cluster: &Cluster) -> Finding {
    const WHAT: &str = "coordinator";
    let mine = env!("CARGO_PKG_VERSION");
    let found = match cluster.api::<Deployment>().get_opt(SERVICE).await {
        Ok(Some(found)) => found,
        Ok(None) => {
            return bad(
                WHAT,
                "there is none in this namespace",
                "kubectl apply -f deploy/, or name its namespace with -n",
            );
        }
        Err(error) => return unsure(WHAT, format!("may not be looked at: {error}"), "the role `view` shows it"),
    };
    let ready = found.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0);
    let image = found
        .spec
        .and_then(|spec| spec.template.spec)
        .and_then(|pod| pod.containers.into_iter().next())
        .and_then(|container| container.image)
        .unwrap_or_default();
    if ready == 0 {
        let remedy = format!("kubectl -n {} describe deployment {SERVICE}", cluster.namespace);
        return bad(WHAT, format!("no replica of {image} is ready"), remedy);
    }
    let tag = image.rsplit_once(':').map(|(_, tag)| tag).filter(|tag| !tag.contains('/'));
    match tag {
        Some(tag) if tag != mine => unsure(
            WHAT,
            format!("{ready} replica(s) ready of version {tag}, this sgclctl is {mine}"),
            "use the sgclctl of that version, or `kubectl apply` this one's deploy/",
        ),
        _ => good(WHAT, format!("{ready} replica(s) ready, {image}")),
    }
}

async fn permission(cluster: &Cluster, verb: &str, group: &str, resource: &str, sub: Option<&str>) -> Finding {
    const WHAT: &str = "permission";
    let name = format!("{verb} {resource}{}", sub.map(|sub| format!("/{sub}")).unwrap_or_default());
    let review = SelfSubjectAccessReview {
        spec: SelfSubjectAccessReviewSpec {
            resource_attributes: Some(ResourceAttributes {
                namespace: Some(cluster.namespace.clone()),
                verb: Some(verb.to_owned()),
                group: Some(group.to_owned()),
                resource: Some(resource.to_owned()),
                subresource: sub.map(str::to_owned),
                ..ResourceAttributes::default()
            }),
            ..SelfSubjectAccessReviewSpec::default()
        },
        ..SelfSubjectAccessReview::default()
    };
    let asked =
        Api::<SelfSubjectAccessReview>::all(cluster.client.clone()).create(&PostParams::default(), &review).await;
    match asked.map(|answer| answer.status.is_some_and(|status| status.allowed)) {
        Ok(true) => good(WHAT, name),
        Ok(false) => bad(
            WHAT,
            format!("not allowed: {name}"),
            format!("ask for the role `edit` in namespace {}", cluster.namespace),
        ),
        Err(error) => unsure(WHAT, format!("{name}: {error}"), "ask whoever runs the cluster"),
    }
}

async fn defaults_of(cluster: &Cluster) -> (Finding, Defaults) {
    const WHAT: &str = "defaults";
    let edit = format!("kubectl -n {} edit configmap {}", cluster.namespace, defaults::NAME);
    let map = match cluster.api::<ConfigMap>().get_opt(defaults::NAME).await {
        Ok(map) => map.and_then(|map| map.data).unwrap_or_default(),
        Err(error) => {
            let found = format!("ConfigMap {} may not be read: {error}", defaults::NAME);
            return (unsure(WHAT, found, "give --bucket, --data and --image to submit"), Defaults::default());
        }
    };
    match Defaults::read(&map) {
        Ok(read) => {
            let word = |name: &str, value: &Option<String>| format!("{name} {}", value.as_deref().unwrap_or("not set"));
            let found = format!("{}, {}", word("image", &read.image), word("device", &read.device));
            let finding = if read.image.is_some() { good(WHAT, found) } else { unsure(WHAT, found, edit) };
            (finding, read)
        }
        Err(error) => (bad(WHAT, error, edit), Defaults::default()),
    }
}

async fn gpus(cluster: &Cluster, resource: &str) -> Finding {
    const WHAT: &str = "GPUs";
    let nodes = match Api::<Node>::all(cluster.client.clone()).list(&ListParams::default()).await {
        Ok(nodes) => nodes,
        Err(_) => {
            return unsure(
                WHAT,
                "this account may not look at nodes",
                "ask whoever runs the cluster how many there are",
            );
        }
    };
    let mut by_size = std::collections::BTreeMap::<u64, usize>::new();
    for node in &nodes {
        let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
        let here = allocatable.and_then(|of| of.get(resource)).and_then(|amount| amount.0.parse().ok()).unwrap_or(0);
        if here > 0 {
            *by_size.entry(here).or_default() += 1;
        }
    }
    if by_size.is_empty() {
        let found = format!("none of {} nodes advertises {resource}", nodes.items.len());
        return bad(WHAT, found, "install the GPUs' device plugin, or set `gpuResource` in sgcl-defaults");
    }
    let sizes: Vec<String> = by_size.iter().map(|(gpus, nodes)| format!("{nodes} node(s) with {gpus}")).collect();
    good(WHAT, format!("{} ({resource}); what others use is not counted", sizes.join(", ")))
}

/// Lists, writes, tries to overwrite what must not be, and deletes.
async fn bucket(url: &str, store: Result<Store, StoreError>) -> Finding {
    const WHAT: &str = "bucket";
    let tried = async {
        let store = store?;
        let rel = format!("checks/{}-{}", std::process::id(), jiff::Timestamp::now().as_nanosecond());
        store.list("checks").await?;
        let mut created = Vec::new();
        for writer in [new_write_id(), new_write_id()] {
            let text = format!("written by `sgclctl check`, to be deleted by it: {writer}");
            created.push(store.create(&rel, text.into_bytes(), &writer).await?);
        }
        store.delete(&rel).await?;
        Ok::<_, StoreError>(matches!(created[..], [Created::Created, Created::Exists(_)]))
    };
    match tried.await {
        Ok(true) => good(WHAT, format!("{url} can be listed, written and deleted in from here")),
        Ok(false) => bad(
            WHAT,
            format!("{url} overwrites objects that must not be overwritten: it does not heed If-None-Match"),
            "commits rest on conditional writes: use an S3 that has them (AWS, MinIO, Ceph, versitygw), or a newer release of this one",
        ),
        Err(error) => bad(
            WHAT,
            format!("from here: {error}"),
            "workers use the Secret `sgcl-bucket` and `s3Endpoint` of sgcl-defaults; this terminal uses AWS_ACCESS_KEY_ID and the like",
        ),
    }
}

async fn patches(url: &str, store: Result<Store, StoreError>) -> Finding {
    const WHAT: &str = "patch set";
    let store = match store {
        Ok(store) => store,
        Err(error) => return bad(WHAT, error.to_string(), "check the URL"),
    };
    match PatchSet::load(store).await {
        Ok(set) => {
            let manifest = set.manifest();
            good(WHAT, format!("{url}: {} patches of {} slides", count(manifest.patches), count(manifest.slides.len())))
        }
        Err(error) => bad(WHAT, format!("{url}: {error}"), "`sgclctl ingest … --to URL` writes one"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_bucket_is_tried_and_left_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let url = folder.path().to_str().unwrap();
        let found = bucket(url, Store::open(url)).await;
        assert_eq!(found.answer, Answer::Good, "{}", found.found);
        let left = Store::open(url).unwrap().list("checks").await.unwrap();
        assert!(left.is_empty(), "{left:?}");
    }

    #[test]
    fn a_remedy_is_part_of_the_json_only_where_there_is_one() {
        let text = |finding: &Finding| serde_json::to_string(finding).unwrap_or_default();
        assert_eq!(text(&good("cluster", "v1")), r#"{"what":"cluster","answer":"good","found":"v1"}"#);
        assert!(
            text(&bad("GPUs", "none", "plug one in"))
                .ends_with(r#""answer":"bad","found":"none","remedy":"plug one in"}"#)
        );
    }
}
