//! Metrics on their way to the bucket, beside training. Rank 0 writes; the others keep the newest, should they have to go on for it.

use std::time::Duration;

use anyhow::{Context, Result};
use sgcl_patchset::Store;
use sgcl_runstore::RunStoreError;
use sgcl_runstore::metrics::{CHUNK, MetricsWriter, StepMetrics};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use super::wait::{LOOK, Wait};

/// Steps between two writes.
const FLUSH_STEPS: usize = 20;
/// Steps that wait to be written, some megabytes. With more, training waits: none is lost.
const MOST_WAITING: usize = 10_000;
/// Steps that a rank which does not write keeps.
const KEPT: usize = 2 * CHUNK;
/// Before the next try after a refusal.
const PAUSE: Duration = Duration::from_secs(10);

enum Order {
    Take { step: Box<StepMetrics>, write: bool },
    Flush(oneshot::Sender<Result<(), RunStoreError>>),
}

/// Where training hands its metrics in.
pub(crate) struct Metrics {
    orders: mpsc::Sender<Order>,
    // What it has not written ends with the process: the trainer waits for that before.
    _writer: AbortOnDropHandle<()>,
}

impl Metrics {
    /// For the run `name` at `run`.
    pub(crate) fn new(runtime: &Handle, run: &Store, name: &str) -> Self {
        let (orders, received) = mpsc::channel(MOST_WAITING);
        let writer = runtime.spawn(write(MetricsWriter::new(run, name), received));
        Self { orders, _writer: AbortOnDropHandle::new(writer) }
    }

    /// Takes a step, which this rank writes or just keeps.
    pub(crate) fn push(&self, step: StepMetrics, write: bool, wait: &mut Wait) -> Result<()> {
        let mut order = Order::Take { step: Box::new(step), write };
        loop {
            order = match self.orders.try_send(order) {
                Ok(()) => return Ok(()),
                Err(mpsc::error::TrySendError::Full(order)) => order,
                Err(mpsc::error::TrySendError::Closed(_)) => anyhow::bail!("the metrics' writer ended"),
            };
            wait.look()?;
            std::thread::sleep(LOOK);
        }
    }

    /// Resolves once everything handed in so far is in the bucket, or the storage refuses it.
    pub(crate) fn flushed(&self) -> impl Future<Output = Result<()>> + Send + use<> {
        let orders = self.orders.clone();
        async move {
            let (reply, done) = oneshot::channel();
            let ended = "the metrics' writer ended";
            orders.send(Order::Flush(reply)).await.ok().context(ended)?;
            Ok(done.await.context(ended)??)
        }
    }
}

/// Ends with the trainer. Failures that pass are waited for in the store; refusals are told, and everything is kept for the next try.
async fn write(mut writer: MetricsWriter, mut orders: mpsc::Receiver<Order>) {
    let mut writes = false;
    let mut refused: Option<tokio::time::Instant> = None;
    while let Some(order) = orders.recv().await {
        let mut asked = Vec::new();
        let mut next = Some(order);
        while let Some(order) = next {
            match order {
                Order::Take { step, write } => {
                    writer.push(*step);
                    writes = write;
                }
                Order::Flush(reply) => asked.push(reply),
            }
            // No more than one chunk at a time, so that the channel is what fills up.
            next = if writer.pending() < CHUNK { orders.try_recv().ok() } else { None };
        }
        if !writes {
            writer.keep(KEPT);
            for reply in asked {
                // Whoever asked may be gone.
                let _ = reply.send(Ok(()));
            }
            continue;
        }
        let again = refused.is_none_or(|at| at.elapsed() >= PAUSE);
        if asked.is_empty() && (writer.pending() < FLUSH_STEPS || !again) {
            continue;
        }
        let result = writer.flush().await;
        refused = result.is_err().then(tokio::time::Instant::now);
        if let Err(error) = &result {
            tracing::warn!(%error, pending = writer.pending(), "metrics were not written; they are kept");
        }
        let mut result = Some(result);
        for reply in asked {
            let _ = reply.send(result.take().unwrap_or(Ok(())));
        }
    }
}
