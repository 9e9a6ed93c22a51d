//! The machine at work: what streams bring in, effects out, one task that owns all state.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use sgcl_patchset::Store;
use sgcl_proto::WAITING_FOR_STORAGE;
use sgcl_proto::v1::{self, NodeOrder, RankOrder, node_order, rank_order};
use sgcl_runstore::commit::Progress;
use sgcl_runstore::status::{EventKind, Phase};
use sgcl_runstore::{Commit, Commits, Lease, Order, Orders, Spec};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use tracing::{Instrument as _, info_span};

use crate::commits::{assemble, follow, is_stale, newest};
use crate::launcher::{Ended, Errands, Launcher};
use crate::machine::{Change, Effect, Event, Machine, Outcome, Place, Settings, YIELDED};
use crate::metrics::{COMMIT_FAILURES, COMMIT_SECONDS};
use crate::orders::{self, Notice};
use crate::recorder::Recorder;
use crate::streams::{Input, Line, listen};
use crate::switchboard::Switchboard;
use crate::trust::Door;
use crate::view::RunView;

/// How often time alone is looked at.
const TICK: Duration = Duration::from_millis(100);
/// Time for a node that its user sends home.
const DRAIN: Duration = Duration::from_secs(10);
/// Longest wait for the last event when the run is ended at once.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// Generations that one coordinator may number: the next one begins behind them.
const GENERATIONS: u64 = 1000;

/// A run to coordinate.
pub struct Coordinator<L> {
    /// What to train.
    pub spec: Spec,
    /// The run's part of the bucket.
    pub run: Store,
    /// How nodes are started.
    pub launcher: Arc<L>,
    /// Where watchers look.
    pub view: watch::Sender<RunView>,
    /// Cancelled once: stop after a commit. `kill` cancelled: stop at once.
    pub stop: CancellationToken,
    /// Cancelled: end without a commit.
    pub kill: CancellationToken,
}

