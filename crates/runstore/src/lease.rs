//! `leases/<epoch>.json`: who coordinates a run. A coordinator creates the next one before it does anything else; whoever holds an older one
//! is stale, and what it would write is refused. Two coordinators may be alive at once: one was paused, or cut off, and comes back.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sgcl_patchset::Store;

use crate::RunStoreError;
use crate::record::{self, FORMAT_VERSION, new_write_id};

const FOLDER: &str = "leases";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    version: u32,
    write_id: String,
    holder: String,
    time: Timestamp,
}

/// The right to coordinate a run, until somebody takes the next one.
#[derive(Clone, Debug)]
pub struct Lease {
    run: Store,
    epoch: u64,
}

impl Lease {
    /// Takes the next lease of the run; whoever had the last one is stale from here on. `holder` is for people: host and process.
    ///
    /// # Errors
    /// The storage.
    pub async fn take(run_store: &Store, holder: &str, now: Timestamp) -> Result<Self, RunStoreError> {
        let record = Record { version: FORMAT_VERSION, write_id: new_write_id(), holder: holder.to_owned(), time: now };
        let mut epoch = newest(run_store).await? + 1;
        while record::create(run_store, &path(epoch), &record, &record.write_id).await?.is_some() {
            epoch += 1;
        }
        Ok(Self { run: run_store.clone(), epoch })
    }

    /// Its number, from 1. Commits carry it.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether this is still the newest.
    ///
    /// # Errors
    /// [`RunStoreError::Superseded`] where it is not; the storage.
    pub async fn check(&self) -> Result<(), RunStoreError> {
        let newest = newest(&self.run).await?;
        if newest <= self.epoch {
            return Ok(());
        }
        let by: Record = record::read(&self.run, &path(newest)).await?;
        Err(RunStoreError::Superseded { run: self.run.url().to_owned(), epoch: self.epoch, newest, by: by.holder })
    }
}

async fn newest(run: &Store) -> Result<u64, RunStoreError> {
    let found = run.list(FOLDER).await?;
    let epochs = found.iter().filter_map(|o| o.rel.strip_prefix("leases/")?.strip_suffix(".json")?.parse().ok());
    Ok(epochs.max().unwrap_or(0))
}

fn path(epoch: u64) -> String {
    format!("{FOLDER}/{epoch:08}.json")
}
