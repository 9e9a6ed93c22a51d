//! What can be wished of a run that is there: suspend, resume, cancel.

use anyhow::Result;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use super::access::Cluster;
use crate::cli::cluster::ClusterArgs;
use crate::exit::Exit;
use crate::output::Out;

/// Commit, then give the nodes back.
pub(crate) async fn suspend(args: &ClusterArgs, run: &str, out: Out) -> Result<Exit> {
    wish(args, run, json!({ "suspend": true }), "commits, then gives its nodes back", out).await
}

/// Go on.
pub(crate) async fn resume(args: &ClusterArgs, run: &str, out: Out) -> Result<Exit> {
    wish(args, run, json!({ "suspend": false }), "goes on from its newest commit", out).await
}

/// Commit and end for good.
pub(crate) async fn cancel(args: &ClusterArgs, run: &str, out: Out) -> Result<Exit> {
    wish(args, run, json!({ "cancel": true }), "commits and ends", out).await
}

async fn wish(args: &ClusterArgs, run: &str, spec: Value, then: &str, out: Out) -> Result<Exit> {
    let cluster = Cluster::open(args).await?;
    patch(&cluster, run, &spec).await?;
    out.note(format!("run {run} {then}"));
    Ok(Exit::Done)
}

/// Changes some fields of a run's spec.
pub(super) async fn patch(cluster: &Cluster, run: &str, spec: &Value) -> Result<()> {
    let patch = Patch::Merge(json!({ "spec": spec }));
    match cluster.runs().patch(run, &PatchParams::default(), &patch).await {
        Ok(_) => Ok(()),
        Err(error) => Err(cluster.told(error, Some(run))),
    }
}
