//! `list`: the runs of a namespace, one a line.

use anyhow::Result;
use kube::ResourceExt;
use kube::api::ListParams;

use super::access::Cluster;
use crate::cli::cluster::ClusterArgs;
use crate::exit::Exit;
use crate::output::Out;
use crate::table;

pub(crate) async fn list(args: &ClusterArgs, out: Out) -> Result<Exit> {
    let cluster = Cluster::open(args).await?;
    let runs = cluster.runs().list(&ListParams::default()).await.map_err(|error| cluster.told(error, None))?;
    let none = || "–".to_owned();
    let mut rows = Vec::new();
    for run in runs {
        let name = run.name_any();
        let status = run.status.unwrap_or_default();
        if out.json() {
            out.json_line(&serde_json::json!({ "run": name, "spec": run.spec, "status": status }))?;
            continue;
        }
        rows.push([
            name,
            status.phase.to_string(),
            status.nodes.unwrap_or_else(none),
            status.epochs.unwrap_or_else(none),
            status.progress.unwrap_or_else(none),
            status.eta.unwrap_or_else(none),
            status.restarts.to_string(),
            status.last_commit.map_or_else(none, |seq| seq.to_string()),
        ]);
    }
    if !rows.is_empty() {
        out.data(table::text(&["run", "phase", "nodes", "epoch", "done", "left", "restarts", "commit"], rows))?;
    } else if !out.json() {
        out.note(format!("no run in namespace {}", cluster.namespace));
    }
    Ok(Exit::Done)
}
