//! The machine at work: gRPC streams in, effects out, one task that owns all state.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use sgcl_patchset::Store;
use sgcl_proto::MAX_MESSAGE_BYTES;
use sgcl_proto::v1::coordinator_server::{Coordinator as Service, CoordinatorServer};
use sgcl_proto::v1::{
    self, NodeEvent, NodeOrder, RankEvent, RankOrder, node_event, node_order, rank_event, rank_order,
};
use sgcl_runstore::commit::Progress;
use sgcl_runstore::status::{EventKind, Events, Phase, RunStatus};
use sgcl_runstore::{Commit, Commits, PartKind, PartRef, RunStoreError, Spec};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};

use crate::launcher::{Ended, Launcher};
use crate::machine::{Change, Effect, Event, Machine, Outcome, Place, Settings};
use crate::switchboard::Switchboard;
use crate::view::RunView;

/// How often time alone is looked at.
const TICK: Duration = Duration::from_millis(100);
/// Silence after which a connection counts as broken: twice this.
const HEARTBEAT: Duration = Duration::from_millis(1500);
/// A pause between two tries of a commit is never longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A run to coordinate.
pub struct Coordinator<L> {
    /// What to train.
    pub spec: Spec,
    /// The run's part of the bucket.
    pub run: Store,
    /// How nodes are started.
    pub launcher: L,
    /// Where watchers look.
    pub view: watch::Sender<RunView>,
    /// Cancelled once: stop after a commit. `kill` cancelled: stop at once.
    pub stop: CancellationToken,
    /// Cancelled: end without a commit.
    pub kill: CancellationToken,
}

/// A stream's way back, and its number: a node whose line broke comes with a new one, maybe before the old one's end is noticed.
pub(crate) struct Line<T> {
    number: u64,
    orders: mpsc::UnboundedSender<Result<T, Status>>,
}

/// What the streams tell the one task that owns the state.
pub(crate) enum Input {
    Event(Event),
    Node(String, Line<NodeOrder>),
    /// The end of a node's stream, which may be an old one.
    NodeGone(String, u64),
    Rank(Place, mpsc::UnboundedSender<Result<RankOrder, Status>>),
    Progress(Place, v1::Progress),
    Parts {
        generation: u64,
        place: Place,
        parts: v1::PartsWritten,
    },
    AskCommit(Place),
    Found(Place, Result<Option<Commit>>),
    Committed {
        generation: u64,
        step: u64,
        result: Result<Commit>,
    },
}

impl<L: Launcher> Coordinator<L> {
    /// Coordinates the run until it ends.
    ///
    /// # Errors
    /// The bucket cannot be read or written, or a node cannot be started.
    pub async fn serve(self, listener: TcpListener) -> Result<Outcome> {
        let address = listener.local_addr().context("the coordinator's listener has no address")?;
        let board = Switchboard::only(self.spec.run.as_str());
        let ended = CancellationToken::new();
        let over = ended.clone().cancelled_owned();
        // Ends with this coordinator, however that ends.
        let _server = AbortOnDropHandle::new(tokio::spawn(listen(board.clone(), listener, over)));
        let outcome = self.attend(&board, format!("http://{address}")).await;
        // Streams are still open where a node has not left yet: give them a moment, then close.
        tokio::time::sleep(Duration::from_millis(300)).await;
        ended.cancel();
        outcome
    }

    /// The same behind a port that serves several runs; `url` is where nodes find it.
    ///
    /// # Errors
    /// As [`Coordinator::serve`].
    pub async fn attend(self, board: &Switchboard, url: String) -> Result<Outcome> {
        let (inputs, received) = mpsc::channel(1024);
        let _plug = board.plug(self.spec.run.as_str(), inputs.clone());
        self.own(url, inputs, received).await
    }

