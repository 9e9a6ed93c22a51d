//! `status`: how a run stands, read from the bucket: the run may be over, or on another machine.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use sgcl_patchset::Store;
use sgcl_runstore::status::Probed;
use sgcl_runstore::{Phase, RunName, RunStatus};

use crate::cli::StatusArgs;
use crate::exit::Exit;
use crate::output::{Out, count, percent, span};

/// A running run that says nothing for so long may be dead.
const SILENT_S: f64 = 300.0;

pub(crate) async fn main(args: StatusArgs, out: Out) -> Result<Exit> {
    if args.bucket.is_none() && !args.run.contains('/') {
        RunName::new(args.run.as_str())?;
        return super::cluster::status(&args.cluster, &args.run, out).await;
    }
    let run = find(&args).await?;
    let status = RunStatus::read(&run).await?;
    if out.json() {
        out.json_line(&status)?;
    } else {
        out.data(text(&status, Timestamp::now()).trim_end())?;
    }
    Ok(Exit::Done)
}

async fn find(args: &StatusArgs) -> Result<Store> {
    if args.run.contains('/') {
        return Ok(Store::open(&args.run)?);
    }
    let bucket = args.bucket.as_deref().context("no bucket")?;
    Ok(super::existing(bucket, &args.run).await?.0)
}

fn text(status: &RunStatus, now: Timestamp) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<10} {value}");
    };
    row("run", status.run.clone());
    row("phase", phase(status, now));
    if let Some(reason) = &status.reason {
        row("because", reason.replace('\n', "\n           "));
    }
    let trained = if status.phase == Phase::Finished { status.epochs } else { status.epoch };
    row(
        "progress",
        format!(
            "{}  ({trained} of {} epochs trained, {} steps)",
            percent(status.progress),
            status.epochs,
            count(status.step)
        ),
    );
    if let Some(eta) = status.eta_s {
        row("left", span(eta));
    }
    if let Some(pace) = status.samples_per_second {
        row("pace", format!("{pace:.0} patches/s"));
    }
    let losses: Vec<String> = status
        .losses
        .iter()
        .filter_map(|(name, value)| Some(format!("{} {value:.4}", name.strip_prefix("loss/")?)))
        .collect();
    if !losses.is_empty() {
        row("losses", losses.join("  "));
    }
    if let Some(probe) = &status.probe {
        row("probe", probed(probe));
    }
    row("commit", status.commit.map_or_else(|| "none yet".to_owned(), |seq| seq.to_string()));
    row("restarts", status.restarts.to_string());
    row("data", status.data.clone());
    row(
        "exports",
        if status.exports.is_empty() { "none yet".to_owned() } else { format!("commit {:?}", status.exports) },
    );
    for (name, eval) in &status.evals {
        let ap = &eval["protocols"][0]["ap"];
        if ap.is_object() {
            row("probe", format!("{name}: AP {}", super::eval::table::figure(ap)));
            continue;
        }
        if eval["mean_iou"].is_object() {
            row("probe", format!("{name}: mean IoU {}", super::eval::table::figure(&eval["mean_iou"])));
            continue;
        }
        let share = |value: &serde_json::Value| value.as_f64().map_or_else(|| "–".to_owned(), percent);
        let probed = eval["knn"]["20"].is_number() || eval["linear"].is_number();
        if eval["evaluation"].is_object() || !probed {
            let found = eval["protocols"].as_array().into_iter().flatten();
            let found = found.filter_map(|found| {
                Some(format!("{} {}", found["protocol"].as_str()?, super::eval::table::figure(&found["accuracy"])))
            });
            row("evaluated", format!("{name}: {}", found.collect::<Vec<_>>().join(", ")));
            continue;
        }
        row("probe", format!("{name}: kNN-20 {}, linear {}", share(&eval["knn"]["20"]), share(&eval["linear"])));
    }
    for (name, found) in &status.embeddings {
        row("embedded", format!("{name}: {found}"));
    }
    text
}

/// What the newest probe found, in words.
pub(super) fn probed(probe: &Probed) -> String {
    let share = |name: &str| probe.figures.get(name).map_or_else(|| "–".to_owned(), |value| percent(*value));
    let (accuracy, balanced) = (share("accuracy"), share("balanced_accuracy"));
    format!("kNN {accuracy}, balanced {balanced}, after epoch {}", probe.epoch + 1)
}

/// The phase in words; a running run that went silent says so.
pub(super) fn phase(status: &RunStatus, now: Timestamp) -> String {
    let word = status.phase.word();
    let quiet = now.duration_since(status.updated).as_secs_f64();
    if status.phase == Phase::Running && quiet > SILENT_S {
        format!("{word}, but silent for {}; if nobody trains it, --resume goes on", span(quiet))
    } else {
        word.to_owned()
    }
}
