//! A rank's line to the coordinator. The stream lives on tokio; training is a plain thread and uses the blocking calls here.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail, ensure};
use sgcl_c10d::ProcessGroup;
use sgcl_proto::v1::{self, RankEvent, rank_event, rank_order};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Status};

use crate::dial::{AGAIN, Dial, GIVE_UP};

/// Time between two looks at what is waited for.
const WAIT: Duration = Duration::from_millis(2);

/// What the coordinator wants of the generation that trains. Looked at between steps.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wishes {
    /// Finish the step, commit, end.
    pub(crate) stop: bool,
    /// Finish the step, hand over, be ready for the next generation.
    pub(crate) pause: Option<v1::Pause>,
}

/// What orders act on at once, whatever the rank is doing.
#[derive(Default)]
struct Shared {
    generation: u64,
    wishes: Wishes,
    /// What a new coordinator is told.
    member: Option<v1::Membership>,
    /// The newest generation that was broken off, and why. The order may come before the assignment is looked at.
    broken: Option<(u64, String)>,
    /// Whether the present line ever brought anything.
    heard: bool,
    /// Step and number of the newest commit of this generation.
    committed: Option<(u64, u64)>,
    /// Aborted when the generation breaks off: whoever waits for a peer gets an error.
    group: Option<Arc<ProcessGroup>>,
}

impl Shared {
    fn check(&self) -> Result<(), BrokenOff> {
        match &self.broken {
            Some((generation, reason)) if *generation == self.generation => Err(BrokenOff(reason.clone())),
            _ => Ok(()),
        }
    }
}

/// The stream behind a session. When it breaks, or the coordinator is replaced, it is made anew: training needs no coordinator, and
/// goes on meanwhile.
struct Line {
    dial: Dial,
    hello: v1::RankHello,
    shared: Arc<Mutex<Shared>>,
    inbox: mpsc::UnboundedSender<rank_order::Order>,
    out: mpsc::UnboundedReceiver<RankEvent>,
    /// What a coordinator must have heard, however often it is replaced: of the newest generation.
    kept: Vec<RankEvent>,
}

