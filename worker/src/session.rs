//! A rank's line to the coordinator. The stream lives on tokio; training is a plain thread and uses the blocking calls here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use sgcl_proto::MAX_MESSAGE_BYTES;
use sgcl_proto::v1::coordinator_client::CoordinatorClient;
use sgcl_proto::v1::{self, RankEvent, rank_event, rank_order};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;

/// An open line.
pub(crate) struct Session {
    runtime: Handle,
    events: mpsc::UnboundedSender<RankEvent>,
    orders: mpsc::UnboundedReceiver<rank_order::Order>,
    stop: Arc<AtomicBool>,
    rank: u32,
}

impl Session {
    /// Says hello and waits to be told who we are. Blocks.
    ///
    /// # Errors
    /// The coordinator cannot be reached, or refuses.
    pub(crate) fn open(runtime: &Handle, coordinator: &str, hello: v1::RankHello) -> Result<(Self, v1::Assignment)> {
        let (events, out) = mpsc::unbounded_channel();
        let (inbox, orders) = mpsc::unbounded_channel();
        let stop = Arc::new(AtomicBool::new(false));
        let mut session = Self { runtime: runtime.clone(), events, orders, stop: Arc::clone(&stop), rank: 0 };
        session.send(rank_event::Event::Hello(hello));
        let mut stream = runtime.block_on(async {
            let client = CoordinatorClient::connect(coordinator.to_owned())
                .await
                .with_context(|| format!("cannot reach the coordinator at {coordinator}"))?;
            let mut client =
                client.max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES);
            let stream = client.rank(UnboundedReceiverStream::new(out)).await.context("the coordinator refused")?;
            anyhow::Ok(stream.into_inner())
        })?;
        runtime.spawn(async move {
            while let Ok(Some(message)) = stream.message().await {
                match message.order {
                    // Looked at between steps, whatever else is being waited for.
                    Some(rank_order::Order::Stop(_)) => stop.store(true, Ordering::Relaxed),
                    Some(order) => {
                        // Nobody waits for orders any more: the rank is at its end.
                        let heard = inbox.send(order).is_ok();
                        if !heard {
                            return;
                        }
                    }
                    None => {}
                }
            }
        });
        match session.next()? {
            rank_order::Order::Assignment(assignment) => {
                session.rank = assignment.rank;
                Ok((session, assignment))
            }
            other => bail!("expected an assignment, got {other:?}"),
        }
    }

    /// Whether the coordinator asked for an end after the current step.
    pub(crate) fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Tells where rank 0's store listens.
    pub(crate) fn store_listening(&self, port: u16) {
        self.send(rank_event::Event::Store(v1::StoreListening { port: port.into() }));
    }

    /// Waits for the ranks to be complete. Blocks.
    ///
    /// # Errors
    /// The coordinator went away.
    pub(crate) fn rendezvous(&mut self) -> Result<(String, u16)> {
        match self.next()? {
            rank_order::Order::Rendezvous(there) => Ok((there.host, u16::try_from(there.port)?)),
            other => bail!("expected a rendezvous, got {other:?}"),
        }
    }

    /// Tells how far training is. Never waits.
    pub(crate) fn progress(&self, progress: v1::Progress) {
        self.send(rank_event::Event::Progress(progress));
    }

    /// Tells that parts are durable, and waits for their commit. Blocks.
    ///
    /// # Errors
    /// The coordinator went away.
    pub(crate) fn commit(&mut self, parts: v1::PartsWritten) -> Result<u64> {
        let step = parts.step;
        self.send(rank_event::Event::Parts(parts));
        loop {
            match self.next()? {
                rank_order::Order::Committed(committed) if committed.step == step => return Ok(committed.seq),
                other => tracing::debug!(?other, "while waiting for a commit"),
            }
        }
    }

    /// Nothing is left to do.
    pub(crate) fn finished(self, stopped: bool) {
        self.send(rank_event::Event::Finished(v1::Finished { stopped }));
        self.drained();
    }

    /// Gives up.
    pub(crate) fn failed(self, message: String, exit_code: u8) {
        self.send(rank_event::Event::Failed(v1::Failed { message, exit_code: exit_code.into() }));
        self.drained();
    }

    /// Gives the last message time to leave: closing our side lets the stream end in good order.
    fn drained(mut self) {
        let (events, _) = mpsc::unbounded_channel();
        drop(std::mem::replace(&mut self.events, events));
        let Self { runtime, mut orders, .. } = self;
        runtime.block_on(async {
            let end = async { while orders.recv().await.is_some() {} };
            // The coordinator may keep its side open: what matters is that ours was flushed.
            let _ = tokio::time::timeout(std::time::Duration::from_millis(500), end).await;
        });
    }

    fn next(&mut self) -> Result<rank_order::Order> {
        self.runtime.block_on(self.orders.recv()).ok_or_else(|| anyhow!("the coordinator closed the line"))
    }

    /// A line that broke shows when an answer is waited for; until then training needs no coordinator.
    fn send(&self, event: rank_event::Event) {
        let _ = self.events.send(RankEvent { rank: self.rank, event: Some(event) });
    }
}
