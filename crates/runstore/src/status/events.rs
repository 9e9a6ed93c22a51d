//! `events/<seq>.json`: changes of a run's state, appended, never overwritten.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sgcl_patchset::Store;

use crate::RunStoreError;
use crate::orders::Order;
use crate::record::{self, FORMAT_VERSION, new_write_id};

const FOLDER: &str = "events";

/// A change of state. The names are stored: never rename one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum EventKind {
    /// Training began, or went on after a suspension.
    Started {
        /// Ranks.
        world: u32,
        /// Commit it went on from.
        from_commit: Option<u64>,
    },
    /// The membership changed while training, and training went on.
    Regrouped {
        /// What made it necessary.
        reason: String,
        /// Whether it counts as a failure; a preemption or a node that joins does not.
        failure: bool,
        /// Ranks before.
        world_before: u32,
        /// Ranks after.
        world: u32,
        /// From the cause to training again.
        seconds: f64,
        /// Steps that had to be trained again.
        steps_lost: u64,
        /// Commit that was gone back to, where memory did not hold everything.
        from_commit: Option<u64>,
    },
    /// A commit could not be used and was put away as `damaged/…`.
    SetAside {
        /// Number it had.
        seq: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A user's order reached the coordinator.
    Ordered {
        /// Number of the order.
        seq: u64,
        /// What was wanted.
        what: Order,
        /// Why it cannot be, where it cannot.
        refused: Option<String>,
    },
    /// Stopped; can be resumed.
    Suspended {
        /// Why.
        reason: String,
    },
    /// Given up.
    Failed {
        /// Why, and what to do.
        message: String,
    },
    /// Ended for good by its user.
    Cancelled,
    /// All epochs are trained.
    Finished,
}

impl EventKind {
    /// Whether training had to go on after a loss.
    #[must_use]
    pub fn is_restart(&self) -> bool {
        matches!(self, Self::Regrouped { failure: true, .. })
    }

    /// Whether this leaves the run's phase as it was.
    pub(super) fn is_remark(&self) -> bool {
        matches!(self, Self::SetAside { .. } | Self::Ordered { .. })
    }
}

/// A stored event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Format version.
    pub version: u32,
    /// Tells this writer from another.
    pub write_id: String,
    /// When.
    pub time: Timestamp,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// The events of a run.
#[derive(Clone, Debug)]
pub struct Events {
    run: Store,
}

impl Events {
    /// Of the run at `run_store`.
    #[must_use]
    pub fn new(run_store: &Store) -> Self {
        Self { run: run_store.clone() }
    }

    /// Appends one behind all others; returns its number.
    ///
    /// # Errors
    /// The storage.
    pub async fn append(&self, kind: EventKind, now: Timestamp) -> Result<u64, RunStoreError> {
        let event = Event { version: FORMAT_VERSION, write_id: new_write_id(), time: now, kind };
        let mut seq = self.list().await?.last().map_or(1, |(n, _)| n + 1);
        while record::create(&self.run, &format!("{FOLDER}/{seq:08}.json"), &event, &event.write_id).await?.is_some() {
            seq += 1;
        }
        Ok(seq)
    }

    /// All, in order.
    ///
    /// # Errors
    /// One is damaged, or the storage.
    pub async fn read(&self) -> Result<Vec<Event>, RunStoreError> {
        let mut events = Vec::new();
        for (_, rel) in self.list().await? {
            events.push(record::read(&self.run, &rel).await?);
        }
        Ok(events)
    }

    async fn list(&self) -> Result<Vec<(u64, String)>, RunStoreError> {
        let mut found: Vec<(u64, String)> = Vec::new();
        for object in self.run.list(FOLDER).await? {
            let name = object.rel.strip_prefix("events/").and_then(|n| n.strip_suffix(".json"));
            if let Some(Ok(seq)) = name.map(str::parse) {
                found.push((seq, object.rel));
            }
        }
        found.sort_unstable();
        Ok(found)
    }
}
