//! A node's supervisor: joins the coordinator, starts and ends rank processes, tells how they ended. No torch is called here.

use std::collections::{BTreeMap, VecDeque};
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use nix::sys::signal::Signal;
use sgcl_proto::exit;
use sgcl_proto::v1::{self, NodeEvent, node_event, node_order};
use sgcl_telemetry::fact;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal as SignalStream, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status};
use tracing::Instrument as _;

use crate::dial::{AGAIN, Dial, GIVE_UP};
use crate::measures::Report;
use crate::metrics::NodeMetrics;

/// Time from a node's SIGTERM to its end: some clouds give 15 s.
const DEADLINE: Duration = Duration::from_secs(10);
/// What is kept of it to end the ranks.
const MARGIN: Duration = Duration::from_secs(1);
/// Lines of a rank's standard error that go into its report.
const LAST_WORDS: usize = 20;
/// Characters of each: libtorch's errors carry stacks.
const LAST_WORD_CHARS: usize = 300;

/// Arguments of `sgcl-worker node`.
#[derive(Args, Debug)]
pub(crate) struct NodeArgs {
    /// URL of the coordinator
    #[arg(long)]
    coordinator: String,
    /// Name of the run
    #[arg(long)]
    run: String,
    /// Name of this node, unique in the run
    #[arg(long)]
    node: String,
    /// Place of the run that this node fills, from 0
    #[arg(long)]
    slot: u32,
    /// Ranks that this node holds
    #[arg(long)]
    ranks: u32,
    /// Address at which other nodes' ranks reach this node's
    #[arg(long)]
    address: String,
    /// Computing threads of a rank [default: the cores shared out]
    #[arg(long)]
    threads: Option<usize>,
    /// Answer Prometheus at /metrics on this port [default: nobody is answered]
    #[arg(long, env = "SGCL_METRICS_PORT", value_name = "PORT")]
    metrics_port: Option<u16>,
    /// End when the process that started this one ends
    #[arg(long)]
    die_with_parent: bool,
}

/// How a rank process ended.
struct Ended {
    local_rank: u32,
    attempt: u32,
    status: std::io::Result<ExitStatus>,
    last_words: String,
}

/// Supervises until the coordinator sends this node home.
///
/// # Errors
/// The coordinator cannot be reached or goes away.
pub(crate) async fn main(args: &NodeArgs) -> Result<ExitCode> {
    fact("run", args.run.clone());
    fact("node", args.node.clone());
    let span = tracing::info_span!("node", run = args.run, node = args.node, slot = args.slot);
    sgcl_telemetry::begin(&span);
    supervise(args).instrument(span).await
}

async fn supervise(args: &NodeArgs) -> Result<ExitCode> {
    if args.die_with_parent {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("cannot ask to end with the parent")?;
    }
    let dial = Dial::new(&args.coordinator)?;
    let metrics = NodeMetrics::default();
    if let Some(port) = args.metrics_port {
        // Another node on this machine may have the port: training does not need it.
        if let Err(error) = metrics.serve(port, &args.run, &args.node).await {
            tracing::warn!("{error:#}");
        }
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let (ranks, alive) = (JoinSet::new(), BTreeMap::new());
    let mut node = Node { args, metrics: metrics.clone(), ranks, alive, unsaid: Vec::new(), deadline: None };
    let mut silent = Instant::now();
    let code = loop {
        let mut heard = false;
        match node.speak(&dial, &mut terminate, &mut heard).await {
            Ok(code) => break code,
            Err(status) if matches!(status.code(), Code::PermissionDenied | Code::InvalidArgument) => {
                return Err(anyhow!("the coordinator at {} refused this node: {}", args.coordinator, status.message()));
            }
            Err(status) => {
                metrics.connected(false);
                silent = if heard { Instant::now() } else { silent };
                if silent.elapsed() > GIVE_UP {
                    return Err(anyhow!("no coordinator answers at {}: {}", args.coordinator, status.message()));
                }
                if heard {
                    tracing::warn!(%status, "the line to the coordinator broke; ranks go on, and it is made anew");
                }
            }
        }
        tokio::time::sleep(AGAIN).await;
    };
    node.alive.values().for_each(CancellationToken::cancel);
    while node.ranks.join_next().await.is_some() {}
    Ok(ExitCode::from(code))
}

/// A node: its rank processes, and what the coordinator has yet to hear of them.
struct Node<'a> {
    args: &'a NodeArgs,
    metrics: NodeMetrics,
    ranks: JoinSet<Ended>,
    /// Cancelled to kill; by place and attempt.
    alive: BTreeMap<(u32, u32), CancellationToken>,
    unsaid: Vec<node_event::Event>,
    /// When this node is gone, once it was told to leave.
    deadline: Option<Instant>,
}

