//! Storage: leases and commits are created, never overwritten. It answers late while it is out.

use std::rc::Rc;

use crate::state::Position;

/// A checkpoint made durable.
#[derive(Clone, Debug)]
pub(crate) struct Commit {
    pub(crate) seq: u64,
    pub(crate) write_id: u64,
    pub(crate) parent: Option<u64>,
    pub(crate) lease: u64,
    pub(crate) generation: u64,
    pub(crate) position: Rc<Position>,
    pub(crate) done: bool,
}

/// What a run has in storage.
#[derive(Default)]
pub(crate) struct Bucket {
    pub(crate) commits: Vec<Rc<Commit>>,
    pub(crate) leases: u64,
    /// It answers nobody before.
    pub(crate) out_until: u64,
    writes: u64,
}

impl Bucket {
    /// The next lease: whoever held an earlier one is stale from now on.
    pub(crate) fn take_lease(&mut self) -> u64 {
        self.leases += 1;
        self.leases
    }

    pub(crate) fn newest(&self) -> Option<Rc<Commit>> {
        self.commits.last().cloned()
    }

    pub(crate) fn write_id(&mut self) -> u64 {
        self.writes += 1;
        self.writes
    }

    /// Creates `commit` where its number is free; otherwise whoever has it.
    pub(crate) fn create(&mut self, commit: Commit) -> Result<Rc<Commit>, Rc<Commit>> {
        if let Some(winner) = self.commits.iter().find(|other| other.seq == commit.seq) {
            return Err(Rc::clone(winner));
        }
        let commit = Rc::new(commit);
        self.commits.push(Rc::clone(&commit));
        Ok(commit)
    }
}