    async fn own(
        self,
        url: String,
        inputs: mpsc::Sender<Input>,
        mut received: mpsc::Receiver<Input>,
    ) -> Result<Outcome> {
        let commit = newest(&self.run).await?;
        let generation = commit.as_ref().map_or(0, |commit| commit.progress.generation);
        let settings = Settings {
            nodes: self.spec.nodes,
            min_nodes: self.spec.min_nodes,
            ranks_per_node: self.spec.ranks_per_node,
            max_restarts: self.spec.config.max_restarts,
            startup_timeout: Duration::from_secs(self.spec.config.startup_timeout_s),
            step_timeout: Duration::from_secs(self.spec.config.step_timeout_s),
        };
        // Whoever coordinated before may have left ranks training.
        let left = RunStatus::read(&self.run).await?.phase == Phase::Running;
        let (machine, effects) = if left {
            (Machine::take_over(settings, generation, Instant::now()), Vec::new())
        } else {
            Machine::start(settings, generation, Instant::now())
        };
        let (ended, mut ends) = mpsc::unbounded_channel();
        let mut desk = Desk {
            machine,
            commit,
            nodes: BTreeMap::new(),
            ranks: BTreeMap::new(),
            parts: BTreeMap::new(),
            writing: false,
            asking: Vec::new(),
            inputs,
            ended,
            coordinator: url,
            owner: &self,
        };
        if let Some(outcome) = desk.carry_out(effects).await? {
            return Ok(outcome);
        }
        let mut tick = tokio::time::interval(TICK);
        let mut asked = false;
        loop {
            let event = tokio::select! {
                Some(input) = received.recv() => match desk.take(input) {
                    Some(event) => event,
                    None => continue,
                },
                Some(Ended { slot, attempt, code }) = ends.recv() => Event::LaunchEnded { slot, attempt, code },
                _ = tick.tick() => Event::Tick,
                () = self.stop.cancelled(), if !asked => { asked = true; Event::StopRequested }
                () = self.kill.cancelled() => {
                    self.launcher.kill_all();
                    let reason = "stopped at once on request".to_owned();
                    self.record(EventKind::Suspended { reason: reason.clone() }).await?;
                    return Ok(Outcome::Suspended { reason });
                }
            };
            let effects = desk.machine.handle(Instant::now(), event);
            if let Some(outcome) = desk.carry_out(effects).await? {
                return Ok(outcome);
            }
        }
    }

    async fn record(&self, kind: EventKind) -> Result<(), RunStoreError> {
        Events::new(&self.run).append(kind, jiff::Timestamp::now()).await.map(drop)
    }
}

/// Everything the owning task holds beside the machine.
struct Desk<'a, L> {
    owner: &'a Coordinator<L>,
    machine: Machine,
    commit: Option<Commit>,
    nodes: BTreeMap<String, Line<NodeOrder>>,
    ranks: BTreeMap<Place, mpsc::UnboundedSender<Result<RankOrder, Status>>>,
    /// Parts of checkpoints under way, by generation and step.
    parts: BTreeMap<(u64, u64), BTreeMap<Place, v1::PartsWritten>>,
    /// A commit is being written: what is newest is not known before it ends.
    writing: bool,
    /// Who waits to hear which commit is newest.
    asking: Vec<Place>,
    inputs: mpsc::Sender<Input>,
    ended: mpsc::UnboundedSender<Ended>,
    coordinator: String,
}

