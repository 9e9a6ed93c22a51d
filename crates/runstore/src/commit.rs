//! `commits/<seq>.json`: a checkpoint made durable. Created, never overwritten: of two writers one loses and stops. The newest is found by
//! listing. Each names its parent's write id, so the commits of a run form one chain.

mod retain;

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sgcl_patchset::Store;

use crate::checkpoint::{PartKind, PartRef, verify_part};
use crate::record::{self, FORMAT_VERSION, new_write_id};
use crate::{Ledger, RunStoreError};

pub use retain::Retention;

const FOLDER: &str = "commits";

/// Steps that were trained after one plan. With the patch set and the run's seed it says which patches those were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Lanes of the plan.
    pub lanes: u32,
    /// Shards that a lane mixed.
    pub window: u32,
    /// Steps.
    pub steps: u64,
}

/// What the run had reached. All of it is needed to go on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Membership that wrote it.
    pub generation: u64,
    /// Transitions of the leader's lease: fences a stale coordinator.
    pub lease_epoch: u64,
    /// Steps finished since the run began.
    pub step: u64,
    /// Epoch of the last step, counted from 0. Where the ledger is full, the next step begins the next epoch.
    pub epoch: u32,
    /// Steps finished in that epoch.
    pub epoch_step: u64,
    /// Steps finished of the current plan.
    pub cursor: u64,
    /// Lanes of the current plan.
    pub lanes: u32,
    /// Shards that a lane of the current plan mixes.
    pub window: u32,
    /// Earlier plans of this epoch, in order: each was made over what those before it had left.
    pub segments: Vec<Segment>,
    /// Plans of the epochs before this one, all of them finished.
    pub history: Vec<Vec<Segment>>,
    /// Ranks that wrote it.
    pub world: u32,
    /// Patches the epoch had used when the current plan was made; none means that the plan began the epoch.
    pub plan_base: Option<PartRef>,
    /// Patches the epoch has used by now.
    pub ledger: PartRef,
    /// Weights, optimiser, bank shards.
    pub parts: Vec<PartRef>,
    /// Losses of the last step, by name.
    pub losses: BTreeMap<String, f64>,
    /// All epochs are trained.
    pub done: bool,
}

/// A commit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Commit {
    /// Format version.
    pub version: u32,
    /// Number, from 1.
    pub seq: u64,
    /// Write id of commit `seq - 1`.
    pub parent: Option<String>,
    /// Tells this writer from another.
    pub write_id: String,
    /// When.
    pub time: Timestamp,
    /// What the run had reached.
    #[serde(flatten)]
    pub progress: Progress,
}

impl Commit {
    /// The commit that follows `parent`. Losses that JSON cannot hold are left out.
    #[must_use]
    pub fn after(parent: Option<&Self>, mut progress: Progress, now: Timestamp) -> Self {
        progress.losses.retain(|_, v| v.is_finite());
        Self {
            version: FORMAT_VERSION,
            seq: parent.map_or(0, |p| p.seq) + 1,
            parent: parent.map(|p| p.write_id.clone()),
            write_id: new_write_id(),
            time: now,
            progress,
        }
    }

    /// Every part it needs, the ledgers too.
    pub fn all_parts(&self) -> impl Iterator<Item = &PartRef> {
        let p = &self.progress;
        p.parts.iter().chain(std::iter::once(&p.ledger)).chain(&p.plan_base)
    }

    /// Its parts of one kind.
    pub fn parts(&self, kind: PartKind) -> impl Iterator<Item = &PartRef> {
        self.progress.parts.iter().filter(move |p| p.kind == kind)
    }
}

/// A commit whose parts were all found intact.
#[derive(Clone, Debug, PartialEq)]
pub struct Intact {
    /// The commit.
    pub commit: Commit,
    /// Newer commits that were passed over, each with its damage.
    pub skipped: Vec<(u64, String)>,
}

/// The commits of a run.
#[derive(Clone, Debug)]
pub struct Commits {
    run: Store,
}

impl Commits {
    /// Of the run at `run_store`.
    #[must_use]
    pub fn new(run_store: &Store) -> Self {
        Self { run: run_store.clone() }
    }

    /// Where the run is.
    pub(crate) fn run(&self) -> &Store {
        &self.run
    }

    /// Numbers of all commits, ascending.
    ///
    /// # Errors
    /// The storage.
    pub async fn list(&self) -> Result<Vec<u64>, RunStoreError> {
        let found = self.run.list(FOLDER).await?;
        let mut seqs: Vec<u64> = found.iter().filter_map(|o| seq_of(&o.rel)).collect();
        seqs.sort_unstable();
        Ok(seqs)
    }

    /// Reads one.
    ///
    /// # Errors
    /// Missing, damaged, from a newer sgcl, or the storage.
    pub async fn read(&self, seq: u64) -> Result<Commit, RunStoreError> {
        let rel = path(seq);
        let commit: Commit = record::read(&self.run, &rel).await?;
        if commit.seq != seq {
            return Err(RunStoreError::damaged(self.run.object(&rel), format!("it says it is commit {}", commit.seq)));
        }
        Ok(commit)
    }

