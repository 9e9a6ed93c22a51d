//! `sgcl-worker embedding`: an embedding that a run's configuration names, made with its newest weights and kept with the run.
//!
//! Prints what `embed` prints. Slides that are complete are not read again; an embedding that is there is not made again.

use anyhow::{Context as _, Result};
use clap::Args;
use serde_json::Value;
use sgcl_runstore::RunName;
use sgcl_runstore::config::Embedding;

use super::EmbedArgs;
use crate::encoder::newest_export;

/// Arguments of `sgcl-worker embedding`.
#[derive(Args, Debug)]
pub(crate) struct EmbeddingArgs {
    /// Run whose newest export is the encoder
    #[arg(long)]
    run: RunName,
    /// Bucket that holds it
    #[arg(long)]
    bucket: String,
    /// The embedding, one of `embeddings` in a run's configuration, as JSON
    #[arg(long)]
    embedding: Embedding,
}

/// Makes it, unless the run has it, and says with the run that all of it is there.
///
/// # Errors
/// The run has no export; the storage; whatever [`super::main`] cannot do.
pub(crate) fn main(runtime: &tokio::runtime::Handle, args: &EmbeddingArgs, mut emit: impl FnMut(Value)) -> Result<()> {
    let (name, wanted) = (&args.run, &args.embedding);
    let (run, commit, made) = runtime.block_on(async {
        let (run, commit) = newest_export(name, &args.bucket).await?;
        let made = wanted.made(&run, commit).await?;
        anyhow::Ok((run, commit, made))
    })?;
    if made.is_some() {
        tracing::info!(run = %name, embedding = wanted.name, commit, "is there already");
        return Ok(());
    }
    let (mut slides, mut patches, mut dim) = (0, 0, None);
    super::main(runtime, &EmbedArgs::of(wanted, args, wanted.folder(&run, commit).url()), |line| {
        dim = dim.or(line["ready"]["dim"].as_u64());
        if let Some(written) = line["slide"]["patches"].as_u64() {
            (slides, patches) = (slides + 1, patches + written);
        }
        emit(line);
    })?;
    let dim = dim.context("features were written before an encoder was ready")?;
    runtime.block_on(wanted.keep(&run, commit, [slides, patches, dim]))?;
    Ok(())
}

impl EmbedArgs {
    /// What would be typed to have it made.
    fn of(embedding: &Embedding, args: &EmbeddingArgs, to: &str) -> Self {
        Self {
            data: Some(embedding.dataset.clone()),
            to: to.to_owned(),
            weights: args.run.to_string(),
            bucket: Some(args.bucket.clone()),
            arch: None,
            name: None,
            layout: embedding.layout.name().to_owned(),
            px: None,
            batch: None,
            device: "auto".to_owned(),
            seed: 0,
            settings: "{}".to_owned(),
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
        args: EmbeddingArgs,
    }

    #[derive(Parser)]
    struct Typed {
        #[command(flatten)]
        args: EmbedArgs,
    }

    fn named(embedding: &str) -> Result<EmbeddingArgs, clap::Error> {
        let words = ["embedding", "--run", "first", "--bucket", "runs", "--embedding", embedding];
        Named::try_parse_from(words).map(|named| named.args)
    }

    #[test]
    fn an_embedding_asks_for_what_a_user_would_type() {
        for (embedding, more) in [
            (r#"{"name": "atlas", "dataset": "patches"}"#, ""),
            (r#"{"name": "atlas", "dataset": "patches", "layout": "both"}"#, "--layout both"),
        ] {
            let args = named(embedding).unwrap();
            let typed = format!("embed --bucket runs --data patches --weights first --to features {more}");
            let typed = Typed::try_parse_from(typed.split_whitespace()).unwrap().args;
            assert_eq!(format!("{:?}", EmbedArgs::of(&args.embedding, &args, "features")), format!("{typed:?}"));
        }
    }

    #[test]
    fn one_that_no_configuration_may_have_is_refused() {
        for (embedding, words) in [
            (r#"{"name": "a", "dataset": ""}"#, "dataset is missing"),
            (r#"{"name": "A b", "dataset": "d"}"#, "is not 1 to 30 of"),
            (r#"{"name": "a", "dataset": "d", "layout": "h5"}"#, "h5"),
        ] {
            let error = named(embedding).map(drop).unwrap_err().to_string();
            assert!(error.contains(words), "{words:?} is not in {error}");
        }
    }
}
