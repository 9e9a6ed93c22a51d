//! `logs`: what a run's nodes say, the newest pod of each, or what follows the run.

use std::collections::BTreeMap;

use anyhow::Result;
use futures::{AsyncBufReadExt, TryStreamExt, future};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{ListParams, LogParams};
use sgcl_coordinator::kube::pods::PodFacts;
use sgcl_coordinator::kube::resource::SgclRunStatus;
use sgcl_coordinator::kube::{RUN_LABEL, evaluation};

use super::access::Cluster;
use crate::cli::cluster::LogsArgs;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Out, warn};

/// What Kubernetes labels a Job's pods with.
const JOB_LABEL: &str = "batch.kubernetes.io/job-name";

pub(crate) async fn logs(args: LogsArgs, out: Out) -> Result<Exit> {
    let cluster = Cluster::open(&args.cluster).await?;
    let run = cluster.run(&args.run).await?;
    let named = args.of.as_ref().map(|name| job_of(&args.run, &run.status.unwrap_or_default(), name)).transpose()?;
    let label = named.as_ref().map_or_else(|| format!("{RUN_LABEL}={}", args.run), |job| format!("{JOB_LABEL}={job}"));
    let pods = cluster.api::<Pod>();
    let listed = pods.list(&ListParams::default().labels(&label)).await.map_err(|error| cluster.told(error, None))?;
    let sources = if named.is_some() { newest(&listed.items) } else { nodes(&listed.items, args.node) };
    if sources.is_empty() {
        let what = args.node.map_or_else(|| "nothing".to_owned(), |node| format!("no node {node}"));
        return Err(Failure::new(Exit::Data, format!("run {} has {what} with logs", args.run))
            .hint(format!("`sgclctl status {}` says what it waits for", args.run))
            .into());
    }
    let several = sources.len() > 1;
    let params = LogParams { follow: args.follow, tail_lines: Some(args.tail), ..LogParams::default() };
    let reading = sources.iter().map(|(word, pod)| {
        let (pods, params) = (pods.clone(), params.clone());
        async move {
            let mut lines = match pods.log_stream(pod, &params).await {
                Ok(stream) => stream.lines(),
                Err(error) => {
                    warn(format!("{pod}: {error}"));
                    return Ok(());
                }
            };
            while let Some(line) = lines.try_next().await? {
                out.data(if several { format!("{word} | {line}") } else { line })?;
            }
            Ok::<_, anyhow::Error>(())
        }
    });
    future::try_join_all(reading).await?;
    Ok(Exit::Done)
}

/// The Job of an evaluation or embedding.
fn job_of(run: &str, status: &SgclRunStatus, name: &str) -> Result<String> {
    let place = status.evaluations.iter().position(|one| one.name == name);
    let Some(place) = place else {
        let known: Vec<&str> = status.evaluations.iter().map(|one| one.name.as_str()).collect();
        let hint = match known[..] {
            [] => "nothing follows it yet: evaluations and embeddings begin when a run is finished".to_owned(),
            _ => format!("there are {}", known.join(", ")),
        };
        return Err(Failure::new(Exit::Data, format!("nothing that follows run {run} is called {name}"))
            .hint(hint)
            .into());
    };
    Ok(evaluation::name(run, place, status.evaluations[place].kind))
}

/// Number and newest pod of each node, or of one.
fn nodes(pods: &[Pod], only: Option<u32>) -> Vec<(String, String)> {
    let mut newest: BTreeMap<u32, PodFacts> = BTreeMap::new();
    for pod in pods.iter().filter_map(PodFacts::of) {
        let newer = newest.get(&pod.slot).is_none_or(|known| known.number < pod.number);
        if newer && only.is_none_or(|node| node == pod.slot) {
            newest.insert(pod.slot, pod);
        }
    }
    newest.into_values().map(|pod| (pod.slot.to_string(), pod.name)).collect()
}

/// The newest of a Job's pods: the others failed before it.
fn newest(pods: &[Pod]) -> Vec<(String, String)> {
    let newest = pods.iter().max_by_key(|pod| pod.creation_timestamp().map(|made| made.0));
    newest.map(|pod| (String::new(), pod.name_any())).into_iter().collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use sgcl_coordinator::kube::resource::{EvaluationKind, EvaluationStatus};

    use super::*;

    #[test]
    fn what_follows_a_run_is_found_by_its_name() {
        let one = |name: &str, kind| EvaluationStatus { name: name.into(), kind, ..EvaluationStatus::default() };
        let evaluations = vec![one("grain", EvaluationKind::Evaluation), one("atlas", EvaluationKind::Embedding)];
        let status = SgclRunStatus { evaluations, ..SgclRunStatus::default() };
        assert_eq!(job_of("first", &status, "grain").unwrap(), "first-eval-0");
        assert_eq!(job_of("first", &status, "atlas").unwrap(), "first-embed-1");
        let error = job_of("first", &status, "graim").unwrap_err();
        assert!(error.to_string().contains("graim"), "{error}");
    }
}
