//! Starting nodes. Locally a node is a process; on Kubernetes it will be a Job.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// Starts and ends nodes.
pub trait Launcher: Send + Sync + 'static {
    /// Starts a node in `slot`; it will join at `coordinator`, an http URL.
    ///
    /// # Errors
    /// What kept it from starting.
    fn launch(&self, slot: u32, attempt: u32, coordinator: &str) -> std::io::Result<()>;

    /// Ends every node that is left, at once.
    fn kill_all(&self);
}

/// Nodes as processes on this machine.
pub struct ProcessLauncher {
    program: PathBuf,
    run: String,
    ranks_per_node: u32,
    threads: usize,
    children: Arc<Mutex<Vec<Child>>>,
}

impl ProcessLauncher {
    /// Nodes of `run` from the program `sgcl-worker`, `nodes` of them on this machine: they share its cores.
    #[must_use]
    pub fn new(program: PathBuf, run: String, nodes: u32, ranks_per_node: u32) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores / (nodes * ranks_per_node).max(1) as usize).max(1);
        Self { program, run, ranks_per_node, threads, children: Arc::default() }
    }

    /// Computing threads of a rank, in place of an equal share of the cores. Results depend on it in the last bits.
    #[must_use]
    pub fn with_threads(self, threads: usize) -> Self {
        Self { threads, ..self }
    }
}

impl Launcher for ProcessLauncher {
    fn launch(&self, slot: u32, attempt: u32, coordinator: &str) -> std::io::Result<()> {
        let node = format!("{}-{slot}-{attempt}", self.run);
        let mut child = Command::new(&self.program)
            .args(["node", "--coordinator", coordinator, "--run", &self.run, "--node", &node])
            .args(["--ranks", &self.ranks_per_node.to_string(), "--address", "127.0.0.1", "--die-with-parent"])
            .args(["--threads", &self.threads.to_string()])
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
        if let Ok(mut children) = self.children.lock() {
            children.push(child);
        }
        Ok(())
    }

    fn kill_all(&self) {
        if let Ok(mut children) = self.children.lock() {
            // A child that is gone already needs no killing.
            children.iter_mut().for_each(|child| drop(child.start_kill()));
        }
    }
}
