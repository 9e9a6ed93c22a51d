//! A node's supervisor: joins the coordinator, starts and ends rank processes, tells how they ended. No torch is called here.

use std::collections::VecDeque;
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sgcl_proto::exit;
use sgcl_proto::v1::coordinator_client::CoordinatorClient;
use sgcl_proto::v1::{self, NodeEvent, node_event, node_order};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnboundedReceiverStream;

/// Time between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(5);
/// Lines of a rank's standard error that go into its report.
const LAST_WORDS: usize = 20;

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
    /// Ranks that this node holds
    #[arg(long)]
    ranks: u32,
    /// Address at which other nodes' ranks reach this node's
    #[arg(long)]
    address: String,
    /// Computing threads of a rank [default: the cores shared out]
    #[arg(long)]
    threads: Option<usize>,
    /// End when the process that started this one ends
    #[arg(long)]
    die_with_parent: bool,
}

/// How a rank process ended.
struct Ended {
    generation: u64,
    local_rank: u32,
    status: std::io::Result<ExitStatus>,
    last_words: String,
}

/// Supervises until the coordinator sends this node home.
///
/// # Errors
/// The coordinator cannot be reached or goes away.
pub(crate) async fn main(args: &NodeArgs) -> Result<ExitCode> {
    if args.die_with_parent {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("cannot ask to end with the parent")?;
    }
    let (events, out) = mpsc::unbounded_channel();
    let tell = |event| {
        // A stream that broke shows below, where orders are read.
        let _ = events.send(NodeEvent { event: Some(event) });
    };
    tell(node_event::Event::Hello(v1::NodeHello {
        run: args.run.clone(),
        node: args.node.clone(),
        address: args.address.clone(),
        devices: args.ranks,
        version: env!("CARGO_PKG_VERSION").into(),
    }));
    let mut client = CoordinatorClient::connect(args.coordinator.clone())
        .await
        .with_context(|| format!("cannot reach the coordinator at {}", args.coordinator))?;
    let stream = client.join(UnboundedReceiverStream::new(out)).await.context("the coordinator refused this node")?;
    let mut orders = stream.into_inner();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut ranks = JoinSet::new();
    let mut pids: Vec<Pid> = Vec::new();
    loop {
        tokio::select! {
            order = orders.message() => match order.context("the line to the coordinator broke")?.and_then(|o| o.order) {
                Some(node_order::Order::Start(start)) => {
                    pids.clear();
                    for local_rank in 0..start.count {
                        let child = spawn(args, start.generation, local_rank, start.count)?;
                        pids.extend(child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw));
                        ranks.spawn(watch(child, start.generation, local_rank));
                    }
                }
                Some(node_order::Order::Stop(_)) => end(&pids),
                Some(node_order::Order::Leave(leave)) => {
                    tracing::info!(reason = leave.reason, "leaving");
                    end(&pids);
                    while ranks.join_next().await.is_some() {}
                    return Ok(ExitCode::from(u8::try_from(leave.exit_code).unwrap_or(exit::INTERNAL)));
                }
                None => return Err(anyhow!("the coordinator closed the line")),
            },
            Some(ended) = ranks.join_next() => {
                let ended = ended.context("the watch over a rank failed")?;
                tell(node_event::Event::Exited(report(ended)));
            }
            _ = terminate.recv() => {
                tell(node_event::Event::Preempting(v1::Preempting { deadline_s: 10 }));
                end(&pids);
                while ranks.join_next().await.is_some() {}
                return Ok(ExitCode::from(exit::YIELDED));
            }
        }
    }
}

fn spawn(args: &NodeArgs, generation: u64, local_rank: u32, count: u32) -> Result<Child> {
    let program = std::env::current_exe().context("cannot find this program to start ranks")?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args.threads.unwrap_or(cores / count.max(1) as usize).max(1);
    Command::new(&program)
        .args(["rank", "--coordinator", &args.coordinator, "--run", &args.run, "--node", &args.node])
        .args(["--local-rank", &local_rank.to_string(), "--generation", &generation.to_string()])
        .args(["--address", &args.address])
        .env("OMP_NUM_THREADS", threads.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))
}

/// Waits for a rank's end; its standard error goes on to ours, the last of it into the report.
async fn watch(mut child: Child, generation: u64, local_rank: u32) -> Ended {
    let words = match child.stderr.take() {
        Some(stderr) => tokio::spawn(last_words(stderr)),
        None => tokio::spawn(async { String::new() }),
    };
    let status = child.wait().await;
    Ended { generation, local_rank, status, last_words: words.await.unwrap_or_default() }
}

async fn last_words(stderr: impl AsyncRead + Unpin) -> String {
    let mut last = VecDeque::with_capacity(LAST_WORDS);
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        tracing::info!(target: "rank", "{line}");
        if last.len() == LAST_WORDS {
            last.pop_front();
        }
        last.push_back(line);
    }
    Vec::from(last).join("\n")
}

fn report(ended: Ended) -> v1::RankExited {
    use std::os::unix::process::ExitStatusExt;
    let code = match &ended.status {
        Ok(status) => status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(exit::INTERNAL.into()),
        Err(_) => exit::INTERNAL.into(),
    };
    v1::RankExited { generation: ended.generation, local_rank: ended.local_rank, code, last_words: ended.last_words }
}

/// SIGTERM now, SIGKILL after the grace; ranks that are gone already are no error.
fn end(pids: &[Pid]) {
    let pids = pids.to_vec();
    for pid in &pids {
        let _ = kill(*pid, Signal::SIGTERM);
    }
    tokio::spawn(async move {
        tokio::time::sleep(GRACE).await;
        for pid in pids {
            let _ = kill(pid, Signal::SIGKILL);
        }
    });
}
