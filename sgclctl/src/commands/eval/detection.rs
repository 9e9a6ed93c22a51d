//! `eval detection`: weights are found, `sgcl_transfer` trains detectors on them, its figures are shown and kept.

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Value, json};
use sgcl_runstore::{evals, export};
use tempfile::TempDir;

use crate::cli::detection::DetectionArgs;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Out, count};
use crate::table as layout;

use super::table::{figure, remarks};
use super::{is_run, runs_to_keep_with, transfer, worker};

pub(crate) async fn main(args: DetectionArgs, out: Out) -> Result<Exit> {
    if let Some(baseline) = args.weights.iter().find(|weights| *weights == "colour-histogram") {
        return Err(Failure::new(Exit::Usage, format!("{baseline} finds no boxes"))
            .hint("`random` is the baseline of detection")
            .into());
    }
    let runs = runs_to_keep_with(&args.weights, args.bucket.as_deref(), args.save_to.as_deref()).await?;
    let (_scratch, files) = fetched(&args).await?;
    let mut command = transfer::python(out).await?;
    command.args(["-m", "sgcl_transfer.detection", "--json", "--data"]).arg(&args.data);
    command.arg("--weights").args(&files).arg("--names").args(&args.weights);
    for (option, path) in [("--out", args.to.as_deref()), ("--arch", args.arch.as_deref().map(Path::new))] {
        if let Some(path) = path {
            command.arg(option).arg(path);
        }
    }
    if args.with_other {
        command.arg("--with-other");
    }
    for (option, value) in [
        ("--fold", args.fold.to_string()),
        ("--holdout-fraction", args.holdout_fraction.to_string()),
        ("--trials", args.trials.to_string()),
        ("--seed", args.seed.to_string()),
        ("--iterations", args.iterations.to_string()),
        ("--batch", args.batch.to_string()),
        ("--lr", args.lr.to_string()),
        ("--crop", args.crop.to_string()),
        ("--scale", args.scale.to_string()),
        ("--regions", args.regions.to_string()),
        ("--proposals", args.proposals.to_string()),
        ("--resamples", args.resamples.to_string()),
    ] {
        command.args([option, &value]);
    }
    let results = worker::follow(command, "sgcl_transfer", out).await?;
    for remark in results.iter().flat_map(remarks) {
        out.note(remark);
    }
    for (name, run) in &runs {
        evals::keep(run, &results, &json!({ "data": args.data, "seed": args.seed }), "-detection").await?;
        out.note(format!("kept with run {name}"));
    }
    if out.json() {
        for result in &results {
            out.json_line(result)?;
        }
    } else {
        out.data(comparison(&results))?;
    }
    Ok(Exit::Done)
}

/// Each of the weights as a file, or `random`; runs' newest exports are fetched to a folder that goes with the first value.
async fn fetched(args: &DetectionArgs) -> Result<(TempDir, Vec<PathBuf>)> {
    let scratch = tempfile::tempdir()?;
    let mut files = Vec::new();
    for (number, weights) in args.weights.iter().enumerate() {
        files.push(match args.bucket.as_deref().filter(|_| is_run(weights)) {
            None => weights.into(),
            Some(bucket) => {
                let (run, _) = crate::commands::existing(bucket, weights).await?;
                let folder = scratch.path().join(number.to_string());
                export::pull(&run, None, &folder, |_, _| {}).await?;
                folder.join("backbone.pth")
            }
        });
    }
    Ok((scratch, files))
}

/// Every encoder's average precision, side by side, then class by class.
fn comparison(results: &[Value]) -> String {
    let mut rows = Vec::new();
    for result in results {
        let found = &result["protocols"][0];
        rows.push([
            word(&result["weights"]),
            word(&result["arch"]),
            figure(&found["ap"]),
            figure(&found["ap50"]),
            figure(&found["ap75"]),
        ]);
    }
    let mut text = layout::text(&["weights", "architecture", "AP", "AP50", "AP75"], rows);
    let classes: Vec<String> =
        results.first().map(|result| list(&result["classes"]).map(word).collect()).unwrap_or_default();
    for result in results {
        let each = list(&result["protocols"][0]["by_class"]).zip(&classes);
        let each: Vec<String> = each.map(|(found, class)| format!("{class} {}", figure(found))).collect();
        text.push_str(&format!("\n{}, AP by class: {}", word(&result["weights"]), each.join(", ")));
    }
    if let Some(first) = results.first() {
        text.push('\n');
        text.push_str(&footer(first));
    }
    text
}

/// What all rows share.
fn footer(result: &Value) -> String {
    let number = |value: &Value| count(value.as_u64().unwrap_or(0));
    let bootstrap = &result["bootstrap"];
    let interval = match (bootstrap["slides"].as_u64(), bootstrap["resamples"].as_u64()) {
        (Some(2..), Some(1..)) => {
            format!("in brackets 95 % intervals over {} resamples of the test slides", number(&bootstrap["resamples"]))
        }
        (Some(2..), _) => "no intervals were asked for".to_owned(),
        _ => "one test slide, so no intervals".to_owned(),
    };
    format!(
        "learnt from {} nuclei in {} fields of {} slides, tested on {} in {} of {} others; {} trials; {interval}",
        number(&result["train_nuclei"]),
        number(&result["train_fields"]),
        number(&result["train_slides"]),
        number(&result["test_nuclei"]),
        number(&result["test_fields"]),
        number(&result["test_slides"]),
        number(&result["protocols"][0]["trials"]),
    )
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn word(value: &Value) -> String {
    value.as_str().unwrap_or("?").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_figure_with_its_spread_and_says_what_was_tested_on() {
        let figure = json!({ "value": 0.413, "std": 0.008, "low": 0.38, "high": 0.441 });
        let none = json!({ "value": null });
        let result = |weights: &str| {
            json!({ "weights": weights, "arch": "resnet18", "classes": ["tumor_any", "sTIL"], "train_nuclei": 12345,
                "train_fields": 40, "train_slides": 8, "test_nuclei": 900, "test_fields": 12, "test_slides": 3,
                "bootstrap": { "slides": 3, "resamples": 1000 }, "protocols": [{ "protocol": "detection", "trials": 3,
                "ap": figure, "ap50": figure, "ap75": none, "by_class": [figure, none] }] })
        };
        let text = comparison(&[result("first"), result("random")]);
        for part in [
            "41.3 ± 0.8 % (38.0–44.1)",
            "random, AP by class: tumor_any 41.3 ± 0.8 % (38.0–44.1), sTIL –",
            "12,345 nuclei in 40 fields of 8 slides, tested on 900 in 12 of 3 others; 3 trials",
            "1,000 resamples of the test slides",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
