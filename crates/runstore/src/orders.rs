//! `orders/<seq>.json`: what a user wants of a run that is under way, wherever it is: its coordinator looks here. Appended, never overwritten.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sgcl_patchset::Store;

use crate::RunStoreError;
use crate::record::{self, FORMAT_VERSION, new_write_id};

const FOLDER: &str = "orders";

/// What is wanted. The names are stored: never rename one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case")]
pub enum Order {
    /// Finish the step, commit and end; the run can be resumed.
    Suspend,
    /// End at once and for good. What was committed stays.
    Cancel,
    /// Hand over what a node holds and send it home; the run goes on without it.
    Drain {
        /// Name of the node.
        node: String,
    },
}

impl std::fmt::Display for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Suspend => f.write_str("suspend"),
            Self::Cancel => f.write_str("cancel"),
            Self::Drain { node } => write!(f, "drain {node}"),
        }
    }
}

/// A stored order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    version: u32,
    write_id: String,
    time: Timestamp,
    #[serde(flatten)]
    order: Order,
}

/// The orders of a run.
#[derive(Clone, Debug)]
pub struct Orders {
    run: Store,
}

impl Orders {
    /// Of the run at `run_store`.
    #[must_use]
    pub fn new(run_store: &Store) -> Self {
        Self { run: run_store.clone() }
    }

    /// Gives one; returns its number.
    ///
    /// # Errors
    /// The storage.
    pub async fn give(&self, order: Order, now: Timestamp) -> Result<u64, RunStoreError> {
        let record = Record { version: FORMAT_VERSION, write_id: new_write_id(), time: now, order };
        let mut seq = self.newest().await? + 1;
        while record::create(&self.run, &path(seq), &record, &record.write_id).await?.is_some() {
            seq += 1;
        }
        Ok(seq)
    }

    /// Number of the newest; 0 where there is none.
    ///
    /// # Errors
    /// The storage.
    pub async fn newest(&self) -> Result<u64, RunStoreError> {
        Ok(self.list().await?.into_iter().max().unwrap_or(0))
    }

    /// Those behind `seq`, in order, with their numbers.
    ///
    /// # Errors
    /// One is damaged, or the storage.
    pub async fn after(&self, seq: u64) -> Result<Vec<(u64, Order)>, RunStoreError> {
        let mut seqs = self.list().await?;
        seqs.retain(|&found| found > seq);
        seqs.sort_unstable();
        let mut orders = Vec::with_capacity(seqs.len());
        for seq in seqs {
            let record: Record = record::read(&self.run, &path(seq)).await?;
            orders.push((seq, record.order));
        }
        Ok(orders)
    }

    async fn list(&self) -> Result<Vec<u64>, RunStoreError> {
        let found = self.run.list(FOLDER).await?;
        let seqs = found.iter().filter_map(|o| o.rel.strip_prefix("orders/")?.strip_suffix(".json")?.parse().ok());
        Ok(seqs.collect())
    }
}

fn path(seq: u64) -> String {
    format!("{FOLDER}/{seq:08}.json")
}
