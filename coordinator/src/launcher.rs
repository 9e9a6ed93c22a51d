//! Starting nodes. Locally a node is a process; on Kubernetes it will be a Job.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

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

    /// Ends a node that was given up, at once; one that is gone already is no error.
    fn discard(&self, slot: u32, attempt: u32);

    /// Ends every node that is left, at once.
    fn kill_all(&self);
}

/// Nodes as processes on this machine.
pub struct ProcessLauncher {
    program: PathBuf,
    run: String,
    ranks_per_node: u32,
    threads: usize,
    environment: Vec<(String, String)>,
    /// Cancelled to kill.
    children: Arc<Mutex<BTreeMap<(u32, u32), CancellationToken>>>,
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
            children.insert((slot, attempt), kill.clone());
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
            if let Ok(mut children) = children.lock() {
                children.remove(&(slot, attempt));
            }
            use std::os::unix::process::ExitStatusExt;
            let code = status.ok().and_then(|status| status.code().or(status.signal().map(|s| 128 + s))).unwrap_or(1);
            // The run may be over: then nobody asks.
            let _ = ended.send(Ended { slot, attempt, code });
        });
        Ok(())
    }

    fn discard(&self, slot: u32, attempt: u32) {
        if let Ok(children) = self.children.lock() {
            children.get(&(slot, attempt)).into_iter().for_each(CancellationToken::cancel);
        }
    }

    fn kill_all(&self) {
        if let Ok(children) = self.children.lock() {
            children.values().for_each(CancellationToken::cancel);
        }
    }
}
