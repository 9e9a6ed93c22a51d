//! The run's events on their way to the bucket, beside the machine: what it decides never waits for the storage.

use anyhow::{Context, Result};
use jiff::Timestamp;
use sgcl_patchset::Store;
use sgcl_runstore::status::{EventKind, Events};
use sgcl_runstore::{Lease, RunStoreError};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

/// Writes events in the order they happened.
pub(crate) struct Recorder {
    events: mpsc::UnboundedSender<(EventKind, Timestamp)>,
    writer: AbortOnDropHandle<Result<(), RunStoreError>>,
}

impl Recorder {
    /// For the run at `run`, whose patience is this one's. Nothing is written once somebody else has the lease.
    pub(crate) fn new(run: &Store, lease: Lease) -> Self {
        let (events, mut received) = mpsc::unbounded_channel();
        let run = Events::new(run);
        let writer = tokio::spawn(async move {
            while let Some((kind, time)) = received.recv().await {
                lease.check().await?;
                run.append(kind, time).await?;
            }
            Ok(())
        });
        Self { events, writer: AbortOnDropHandle::new(writer) }
    }

    /// Takes what happened just now.
    pub(crate) fn record(&self, kind: EventKind) {
        // The writer ended over a refusal, which `refused` tells.
        let _ = self.events.send((kind, Timestamp::now()));
    }

    /// Resolves when the storage refuses an event.
    pub(crate) async fn refused(&mut self) -> anyhow::Error {
        match (&mut self.writer).await {
            Ok(Err(error)) => error.into(),
            Ok(Ok(())) => anyhow::anyhow!("the events' writer ended"),
            Err(error) => error.into(),
        }
    }

    /// Waits until all that was recorded is in the bucket.
    pub(crate) async fn finish(self) -> Result<()> {
        drop(self.events);
        Ok(self.writer.await.context("the events' writer broke off")??)
    }
}
