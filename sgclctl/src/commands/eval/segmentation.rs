//! `eval segmentation`: `sgcl-worker` trains and validates; this shows what it found.

use std::path::Path;

use anyhow::{Context, Result};
use askama::Template as _;
use serde_json::{Value, json};
use sgcl_runstore::evals;
use tokio::process::Command;

use super::runs_to_keep_with;
use super::table::{figure, remarks};
use super::worker::{follow, names};
use crate::cli::segmentation::SegmentationArgs;
use crate::exit::Exit;
use crate::output::{Out, count, percent};
use crate::report::SegmentationPage;
use crate::{table, worker};

pub(crate) async fn main(args: SegmentationArgs, out: Out) -> Result<Exit> {
    let runs = runs_to_keep_with(&args.weights, args.bucket.as_deref(), None).await?;
    // Pictures are made for the page too; without --save they go when it is written.
    let temporary = match (&args.save, &args.page) {
        (None, Some(_)) => Some(tempfile::tempdir().context("no folder for pictures")?),
        _ => None,
    };
    let save = args.save.as_deref().or(temporary.as_ref().map(tempfile::TempDir::path));
    let mut results = follow(command(&args, save)?, "sgcl-worker", out).await?;
    for remark in results.iter().flat_map(remarks) {
        out.note(remark);
    }
    let kept: Vec<Value> = results.iter().map(without_images).collect();
    for (name, run) in &runs {
        evals::keep(run, &kept, &json!({ "data": args.data, "seed": args.seed }), "-segmentation").await?;
        out.note(format!("kept with run {name}"));
    }
    if let Some(file) = &args.page {
        let html = SegmentationPage::new(&args, &results).render()?;
        super::super::report::write(file, html.as_bytes()).with_context(|| file.display().to_string())?;
        out.note(format!("page: {}", file.display()));
    }
    if temporary.is_some() {
        forget_pictures(&mut results);
    }
    if out.json() {
        for result in &results {
            out.json_line(result)?;
        }
    } else {
        out.data(comparison(&results))?;
        if let Some(folder) = &args.save {
            out.note(format!("predicted classes and pictures: {}", folder.display()));
        }
    }
    Ok(Exit::Done)
}

fn command(args: &SegmentationArgs, save: Option<&Path>) -> Result<Command> {
    let mut command = Command::new(worker::find()?);
    command.arg("segmentation").arg("--data").arg(&args.data);
    for (option, value) in [
        ("--validation", args.validation.join(",")),
        ("--tile-px", args.tile_px.to_string()),
        ("--trials", args.trials.to_string()),
        ("--steps", args.steps.to_string()),
        ("--batch", args.batch.to_string()),
        ("--lr", args.lr.to_string()),
        ("--augment", names(&args.augment)),
        ("--seed", args.seed.to_string()),
    ] {
        command.args([option, &value]);
    }
    for (option, value) in [("--bucket", &args.bucket), ("--arch", &args.arch)] {
        if let Some(value) = value {
            command.args([option, value]);
        }
    }
    for (option, folder) in [("--save", save), ("--scratch", args.scratch.as_deref())] {
        if let Some(folder) = folder {
            command.arg(option).arg(folder);
        }
    }
    command.arg("--weights").args(&args.weights);
    Ok(command)
}

/// What a run keeps of a result: every `status` reads it.
fn without_images(result: &Value) -> Value {
    let mut kept = result.clone();
    if let Some(map) = kept.as_object_mut() {
        map.retain(|key, _| key != "images" && key != "colours");
    }
    kept
}

/// Names of pictures that are gone would mislead.
fn forget_pictures(results: &mut [Value]) {
    for image in results.iter_mut().filter_map(|result| result["images"].as_array_mut()).flatten() {
        image["picture"] = Value::Null;
    }
}

/// Every encoder, side by side.
fn comparison(results: &[Value]) -> String {
    let classes: Vec<&str> = results
        .first()
        .and_then(|result| result["classes"].as_array())
        .map(|classes| classes.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    let rows = results.iter().map(|result| {
        let mut row = vec![
            result["weights"].as_str().unwrap_or("?").to_owned(),
            figure(&result["mean_iou"]),
            figure(&result["accuracy"]),
        ];
        row.extend(classes.iter().map(|class| plain(&result["iou"][*class])));
        row
    });
    let header: Vec<&str> =
        ["weights", "mean IoU", "pixels right"].into_iter().chain(classes.iter().copied()).collect();
    let mut text = table::wide(&header, rows.collect());
    if let Some(first) = results.first() {
        text.push('\n');
        text.push_str(&footer(first));
    }
    text
}

/// A figure without its interval: many stand side by side.
fn plain(figure: &Value) -> String {
    match (figure["value"].as_f64(), figure["std"].as_f64()) {
        (None, _) => "–".to_owned(),
        (Some(value), Some(deviation)) => format!("{:.1} ± {:.1} %", 100.0 * value, 100.0 * deviation),
        (Some(value), None) => percent(value),
    }
}

/// What all rows share.
pub(crate) fn footer(result: &Value) -> String {
    let number = |name: &str| count(result[name].as_u64().unwrap_or(0));
    let bootstrap = &result["bootstrap"];
    let interval = if bootstrap["slides"].as_u64() < Some(2) {
        "one validation slide, so no intervals".to_owned()
    } else {
        let resamples = count(bootstrap["resamples"].as_u64().unwrap_or(0));
        format!("in brackets 95 % intervals over {resamples} resamples of the validation slides")
    };
    format!(
        "IoU of each class on the right; learnt from {} tiles of {} slides, validated on {} pixels of {} others, {} trial(s); {interval}",
        number("train_tiles"),
        number("train_slides"),
        number("validation_pixels"),
        number("validation_slides"),
        number("trials"),
    )
}
