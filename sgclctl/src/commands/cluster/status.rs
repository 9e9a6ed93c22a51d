//! `status`: how a run stands, and what it waits for.

use std::fmt::Write as _;

use anyhow::Result;
use k8s_openapi::api::events::v1::Event;
use kube::api::ListParams;
use sgcl_coordinator::kube::resource::{EvaluationKind, SgclRun};

use super::access::Cluster;
use crate::cli::cluster::ClusterArgs;
use crate::exit::Exit;
use crate::output::Out;

/// Events that are shown.
const LAST: usize = 8;

pub(crate) async fn status(args: &ClusterArgs, name: &str, out: Out) -> Result<Exit> {
    let cluster = Cluster::open(args).await?;
    let run = cluster.run(name).await?;
    if out.json() {
        out.json_line(&serde_json::json!({ "run": name, "spec": run.spec, "status": run.status }))?;
        return Ok(Exit::Done);
    }
    let of_run = ListParams::default().fields(&format!("regarding.kind=SgclRun,regarding.name={name}"));
    // Whoever may read runs may not be allowed to read events: the rest is worth showing.
    let mut events = cluster.api::<Event>().list(&of_run).await.map(|list| list.items).unwrap_or_default();
    events.sort_by_key(|event| event.event_time.as_ref().map(|time| time.0));
    out.data(text(name, &run, &events).trim_end())?;
    Ok(Exit::Done)
}

fn text(name: &str, run: &SgclRun, events: &[Event]) -> String {
    let status = run.status.clone().unwrap_or_default();
    let mut text = String::new();
    let mut row = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<10} {}", value.replace('\n', "\n           "));
    };
    row("run", name);
    row("phase", &status.phase.to_string());
    if let Some(message) = &status.message {
        row("because", message);
    }
    row("nodes", &status.nodes.clone().unwrap_or_else(|| format!("0/{}", run.spec.nodes)));
    let given = [
        ("epoch", &status.epochs),
        ("done", &status.progress),
        ("left", &status.eta),
        ("patches/s", &status.patches_per_second),
        ("goodput", &status.goodput),
        ("probe", &status.probe),
        ("bucket", &status.url),
    ];
    for (name, value) in given {
        if let Some(value) = value {
            row(name, value);
        }
    }
    for one in &status.evaluations {
        let words = match one.kind {
            EvaluationKind::Evaluation => ["evaluated", "evaluation"],
            EvaluationKind::Embedding => ["embedded", "embedding"],
        };
        let (word, said) = match &one.figures {
            Some(figures) => (words[0], figures.clone()),
            None => (words[1], one.phase.to_string()),
        };
        let why = one.message.as_ref().map(|message| format!(": {message}")).unwrap_or_default();
        row(word, &format!("{}: {said}{why}", one.name));
    }
    row("steps", &status.step.to_string());
    row("commit", &status.last_commit.map_or_else(|| "none yet".to_owned(), |seq| seq.to_string()));
    row("restarts", &status.restarts.to_string());
    for event in &events[events.len().saturating_sub(LAST)..] {
        let time = event.event_time.as_ref().map(|time| time.0.strftime("%H:%M:%S").to_string()).unwrap_or_default();
        let (reason, note) = (event.reason.as_deref().unwrap_or_default(), event.note.as_deref().unwrap_or_default());
        let times = event.series.as_ref().map(|series| format!(" (×{})", series.count)).unwrap_or_default();
        row(&time, &format!("{reason}: {note}{times}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use sgcl_coordinator::kube::resource::{EvaluationPhase, EvaluationStatus, SgclRunSpec, SgclRunStatus};

    use super::*;

    #[test]
    fn evaluations_stand_with_their_figures_or_with_why_there_are_none() {
        let one = |name: &str, phase| EvaluationStatus { name: name.into(), phase, ..EvaluationStatus::default() };
        let grain = EvaluationStatus { figures: Some("linear 64.5%".into()), ..one("grain", EvaluationPhase::Done) };
        let torn = EvaluationStatus { message: Some("no such set".into()), ..one("torn", EvaluationPhase::Failed) };
        let mut run = SgclRun::new("first", SgclRunSpec::default());
        let atlas = EvaluationStatus { kind: EvaluationKind::Embedding, ..one("atlas", EvaluationPhase::Waiting) };
        let evaluations = vec![grain, torn, one("tumour", EvaluationPhase::Running), atlas];
        run.status = Some(SgclRunStatus { evaluations, ..SgclRunStatus::default() });
        let text = text("first", &run, &[]);
        for line in [
            "evaluated  grain: linear 64.5%",
            "evaluation torn: Failed: no such set",
            "evaluation tumour: Running",
            "embedding  atlas: Waiting",
        ] {
            assert!(text.lines().any(|found| found == line), "{line:?} is not in {text}");
        }
    }
}
