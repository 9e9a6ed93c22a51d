//! Staying with a run until it ends.

use anyhow::Result;
use futures::{StreamExt, TryStreamExt};
use kube::runtime::{WatchStreamExt, watcher};
use sgcl_coordinator::kube::resource::{Phase, SgclRunStatus};

use super::access::Cluster;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Out, warn};

/// Watches until the run is over; `all` tells every change, else transitions alone.
pub(super) async fn follow(cluster: &Cluster, name: &str, all: bool, out: Out) -> Result<Exit> {
    let mut changes = watcher::watch_object(cluster.runs(), name).default_backoff().boxed();
    let (mut said, mut seen) = (String::new(), false);
    loop {
        let run = match changes.try_next().await {
            Ok(Some(Some(run))) => run,
            // Before the first sight of it the object may not have come through yet.
            Ok(Some(None)) if !seen => continue,
            Ok(_) => {
                return Err(Failure::new(Exit::Failed, format!("run {name} was deleted")).into());
            }
            Err(error) => {
                warn(format!("the watch broke, it is made anew: {error}"));
                continue;
            }
        };
        seen = true;
        let status = run.status.unwrap_or_default();
        let line = line(&status, all);
        if line != said {
            if out.json() {
                out.json_line(&status)?;
            } else {
                out.note(&line);
            }
            said = line;
        }
        if status.observed_generation < run.metadata.generation.unwrap_or(0) {
            continue;
        }
        match status.phase {
            Phase::Finished => return Ok(Exit::Done),
            Phase::Suspended | Phase::Cancelled => return Ok(Exit::Suspended),
            Phase::Failed => {
                let why = status.message.unwrap_or_else(|| "no reason was given".into());
                return Err(Failure::new(Exit::Failed, format!("run {name} failed: {why}"))
                    .hint(format!("`sgclctl logs {name}` shows what its nodes said"))
                    .into());
            }
            Phase::Pending | Phase::Waiting | Phase::Running => {}
        }
    }
}

fn line(status: &SgclRunStatus, all: bool) -> String {
    let mut line = status.phase.to_string();
    if all {
        for (name, value) in
            [("nodes", &status.nodes), ("epoch", &status.epochs), ("done", &status.progress), ("left", &status.eta)]
        {
            if let Some(value) = value {
                line = format!("{line}  {name} {value}");
            }
        }
    }
    match &status.message {
        Some(message) => format!("{line}: {message}"),
        None => line,
    }
}