impl<L: Launcher> Coordinator<L> {
    /// Coordinates the run until it ends. Whoever coordinated it before is stale from here on.
    ///
    /// # Errors
    /// The bucket cannot be read or written, a node cannot be started, or another coordinator has taken the run over
    /// ([`Superseded`](sgcl_runstore::RunStoreError::Superseded)).
    pub async fn serve(self, listener: TcpListener) -> Result<Outcome> {
        let address = listener.local_addr().context("the coordinator's listener has no address")?;
        let board = Switchboard::only(self.spec.run.as_str());
        let ended = CancellationToken::new();
        let over = ended.clone().cancelled_owned();
        // Ends with this coordinator, however that ends.
        let _server = AbortOnDropHandle::new(tokio::spawn(listen(board.clone(), Door::open(), listener, over)));
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
    pub async fn attend(mut self, board: &Switchboard, url: String) -> Result<Outcome> {
        // Nothing that passes by itself ends a run.
        self.run = self.run.patient();
        let (inputs, received) = mpsc::channel(1024);
        let _plug = board.plug(self.spec.run.as_str(), inputs.clone());
        let span = info_span!("coordinate", run = %self.spec.run);
        self.own(url, inputs, received).instrument(span).await
    }

    async fn own(
        self,
        url: String,
        inputs: mpsc::Sender<Input>,
        mut received: mpsc::Receiver<Input>,
    ) -> Result<Outcome> {
        let found = async {
            let lease = Lease::take(&self.run, &holder(), jiff::Timestamp::now()).await?;
            let seen = Orders::new(&self.run).newest().await?;
            anyhow::Ok((lease, seen, newest(&self.run).await?, Phase::read(&self.run).await?))
        };
        let (lease, seen, commit, phase) = tokio::select! {
            found = found.instrument(info_span!("lease")) => found?,
            () = self.kill.cancelled() => {
                return Ok(Outcome::Suspended { reason: "stopped before the storage answered".to_owned() });
            }
        };
        // Generations of an earlier coordinator may live and have left no commit: no number is used twice.
        let used = lease.epoch().saturating_sub(1) * GENERATIONS;
        let generation = commit.as_ref().map_or(0, |commit| commit.progress.generation).max(used);
        let settings = Settings {
            nodes: self.spec.nodes,
            min_nodes: self.spec.min_nodes,
            ranks_per_node: self.spec.ranks_per_node,
            max_restarts: self.spec.config.max_restarts,
            startup_timeout: Duration::from_secs(self.spec.config.startup_timeout_s),
            step_timeout: Duration::from_secs(self.spec.config.step_timeout_s),
        };
        // Whoever coordinated before may have left ranks training.
        let left = phase == Phase::Running;
        let (machine, effects) = if left {
            (Machine::take_over(settings, generation, Instant::now()), Vec::new())
        } else {
            Machine::start(settings, generation, Instant::now())
        };
        let (ended, mut ends) = mpsc::unbounded_channel();
        let (looking, mut found) = mpsc::channel(16);
        // Ends with this coordinator.
        let _watch =
            AbortOnDropHandle::new(tokio::spawn(orders::watch(self.run.clone(), lease.clone(), seen, looking)));
        let mut desk = Desk {
            machine,
            recorder: Recorder::new(&self.run, lease.clone()),
            errands: Errands::new(Arc::clone(&self.launcher), lease.clone(), url, ended.clone()),
            lease,
            commit,
            nodes: BTreeMap::new(),
            ranks: BTreeMap::new(),
            parts: BTreeMap::new(),
            forming: None,
            writing: false,
            looking: 0,
            to_write: VecDeque::new(),
            asking: Vec::new(),
            inputs,
            owner: &self,
        };
        if let Some(outcome) = desk.carry_out(effects)? {
            return desk.close(outcome).await;
        }
        for event in if left { desk.inherited(ended) } else { Vec::new() } {
            let effects = desk.machine.handle(Instant::now(), event);
            if let Some(outcome) = desk.carry_out(effects)? {
                return desk.close(outcome).await;
            }
        }
        let mut tick = tokio::time::interval(TICK);
        let mut asked = false;
        loop {
            let event = tokio::select! {
                Some(input) = received.recv() => match desk.take(input)? {
                    Some(event) => event,
                    None => continue,
                },
                Some(found) = found.recv() => match found {
                    Notice::Order(seq, order) => match desk.obey(seq, order) {
                        Some(event) => event,
                        None => continue,
                    },
                    Notice::Stale(error) => return Err(error.into()),
                },
                Some(Ended { slot, attempt, code }) = ends.recv() => Event::LaunchEnded { slot, attempt, code },
                // Whoever waits for a commit waits for the storage, not for a rank that hangs.
                _ = tick.tick() => if desk.writing || desk.looking > 0 {
                    Event::Progress { generation: desk.machine.generation(), step: 0 }
                } else {
                    Event::Tick
                },
                error = desk.recorder.refused() => return Err(error),
                error = desk.errands.failed() => return Err(error),
                () = self.stop.cancelled(), if !asked => { asked = true; Event::StopRequested }
                () = self.kill.cancelled() => {
                    // None is started behind this.
                    drop(desk.errands);
                    self.launcher.kill_all();
                    let reason = "stopped at once on request".to_owned();
                    desk.recorder.record(EventKind::Suspended { reason: reason.clone() });
                    if tokio::time::timeout(LAST_WORDS, desk.recorder.finish()).await.is_err() {
                        tracing::warn!("the storage does not answer: the bucket does not say that the run was stopped");
                    }
                    return Ok(Outcome::Suspended { reason });
                }
            };
            let effects = desk.machine.handle(Instant::now(), event);
            if let Some(outcome) = desk.carry_out(effects)? {
                return desk.close(outcome).await;
            }
        }
    }
}

/// A number as spans take it.
fn count(number: impl Into<u64>) -> sgcl_telemetry::Value {
    i64::try_from(number.into()).unwrap_or(i64::MAX).into()
}

/// Who this is, for people: host and process.
fn holder() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("process {} on {}", std::process::id(), host.trim())
}

