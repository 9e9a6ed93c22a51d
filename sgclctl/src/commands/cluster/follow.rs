//! Staying with a run until it ends.

use anyhow::Result;
use futures::{StreamExt, TryStreamExt};
use kube::runtime::{WatchStreamExt, watcher};
use sgcl_coordinator::kube::resource::{EvaluationKind, EvaluationPhase, EvaluationStatus, Phase, SgclRunStatus};

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
            Phase::Finished if status.evaluations.iter().any(|one| !one.phase.is_over()) => {}
            Phase::Finished => return evaluated(name, &status),
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

/// A finished run after which all is over: all of it is wanted.
fn evaluated(name: &str, status: &SgclRunStatus) -> Result<Exit> {
    let failed = |one: &&EvaluationStatus| one.phase == EvaluationPhase::Failed;
    let failed: Vec<&str> = status.evaluations.iter().filter(failed).map(|one| one.name.as_str()).collect();
    if failed.is_empty() {
        return Ok(Exit::Done);
    }
    let message = format!("run {name} is finished and exported, but not made: {}", failed.join(", "));
    Err(Failure::new(Exit::Failed, message).hint(format!("`sgclctl status {name}` says why")).into())
}

/// What messages call it.
fn kind(one: &EvaluationStatus) -> &'static str {
    match one.kind {
        EvaluationKind::Evaluation => "evaluation",
        EvaluationKind::Embedding => "embedding",
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
    if let Some(message) = &status.message {
        line = format!("{line}: {message}");
    }
    for one in &status.evaluations {
        let said = one.figures.as_ref().or(one.message.as_ref()).map(|said| format!(": {said}")).unwrap_or_default();
        let kind = kind(one);
        line = format!("{line}\n  {kind} {} {}{said}", one.name, one.phase);
    }
    line
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_finished_run_has_failed_its_user_where_an_evaluation_is_missing() {
        let one = |name: &str, phase| EvaluationStatus { name: name.into(), phase, ..EvaluationStatus::default() };
        let of = |evaluations| SgclRunStatus { phase: Phase::Finished, evaluations, ..SgclRunStatus::default() };
        assert!(matches!(evaluated("first", &of(vec![one("grain", EvaluationPhase::Done)])), Ok(Exit::Done)));
        let torn = of(vec![one("grain", EvaluationPhase::Done), one("torn", EvaluationPhase::Failed)]);
        let error = evaluated("first", &torn).map(drop).unwrap_err().to_string();
        assert!(error.ends_with("not made: torn"), "{error}");
        assert!(line(&torn, false).contains("evaluation torn Failed"));
    }
}
