//! What a run's configuration has made of its weights once they are exported: evaluations and embeddings. `sgcl-worker` keeps them with the run.

use anyhow::Result;
use serde_json::json;
use sgcl_patchset::Store;
use sgcl_runstore::{FollowUp, Spec, export, follow_up};

use super::{embed, eval};
use crate::error::{Failure, tell};
use crate::exit::Exit;
use crate::output::{Out, warn};

/// Makes what the run does not have yet of its newest weights. Each is made, whatever becomes of the others.
///
/// # Errors
/// The bucket; or some were not made, which names them: the run itself is whole, and `resume` makes them.
pub(crate) async fn make(spec: &Spec, bucket: &Store, resume: &str, out: Out) -> Result<()> {
    let wanted = FollowUp::all(&spec.config);
    let run = spec.run.store(bucket);
    let Some(&commit) = export::list_exports(&run).await?.last() else { return Ok(()) };
    let made = follow_up::made(&wanted, &spec.run, &run, commit).await?;
    let mut failed: Option<(Exit, Vec<&str>)> = None;
    for one in &wanted {
        let (kind, name) = (one.kind(), one.name());
        if made.contains_key(name) {
            out.note(format!("{kind} {name} is there"));
            continue;
        }
        out.note(format!("{kind} {name} on {}", one.dataset()));
        if let Err(error) = make_one(one, spec, bucket, out).await {
            let told = tell(&error);
            warn(format!("{kind} {name}: {}", told.message));
            if let Some(hint) = told.hint {
                warn(format!("hint: {hint}"));
            }
            failed.get_or_insert((told.exit, Vec::new())).1.push(name);
        }
    }
    match failed {
        None => Ok(()),
        Some((exit, names)) => {
            let message = format!("run {} is finished and exported, but not made: {}", spec.run, names.join(", "));
            Err(Failure::new(exit, message).hint(format!("mend that, then: {resume}")).into())
        }
    }
}

async fn make_one(one: &FollowUp, spec: &Spec, bucket: &Store, out: Out) -> Result<()> {
    let words = one.words(spec.run.as_str(), bucket.url())?;
    let told = match one {
        FollowUp::Evaluation(evaluation) => {
            let results = eval::worker::named(&words, out).await?;
            for remark in results.iter().flat_map(eval::table::remarks) {
                out.note(remark);
            }
            if !out.json_progress() {
                out.data(eval::table::comparison(&results))?;
            }
            json!({ "evaluated": { "run": spec.run, "evaluation": evaluation.name, "results": results } })
        }
        FollowUp::Embedding(embedding) => {
            let figures = embed::named(&words, &embedding.dataset, out).await?;
            json!({ "embedded": { "run": spec.run, "embedding": embedding.name, "result": figures } })
        }
    };
    if out.json_progress() { out.json_line(&told) } else { Ok(()) }
}
