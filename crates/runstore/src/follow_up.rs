//! What a run's configuration has made of its weights once they are exported: evaluations and embeddings.
//!
//! An embedding's features lie below `features/<commit>/<name>/` in the layout asked for ([`crate::features`]), each slide with its record;
//! `embeddings/<commit>/<name>.json` is written last and says that all slides are there.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sgcl_patchset::Store;

use crate::config::{Embedding, Evaluation};
use crate::record::{self, FORMAT_VERSION};
use crate::{RunConfig, RunName, RunStoreError, evals, status};

/// One thing that is made of a run's weights.
#[derive(Clone, Debug, PartialEq)]
pub enum FollowUp {
    /// Figures on a labelled patch set.
    Evaluation(Evaluation),
    /// Features of a patch set.
    Embedding(Embedding),
}

impl FollowUp {
    /// All that a configuration names, in the order in which they are made. No two have one name.
    #[must_use]
    pub fn all(config: &RunConfig) -> Vec<Self> {
        let evaluations = config.evaluations.iter().cloned().map(Self::Evaluation);
        evaluations.chain(config.embeddings.iter().cloned().map(Self::Embedding)).collect()
    }

    /// Its name in the configuration.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Evaluation(one) => &one.name,
            Self::Embedding(one) => &one.name,
        }
    }

    /// The patch set that it is made on.
    #[must_use]
    pub fn dataset(&self) -> &str {
        match self {
            Self::Evaluation(one) => &one.dataset,
            Self::Embedding(one) => &one.dataset,
        }
    }

    /// `evaluation` or `embedding`: what messages call it, and the command of `sgcl-worker` that makes it.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Evaluation(_) => "evaluation",
            Self::Embedding(_) => "embedding",
        }
    }

    /// The arguments of `sgcl-worker` that have it made for a run.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub fn words(&self, run: &str, bucket: &str) -> Result<Vec<String>, serde_json::Error> {
        let kind = self.kind();
        let text = match self {
            Self::Evaluation(one) => serde_json::to_string(one),
            Self::Embedding(one) => serde_json::to_string(one),
        }?;
        let words = [kind, "--run", run, "--bucket", bucket, &format!("--{kind}"), &text];
        Ok(words.map(str::to_owned).into())
    }
}

/// Those of `wanted` that a run has of this commit's weights: what came of each in a line, by name.
///
/// # Errors
/// A record is damaged, or the storage.
pub async fn made(
    wanted: &[FollowUp],
    name: &RunName,
    run: &Store,
    commit: u64,
) -> Result<BTreeMap<String, String>, RunStoreError> {
    let evaluated = wanted.iter().any(|one| matches!(one, FollowUp::Evaluation(_)));
    let kept = if evaluated { status::read_evals(run).await? } else { BTreeMap::new() };
    let mut lines = BTreeMap::new();
    for one in wanted {
        let line = match one {
            FollowUp::Evaluation(evaluation) => evaluation.made(name, commit, &kept).map(evals::accuracies),
            FollowUp::Embedding(embedding) => embedding.made(run, commit).await?.map(|features| features.to_string()),
        };
        lines.extend(line.map(|line| (one.name().to_owned(), line)));
    }
    Ok(lines)
}

/// What came of an embedding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Embedded {
    /// Version of the format.
    version: u32,
    /// What was asked for.
    embedding: Embedding,
    /// When it was done.
    time: Timestamp,
    /// Slides with features.
    pub slides: u64,
    /// Their patches.
    pub patches: u64,
    /// Width of a feature.
    pub dim: u64,
}

impl std::fmt::Display for Embedded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "features of {} patches of {} slide(s), {} numbers each", self.patches, self.slides, self.dim)
    }
}

impl From<Evaluation> for FollowUp {
    fn from(one: Evaluation) -> Self {
        Self::Evaluation(one)
    }
}

impl From<Embedding> for FollowUp {
    fn from(one: Embedding) -> Self {
        Self::Embedding(one)
    }
}

fn record_path(commit: u64, name: &str) -> String {
    format!("embeddings/{commit:08}/{name}.json")
}

/// What a run has of embeddings with this commit's weights, by name.
///
/// # Errors
/// A record is damaged, or the storage.
pub async fn embeddings(run: &Store, commit: u64) -> Result<BTreeMap<String, Embedded>, RunStoreError> {
    let mut found = BTreeMap::new();
    for object in run.list(&format!("embeddings/{commit:08}")).await? {
        let embedded = record::read::<Embedded>(run, &object.rel).await?;
        found.insert(embedded.embedding.name.clone(), embedded);
    }
    Ok(found)
}

impl Embedding {
    /// Where a run keeps the features of these weights.
    #[must_use]
    pub fn folder(&self, run: &Store, commit: u64) -> Store {
        run.child(&format!("features/{commit:08}/{}", self.name))
    }

    /// What came of it, where a run has all of it of this commit's weights.
    ///
    /// # Errors
    /// The record is damaged, or the storage.
    pub async fn made(&self, run: &Store, commit: u64) -> Result<Option<Embedded>, RunStoreError> {
        match record::read::<Embedded>(run, &record_path(commit, &self.name)).await {
            Ok(found) => Ok((found.embedding == *self).then_some(found)),
            Err(RunStoreError::Store(error)) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Says that the features of all slides are there.
    ///
    /// # Errors
    /// The storage.
    pub async fn keep(
        &self,
        run: &Store,
        commit: u64,
        [slides, patches, dim]: [u64; 3],
    ) -> Result<Embedded, RunStoreError> {
        let rel = record_path(commit, &self.name);
        let (version, embedding, time) = (FORMAT_VERSION, self.clone(), Timestamp::now());
        let found = Embedded { version, embedding, time, slides, patches, dim };
        run.put(&rel, record::to_json(&found, &run.object(&rel))?).await?;
        Ok(found)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn atlas() -> Embedding {
        Embedding { name: "atlas".into(), dataset: "s3://lab/atlas".into(), ..Embedding::default() }
    }

    #[tokio::test]
    async fn an_embedding_is_made_once_its_record_says_so_of_these_weights() {
        let folder = tempfile::tempdir().unwrap();
        let run = Store::open(folder.path().to_str().unwrap()).unwrap();
        let name = RunName::new("first").unwrap();
        let wanted = [FollowUp::Embedding(atlas())];
        assert!(made(&wanted, &name, &run, 7).await.unwrap().is_empty());
        let _ = atlas().keep(&run, 7, [2, 340, 512]).await.unwrap();
        let lines = made(&wanted, &name, &run, 7).await.unwrap();
        assert_eq!(lines["atlas"], "features of 340 patches of 2 slide(s), 512 numbers each");
        assert_eq!(embeddings(&run, 7).await.unwrap()["atlas"].patches, 340);
        assert!(made(&wanted, &name, &run, 8).await.unwrap().is_empty(), "newer weights");
        let other = Embedding { dataset: "s3://lab/other".into(), ..atlas() };
        assert!(made(&[FollowUp::Embedding(other)], &name, &run, 7).await.unwrap().is_empty(), "of another set");
    }

    #[test]
    fn a_worker_is_told_all_of_it() {
        let words = FollowUp::Embedding(atlas()).words("first", "s3://lab/runs").unwrap();
        assert_eq!(words[..6], ["embedding", "--run", "first", "--bucket", "s3://lab/runs", "--embedding"]);
        assert_eq!(words[6].parse::<Embedding>().unwrap(), atlas());
    }
}
