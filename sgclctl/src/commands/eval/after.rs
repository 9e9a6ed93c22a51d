//! Evaluations that a run's configuration names: made once its weights are exported. `sgcl-worker` keeps them with the run.

use anyhow::Result;
use serde_json::{Value, json};
use sgcl_patchset::Store;
use sgcl_runstore::config::Evaluation;
use sgcl_runstore::{RunName, Spec, export, status};

use super::{table, worker};
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
        let name = evaluation.name.as_str();
        if evaluation.made(&spec.run, commit, &kept).is_some() {
            out.note(format!("evaluation {name} is there"));
            continue;
        }
        out.note(format!("evaluation {name} on {}", evaluation.dataset));
        match one(evaluation, &spec.run, bucket, out).await {
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

async fn one(evaluation: &Evaluation, run: &RunName, bucket: &Store, out: Out) -> Result<Vec<Value>> {
    let results = worker::evaluation(evaluation, run, bucket, out).await?;
    for remark in results.iter().flat_map(table::remarks) {
        out.note(remark);
    }
    Ok(results)
}
