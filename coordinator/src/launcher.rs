//! Starting and ending nodes. Locally a node is a process, on Kubernetes a Job. [`Errands`] sees to it that a coordinator which was replaced
//! starts and ends none.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sgcl_runstore::Lease;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

/// Between two looks at nodes that are to end.
const LOOK: Duration = Duration::from_millis(10);

/// What was started for a slot has ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// Which slot.
    pub slot: u32,
    /// Which attempt at it.
    pub attempt: u32,
    /// Exit code, or 128 + signal.
    pub code: i32,
}

/// Starts and ends nodes.
pub trait Launcher: Send + Sync + 'static {
    /// Starts a node in `slot`; it will join at `coordinator`, an http URL. Its end is told to `ended`.
    ///
    /// # Errors
    /// What kept it from starting.
    fn launch(
        &self,
        slot: u32,
        attempt: u32,
        coordinator: &str,
        ended: mpsc::UnboundedSender<Ended>,
    ) -> std::io::Result<()>;

    /// Slot and attempt of every node that an earlier coordinator started and that has not ended. From here on their ends are told to `ended`.
    fn adopt(&self, ended: mpsc::UnboundedSender<Ended>) -> Vec<(u32, u32)>;

    /// Ends a node that was given up, at once; one that is gone already is no error.
    fn discard(&self, slot: u32, attempt: u32);

    /// Ends every node that is left, at once.
    fn kill_all(&self);
}

/// What is to be done about a node.
#[derive(Clone, Copy, Debug)]
enum Errand {
    Launch { slot: u32, attempt: u32 },
    Discard { slot: u32, attempt: u32 },
}

/// Launches and discards, one after the other, each only once its coordinator is known to be the newest still: one that was paused, or cut
/// off, and wakes up misses nodes that have long gone over to another, and must not end them.
pub(crate) struct Errands {
    queue: mpsc::UnboundedSender<Errand>,
    runner: AbortOnDropHandle<anyhow::Error>,
}

impl Errands {
    /// For nodes that join at `coordinator`, a URL.
    pub(crate) fn new<L: Launcher>(
        launcher: Arc<L>,
        lease: Lease,
        coordinator: String,
        ended: mpsc::UnboundedSender<Ended>,
    ) -> Self {
        let (queue, mut errands) = mpsc::unbounded_channel();
        let run = async move {
            let mut due = Vec::new();
            while errands.recv_many(&mut due, usize::MAX).await > 0 {
                lease.check().await?;
                for errand in due.drain(..) {
                    match errand {
                        Errand::Launch { slot, attempt } => {
                            launcher.launch(slot, attempt, &coordinator, ended.clone())?;
                        }
                        Errand::Discard { slot, attempt } => launcher.discard(slot, attempt),
                    }
                }
            }
            Ok(())
        };
        let run = async move {
            let result: anyhow::Result<()> = run.await;
            result.err().unwrap_or_else(|| anyhow::anyhow!("nobody sends errands any more"))
        };
        Self { queue, runner: AbortOnDropHandle::new(tokio::spawn(run.in_current_span())) }
    }

    pub(crate) fn launch(&self, slot: u32, attempt: u32) {
        // Where the runner has ended, `failed` tells why.
        let _ = self.queue.send(Errand::Launch { slot, attempt });
    }

    pub(crate) fn discard(&self, slot: u32, attempt: u32) {
        let _ = self.queue.send(Errand::Discard { slot, attempt });
    }

    /// Resolves when a node cannot be started, or another coordinator has the lease.
    pub(crate) async fn failed(&mut self) -> anyhow::Error {
        (&mut self.runner).await.unwrap_or_else(Into::into)
    }
}

/// Nodes as processes on this machine.
pub struct ProcessLauncher {
    program: PathBuf,
    run: String,
    ranks_per_node: u32,
    threads: usize,
    environment: Vec<(String, String)>,
    children: Arc<Mutex<Children>>,
}

/// Processes that have not ended.
#[derive(Default)]
struct Children {
    /// By slot and attempt; cancelled to kill.
    alive: BTreeMap<(u32, u32), CancellationToken>,
    /// Whom their ends are told: the newest coordinator.
    ended: Option<mpsc::UnboundedSender<Ended>>,
}

impl ProcessLauncher {
    /// Nodes of `run` from the program `sgcl-worker`, `nodes` of them on this machine: they share its cores.
    #[must_use]
    pub fn new(program: PathBuf, run: String, nodes: u32, ranks_per_node: u32) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores / (nodes * ranks_per_node).max(1) as usize).max(1);
        Self { program, run, ranks_per_node, threads, environment: Vec::new(), children: Arc::default() }
    }

    /// Computing threads of a rank, in place of an equal share of the cores. Results depend on it in the last bits.
    #[must_use]
    pub fn with_threads(self, threads: usize) -> Self {
        Self { threads, ..self }
    }

    /// Waits until every node has ended, at most so long: one that was sent home may have something to write yet.
    pub async fn ended(&self, at_most: Duration) {
        let none = || self.children.lock().map_or(true, |children| children.alive.is_empty());
        let all = async {
            while !none() {
                tokio::time::sleep(LOOK).await;
            }
        };
        // Whoever is left then goes with this process.
        let _ = tokio::time::timeout(at_most, all).await;
    }

    /// Variables that nodes see beside this process's own.
    #[must_use]
    pub fn with_environment(self, environment: Vec<(String, String)>) -> Self {
        Self { environment, ..self }
    }
}