    /// The newest, whether its parts are intact or not.
    ///
    /// # Errors
    /// As [`Commits::read`].
    pub async fn latest(&self) -> Result<Option<Commit>, RunStoreError> {
        match self.list().await?.last() {
            Some(&seq) => Ok(Some(self.read(seq).await?)),
            None => Ok(None),
        }
    }

    /// Makes `commit` durable. Calling again with the same commit is safe.
    ///
    /// # Errors
    /// [`RunStoreError::Lost`] where another writer was first; [`RunStoreError::BrokenChain`] where its parent is not in the bucket; the storage.
    pub async fn append(&self, commit: &Commit) -> Result<(), RunStoreError> {
        let rel = path(commit.seq);
        if let Some(expected) = &commit.parent {
            let seq = commit.seq - 1;
            let broken = |reason| RunStoreError::BrokenChain { object: self.run.object(&rel), expected: seq, reason };
            let parent = self.read(seq).await.map_err(|e| if e.is_damage() { broken(e.to_string()) } else { e })?;
            if parent.write_id != *expected {
                return Err(broken(format!("its parent is {expected}, the bucket has {}", parent.write_id)));
            }
        }
        let Some(theirs) = record::create(&self.run, &rel, commit, &commit.write_id).await? else { return Ok(()) };
        let winner: Commit = record::from_json(&theirs, &self.run.object(&rel))?;
        Err(RunStoreError::Lost { seq: commit.seq, generation: winner.progress.generation, winner: winner.write_id })
    }

    /// The newest commit whose parts are all there and intact; newer damaged ones are passed over and named. Reads every part.
    ///
    /// # Errors
    /// [`RunStoreError::NoneIntact`] where there are commits and none can be used; the storage.
    pub async fn newest_intact(&self) -> Result<Option<Intact>, RunStoreError> {
        let seqs = self.list().await?;
        let mut skipped = Vec::new();
        for &seq in seqs.iter().rev() {
            match self.read_intact(seq).await {
                Ok(commit) => return Ok(Some(Intact { commit, skipped })),
                Err(e) if e.is_damage() => {
                    tracing::warn!(seq, error = %e, "commit passed over");
                    skipped.push((seq, e.to_string()));
                }
                Err(e) => return Err(e),
            }
        }
        if skipped.is_empty() {
            return Ok(None);
        }
        let skipped = skipped.into_iter().map(|(seq, damage)| format!("commit {seq}: {damage}")).collect();
        Err(RunStoreError::NoneIntact { run: self.run.url().to_owned(), skipped })
    }

    /// Puts an unusable commit away as `damaged/<seq>-<time>.json`, so that its number is free and the chain goes on from an earlier one.
    /// Nothing of it is lost.
    ///
    /// # Errors
    /// The storage.
    pub async fn set_aside(&self, seq: u64, now: Timestamp) -> Result<(), RunStoreError> {
        let bytes = self.run.get(&path(seq), record::MAX_RECORD_BYTES).await?;
        self.run.put(&format!("damaged/{seq:08}-{}.json", now.as_millisecond()), bytes).await?;
        Ok(self.run.delete(&path(seq)).await?)
    }

    async fn read_intact(&self, seq: u64) -> Result<Commit, RunStoreError> {
        let commit = self.read(seq).await?;
        for part in commit.all_parts() {
            verify_part(&self.run, part).await?;
        }
        Ok(commit)
    }

    /// The patches a commit's epoch has used.
    ///
    /// # Errors
    /// The part is missing or damaged; the storage.
    pub async fn ledger(&self, part: &PartRef) -> Result<Ledger, RunStoreError> {
        let bytes = crate::checkpoint::read_part(&self.run, part).await?;
        Ledger::from_bytes(&bytes, &self.run.object(&part.path))
    }

    /// Whether `commits`, ascending, form one chain.
    ///
    /// # Errors
    /// [`RunStoreError::BrokenChain`] at the first that does not follow.
    pub fn check_chain(&self, commits: &[Commit]) -> Result<(), RunStoreError> {
        for pair in commits.windows(2) {
            let [a, b] = pair else { continue };
            // Retention leaves gaps below the newest; a parent that is there must be the right one.
            if b.seq == a.seq + 1 && b.parent.as_deref() != Some(a.write_id.as_str()) {
                return Err(RunStoreError::BrokenChain {
                    object: self.run.object(&path(b.seq)),
                    expected: a.seq,
                    reason: format!("its parent is {:?}, the bucket has {}", b.parent, a.write_id),
                });
            }
        }
        Ok(())
    }
}

fn path(seq: u64) -> String {
    format!("{FOLDER}/{seq:08}.json")
}

fn seq_of(rel: &str) -> Option<u64> {
    rel.strip_prefix(FOLDER)?.strip_prefix('/')?.strip_suffix(".json")?.parse().ok()
}
