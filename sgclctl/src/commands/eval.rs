//! `eval`: `sgcl-worker` evaluates encoders; this shows and keeps what it found.

mod detection;
pub(crate) mod segmentation;
pub(crate) mod table;
mod transfer;
pub(super) mod worker;

use std::path::Path;

use anyhow::{Context, Result};
use askama::Template as _;
use serde_json::{Value, json};
use sgcl_patchset::{PatchSet, Store};
use sgcl_runstore::{RunName, evals};

use crate::cli::eval::{EvalArgs, EvalCommand, EvalTask, Protocol};
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::Out;
use crate::report::EvalPage;

pub(crate) async fn main(command: EvalCommand, out: Out) -> Result<Exit> {
    match (command.task, command.patches) {
        (Some(EvalTask::Detection(args)), _) => detection::main(*args, out).await,
        (Some(EvalTask::Segmentation(args)), _) => segmentation::main(*args, out).await,
        (None, Some(args)) => patches(args, out).await,
        // The parser has asked for --data and --weights.
        (None, None) => Err(Failure::new(Exit::Usage, "nothing to evaluate").hint("`sgclctl eval --help`").into()),
    }
}

/// Evaluates encoders on a labelled patch set.
async fn patches(args: EvalArgs, out: Out) -> Result<Exit> {
    if !(args.holdout_fraction > 0.0 && args.holdout_fraction < 1.0) {
        return Err(Failure::new(
            Exit::Usage,
            format!("--holdout-fraction {} is not between 0 and 1", args.holdout_fraction),
        )
        .into());
    }
    let runs = runs_to_keep_with(&args.weights, args.bucket.as_deref(), args.save_to.as_deref()).await?;
    let results = worker::results(&args, out).await?;
    for remark in results.iter().flat_map(table::remarks) {
        out.note(remark);
    }
    // What was fine-tuned alone stands beside the probes that were kept before, not in their place.
    let task = if args.protocol.iter().all(|one| *one == Protocol::Finetune) { "-finetune" } else { "" };
    for (name, run) in &runs {
        evals::keep(run, &results, &json!({ "data": args.data, "seed": args.seed }), task).await?;
        out.note(format!("kept with run {name}: `sgclctl report` shows them"));
    }
    if out.json() {
        for result in &results {
            out.json_line(result)?;
        }
    } else {
        out.data(table::comparison(&results))?;
    }
    if let Some(file) = &args.page {
        page(&args, &results, file, out).await?;
    }
    Ok(Exit::Done)
}

/// Writes the page; pictures of mistakes that cannot be read are left out of it.
async fn page(args: &EvalArgs, results: &[Value], file: &Path, out: Out) -> Result<()> {
    let set = PatchSet::open(&args.data).await?;
    let html = EvalPage::new(args, results, &set).await.render()?;
    super::report::write(file, html.as_bytes()).with_context(|| file.display().to_string())?;
    out.note(format!("page: {}", file.display()));
    Ok(())
}

/// Runs whose folders get the results: checked before the work, not after it.
async fn runs_to_keep_with(
    weights: &[String],
    bucket: Option<&str>,
    save_to: Option<&str>,
) -> Result<Vec<(RunName, Store)>> {
    let named: Vec<&str> = match save_to {
        Some(run) => vec![run],
        None => weights.iter().map(String::as_str).filter(|w| is_run(w)).collect(),
    };
    let Some(bucket) = bucket else {
        return match named.first() {
            None => Ok(Vec::new()),
            Some(run) => {
                Err(Failure::new(Exit::Usage, format!("{run} is neither `random`, `colour-histogram` nor a file"))
                    .hint("for a run of that name add --bucket URL")
                    .into())
            }
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
    !["random", "colour-histogram"].contains(&weights) && !std::path::Path::new(weights).is_file()
}
