//! `sgcl-worker evaluation`: an evaluation that a run's configuration names, made of its newest weights and kept with the run.
//!
//! Prints what `eval` prints. One that is there is not made again: whoever asks twice, or asks anew after a crash, finds it done.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::Value;
use sgcl_runstore::config::{EvalProtocol, EvalRecipe, Evaluation};
use sgcl_runstore::{RunName, evals, status};

use super::EvalArgs;
use super::protocol::{Family, LinearRecipe};
use crate::encoder::newest_export;

/// Arguments of `sgcl-worker evaluation`.
#[derive(Args, Debug)]
pub(crate) struct EvaluationArgs {
    /// Run whose newest export is evaluated
    #[arg(long)]
    run: RunName,
    /// Bucket that holds it
    #[arg(long)]
    bucket: String,
    /// The evaluation, one of `evaluations` in a run's configuration, as JSON
    #[arg(long)]
    evaluation: Evaluation,
    /// Folder that keeps features
    #[arg(long)]
    cache: Option<PathBuf>,
}

/// Makes it, unless the run has it, and keeps its results with the run.
///
/// # Errors
/// The run has no export; the storage; whatever [`super::main`] cannot do.
pub(crate) fn main(runtime: &tokio::runtime::Handle, args: &EvaluationArgs, mut emit: impl FnMut(Value)) -> Result<()> {
    let (name, wanted) = (&args.run, &args.evaluation);
    let (run, commit, kept) = runtime.block_on(async {
        let (run, commit) = newest_export(name, &args.bucket).await?;
        let kept = status::read_evals(&run).await?;
        anyhow::Ok((run, commit, kept))
    })?;
    if wanted.made(name, commit, &kept).is_some() {
        tracing::info!(run = %name, evaluation = wanted.name, commit, "is there already");
        return Ok(());
    }
    let mut results = Vec::new();
    super::main(runtime, &EvalArgs::of(wanted, args), |line| {
        results.extend(line.get("result").cloned());
        emit(line);
    })?;
    let (asked, task) = (wanted.asked(commit), format!("-{}", wanted.name));
    Ok(runtime.block_on(evals::keep(&run, &results, &asked, &task))?)
}

impl EvalArgs {
    /// What would be typed to have it made.
    fn of(evaluation: &Evaluation, args: &EvaluationArgs) -> Self {
        Self {
            data: evaluation.dataset.clone(),
            weights: evaluation.weights(&args.run),
            bucket: Some(args.bucket.clone()),
            arch: None,
            px: None,
            holdout_fraction: Self::HOLDOUT_FRACTION,
            seed: evaluation.seed,
            protocol: evaluation.protocol.iter().copied().map(Family::from).collect(),
            recipe: evaluation.recipe.iter().copied().map(LinearRecipe::from).collect(),
            labels: evaluation.labels.iter().map(|percent| percent / 100.0).collect(),
            trials: evaluation.trials,
            epochs: evaluation.epochs,
            cache: args.cache.clone(),
        }
    }
}

impl From<EvalProtocol> for Family {
    fn from(protocol: EvalProtocol) -> Self {
        match protocol {
            EvalProtocol::Knn => Self::Knn,
            EvalProtocol::Linear => Self::Linear,
            EvalProtocol::Finetune => Self::Finetune,
        }
    }
}

impl From<EvalRecipe> for LinearRecipe {
    fn from(recipe: EvalRecipe) -> Self {
        match recipe {
            EvalRecipe::Lbfgs => Self::Lbfgs,
            EvalRecipe::Seed => Self::Seed,
            EvalRecipe::Eva => Self::Eva,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Named {
        #[command(flatten)]
        args: EvaluationArgs,
    }

    #[derive(Parser)]
    struct Typed {
        #[command(flatten)]
        args: EvalArgs,
    }

    fn named(evaluation: &str) -> Result<EvaluationArgs, clap::Error> {
        let words = ["evaluation", "--run", "first", "--bucket", "runs", "--evaluation", evaluation];
        Named::try_parse_from(words).map(|named| named.args)
    }

    fn mapped(evaluation: &str) -> String {
        let args = named(evaluation).unwrap();
        format!("{:?}", EvalArgs::of(&args.evaluation, &args))
    }

    fn typed(words: &str) -> String {
        let words = format!("eval --bucket runs --data labelled --weights first {words}");
        format!("{:?}", Typed::try_parse_from(words.split_whitespace()).unwrap().args)
    }

    #[test]
    fn an_evaluation_asks_for_what_a_user_would_type() {
        assert_eq!(mapped(r#"{"name": "grain", "dataset": "labelled"}"#), typed(""));
        let all = r#"{"name": "all", "dataset": "labelled", "protocol": ["finetune", "linear", "knn"],
            "recipe": ["eva", "seed", "lbfgs"], "labels": [1, 12.5, 7], "trials": 3, "epochs": 4, "seed": 5,
            "baselines": ["random", "colour-histogram"]}"#;
        let words = "random colour-histogram --protocol finetune,linear,knn --recipe eva,seed,lbfgs --labels 1%,12.5%,7% \
            --trials 3 --epochs 4 --seed 5";
        assert_eq!(mapped(all), typed(words));
    }

    #[test]
    fn one_that_no_configuration_may_have_is_refused() {
        for (evaluation, words) in [
            (r#"{"name": "a", "dataset": ""}"#, "dataset is missing"),
            (r#"{"name": "a", "dataset": "d", "trials": 0}"#, "trials 0"),
            (r#"{"name": "a", "dataset": "d", "shots": 3}"#, "shots"),
        ] {
            let error = named(evaluation).map(drop).unwrap_err().to_string();
            assert!(error.contains(words), "{words:?} is not in {error}");
        }
    }
}
