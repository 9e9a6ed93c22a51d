//! `list`: the runs of a namespace, one a line.

use anyhow::Result;
use kube::ResourceExt;
use kube::api::ListParams;
use serde_json::{Value, json};
use sgcl_coordinator::kube::resource::SgclRun;

use super::access::Cluster;
use crate::cli::cluster::ClusterArgs;
use crate::exit::Exit;
use crate::output::Out;
use crate::table;

pub(crate) async fn list(args: &ClusterArgs, out: Out) -> Result<Exit> {
    let cluster = Cluster::open(args).await?;
    let runs = cluster.runs().list(&ListParams::default()).await.map_err(|error| cluster.told(error, None))?;
    if out.json() {
        runs.iter().try_for_each(|run| out.json_line(&record(run)))?;
    } else if runs.items.is_empty() {
        out.note(format!("no run in namespace {}", cluster.namespace));
    } else {
        out.data(table_of(&runs))?;
    }
    Ok(Exit::Done)
}

/// A run for programs.
pub(super) fn record(run: &SgclRun) -> Value {
    json!({ "run": run.name_any(), "spec": run.spec, "status": run.status.clone().unwrap_or_default() })
}

/// Runs for people.
pub(super) fn table_of<'a>(runs: impl IntoIterator<Item = &'a SgclRun>) -> String {
    let none = || "–".to_owned();
    let rows = runs.into_iter().map(|run| {
        let status = run.status.clone().unwrap_or_default();
        [
            run.name_any(),
            status.phase.to_string(),
            status.nodes.unwrap_or_else(none),
            status.epochs.unwrap_or_else(none),
            status.progress.unwrap_or_else(none),
            status.eta.unwrap_or_else(none),
            status.restarts.to_string(),
            status.last_commit.map_or_else(none, |seq| seq.to_string()),
        ]
    });
    table::text(&["run", "phase", "nodes", "epoch", "done", "left", "restarts", "commit"], rows.collect())
}