impl Node<'_> {
    /// One stream, until it breaks (an error) or this node is to end with a code.
    async fn speak(&mut self, dial: &Dial, terminate: &mut SignalStream, heard: &mut bool) -> Result<u8, Status> {
        let args = self.args;
        let (events, out) = mpsc::unbounded_channel();
        let tell = |event| {
            // A stream that broke shows below, where orders are read.
            let _ = events.send(NodeEvent { event: Some(event) });
        };
        let live = |&(local_rank, attempt): &(u32, u32)| v1::LiveRank { local_rank, attempt };
        tell(node_event::Event::Hello(v1::NodeHello {
            run: args.run.clone(),
            node: args.node.clone(),
            address: args.address.clone(),
            devices: args.ranks,
            version: env!("CARGO_PKG_VERSION").into(),
            slot: args.slot,
            ranks: self.alive.keys().map(live).collect(),
        }));
        if self.deadline.is_some() {
            tell(preempting());
        }
        let mut client = dial.client();
        let mut opening = std::pin::pin!(client.join(UnboundedReceiverStream::new(out)));
        let mut orders = tokio::select! {
            stream = &mut opening => stream?.into_inner(),
            _ = terminate.recv() => return Ok(exit::YIELDED),
        };
        self.metrics.connected(true);
        // A line that never stood would take them along.
        self.unsaid.drain(..).for_each(tell);
        loop {
            tokio::select! {
                order = orders.message() => {
                    let order = order?.ok_or_else(|| Status::unavailable("the coordinator closed the line"))?.order;
                    *heard = true;
                    match order {
                        Some(node_order::Order::Start(v1::StartRank { local_rank, attempt })) => {
                            let child = spawn(args, local_rank, attempt).map_err(|e| Status::internal(format!("{e:#}")))?;
                            let kill = CancellationToken::new();
                            self.alive.insert((local_rank, attempt), kill.clone());
                            self.metrics.running(self.alive.len());
                            self.ranks.spawn(watch(child, kill, local_rank, attempt, self.metrics.clone()));
                        }
                        Some(node_order::Order::Kill(v1::KillRank { local_rank, attempt })) => {
                            self.alive.get(&(local_rank, attempt)).into_iter().for_each(CancellationToken::cancel);
                        }
                        Some(node_order::Order::Leave(leave)) => {
                            tracing::info!(reason = leave.reason, "leaving");
                            return Ok(u8::try_from(leave.exit_code).unwrap_or(exit::INTERNAL));
                        }
                        None => {}
                    }
                }
                Some(ended) = self.ranks.join_next() => {
                    let ended = ended.map_err(|e| Status::internal(format!("the watch over a rank failed: {e}")))?;
                    self.alive.remove(&(ended.local_rank, ended.attempt));
                    self.metrics.running(self.alive.len());
                    let exited = report(ended);
                    self.metrics.exited(exited.local_rank, exited.code);
                    let report = node_event::Event::Exited(exited);
                    if events.is_closed() {
                        self.unsaid.push(report);
                    } else {
                        tell(report);
                    }
                }
                _ = terminate.recv(), if self.deadline.is_none() => {
                    tracing::info!("told to leave");
                    self.metrics.preempting();
                    self.deadline = Some(Instant::now() + DEADLINE - MARGIN);
                    tell(preempting());
                }
                () = tokio::time::sleep_until(self.deadline.unwrap_or_else(Instant::now)), if self.deadline.is_some() => {
                    tracing::warn!("the coordinator did not let this node go in time");
                    return Ok(exit::YIELDED);
                }
            }
        }
    }
}