impl<L: Launcher> Desk<'_, L> {
    /// Keeps what the machine does not need, hands on what it does.
    fn take(&mut self, input: Input) -> Option<Event> {
        match input {
            Input::Event(event) => Some(event),
            Input::NodeGone(node, number) => {
                self.nodes.get(&node).filter(|line| line.number == number)?;
                self.nodes.remove(&node);
                let nodes = self.nodes.len() as u32;
                self.owner.view.send_modify(|view| view.nodes = nodes);
                Some(Event::NodeLost { node })
            }
            Input::Node(node, line) => {
                self.nodes.insert(node, line);
                let nodes = self.nodes.len() as u32;
                self.owner.view.send_modify(|view| view.nodes = nodes);
                None
            }
            Input::Rank(place, orders) => {
                self.ranks.insert(place.clone(), orders);
                // A spec that is not JSON would have been refused when it was made.
                let spec_json = serde_json::to_string(&self.owner.spec).unwrap_or_default();
                let run_url = self.owner.run.url().to_owned();
                self.tell(&place, rank_order::Order::Welcome(v1::Welcome { run_url, spec_json }));
                None
            }
            Input::Progress(place, progress) => {
                if self.machine.first_place() != Some(&place) {
                    return None;
                }
                self.owner.view.send_modify(|view| {
                    view.phase = progress.phase;
                    view.epoch = progress.epoch;
                    view.epoch_step = progress.epoch_step;
                    view.epoch_steps = progress.epoch_steps;
                    view.step = progress.step;
                    if !progress.metrics.is_empty() {
                        view.metrics = progress.metrics.into_iter().collect();
                        view.samples_per_second = progress.samples_per_second;
                    }
                });
                None
            }
            Input::Parts { generation, place, parts } => {
                if generation != self.machine.generation() {
                    return None;
                }
                let step = parts.step;
                self.parts.entry((generation, step)).or_default().insert(place.clone(), parts);
                Some(Event::PartsWritten { generation, place, step })
            }
            Input::AskCommit(place) => {
                self.asking.push(place);
                self.answer();
                None
            }
            Input::Found(place, result) => match result {
                Ok(commit) => {
                    let seq = commit.as_ref().map(|commit| commit.seq);
                    self.commit = commit;
                    self.tell(&place, rank_order::Order::Newest(v1::Newest { commit: seq }));
                    None
                }
                Err(error) => Some(Event::CommitFailed { reason: format!("no commit to go back to: {error:#}") }),
            },
            Input::Committed { generation, step, result } => {
                self.writing = false;
                match result {
                    Ok(commit) => {
                        let seq = commit.seq;
                        self.commit = Some(commit);
                        self.owner.view.send_modify(|view| view.last_commit = Some(seq));
                        self.answer();
                        Some(Event::Committed { generation, seq, step })
                    }
                    Err(error) => Some(Event::CommitFailed { reason: format!("the commit failed: {error:#}") }),
                }
            }
        }
    }

    /// Looks the newest intact commit up for those who ask, once none is being written.
    fn answer(&mut self) {
        if self.writing {
            return;
        }
        for place in self.asking.drain(..) {
            let (run, inputs) = (self.owner.run.clone(), self.inputs.clone());
            tokio::spawn(async move {
                let found = newest(&run).await;
                // The receiver is gone when the run has ended: nobody is left to tell.
                let _ = inputs.send(Input::Found(place, found)).await;
            });
        }
    }

    async fn carry_out(&mut self, effects: Vec<Effect>) -> Result<Option<Outcome>> {
        for effect in effects {
            tracing::debug!(?effect, "decided");
            match effect {
                Effect::Launch { slot, attempt } => {
                    self.owner.launcher.launch(slot, attempt, &self.coordinator, self.ended.clone())?;
                }
                Effect::Discard { slot, attempt } => self.owner.launcher.discard(slot, attempt),
                Effect::StartRank { place: (node, local_rank), attempt } => {
                    self.order(&node, node_order::Order::Start(v1::StartRank { local_rank, attempt }));
                }
                Effect::KillRank { place: (node, local_rank), attempt } => {
                    self.order(&node, node_order::Order::Kill(v1::KillRank { local_rank, attempt }));
                }
                Effect::Leave { node, reason, code } => {
                    self.order(&node, node_order::Order::Leave(v1::Leave { reason, exit_code: code }));
                }
                Effect::Assign { place, generation, rank, nodes } => {
                    // What an earlier generation had begun to write comes to nothing.
                    self.parts.retain(|&(of, _), _| of == generation);
                    self.tell(&place, rank_order::Order::Assignment(v1::Assignment { generation, rank, nodes }));
                }
                Effect::Rendezvous { place, host, port } => {
                    self.tell(&place, rank_order::Order::Rendezvous(v1::Rendezvous { host, port }));
                }
                Effect::Stop { place, reason } => self.tell(&place, rank_order::Order::Stop(v1::Stop { reason })),
                Effect::Pause { place, generation, reason, leaving, commit } => {
                    self.tell(&place, rank_order::Order::Pause(v1::Pause { generation, reason, leaving, commit }));
                }
                Effect::Regroup { place, generation, reason } => {
                    self.tell(&place, rank_order::Order::Regroup(v1::Regroup { generation, reason }));
                }
                Effect::WriteCommit { generation, step } => self.write_commit(generation, step),
                Effect::TellCommitted { place, seq, step } => {
                    self.tell(&place, rank_order::Order::Committed(v1::Committed { seq, step }));
                }
                Effect::Started { generation, world, from_commit } => {
                    self.owner.view.send_modify(|view| {
                        view.generation = generation;
                        view.ranks = world;
                    });
                    self.owner.record(EventKind::Started { world, from_commit }).await?;
                }
                Effect::Found { generation, world } => {
                    tracing::info!(generation, world, "took over a generation that trains");
                    self.owner.view.send_modify(|view| {
                        view.generation = generation;
                        view.ranks = world;
                    });
                }
                Effect::Regrouped(change) => self.regrouped(change).await?,
                Effect::Note { message } => {
                    tracing::warn!("{message}");
                    self.owner.view.send_modify(|view| view.message = Some(message));
                }
                Effect::End(outcome) => {
                    self.owner
                        .record(match outcome.clone() {
                            Outcome::Finished => EventKind::Finished,
                            Outcome::Suspended { reason } => EventKind::Suspended { reason },
                            Outcome::Failed { message, .. } => EventKind::Failed { message },
                        })
                        .await?;
                    return Ok(Some(outcome));
                }
            }
        }
        Ok(None)
    }

    async fn regrouped(&self, change: Change) -> Result<()> {
        tracing::warn!(
            world = change.world,
            seconds = change.took.as_secs_f64(),
            steps_lost = change.steps_lost,
            "training goes on: {}",
            change.reason
        );
        self.owner.view.send_modify(|view| {
            view.restarts += u32::from(change.failure);
            view.message = Some(change.reason.clone());
            view.changes.push(change.clone());
        });
        let Change { reason, failure, world_before, world, took, steps_lost, from_commit, .. } = change;
        let seconds = took.as_secs_f64();
        let kind = EventKind::Regrouped { reason, failure, world_before, world, seconds, steps_lost, from_commit };
        Ok(self.owner.record(kind).await?)
    }

    /// Sends to a node. One that is gone will be noticed by its stream's end.
    fn order(&self, node: &str, order: node_order::Order) {
        if let Some(line) = self.nodes.get(node) {
            let _ = line.orders.send(Ok(NodeOrder { order: Some(order) }));
        }
    }

    /// Sends to a rank, likewise.
    fn tell(&self, place: &Place, order: rank_order::Order) {
        if let Some(orders) = self.ranks.get(place) {
            let _ = orders.send(Ok(RankOrder { order: Some(order) }));
        }
    }

    /// Writes the commit of `step` beside the event loop, and retires old ones behind it.
    fn write_commit(&mut self, generation: u64, step: u64) {
        let written = self.parts.remove(&(generation, step)).unwrap_or_default();
        let parent = self.commit.clone();
        let run = self.owner.run.clone();
        let keep = self.owner.spec.config.checkpoint.clone();
        let inputs = self.inputs.clone();
        self.writing = true;
        tokio::spawn(async move {
            let result = async {
                let progress = assemble(written.into_values().collect())?;
                let commit = Commit::after(parent.as_ref(), progress, jiff::Timestamp::now());
                let commits = Commits::new(&run);
                append(&commits, &commit).await?;
                if let Err(error) = commits.retain(&keep).await {
                    tracing::warn!(%error, "old commits were not removed; the next commit tries again");
                }
                Ok(commit)
            }
            .await;
            // The receiver is gone when the run has ended: nobody is left to tell.
            let _ = inputs.send(Input::Committed { generation, step, result }).await;
        });
    }
}

