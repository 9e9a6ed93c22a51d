//! Commits as a coordinator makes them: one record of what all ranks wrote, behind the one before, and none once it was replaced.

use anyhow::{Context, Result};
use sgcl_patchset::Store;
use sgcl_proto::v1;
use sgcl_runstore::commit::Progress;
use sgcl_runstore::status::{EventKind, Events};
use sgcl_runstore::{Commit, Commits, Lease, PartKind, PartRef, RunStoreError};

/// Whether this says that somebody else coordinates the run.
pub(crate) fn is_stale(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(RunStoreError::Superseded { .. } | RunStoreError::Lost { .. }))
}

/// Makes the commit that follows `parent`. A coordinator that was replaced may have made one before it noticed: where it tells of a step of
/// this run, this one follows it; where it does not, it is put away.
pub(crate) async fn follow(
    commits: &Commits,
    lease: &Lease,
    mut parent: Option<Commit>,
    mut progress: Progress,
) -> Result<Commit> {
    progress.lease_epoch = lease.epoch();
    let reached = (progress.generation, progress.step);
    loop {
        lease.check().await?;
        let now = jiff::Timestamp::now();
        let commit = Commit::after(parent.as_ref(), progress.clone(), now);
        let lost = match commits.append(&commit).await {
            Ok(()) => return Ok(commit),
            Err(lost @ RunStoreError::Lost { .. }) => lost,
            Err(error) => return Err(error.into()),
        };
        let theirs = commits.read(commit.seq).await?;
        let stale = theirs.progress.lease_epoch < lease.epoch();
        match (theirs.progress.generation, theirs.progress.step) {
            _ if !stale => return Err(lost.into()),
            there if there == reached => return Ok(theirs),
            there if there < reached => parent = Some(theirs),
            _ => commits.set_aside(commit.seq, now).await?,
        }
    }
}

/// The newest commit that can be gone back to. Newer ones that are damaged are put away, and the run's events say so.
pub(crate) async fn newest(run: &Store) -> Result<Option<Commit>> {
    let commits = Commits::new(run);
    let Some(found) = commits.newest_intact().await? else { return Ok(None) };
    for (seq, reason) in found.skipped {
        tracing::warn!("commit {seq} cannot be used: {reason}; going back to commit {}", found.commit.seq);
        let now = jiff::Timestamp::now();
        commits.set_aside(seq, now).await?;
        Events::new(run).append(EventKind::SetAside { seq, reason }, now).await?;
    }
    Ok(Some(found.commit))
}

/// One record of what all ranks wrote.
pub(crate) fn assemble(written: Vec<v1::PartsWritten>) -> Result<Progress> {
    let head = written.iter().find(|parts| !parts.progress_json.is_empty()).context("rank 0 sent no position")?;
    let mut progress: Progress =
        serde_json::from_str(&head.progress_json).context("rank 0's position is not readable")?;
    for part in written.iter().flat_map(|parts| &parts.parts) {
        let kind: PartKind = serde_json::from_value(part.kind.clone().into()).context("a part of unknown kind")?;
        progress.parts.push(PartRef { kind, path: part.path.clone(), bytes: part.bytes, crc32c: part.crc32c });
    }
    Ok(progress)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What ranks of `generation` reached at `step`, as a checkpoint without parts would say.
    fn reached(generation: u64, step: u64) -> Progress {
        serde_json::from_value(serde_json::json!({
            "generation": generation, "lease_epoch": 0, "step": step, "epoch": 0, "epoch_step": step, "cursor": step,
            "lanes": 2, "window": 4, "segments": [], "history": [], "world": 2, "plan_base": null,
            "ledger": { "kind": "ledger", "path": "checkpoints/1-1/ledger.roaring", "bytes": 0, "crc32c": 0 },
            "parts": [], "losses": {}, "done": false,
        }))
        .unwrap()
    }

    struct Rivals {
        _folder: tempfile::TempDir,
        commits: Commits,
        stale: Lease,
        ours: Lease,
        parent: Commit,
    }

    /// A run with one commit, whose coordinator was replaced.
    async fn rivals() -> Rivals {
        let folder = tempfile::tempdir().unwrap();
        let run = Store::open(&folder.path().display().to_string()).unwrap();
        let now = jiff::Timestamp::now();
        let stale = Lease::take(&run, "stale", now).await.unwrap();
        let commits = Commits::new(&run);
        let parent = follow(&commits, &stale, None, reached(1, 10)).await.unwrap();
        let ours = Lease::take(&run, "ours", now).await.unwrap();
        Rivals { _folder: folder, commits, stale, ours, parent }
    }

    /// The stale coordinator's write, already on its way when the lease changed hands.
    async fn late(rivals: &Rivals, step: u64) -> Commit {
        let mut progress = reached(1, step);
        progress.lease_epoch = rivals.stale.epoch();
        let commit = Commit::after(Some(&rivals.parent), progress, jiff::Timestamp::now());
        rivals.commits.append(&commit).await.unwrap();
        commit
    }

    #[tokio::test]
    async fn a_stale_coordinator_commits_nothing_more() {
        let rivals = rivals().await;
        let parent = Some(rivals.parent.clone());
        let error = follow(&rivals.commits, &rivals.stale, parent.clone(), reached(1, 20)).await.unwrap_err();
        assert!(is_stale(&error) && error.to_string().contains("ours coordinates it now"), "{error:#}");
        assert_eq!(rivals.commits.list().await.unwrap(), [1]);
        assert_eq!(follow(&rivals.commits, &rivals.ours, parent, reached(1, 20)).await.unwrap().seq, 2);
    }

    #[tokio::test]
    async fn a_late_commit_of_a_stale_coordinator_is_followed_where_it_tells_of_the_past() {
        let rivals = rivals().await;
        let theirs = late(&rivals, 20).await;
        let ours = follow(&rivals.commits, &rivals.ours, Some(rivals.parent.clone()), reached(1, 30)).await.unwrap();
        assert_eq!((ours.seq, ours.parent), (3, Some(theirs.write_id)));
        assert_eq!(ours.progress.lease_epoch, rivals.ours.epoch());
    }

    #[tokio::test]
    async fn the_same_checkpoint_committed_by_both_counts_once() {
        let rivals = rivals().await;
        let theirs = late(&rivals, 20).await;
        let ours = follow(&rivals.commits, &rivals.ours, Some(rivals.parent.clone()), reached(1, 20)).await.unwrap();
        assert_eq!(ours, theirs);
    }

    #[tokio::test]
    async fn a_late_commit_of_steps_that_this_run_never_took_is_put_away() {
        let rivals = rivals().await;
        late(&rivals, 50).await;
        let ours = follow(&rivals.commits, &rivals.ours, Some(rivals.parent.clone()), reached(1, 30)).await.unwrap();
        assert_eq!((ours.seq, ours.parent.clone()), (2, Some(rivals.parent.write_id.clone())));
        assert_eq!(rivals.commits.read(2).await.unwrap(), ours);
    }
}
