//! `eval`: `sgcl-worker` extracts features and probes them; this shows and keeps what it found.

use std::process::Stdio;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sgcl_patchset::Store;
use sgcl_runstore::{RunName, status};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;

use crate::cli::EvalArgs;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Out, count, percent};
use crate::table;
use crate::{progress, worker};

/// Lines of the worker's log that are kept for an error.
const LAST_LINES: usize = 20;

pub(crate) async fn main(args: EvalArgs, out: Out) -> Result<Exit> {
    if !(args.holdout_fraction > 0.0 && args.holdout_fraction < 1.0) {
        return Err(Failure::new(
            Exit::Usage,
            format!("--holdout-fraction {} is not between 0 and 1", args.holdout_fraction),
        )
        .into());
    }
    let runs = runs_to_keep_with(&args).await?;
    let results = probe(&args, out).await?;
    for (name, run) in &runs {
        for result in &results {
            let Some(weights) = result["weights"].as_str() else { continue };
            let mut kept = result.clone();
            kept["data"] = json!(args.data);
            kept["seed"] = json!(args.seed);
            kept["time"] = json!(jiff::Timestamp::now());
            status::write_eval(run, &file_name(weights), &kept).await?;
        }
        out.note(format!("kept with run {name}: `sgclctl report` shows them"));
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

/// Runs whose folders get the results: checked before the work, not after it.
async fn runs_to_keep_with(args: &EvalArgs) -> Result<Vec<(RunName, Store)>> {
    let named: Vec<&String> = match &args.save_to {
        Some(run) => vec![run],
        None => args.weights.iter().filter(|w| is_run(w)).collect(),
    };
    let Some(bucket) = &args.bucket else {
        return match named.first() {
            None => Ok(Vec::new()),
            Some(run) => Err(Failure::new(Exit::Usage, format!("{run} is neither `random` nor a file"))
                .hint("for a run of that name add --bucket URL")
                .into()),
        };
    };
    let mut runs = Vec::new();
    for run in named {
        let (store, spec) = super::existing(bucket, run).await?;
        runs.push((spec.run, store));
    }
    Ok(runs)
}

fn is_run(weights: &str) -> bool {
    weights != "random" && !std::path::Path::new(weights).is_file()
}

/// A result's name as a file name.
fn file_name(weights: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '-' };
    let last = weights.rsplit('/').next().unwrap_or(weights);
    last.chars().map(plain).take(100).collect()
}

/// Runs `sgcl-worker eval` and returns its results.
async fn probe(args: &EvalArgs, out: Out) -> Result<Vec<Value>> {
    let mut command = Command::new(worker::find()?);
    command.args(["eval", "--data", &args.data, "--seed", &args.seed.to_string()]);
    command.args(["--holdout-fraction", &args.holdout_fraction.to_string()]);
    for (option, value) in
        [("--bucket", args.bucket.clone()), ("--arch", args.arch.clone()), ("--px", args.px.map(|px| px.to_string()))]
    {
        if let Some(value) = value {
            command.args([option, &value]);
        }
    }
    command.arg("--weights").args(&args.weights);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().context("cannot start sgcl-worker")?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let words = tokio::spawn(last_words(stderr));

    let bar = progress::bar(out, 0, "{wide_msg}\n{wide_bar:.cyan/dim} {pos}/{len}");
    let mut results = Vec::new();
    if let Some(stdout) = stdout {
        let mut lines = BufReader::new(stdout).lines();
        while let Some(line) = lines.next_line().await? {
            let mut message: Value = serde_json::from_str(&line)
                .with_context(|| format!("sgcl-worker printed what is not JSON: {line:?}"))?;
            if let Some(progress) = message.get("progress") {
                bar.set_length(progress["total"].as_u64().unwrap_or(0));
                bar.set_position(progress["done"].as_u64().unwrap_or(0));
                bar.set_message(progress["what"].as_str().unwrap_or_default().to_owned());
            }
            if let Some(result) = message.get_mut("result") {
                results.push(result.take());
            }
        }
    }
    bar.finish_and_clear();
    let ended = child.wait().await?;
    let words = words.await.unwrap_or_default();
    if !ended.success() {
        return Err(failure(ended.code(), &words).into());
    }
    Ok(results)
}

/// What the worker said last: its `error:` line where there is one.
fn failure(code: Option<i32>, words: &[String]) -> Failure {
    let last = words.iter().rposition(|line| line.starts_with("error: ")).map_or(words, |at| &words[at..]);
    let text = last.join("\n");
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let exit = code.map_or(Exit::Failed, Exit::of_worker);
    match text.rsplit_once("; ").filter(|_| !text.contains('\n')) {
        Some((what, remedy)) => Failure::new(exit, what).hint(remedy),
        None if text.is_empty() => Failure::new(exit, format!("sgcl-worker ended with {code:?} and said nothing"))
            .hint("SGCL_LOG=debug makes it say more"),
        None => Failure::new(exit, text),
    }
}

async fn last_words(stderr: Option<impl AsyncRead + Unpin>) -> Vec<String> {
    let mut kept = Vec::new();
    let Some(stderr) = stderr else { return kept };
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        tracing::info!(target: "worker", "{line}");
        if kept.len() == LAST_LINES {
            kept.remove(0);
        }
        kept.push(line);
    }
    kept
}

/// The results side by side.
fn comparison(results: &[Value]) -> String {
    let share = |value: &Value| value.as_f64().map_or_else(|| "–".to_owned(), percent);
    let rows = results.iter().map(|result| {
        [
            result["weights"].as_str().unwrap_or("?").to_owned(),
            share(&result["knn"]["10"]),
            share(&result["knn"]["20"]),
            share(&result["balanced"]["knn"]),
            share(&result["linear"]),
            share(&result["balanced"]["linear"]),
        ]
    });
    let table =
        table::text(&["weights", "kNN-10", "kNN-20", "kNN-20 balanced", "linear", "linear balanced"], rows.collect());
    let Some(first) = results.first() else { return table };
    let number = |key: &str| count(first[key].as_u64().unwrap_or(0));
    let classes = first["classes"].as_array().map_or(0, Vec::len);
    let mut text = format!(
        "{table}\n{classes} classes; learnt from {} patches, tested on {} of other slides",
        number("train_patches"),
        number("test_patches")
    );
    let knn = |result: &Value| result["knn"]["20"].as_f64();
    let random = results.iter().find(|r| r["weights"] == "random").and_then(knn);
    let best = results.iter().filter(|r| r["weights"] != "random").filter_map(knn).reduce(f64::max);
    if let (Some(random), Some(best)) = (random, best) {
        text.push_str(&format!("; kNN-20 {:+.1} points against random weights", 100.0 * (best - random)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_comparison_states_the_gain_over_random_weights() {
        let result = |weights: &str, knn: f64| {
            json!({ "weights": weights, "knn": {"10": knn, "20": knn}, "linear": knn, "balanced": {"knn": knn, "linear": knn},
                "classes": ["a", "b"], "train_patches": 900, "test_patches": 300 })
        };
        let text = comparison(&[result("demo", 0.9), result("random", 0.6)]);
        assert!(text.contains("90.0 %") && text.contains("+30.0 points"), "{text}");
    }

    #[test]
    fn a_weights_file_is_kept_under_its_plain_name() {
        assert_eq!(file_name("../x/backbone.pth"), "backbone-pth");
        assert_eq!(file_name("demo"), "demo");
    }
}
