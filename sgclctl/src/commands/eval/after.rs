//! Evaluations that a run's configuration names: made once its weights are exported, kept with the run.

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Value, json};
use sgcl_patchset::Store;
use sgcl_runstore::config::Evaluation;
use sgcl_runstore::{RunName, Spec, export, status};

use super::{keep, table, worker};
use crate::cli::eval::EvalArgs;
use crate::error::{Failure, tell};
use crate::exit::Exit;
use crate::output::{Out, warn};

/// Makes those that the run does not have yet of its newest weights. Each is made, whatever becomes of the others.
///
/// # Errors
/// The bucket; or some were not made, which names them: the run itself is whole, and `resume` makes them.
pub(crate) async fn follow_up(spec: &Spec, bucket: &Store, resume: &str, out: Out) -> Result<()> {
    let run = spec.run.store(bucket);
    let Some(&commit) = export::list_exports(&run).await?.last() else { return Ok(()) };
    let kept = status::read_evals(&run).await?;
    let mut failed: Option<(Exit, Vec<&str>)> = None;
    for evaluation in &spec.config.evaluations {
        let asked =
            json!({ "data": evaluation.dataset, "seed": evaluation.seed, "commit": commit, "evaluation": evaluation });
        let is_it = |kept: &Value| {
            kept["weights"] == spec.run.as_str() && ["commit", "evaluation"].iter().all(|key| kept[key] == asked[key])
        };
        let name = evaluation.name.as_str();
        if kept.values().any(is_it) {
            out.note(format!("evaluation {name} is there"));
            continue;
        }
        out.note(format!("evaluation {name} on {}", evaluation.dataset));
        match one(evaluation, &spec.run, &run, bucket, &asked, out).await {
            Ok(results) if out.json_progress() => {
                out.json_line(&json!({ "evaluated": { "run": spec.run, "evaluation": name, "results": results } }))?;
            }
            Ok(results) => out.data(table::comparison(&results))?,
            Err(error) => {
                let told = tell(&error);
                warn(format!("evaluation {name}: {}", told.message));
                if let Some(hint) = told.hint {
                    warn(format!("hint: {hint}"));
                }
                failed.get_or_insert((told.exit, Vec::new())).1.push(name);
            }
        }
    }
    match failed {
        None => Ok(()),
        Some((exit, names)) => {
            let message = format!("run {} is finished and exported, but not evaluated: {}", spec.run, names.join(", "));
            Err(Failure::new(exit, message).hint(format!("mend that, then: {resume}")).into())
        }
    }
}

async fn one(
    evaluation: &Evaluation,
    name: &RunName,
    run: &Store,
    bucket: &Store,
    asked: &Value,
    out: Out,
) -> Result<Vec<Value>> {
    let results = worker::results(&arguments(evaluation, name, bucket), out).await?;
    for remark in results.iter().flat_map(table::remarks) {
        out.note(remark);
    }
    keep(run, &results, asked, &format!("-{}", evaluation.name)).await?;
    Ok(results)
}

/// What a user would type to have it made.
fn arguments(evaluation: &Evaluation, name: &RunName, bucket: &Store) -> EvalArgs {
    let baselines = evaluation.baselines.iter().map(|baseline| baseline.name().to_owned());
    EvalArgs {
        data: evaluation.dataset.clone(),
        weights: [name.to_string()].into_iter().chain(baselines).collect(),
        bucket: Some(bucket.url().to_owned()),
        save_to: None,
        arch: None,
        px: None,
        holdout_fraction: EvalArgs::HOLDOUT_FRACTION,
        seed: evaluation.seed,
        protocol: evaluation.protocol.iter().filter_map(typed).collect(),
        recipe: evaluation.recipe.iter().filter_map(typed).collect(),
        labels: evaluation.labels.iter().map(|percent| format!("{percent}%")).collect(),
        trials: evaluation.trials,
        epochs: evaluation.epochs,
        cache: None,
        page: None,
    }
}

/// The value that is typed as a configuration has it.
fn typed<T: ValueEnum>(configured: &impl Serialize) -> Option<T> {
    T::from_str(serde_json::to_value(configured).ok()?.as_str()?, false).ok()
}

#[cfg(test)]
mod tests {
    use sgcl_runstore::config::{EvalProtocol, EvalRecipe};

    use super::*;
    use crate::cli::eval::{Protocol, Recipe};

    #[test]
    fn every_protocol_and_recipe_of_a_configuration_can_be_typed() {
        use {EvalProtocol as P, EvalRecipe as R};
        let protocols: Vec<Protocol> = [P::Knn, P::Linear, P::Finetune].iter().filter_map(typed).collect();
        assert_eq!(protocols, [Protocol::Knn, Protocol::Linear, Protocol::Finetune]);
        let recipes: Vec<Recipe> = [R::Lbfgs, R::Seed, R::Eva].iter().filter_map(typed).collect();
        assert_eq!(recipes, [Recipe::Lbfgs, Recipe::Seed, Recipe::Eva]);
    }
}
