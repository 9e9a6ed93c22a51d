//! `sgcl-worker eval` and `evaluation`: their arguments, progress, results and last words.

use std::process::Stdio;

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::cli::eval::EvalArgs;
use crate::output::Out;
use crate::{progress, worker};

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
    follow(command, "sgcl-worker", out).await
}

/// Has `sgcl-worker` make an evaluation that a run's configuration names, by these words; its results.
pub(in crate::commands) async fn named(words: &[String], out: Out) -> Result<Vec<Value>> {
    let mut command = Command::new(worker::find()?);
    command.args(words);
    follow(command, "sgcl-worker", out).await
}

/// Runs a program that prints progress and results as JSON lines, to its end; `program` is what messages call it.
pub(super) async fn follow(mut command: Command, program: &str, out: Out) -> Result<Vec<Value>> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().with_context(|| format!("cannot start {program}"))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let words = stderr.map(|stderr| tokio::spawn(worker::last_words(out, stderr)));

    let bar = progress::bar(out, 0, "{wide_msg}\n{wide_bar:.cyan/dim} {pos}/{len}");
    let mut results = Vec::new();
    if let Some(stdout) = stdout {
        let mut lines = BufReader::new(stdout).lines();
        while let Some(line) = lines.next_line().await? {
            let mut message: Value =
                serde_json::from_str(&line).with_context(|| format!("{program} printed what is not JSON: {line:?}"))?;
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
    if !ended.success() {
        let words = match words {
            Some(words) => words.await.unwrap_or_default(),
            None => Vec::new(),
        };
        return Err(worker::failure(program, ended.code(), &words).into());
    }
    Ok(results)
}

/// Values as typed, separated by commas.
pub(super) fn names<T: ValueEnum>(values: &[T]) -> String {
    let names: Vec<String> =
        values.iter().filter_map(|v| v.to_possible_value()).map(|v| v.get_name().to_owned()).collect();
    names.join(",")
}
