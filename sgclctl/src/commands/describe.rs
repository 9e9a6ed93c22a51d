//! `describe`: a run's life: every membership change with its cause and cost, and what share of the time was training.

use std::fmt::Write as _;

use anyhow::Result;
use jiff::Timestamp;
use serde::Serialize;
use sgcl_runstore::status::Event;
use sgcl_runstore::{EventKind, Events, RunStatus, Spec};

use super::status::probed;
use crate::cli::DescribeArgs;
use crate::exit::Exit;
use crate::output::{Out, percent, span};
use crate::table;

/// What was lost on the way.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Costs {
    /// Membership changes.
    changes: u32,
    /// Those that count as failures.
    failures: u32,
    /// Steps that were trained again.
    steps_lost: u64,
    /// Seconds from causes to training again.
    seconds: f64,
    /// The same times the ranks that waited.
    device_seconds: f64,
    /// Seconds between start and end, without those suspended.
    active: f64,
    /// Share of the active time that was not spent on changes.
    goodput: Option<f64>,
}

#[derive(Serialize)]
struct Described<'a> {
    status: &'a RunStatus,
    spec: &'a Spec,
    events: &'a [Event],
    costs: &'a Costs,
}

pub(crate) async fn main(args: DescribeArgs, out: Out) -> Result<Exit> {
    let (run, spec) = super::existing(&args.bucket.bucket, &args.run).await?;
    let status = RunStatus::read(&run).await?;
    let events = Events::new(&run).read().await?;
    let costs = costs(&events, status.updated);
    if out.json() {
        out.json_line(&Described { status: &status, spec: &spec, events: &events, costs: &costs })?;
    } else {
        out.data(text(&status, &spec, &events, &costs).trim_end())?;
    }
    Ok(Exit::Done)
}

fn costs(events: &[Event], updated: Timestamp) -> Costs {
    let mut costs = Costs::default();
    let mut since: Option<Timestamp> = None;
    for event in events {
        match &event.kind {
            EventKind::Started { .. } => since = since.or(Some(event.time)),
            EventKind::Regrouped { failure, world_before, seconds, steps_lost, .. } => {
                costs.changes += 1;
                costs.failures += u32::from(*failure);
                costs.steps_lost += steps_lost;
                costs.seconds += seconds;
                costs.device_seconds += seconds * f64::from(*world_before);
            }
            EventKind::Suspended { .. } | EventKind::Failed { .. } | EventKind::Cancelled | EventKind::Finished => {
                if let Some(since) = since.take() {
                    costs.active += event.time.duration_since(since).as_secs_f64();
                }
            }
            EventKind::SetAside { .. } | EventKind::Ordered { .. } => {}
        }
    }
    if let Some(since) = since {
        costs.active += updated.duration_since(since).as_secs_f64().max(0.0);
    }
    costs.goodput = (costs.active > 0.0).then(|| (1.0 - costs.seconds / costs.active).clamp(0.0, 1.0));
    costs
}

fn text(status: &RunStatus, spec: &Spec, events: &[Event], costs: &Costs) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<10} {value}");
    };
    row("run", status.run.clone());
    row("phase", status.phase.word().to_owned());
    row("data", spec.data.clone());
    row("nodes", format!("{} of {} ranks, at least {}", spec.nodes, spec.ranks_per_node, spec.min_nodes));
    row("progress", format!("{}, step {}", percent(status.progress), status.step));
    if let Some(probe) = &status.probe {
        row("probe", probed(probe));
    }
    row("commit", status.commit.map_or_else(|| "none".into(), |seq| seq.to_string()));
    row(
        "changes",
        format!(
            "{} ({} failures of {} allowed), {} steps trained again, {} lost ({:.0} device-seconds)",
            costs.changes,
            costs.failures,
            spec.config.max_restarts,
            costs.steps_lost,
            span(costs.seconds),
            costs.device_seconds
        ),
    );
    if let Some(goodput) = costs.goodput {
        row("goodput", format!("{} of {}", percent(goodput), span(costs.active)));
    }
    let rows = events.iter().map(|event| {
        let (what, cost, why) = line(&event.kind);
        [event.time.strftime("%Y-%m-%d %H:%M:%S").to_string(), what.to_owned(), cost, why]
    });
    let _ = write!(text, "\n{}", table::text(&["when (UTC)", "what", "cost", "why"], rows.collect()));
    text
}

fn line(kind: &EventKind) -> (&'static str, String, String) {
    match kind {
        EventKind::Started { world, from_commit } => {
            let from = from_commit.map_or_else(String::new, |seq| format!("from commit {seq}"));
            ("training", format!("{world} ranks"), from)
        }
        EventKind::Regrouped { reason, failure, world_before, world, seconds, steps_lost, from_commit } => {
            let what = if *failure { "failure" } else { "regrouped" };
            let back = match from_commit {
                Some(seq) => format!(", back to commit {seq}"),
                None if *steps_lost > 0 => ", back to the beginning: there was no commit yet".to_owned(),
                None => String::new(),
            };
            let cost = format!("{seconds:.1} s, {steps_lost} steps, {world_before} to {world} ranks{back}");
            (what, cost, reason.lines().next().unwrap_or_default().to_owned())
        }
        EventKind::SetAside { seq, reason } => ("set aside", format!("commit {seq}"), reason.clone()),
        EventKind::Ordered { what, refused, .. } => {
            let answer = refused.as_ref().map_or_else(String::new, |why| format!(" (refused: {why})"));
            ("ordered", String::new(), format!("{what}{answer}"))
        }
        EventKind::Suspended { reason } => ("suspended", String::new(), reason.clone()),
        EventKind::Failed { message } => {
            ("failed", String::new(), message.lines().next().unwrap_or_default().to_owned())
        }
        EventKind::Cancelled => ("cancelled", String::new(), String::new()),
        EventKind::Finished => ("finished", String::new(), String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_add_up_and_suspended_time_does_not_count() {
        let at = |second: i64, kind| Event {
            version: sgcl_runstore::FORMAT_VERSION,
            write_id: String::new(),
            time: Timestamp::from_second(second).unwrap_or_default(),
            kind,
        };
        let started = |second| at(second, EventKind::Started { world: 4, from_commit: None });
        let lost = EventKind::Regrouped {
            reason: "node a was lost".into(),
            failure: true,
            world_before: 4,
            world: 2,
            seconds: 5.0,
            steps_lost: 3,
            from_commit: Some(1),
        };
        let events = [
            started(0),
            at(40, lost),
            started(40),
            at(100, EventKind::Suspended { reason: "asked".into() }),
            started(1000),
            at(1100, EventKind::Finished),
        ];
        let costs = costs(&events, Timestamp::UNIX_EPOCH);
        let expected = Costs {
            changes: 1,
            failures: 1,
            steps_lost: 3,
            seconds: 5.0,
            device_seconds: 20.0,
            active: 200.0,
            goodput: Some(0.975),
        };
        assert_eq!(costs, expected);
    }
}