/// Makes a commit durable, through what passes by itself.
async fn append(commits: &Commits, commit: &Commit) -> Result<(), RunStoreError> {
    let mut pause = Duration::from_millis(200);
    loop {
        match commits.append(commit).await {
            Err(RunStoreError::Store(error)) if !error.is_permanent() && pause < LONGEST_PAUSE => {
                tracing::warn!(%error, seq = commit.seq, "the commit was not written, trying again");
            }
            result => return result,
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
}

/// The newest commit that can be gone back to. Newer ones that are damaged are put away, and the run's events say so.
async fn newest(run: &Store) -> Result<Option<Commit>> {
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
fn assemble(written: Vec<v1::PartsWritten>) -> Result<Progress> {
    let head = written.iter().find(|parts| !parts.progress_json.is_empty()).context("rank 0 sent no position")?;
    let mut progress: Progress =
        serde_json::from_str(&head.progress_json).context("rank 0's position is not readable")?;
    for part in written.iter().flat_map(|parts| &parts.parts) {
        let kind: PartKind = serde_json::from_value(part.kind.clone().into()).context("a part of unknown kind")?;
        progress.parts.push(PartRef { kind, path: part.path.clone(), bytes: part.bytes, crc32c: part.crc32c });
    }
    Ok(progress)
}

/// Serves the streams of every run on the board, until told to end.
///
/// # Errors
/// The listener breaks.
pub async fn listen(
    board: Switchboard,
    listener: TcpListener,
    end: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let service = CoordinatorServer::new(Streams { board, lines: AtomicU64::new(0) })
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(HEARTBEAT))
        .http2_keepalive_timeout(Some(HEARTBEAT))
        .add_service(service)
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), end)
        .await
}