fn preempting() -> node_event::Event {
    let deadline_s = u32::try_from(DEADLINE.as_secs()).unwrap_or(u32::MAX);
    node_event::Event::Preempting(v1::Preempting { deadline_s })
}

fn spawn(args: &NodeArgs, local_rank: u32, attempt: u32) -> Result<Child> {
    let program = std::env::current_exe().context("cannot find this program to start ranks")?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or(cores / args.ranks.max(1) as usize).max(1);
    Command::new(&program)
        .args(["rank", "--coordinator", &args.coordinator, "--run", &args.run, "--node", &args.node])
        .args(["--local-rank", &local_rank.to_string(), "--attempt", &attempt.to_string()])
        .args(["--address", &args.address])
        .args(args.metrics_port.map(|_| "--measures"))
        .env("OMP_NUM_THREADS", threads.to_string())
        .envs(sgcl_telemetry::current().map(|here| (sgcl_telemetry::VARIABLE, here.to_string())))
        // libtorch's warnings speak to its own developers.
        .env("TORCH_CPP_LOG_LEVEL", std::env::var_os("TORCH_CPP_LOG_LEVEL").unwrap_or_else(|| "ERROR".into()))
        .stdin(Stdio::null())
        .stdout(if args.metrics_port.is_some() { Stdio::piped() } else { Stdio::null() })
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))
}

/// Waits for a rank's end; its standard error goes on to ours, the last of it into the report.
async fn watch(
    mut child: Child,
    kill: CancellationToken,
    local_rank: u32,
    attempt: u32,
    metrics: NodeMetrics,
) -> Ended {
    let measures =
        child.stdout.take().map(|out| AbortOnDropHandle::new(tokio::spawn(listen(out, local_rank, metrics))));
    let words = match child.stderr.take() {
        Some(stderr) => tokio::spawn(last_words(stderr)),
        None => tokio::spawn(async { String::new() }),
    };
    let status = tokio::select! {
        status = child.wait() => status,
        () = kill.cancelled() => {
            // A rank that is gone already needs no killing.
            let _ = child.start_kill();
            child.wait().await
        }
    };
    if let Some(measures) = measures {
        // What it has not read tells of a rank that is gone.
        measures.abort();
        let _ = measures.await;
    }
    Ended { local_rank, attempt, status, last_words: words.await.unwrap_or_default() }
}

/// Takes a rank's reports. What else comes on its standard output is a library's, NCCL's log for one.
async fn listen(out: impl AsyncRead + Unpin, local_rank: u32, metrics: NodeMetrics) {
    let mut lines = BufReader::new(out).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match Report::read(&line) {
            Some(report) => metrics.told(local_rank, report),
            None => tracing::info!(target: "rank", "{line}"),
        }
    }
}

async fn last_words(stderr: impl AsyncRead + Unpin) -> String {
    let mut last = VecDeque::with_capacity(LAST_WORDS);
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        tracing::info!(target: "rank", "{line}");
        if last.len() == LAST_WORDS {
            last.pop_front();
        }
        last.push_back(sgcl_telemetry::plain(&line).chars().take(LAST_WORD_CHARS).collect::<String>());
    }
    Vec::from(last).join("\n")
}

fn report(ended: Ended) -> v1::RankExited {
    use std::os::unix::process::ExitStatusExt;
    let code = match &ended.status {
        Ok(status) => status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(exit::INTERNAL.into()),
        Err(_) => exit::INTERNAL.into(),
    };
    v1::RankExited { local_rank: ended.local_rank, attempt: ended.attempt, code, last_words: ended.last_words }
}
