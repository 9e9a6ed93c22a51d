//! Which commits and parts are deleted: only below the newest `keep_last`, a commit before its parts, never a part that a kept commit names.

use std::collections::{BTreeMap, BTreeSet};

use super::{Commit, Commits, path};
use crate::RunStoreError;
use crate::checkpoint::position;
use crate::config::Checkpoint;

/// What a clean-up did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// Commits deleted.
    pub commits: Vec<u64>,
    /// Parts deleted.
    pub parts: Vec<String>,
}

impl Commits {
    /// Deletes what `keep` does not keep, and parts that no commit ever named from before the oldest of the newest `keep_last`.
    ///
    /// # Errors
    /// A commit cannot be read (then nothing is deleted), or the storage.
    pub async fn retain(&self, keep: &Checkpoint) -> Result<Retention, RunStoreError> {
        let seqs = self.list().await?;
        let mut all = Vec::with_capacity(seqs.len());
        for seq in seqs {
            all.push(self.read(seq).await?);
        }
        let (kept, gone) = choose(all, keep);
        let mut done = Retention::default();
        for commit in &gone {
            self.run.delete(&path(commit.seq)).await?;
            done.commits.push(commit.seq);
        }
        let named: BTreeSet<&str> = kept.iter().flat_map(Commit::all_parts).map(|p| p.path.as_str()).collect();
        let newest = kept.iter().rev().take(keep.keep_last.max(1) as usize);
        let Some(floor) = newest.map(|c| (c.progress.generation, c.progress.step)).min() else { return Ok(done) };
        for object in self.run.list("checkpoints").await? {
            if position(&object.rel).is_some_and(|at| at < floor) && !named.contains(object.rel.as_str()) {
                self.run.delete(&object.rel).await?;
                done.parts.push(object.rel);
            }
        }
        Ok(done)
    }
}

/// Splits commits, ascending, into kept and not.
fn choose(all: Vec<Commit>, keep: &Checkpoint) -> (Vec<Commit>, Vec<Commit>) {
    let newest = all.len().saturating_sub(keep.keep_last.max(1) as usize);
    // The last commit of every epoch that is kept for good.
    let milestones: BTreeMap<u32, u64> = all
        .iter()
        .filter(|c| keep.keep_every > 0 && (c.progress.epoch + 1).is_multiple_of(keep.keep_every))
        .map(|c| (c.progress.epoch, c.seq))
        .collect();
    let mut at = 0;
    all.into_iter().partition(|c| {
        at += 1;
        at > newest || milestones.get(&c.progress.epoch) == Some(&c.seq)
    })
}