/// Everything the owning task holds beside the machine.
struct Desk<'a, L> {
    owner: &'a Coordinator<L>,
    machine: Machine,
    lease: Lease,
    commit: Option<Commit>,
    nodes: BTreeMap<String, Line<NodeOrder>>,
    ranks: BTreeMap<Place, mpsc::UnboundedSender<Result<RankOrder, Status>>>,
    /// Parts of checkpoints under way, by generation and step.
    parts: BTreeMap<(u64, u64), BTreeMap<Place, v1::PartsWritten>>,
    /// Generation whose ranks find each other, and since when.
    forming: Option<(u64, Instant)>,
    /// A commit is being written: what is newest is not known before it ends.
    writing: bool,
    /// Looks for the newest commit under way: none is written before they end.
    looking: usize,
    /// Commits that wait for that.
    to_write: VecDeque<(u64, u64, Vec<v1::PartsWritten>)>,
    /// Who waits to hear which commit is newest.
    asking: Vec<Place>,
    inputs: mpsc::Sender<Input>,
    errands: Errands,
    recorder: Recorder,
}

impl<L: Launcher> Desk<'_, L> {
    /// What an earlier coordinator has left: nodes that live, and a commit that ranks may still wait to hear of.
    fn inherited(&self, ended: mpsc::UnboundedSender<Ended>) -> Vec<Event> {
        let nodes = self.owner.launcher.adopt(ended).into_iter();
        let commit = self.commit.iter().map(|made| {
            let Progress { generation, step, .. } = made.progress;
            Event::Committed { generation, seq: made.seq, step }
        });
        nodes.map(|(slot, attempt)| Event::Launched { slot, attempt }).chain(commit).collect()
    }

    /// The end, once the bucket tells of it.
    async fn close(self, outcome: Outcome) -> Result<Outcome> {
        tokio::select! {
            recorded = self.recorder.finish() => match recorded {
                // Why it failed is worth more than that the bucket cannot be told; a run that is another's has not failed.
                Err(error) if matches!(outcome, Outcome::Failed { .. }) && !is_stale(&error) => {
                    tracing::warn!("the bucket does not say that the run failed: {error:#}");
                    Ok(outcome)
                }
                recorded => recorded.map(|()| outcome),
            },
            () = self.owner.kill.cancelled() => Ok(outcome),
        }
    }

    /// Keeps what the machine does not need, hands on what it does.
    ///
    /// # Errors
    /// A commit shows that this coordinator is stale.
    fn take(&mut self, input: Input) -> Result<Option<Event>> {
        Ok(match input {
            Input::Event(event) => Some(event),
            Input::NodeGone(node, number) => {
                if self.nodes.get(&node).is_none_or(|line| line.number != number) {
                    return Ok(None);
                }
                self.nodes.remove(&node);
                let nodes = self.nodes.len() as u32;
                self.owner.view.send_modify(|view| view.nodes = nodes);
                Some(Event::NodeLost { node })
            }
            Input::Node { node, slot, address, ranks, line } => {
                if self.machine.address(&node).is_some_and(|known| known != address) {
                    // A Job that its queue took back and let go again at once has two pods: the first still hands over what it holds.
                    let reason = format!("slot {slot} of this run is filled by another node");
                    let leave = node_order::Order::Leave(v1::Leave { reason, exit_code: YIELDED });
                    let _ = line.orders.send(Ok(NodeOrder { order: Some(leave) }));
                    return Ok(None);
                }
                self.nodes.insert(node.clone(), line);
                let nodes = self.nodes.len() as u32;
                self.owner.view.send_modify(|view| view.nodes = nodes);
                Some(Event::NodeJoined { node, slot, address, ranks })
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
                // One rank that waits for the storage holds all up.
                let waits = progress.phase == WAITING_FOR_STORAGE;
                if waits || self.machine.first_place() != Some(&place) {
                    self.owner.view.send_if_modified(|view| {
                        waits && view.phase != progress.phase && {
                            view.phase = progress.phase;
                            true
                        }
                    });
                    return Ok(None);
                }
                self.owner.view.send_modify(|view| {
                    view.phase = progress.phase;
                    view.epoch = progress.epoch;
                    view.epoch_step = progress.epoch_step;
                    view.epoch_steps = progress.epoch_steps;
                    view.step = progress.step;
                    // A probe's figures stand until the next one's, and it has no pace.
                    view.metrics.extend(progress.metrics);
                    if progress.samples_per_second > 0.0 {
                        view.samples_per_second = progress.samples_per_second;
                    }
                });
                None
            }
            Input::Parts { generation, place, parts } => {
                if generation != self.machine.generation() {
                    return Ok(None);
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
            Input::Found(place, result) => {
                self.looking -= 1;
                match result {
                    Ok(commit) => {
                        let seq = commit.as_ref().map(|commit| commit.seq);
                        self.commit = commit;
                        self.tell(&place, rank_order::Order::Newest(v1::Newest { commit: seq }));
                        self.write_next();
                        None
                    }
                    Err(error) => Some(Event::CommitFailed { reason: format!("no commit to go back to: {error:#}") }),
                }
            }
            Input::Committed { generation, step, result } => {
                self.writing = false;
                match result {
                    Ok(commit) => {
                        let seq = commit.seq;
                        self.commit = Some(commit);
                        self.owner.view.send_modify(|view| view.last_commit = Some(seq));
                        self.write_next();
                        Some(Event::Committed { generation, seq, step })
                    }
                    Err(error) if is_stale(&error) => return Err(error),
                    Err(error) => Some(Event::CommitFailed { reason: format!("the commit failed: {error:#}") }),
                }
            }
        })
    }

    /// Answers an order in the run's events, where whoever gave it looks.
    fn obey(&mut self, seq: u64, what: Order) -> Option<Event> {
        let (event, refused) = match &what {
            Order::Suspend => (Some(Event::StopRequested), None),
            Order::Cancel => (Some(Event::CancelRequested), None),
            Order::Drain { node } => match self.node(node) {
                Some(node) => (Some(Event::Preempting { node, deadline: DRAIN }), None),
                None => {
                    let names: Vec<&str> = self.nodes.keys().map(String::as_str).collect();
                    (None, Some(format!("there is no node {node}; the run has {}", names.join(", "))))
                }
            },
        };
        self.recorder.record(EventKind::Ordered { seq, what, refused });
        event
    }

    /// A node by its name, or by its slot.
    fn node(&self, name: &str) -> Option<String> {
        let slot = format!("{}-{name}-", self.owner.spec.run);
        self.nodes.keys().find(|node| *node == name || node.starts_with(&slot)).cloned()
    }

    /// Looks the newest intact commit up for those who ask, once none is being written or waits for that.
    fn answer(&mut self) {
        if self.writing || !self.to_write.is_empty() {
            return;
        }
        for place in self.asking.drain(..) {
            self.looking += 1;
            let (run, inputs) = (self.owner.run.clone(), self.inputs.clone());
            tokio::spawn(async move {
                let found = newest(&run).await;
                // The receiver is gone when the run has ended: nobody is left to tell.
                let _ = inputs.send(Input::Found(place, found)).await;
            });
        }
    }

    fn carry_out(&mut self, effects: Vec<Effect>) -> Result<Option<Outcome>> {
        for effect in effects {
            tracing::debug!(?effect, "decided");
            match effect {
                Effect::Launch { slot, attempt } => {
                    self.errands.launch(slot, attempt);
                }
                Effect::Discard { slot, attempt } => self.errands.discard(slot, attempt),
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
                    if self.forming.is_none_or(|(of, _)| of != generation) {
                        self.forming = Some((generation, Instant::now()));
                    }
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
                    if let Some((_, since)) = self.forming.take() {
                        let told = [("generation", count(generation)), ("world", count(world))];
                        sgcl_telemetry::elapsed("rendezvous", since.elapsed(), &told);
                    }
                    self.recorder.record(EventKind::Started { world, from_commit });
                }
                Effect::Found { generation, world } => {
                    tracing::info!(generation, world, "took over a generation that trains");
                    self.owner.view.send_modify(|view| {
                        view.generation = generation;
                        view.ranks = world;
                    });
                }
                Effect::Regrouped(change) => self.regrouped(change),
                Effect::Note { message } => {
                    tracing::warn!("{message}");
                    self.owner.view.send_modify(|view| view.message = Some(message));
                }
                Effect::End(outcome) => {
                    self.recorder.record(match outcome.clone() {
                        Outcome::Finished => EventKind::Finished,
                        Outcome::Suspended { reason } => EventKind::Suspended { reason },
                        Outcome::Failed { message, .. } => EventKind::Failed { message },
                        Outcome::Cancelled => EventKind::Cancelled,
                    });
                    return Ok(Some(outcome));
                }
            }
        }
        Ok(None)
    }

    fn regrouped(&self, change: Change) {
        tracing::warn!(
            run = %self.owner.spec.run,
            generation = self.machine.generation(),
            world = change.world,
            seconds = change.took.as_secs_f64(),
            steps_lost = change.steps_lost,
            "training goes on: {}",
            change.reason
        );
        let told = [
            ("reason", change.reason.clone().into()),
            ("failure", change.failure.into()),
            ("world", count(change.world)),
            ("steps_lost", count(change.steps_lost)),
        ];
        sgcl_telemetry::elapsed("regroup", change.took, &told);
        self.owner.view.send_modify(|view| {
            view.restarts += u32::from(change.failure);
            view.message = Some(change.reason.clone());
            view.changes.push(change.clone());
        });
        let Change { reason, failure, world_before, world, took, steps_lost, from_commit, .. } = change;
        let seconds = took.as_secs_f64();
        let kind = EventKind::Regrouped { reason, failure, world_before, world, seconds, steps_lost, from_commit };
        self.recorder.record(kind);
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

    /// Writes the commit of `step`, after those under way.
    fn write_commit(&mut self, generation: u64, step: u64) {
        let written = self.parts.remove(&(generation, step)).unwrap_or_default();
        self.to_write.push_back((generation, step, written.into_values().collect()));
        self.write_next();
    }

    /// Writes a commit beside the event loop, and retires old ones behind it. One at a time: each follows the one before. Whoever waits to
    /// hear of the newest is answered when none is left to write; and none is written while it is looked for, since what is found would
    /// then be older than what was made.
    fn write_next(&mut self) {
        if self.writing || self.looking > 0 {
            return;
        }
        let Some((generation, step, written)) = self.to_write.pop_front() else { return self.answer() };
        let parent = self.commit.clone();
        let run = self.owner.run.clone();
        let lease = self.lease.clone();
        let keep = self.owner.spec.config.checkpoint.clone();
        let inputs = self.inputs.clone();
        self.writing = true;
        let span = info_span!("commit", generation, step);
        let work = async move {
            let began = Instant::now();
            let result = async {
                let progress = assemble(written)?;
                let commits = Commits::new(&run);
                let commit = follow(&commits, &lease, parent, progress).await?;
                if let Err(error) = Commits::new(&run.impatient()).retain(&keep).await {
                    tracing::warn!(%error, "old commits were not removed; the next commit tries again");
                }
                Ok(commit)
            }
            .await;
            match &result {
                Ok(_) => COMMIT_SECONDS.add(began.elapsed()),
                Err(_) => COMMIT_FAILURES.add(1),
            }
            // The receiver is gone when the run has ended: nobody is left to tell.
            let _ = inputs.send(Input::Committed { generation, step, result }).await;
        };
        tokio::spawn(work.instrument(span));
    }
}
