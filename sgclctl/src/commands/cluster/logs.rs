//! `logs`: what a run's nodes say, the newest pod of each.

use std::collections::BTreeMap;

use anyhow::Result;
use futures::{AsyncBufReadExt, TryStreamExt, future};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, LogParams};
use sgcl_coordinator::kube::RUN_LABEL;
use sgcl_coordinator::kube::pods::PodFacts;

use super::access::Cluster;
use crate::cli::cluster::LogsArgs;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Out, warn};

pub(crate) async fn logs(args: LogsArgs, out: Out) -> Result<Exit> {
    let cluster = Cluster::open(&args.cluster).await?;
    cluster.run(&args.run).await?;
    let pods = cluster.api::<Pod>();
    let of_run = ListParams::default().labels(&format!("{RUN_LABEL}={}", args.run));
    let found = pods.list(&of_run).await.map_err(|error| cluster.told(error, None))?;
    let mut newest: BTreeMap<u32, PodFacts> = BTreeMap::new();
    for pod in found.iter().filter_map(PodFacts::of) {
        let newer = newest.get(&pod.slot).is_none_or(|known| known.number < pod.number);
        if newer && args.node.is_none_or(|node| node == pod.slot) {
            newest.insert(pod.slot, pod);
        }
    }
    if newest.is_empty() {
        let what = args.node.map_or_else(|| "no node".to_owned(), |node| format!("no node {node}"));
        return Err(Failure::new(Exit::Data, format!("run {} has {what} with logs", args.run))
            .hint(format!("`sgclctl status {}` says what it waits for", args.run))
            .into());
    }
    let several = newest.len() > 1;
    let params = LogParams { follow: args.follow, tail_lines: Some(args.tail), ..LogParams::default() };
    let reading = newest.values().map(|pod| {
        let (pods, params) = (pods.clone(), params.clone());
        async move {
            let mut lines = match pods.log_stream(&pod.name, &params).await {
                Ok(stream) => stream.lines(),
                Err(error) => {
                    warn(format!("node {} ({}): {error}", pod.slot, pod.name));
                    return Ok(());
                }
            };
            while let Some(line) = lines.try_next().await? {
                out.data(if several { format!("{} | {line}", pod.slot) } else { line })?;
            }
            Ok::<_, anyhow::Error>(())
        }
    });
    future::try_join_all(reading).await?;
    Ok(Exit::Done)
}
