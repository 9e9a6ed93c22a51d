//! `sgcl-worker eval`: its arguments, its progress, its results, its last words.

use std::process::Stdio;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::Command;

use crate::cli::eval::EvalArgs;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::Out;
use crate::{progress, worker};

/// Lines of the worker's log that are kept for an error.
const LAST_LINES: usize = 20;

/// Runs `sgcl-worker eval` and returns its results.
pub(super) async fn results(args: &EvalArgs, out: Out) -> Result<Vec<Value>> {
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
    command.args(["--trials", &args.trials.to_string(), "--labels", &args.labels.join(",")]);
    command.args(["--protocol", &names(&args.protocol), "--recipe", &names(&args.recipe)]);
    if let Some(epochs) = args.epochs {
        command.args(["--epochs", &epochs.to_string()]);
    }
    if let Some(cache) = &args.cache {
        command.arg("--cache").arg(cache);
    }
    command.arg("--weights").args(&args.weights);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().context("cannot start sgcl-worker")?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let words = tokio::spawn(last_words(out, stderr));

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

async fn last_words(out: Out, stderr: Option<impl AsyncRead + Unpin>) -> Vec<String> {
    let mut kept = Vec::new();
    let Some(stderr) = stderr else { return kept };
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        // What the worker warns of concerns the user: a cache that cannot be used.
        if let Some(words) = line.trim_start().strip_prefix("WARN ") {
            let words = words.split_once(": ").map_or(words, |(_, words)| words);
            out.note(format!("warning: {words}"));
        }
        tracing::info!(target: "worker", "{line}");
        if kept.len() == LAST_LINES {
            kept.remove(0);
        }
        kept.push(line);
    }
    kept
}

/// Values as typed, separated by commas.
fn names<T: ValueEnum>(values: &[T]) -> String {
    let names: Vec<String> =
        values.iter().filter_map(|v| v.to_possible_value()).map(|v| v.get_name().to_owned()).collect();
    names.join(",")
}