impl Line {
    async fn hold(mut self) {
        let mut silent = Instant::now();
        loop {
            match self.speak().await {
                // Our side is closed: nothing is left to say.
                Ok(()) => return,
                Err(status) => {
                    let refused = matches!(status.code(), Code::PermissionDenied | Code::InvalidArgument);
                    let heard = std::mem::take(&mut lock(&self.shared).heard);
                    silent = if heard { Instant::now() } else { silent };
                    if refused || silent.elapsed() > GIVE_UP {
                        tracing::error!(%status, "no line to the coordinator");
                        return;
                    }
                    if heard {
                        tracing::warn!(%status, "the line to the coordinator broke; training goes on, and it is made anew");
                    }
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// One stream, until it breaks or our side is closed.
    async fn speak(&mut self) -> Result<(), Status> {
        let (events, out) = mpsc::unbounded_channel();
        let member = lock(&self.shared).member.clone();
        let hello = rank_event::Event::Hello(v1::RankHello { member, ..self.hello.clone() });
        let said = |event| events.send(event).map_err(|_| Status::aborted("the stream is closed"));
        said(RankEvent { generation: 0, event: Some(hello) })?;
        for event in &self.kept {
            said(event.clone())?;
        }
        let mut stream = self.dial.client().rank(UnboundedReceiverStream::new(out)).await?.into_inner();
        loop {
            tokio::select! {
                message = stream.message() => {
                    let message = message?.ok_or_else(|| Status::unavailable("the coordinator closed the line"))?;
                    lock(&self.shared).heard = true;
                    self.order(message.order);
                }
                event = self.out.recv() => {
                    let Some(event) = event else {
                        // Closing our side lets the last messages leave in good order.
                        drop(events);
                        while let Ok(Some(_)) = stream.message().await {}
                        return Ok(());
                    };
                    self.keep(&event);
                    said(event)?;
                }
            }
        }
    }

    fn order(&mut self, order: Option<rank_order::Order>) {
        match order {
            Some(rank_order::Order::Stop(_)) => lock(&self.shared).wishes.stop = true,
            Some(rank_order::Order::Pause(pause)) => {
                let mut shared = lock(&self.shared);
                if pause.generation == shared.generation {
                    shared.wishes.pause = Some(pause);
                }
            }
            Some(rank_order::Order::Regroup(regroup)) => break_off(&self.shared, regroup),
            Some(rank_order::Order::Committed(commit)) => {
                lock(&self.shared).committed = Some((commit.step, commit.seq));
                // It may be told again, when the next checkpoint's parts are said already.
                let of = |parts: &v1::PartsWritten| parts.step <= commit.step;
                self.kept.retain(|kept| !matches!(&kept.event, Some(rank_event::Event::Parts(parts)) if of(parts)));
            }
            Some(order) => {
                if matches!(order, rank_order::Order::Newest(_)) {
                    // Answered: asked again on a new line it would have all of a commit read for nothing.
                    self.kept.retain(|kept| !matches!(kept.event, Some(rank_event::Event::AskCommit(_))));
                }
                // Nobody waits any more where the rank is at its end.
                drop(self.inbox.send(order));
            }
            None => {}
        }
    }

    /// Notes what has to be said again on a new line.
    fn keep(&mut self, event: &RankEvent) {
        self.kept.retain(|kept| kept.generation == event.generation);
        match &event.event {
            // Ready for another generation: the last one is over.
            Some(rank_event::Event::Ready(_)) => self.kept = vec![event.clone()],
            Some(rank_event::Event::Progress(_) | rank_event::Event::Hello(_)) | None => {}
            Some(_) => self.kept.push(event.clone()),
        }
    }
}

/// An open line.
pub(crate) struct Session {
    runtime: Handle,
    events: mpsc::UnboundedSender<RankEvent>,
    orders: mpsc::UnboundedReceiver<rank_order::Order>,
    shared: Arc<Mutex<Shared>>,
    generation: u64,
}

impl Session {
    /// Says hello and hears what to prepare for. Blocks.
    ///
    /// # Errors
    /// The coordinator cannot be reached, or refuses.
    pub(crate) fn open(runtime: &Handle, coordinator: &str, hello: v1::RankHello) -> Result<(Self, v1::Welcome)> {
        // The channel's own task needs a runtime around it.
        let _inside = runtime.enter();
        let (events, out) = mpsc::unbounded_channel();
        let (inbox, orders) = mpsc::unbounded_channel();
        let shared = Arc::new(Mutex::new(Shared::default()));
        let mut session = Self { runtime: runtime.clone(), events, orders, shared: Arc::clone(&shared), generation: 0 };
        let line = Line { dial: Dial::new(coordinator)?, hello, shared, inbox, out, kept: Vec::new() };
        // Not within the span under way, which would last as long as this task does.
        runtime.spawn(line.hold());
        match session.next()? {
            rank_order::Order::Welcome(welcome) => Ok((session, welcome)),
            other => bail!("expected a welcome, got {other:?}"),
        }
    }

    /// Tells that this rank is in no generation, with the step of the state it holds, and waits for one. Blocks.
    ///
    /// # Errors
    /// The coordinator went away.
    pub(crate) fn assignment(&mut self, step: Option<u64>, broken: Option<String>) -> Result<v1::Assignment> {
        let left = {
            let mut shared = lock(&self.shared);
            shared.member = None;
            shared.group.take()
        };
        // Leaving may take a moment.
        drop(left);
        self.send(rank_event::Event::Ready(v1::Ready { step, broken: broken.unwrap_or_default() }));
        loop {
            match self.next()? {
                // One that is told again on a new line was heard on the old one.
                rank_order::Order::Assignment(assignment) if assignment.generation > self.generation => {
                    self.generation = assignment.generation;
                    let mut shared = lock(&self.shared);
                    shared.generation = assignment.generation;
                    let v1::Assignment { generation, rank, nodes } = assignment.clone();
                    shared.member = Some(v1::Membership { generation, rank, nodes });
                    shared.wishes.pause = None;
                    shared.committed = None;
                    return Ok(assignment);
                }
                // Of the generation that broke off.
                other => tracing::debug!(?other, "while waiting for a generation"),
            }
        }
    }

    /// What the coordinator wants of this generation.
    pub(crate) fn wishes(&self) -> Wishes {
        lock(&self.shared).wishes.clone()
    }

    /// The ring that breaks when the coordinator says so.
    ///
    /// # Errors
    /// It has said so already.
    pub(crate) fn hold(&self, group: &Arc<ProcessGroup>) -> Result<()> {
        let mut shared = lock(&self.shared);
        shared.check()?;
        shared.group = Some(Arc::clone(group));
        Ok(())
    }

    /// An error once the generation was broken off.
    ///
    /// # Errors
    /// [`BrokenOff`].
    pub(crate) fn check(&self) -> Result<()> {
        Ok(lock(&self.shared).check()?)
    }

    /// Waits for the order to pause, which may arrive after a peer has acted on it. Blocks.
    ///
    /// # Errors
    /// The generation was broken off instead.
    pub(crate) fn pause(&self) -> Result<v1::Pause> {
        loop {
            self.check()?;
            if let Some(pause) = self.wishes().pause {
                return Ok(pause);
            }
            std::thread::sleep(WAIT);
        }
    }

    /// Tells where rank 0's store listens.
    pub(crate) fn store_listening(&self, port: u16) {
        self.send(rank_event::Event::Store(v1::StoreListening { port: port.into() }));
    }

    /// Waits to hear where the store is. Blocks.
    ///
    /// # Errors
    /// The coordinator went away, or the generation was broken off.
    pub(crate) fn rendezvous(&mut self) -> Result<(String, u16)> {
        loop {
            if let rank_order::Order::Rendezvous(there) = self.answer()? {
                return Ok((there.host, u16::try_from(there.port)?));
            }
        }
    }

    /// Asks which commit to go back to. Blocks.
    ///
    /// # Errors
    /// The coordinator went away, or the generation was broken off.
    pub(crate) fn newest_commit(&mut self) -> Result<Option<u64>> {
        self.send(rank_event::Event::AskCommit(v1::AskCommit {}));
        loop {
            if let rank_order::Order::Newest(newest) = self.answer()? {
                return Ok(newest.commit);
            }
        }
    }

    /// Tells that this rank has the state it needs.
    pub(crate) fn reunited(&self, step: u64, from_commit: Option<u64>) {
        self.send(rank_event::Event::Reunited(v1::Reunited { step, from_commit }));
    }

    /// Tells how far training is. Never waits.
    pub(crate) fn progress(&self, progress: v1::Progress) {
        self.send(rank_event::Event::Progress(progress));
    }

    /// What a checkpoint's writer needs to tell that its parts are durable, from whichever thread.
    pub(crate) fn reporter(&self) -> Reporter {
        Reporter { events: self.events.clone(), generation: self.generation }
    }

    /// Waits until the checkpoint of `step` is committed and returns the commit's number. Blocks.
    ///
    /// # Errors
    /// The generation was broken off.
    pub(crate) fn committed(&self, step: u64) -> Result<u64> {
        loop {
            let committed = lock(&self.shared).committed;
            if let Some((_, seq)) = committed.filter(|&(of, _)| of == step) {
                return Ok(seq);
            }
            self.check()?;
            ensure!(!self.orders.is_closed(), "the coordinator closed the line");
            std::thread::sleep(WAIT);
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
            let _ = tokio::time::timeout(Duration::from_millis(500), end).await;
        });
    }

    fn next(&mut self) -> Result<rank_order::Order> {
        self.runtime.block_on(self.orders.recv()).ok_or_else(|| anyhow!("the coordinator closed the line"))
    }

    /// The next order, unless the generation is broken off before it comes.
    fn answer(&mut self) -> Result<rank_order::Order> {
        loop {
            self.check()?;
            let orders = &mut self.orders;
            match self.runtime.block_on(async { tokio::time::timeout(WAIT, orders.recv()).await }) {
                Ok(Some(order)) => return Ok(order),
                Ok(None) => bail!("the coordinator closed the line"),
                Err(_) => {}
            }
        }
    }

    /// A line that broke shows when an answer is waited for; until then training needs no coordinator.
    fn send(&self, event: rank_event::Event) {
        let _ = self.events.send(RankEvent { generation: self.generation, event: Some(event) });
    }
}

/// The coordinator broke this generation off.
#[derive(Debug, thiserror::Error)]
#[error("broken off: {0}")]
pub(crate) struct BrokenOff(String);

/// Tells of durable parts.
pub(crate) struct Reporter {
    events: mpsc::UnboundedSender<RankEvent>,
    generation: u64,
}

impl Reporter {
    /// All parts that this rank owes to a checkpoint are durable.
    pub(crate) fn parts_written(&self, parts: v1::PartsWritten) {
        let event = Some(rank_event::Event::Parts(parts));
        // As with every event: a line that broke shows when an answer is waited for.
        let _ = self.events.send(RankEvent { generation: self.generation, event });
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn break_off(shared: &Mutex<Shared>, regroup: v1::Regroup) {
    let mut shared = lock(shared);
    tracing::info!(reason = regroup.reason, generation = regroup.generation, "breaking off");
    shared.broken = Some((regroup.generation, regroup.reason));
    if shared.check().is_ok() {
        return;
    }
    if let Some(Err(error)) = shared.group.take().map(|group| group.abort()) {
        tracing::warn!(%error, "the ring could not be aborted; it will time out");
    }
}