impl Launcher for ProcessLauncher {
    fn launch(
        &self,
        slot: u32,
        attempt: u32,
        coordinator: &str,
        ended: mpsc::UnboundedSender<Ended>,
    ) -> std::io::Result<()> {
        let node = format!("{}-{slot}-{attempt}", self.run);
        let mut child = Command::new(&self.program)
            .args(["node", "--coordinator", coordinator, "--run", &self.run, "--node", &node])
            .args(["--slot", &slot.to_string(), "--ranks", &self.ranks_per_node.to_string()])
            .args(["--address", "127.0.0.1", "--die-with-parent", "--threads", &self.threads.to_string()])
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .envs(sgcl_telemetry::current().map(|here| (sgcl_telemetry::VARIABLE, here.to_string())))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // The terminal's Ctrl-C is for sgclctl, which stops the run in good order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| std::io::Error::new(e.kind(), format!("{}: {e}", self.program.display())))?;
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(async move {
                let mut lines = BufReader::new(stderr).lines();
                while let Ok(Some(line)) = lines.next_line().await {
                    tracing::info!(target: "node", node, "{line}");
                }
            });
        }
        let kill = CancellationToken::new();
        if let Ok(mut children) = self.children.lock() {
            children.alive.insert((slot, attempt), kill.clone());
            children.ended = Some(ended);
        }
        let children = Arc::clone(&self.children);
        tokio::spawn(async move {
            let status = tokio::select! {
                status = child.wait() => status,
                () = kill.cancelled() => {
                    // One that is gone already needs no killing.
                    let _ = child.start_kill();
                    child.wait().await
                }
            };
            use std::os::unix::process::ExitStatusExt;
            let code = status.ok().and_then(|status| status.code().or(status.signal().map(|s| 128 + s))).unwrap_or(1);
            if let Ok(mut children) = children.lock() {
                children.alive.remove(&(slot, attempt));
                // The run may be over, or between two coordinators: then nobody asks.
                let _ = children.ended.as_ref().map(|ended| ended.send(Ended { slot, attempt, code }));
            }
        });
        Ok(())
    }

    fn adopt(&self, ended: mpsc::UnboundedSender<Ended>) -> Vec<(u32, u32)> {
        let Ok(mut children) = self.children.lock() else { return Vec::new() };
        children.ended = Some(ended);
        children.alive.keys().copied().collect()
    }

    fn discard(&self, slot: u32, attempt: u32) {
        if let Ok(children) = self.children.lock() {
            children.alive.get(&(slot, attempt)).into_iter().for_each(CancellationToken::cancel);
        }
    }

    fn kill_all(&self) {
        if let Ok(children) = self.children.lock() {
            children.alive.values().for_each(CancellationToken::cancel);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use sgcl_patchset::Store;
    use sgcl_runstore::RunStoreError;

    /// Writes down what it is asked.
    #[derive(Default)]
    struct Written(Mutex<Vec<(&'static str, u32, u32)>>);

    impl Launcher for Written {
        fn launch(&self, slot: u32, attempt: u32, _: &str, _: mpsc::UnboundedSender<Ended>) -> std::io::Result<()> {
            self.0.lock().unwrap().push(("launch", slot, attempt));
            Ok(())
        }

        fn adopt(&self, _: mpsc::UnboundedSender<Ended>) -> Vec<(u32, u32)> {
            Vec::new()
        }

        fn discard(&self, slot: u32, attempt: u32) {
            self.0.lock().unwrap().push(("discard", slot, attempt));
        }

        fn kill_all(&self) {}
    }

    #[tokio::test]
    async fn a_coordinator_that_was_replaced_starts_and_ends_no_node() {
        let folder = tempfile::tempdir().unwrap();
        let run = Store::open(&folder.path().display().to_string()).unwrap();
        let lease = Lease::take(&run, "the first", jiff::Timestamp::now()).await.unwrap();
        let nodes = Arc::new(Written::default());
        let mut errands =
            Errands::new(Arc::clone(&nodes), lease, "http://here".to_owned(), mpsc::unbounded_channel().0);
        errands.launch(0, 0);
        errands.discard(0, 0);
        errands.launch(0, 1);
        let all = [("launch", 0, 0), ("discard", 0, 0), ("launch", 0, 1)];
        while nodes.0.lock().unwrap().len() < all.len() {
            tokio::task::yield_now().await;
        }
        Lease::take(&run, "the second", jiff::Timestamp::now()).await.unwrap();
        errands.discard(0, 1);
        let error = errands.failed().await;
        assert!(matches!(error.downcast_ref(), Some(RunStoreError::Superseded { .. })), "{error:#}");
        assert_eq!(*nodes.0.lock().unwrap(), all);
    }
}