/// The gRPC side: streams to inputs.
struct Streams {
    board: Switchboard,
    /// Streams so far.
    lines: AtomicU64,
}

impl Streams {
    async fn send(inputs: &mpsc::Sender<Input>, input: Input) -> bool {
        inputs.send(input).await.is_ok()
    }
}

/// The first message of a stream must say who speaks, and of which run.
fn hello<T>(first: Option<T>, run: impl Fn(&T) -> Option<&str>) -> Result<(T, String), Status> {
    let first = first.ok_or_else(|| Status::invalid_argument("the stream ended before its hello"))?;
    let run = run(&first).ok_or_else(|| Status::invalid_argument("the first message must be a hello"))?.to_owned();
    Ok((first, run))
}

#[tonic::async_trait]
impl Service for Streams {
    type JoinStream = UnboundedReceiverStream<Result<NodeOrder, Status>>;
    type RankStream = UnboundedReceiverStream<Result<RankOrder, Status>>;

    async fn join(&self, request: Request<Streaming<NodeEvent>>) -> Result<Response<Self::JoinStream>, Status> {
        let mut events = request.into_inner();
        let (first, run) = hello(events.message().await?, |first| match &first.event {
            Some(node_event::Event::Hello(hello)) => Some(&hello.run),
            _ => None,
        })?;
        let Some(node_event::Event::Hello(v1::NodeHello { node, address, slot, ranks, .. })) = first.event else {
            return Err(Status::invalid_argument("the first message must be a hello"));
        };
        let inputs = self.board.find(&run)?;
        let (orders, out) = mpsc::unbounded_channel();
        let number = self.lines.fetch_add(1, Ordering::Relaxed);
        let line = Line { number, orders };
        tokio::spawn(async move {
            let ranks = ranks.into_iter().map(|rank| (rank.local_rank, rank.attempt)).collect();
            let joined = Event::NodeJoined { node: node.clone(), slot, address, ranks };
            let mut known = Self::send(&inputs, Input::Node(node.clone(), line)).await
                && Self::send(&inputs, Input::Event(joined)).await;
            while let (true, Ok(Some(message))) = (known, events.message().await) {
                let event = match message.event {
                    Some(node_event::Event::Exited(e)) => Event::RankExited {
                        place: (node.clone(), e.local_rank),
                        attempt: e.attempt,
                        code: e.code,
                        last_words: e.last_words,
                    },
                    Some(node_event::Event::Preempting(e)) => {
                        Event::Preempting { node: node.clone(), deadline: Duration::from_secs(e.deadline_s.into()) }
                    }
                    Some(node_event::Event::Hello(_)) | None => continue,
                };
                known = Self::send(&inputs, Input::Event(event)).await;
            }
            Self::send(&inputs, Input::NodeGone(node, number)).await;
        });
        Ok(Response::new(UnboundedReceiverStream::new(out)))
    }

    async fn rank(&self, request: Request<Streaming<RankEvent>>) -> Result<Response<Self::RankStream>, Status> {
        let mut events = request.into_inner();
        let (first, run) = hello(events.message().await?, |first| match &first.event {
            Some(rank_event::Event::Hello(hello)) => Some(&hello.run),
            _ => None,
        })?;
        let Some(rank_event::Event::Hello(v1::RankHello { node, local_rank, attempt, member, .. })) = first.event
        else {
            return Err(Status::invalid_argument("the first message must be a hello"));
        };
        let inputs = self.board.find(&run)?;
        let (orders, out) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let place = (node, local_rank);
            if !Self::send(&inputs, Input::Rank(place.clone(), orders)).await {
                return;
            }
            if let Some(v1::Membership { generation, rank, nodes }) = member {
                let (place, world) = (place.clone(), u32::try_from(nodes.len()).unwrap_or(u32::MAX));
                let returned = Event::RankReturned { place, attempt, generation, rank, world };
                if !Self::send(&inputs, Input::Event(returned)).await {
                    return;
                }
            }
            // A stream that ends says nothing: the supervisor reports how the process ended.
            while let Ok(Some(RankEvent { generation, event: Some(event) })) = events.message().await {
                let place = place.clone();
                let input = match event {
                    rank_event::Event::Hello(_) => continue,
                    rank_event::Event::Ready(ready) => {
                        let broken = Some(ready.broken).filter(|broken| !broken.is_empty());
                        Input::Event(Event::RankReady { place, attempt, generation, broken })
                    }
                    rank_event::Event::Store(store) => {
                        Input::Event(Event::StoreListening { generation, port: store.port })
                    }
                    rank_event::Event::AskCommit(_) => Input::AskCommit(place),
                    rank_event::Event::Reunited(v1::Reunited { step, from_commit }) => {
                        Input::Event(Event::Reunited { generation, place, step, from_commit })
                    }
                    rank_event::Event::Progress(progress) => {
                        let alive = Event::Progress { generation, step: progress.step };
                        if !Self::send(&inputs, Input::Event(alive)).await {
                            break;
                        }
                        Input::Progress(place, progress)
                    }
                    rank_event::Event::Parts(parts) => Input::Parts { generation, place, parts },
                    rank_event::Event::Finished(finished) => {
                        Input::Event(Event::RankFinished { generation, place, stopped: finished.stopped })
                    }
                    rank_event::Event::Failed(failed) => Input::Event(Event::RankFailed {
                        place,
                        attempt,
                        message: failed.message,
                        code: failed.exit_code,
                    }),
                };
                if !Self::send(&inputs, input).await {
                    break;
                }
            }
        });
        Ok(Response::new(UnboundedReceiverStream::new(out)))
    }
}
