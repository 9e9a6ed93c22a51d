//! A small patch set and a run over it, with the coordinator in process and real workers.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, unreachable_pub)]

use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use rand::Rng as _;
use sgcl_coordinator::{Coordinator, Launcher, Outcome, ProcessLauncher, RunView};
use sgcl_draw::{Purpose, rng};
use sgcl_patchset::{Manifest, Opened, PatchSet, PatchSetWriter, SlideInfo, Store, WriterOptions};
use sgcl_runstore::checkpoint::read_tensors;
use sgcl_runstore::{Commits, RunConfig, RunName, Spec, Tensor};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Side of a patch in pixels.
const PX: u16 = 64;

/// A set of `slides` slides of `side` × `side` textured patches; the class is the texture's grain.
pub async fn patch_set(store: &Store, slides: u64, side: i32) -> Manifest {
    textured(store, slides, side, true).await
}

/// The same, with or without its classes.
pub async fn textured(store: &Store, slides: u64, side: i32, labelled: bool) -> Manifest {
    let Opened::Writer(writer) =
        PatchSetWriter::open(store.clone(), WriterOptions::new(PX.into(), 90, 1)).await.unwrap()
    else {
        panic!("there is a set already");
    };
    for slide in 0..slides {
        let mut open = writer
            .slide(SlideInfo {
                name: format!("slide-{slide}"),
                source: "drawn".into(),
                fingerprint: "1".into(),
                level: 0,
                mpp: Some(0.5),
                width: u64::from(PX) * side as u64,
                height: u64::from(PX) * side as u64,
                grid: [side as u32, side as u32],
                spatial: true,
            })
            .unwrap();
        for y in 0..side {
            for x in 0..side {
                let coarse = x < side / 2;
                let class = if coarse { "coarse" } else { "fine" };
                open.push(x, y, labelled.then_some(class), &texture(slide, x, y, if coarse { 16 } else { 4 })).unwrap();
            }
        }
        open.preview(texture(slide, 0, 0, 8));
        open.finish().await.unwrap();
    }
    writer.finish(|_, _| {}).await.unwrap()
}

/// Blocks of random tones around a slide's own tint.
fn texture(slide: u64, x: i32, y: i32, grain: usize) -> Vec<u8> {
    let side = usize::from(PX);
    let mut draw = rng(slide, Purpose::Phantom, x as u64, y as u64);
    let blocks = side / grain;
    let tones: Vec<u8> = (0..blocks * blocks).map(|_| draw.random_range(60..220)).collect();
    let tint = [40, 0, 20].map(|t: u8| t.wrapping_add(slide as u8 * 5));
    let pixels: Vec<u8> = (0..side * side)
        .flat_map(|at| {
            let tone = tones[at / side / grain * blocks + at % side / grain];
            tint.map(|t| tone.saturating_sub(t))
        })
        .collect();
    let mut out = Vec::new();
    jpeg_encoder::Encoder::new(&mut out, 90).encode(&pixels, PX, PX, jpeg_encoder::ColorType::Rgb).unwrap();
    out
}

/// What makes a run train in seconds.
pub const SMALL: [&str; 13] = [
    "epochs=2",
    "views.global_px=32",
    "views.local_px=32",
    "batch.per_rank=8",
    "objective.negatives=64",
    "objective.hard=16",
    "objective.nearest=16",
    "kmeans.clusters=4",
    "kmeans.iterations=5",
    "device=cpu",
    "startup_timeout_s=60",
    "step_timeout_s=60",
    "max_restarts=0",
];

/// A configuration that trains in seconds.
pub fn config(overrides: &[&str]) -> RunConfig {
    let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
    small(None, &overrides)
}

/// The same of a configuration file.
pub fn small(file: Option<&std::path::Path>, overrides: &[String]) -> RunConfig {
    let sets: Vec<String> = SMALL.iter().map(|s| (*s).to_owned()).chain(overrides.iter().cloned()).collect();
    RunConfig::load(file, &sets).unwrap()
}

/// The program under test, built beside this test.
pub fn worker() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().unwrap().parent().unwrap().join("sgcl-worker");
    assert!(program.is_file(), "{} is not built; run: cargo build --release -p sgcl-worker", program.display());
    program
}

/// A run under way.
pub struct Running {
    pub view: watch::Receiver<RunView>,
    pub stop: CancellationToken,
    pub outcome: tokio::task::JoinHandle<Outcome>,
    pub address: std::net::SocketAddr,
}

/// Starts a run, or goes on with one of that name.
pub async fn start(bucket: &Store, data: &str, name: &str, nodes: u32, ranks: u32, config: RunConfig) -> Running {
    let launcher = ProcessLauncher::new(worker(), name.to_owned(), nodes, ranks).with_threads(1);
    start_with(launcher, bucket, data, name, nodes, ranks, config).await
}

/// The same with nodes started by `launcher`.
pub async fn start_with<L: Launcher>(
    launcher: L,
    bucket: &Store,
    data: &str,
    name: &str,
    nodes: u32,
    ranks: u32,
    config: RunConfig,
) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    start_at(listener, launcher, bucket, data, name, nodes, ranks, config).await
}

/// The same with a coordinator that listens where another one did.
#[allow(clippy::too_many_arguments)]
pub async fn start_at<L: Launcher>(
    listener: TcpListener,
    launcher: L,
    bucket: &Store,
    data: &str,
    name: &str,
    nodes: u32,
    ranks: u32,
    config: RunConfig,
) -> Running {
    let data = Store::open(data).unwrap();
    start_over(listener, launcher, bucket, &data, name, nodes, ranks, config).await
}

/// The same with the patch set in a store that this process's environment does not open.
#[allow(clippy::too_many_arguments)]
pub async fn start_over<L: Launcher>(
    listener: TcpListener,
    launcher: L,
    bucket: &Store,
    data: &Store,
    name: &str,
    nodes: u32,
    ranks: u32,
    config: RunConfig,
) -> Running {
    let set = PatchSet::load(data.patient()).await.unwrap();
    let data = data.url();
    let bucket = &bucket.patient();
    let run = RunName::new(name).unwrap();
    let store = run.store(bucket);
    let id = set.manifest().content_id.clone();
    let spec = Spec::new(run, data, id, nodes, ranks, 1, config, Timestamp::now());
    if Spec::find(&store).await.unwrap().is_none() {
        spec.create(&store).await.unwrap();
    }
    let (sender, view) = watch::channel(RunView::default());
    let stop = CancellationToken::new();
    let coordinator = Coordinator {
        spec,
        run: store,
        launcher: Arc::new(launcher),
        view: sender,
        stop: stop.clone(),
        kill: CancellationToken::new(),
    };
    let address = listener.local_addr().unwrap();
    let outcome = tokio::spawn(async move { coordinator.serve(listener).await.unwrap() });
    Running { view, stop, outcome, address }
}

/// Runs to the end.
pub async fn train(bucket: &Store, data: &str, name: &str, nodes: u32, ranks: u32, config: RunConfig) -> Outcome {
    start(bucket, data, name, nodes, ranks, config).await.outcome.await.unwrap()
}

/// A process of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    pub node: String,
    /// None for the supervisor.
    pub local_rank: Option<u32>,
}

impl Process {
    /// Sends a signal; false where the process is gone.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> bool {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), signal).is_ok()
    }
}

/// The processes of a run on this machine, as the system lists them.
pub fn processes(run: &str) -> Vec<Process> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let words: Vec<&str> = line.split(|b| *b == 0).filter_map(|word| std::str::from_utf8(word).ok()).collect();
        let after = |name: &str| words.iter().position(|word| *word == name).and_then(|at| words.get(at + 1).copied());
        let ours = words.first().is_some_and(|program| program.ends_with("sgcl-worker"));
        if let (true, Some(name), Some(node)) = (ours && after("--run") == Some(run), words.get(1), after("--node")) {
            let local_rank = (*name == "rank").then(|| after("--local-rank").unwrap().parse().unwrap());
            found.push(Process { pid, node: node.to_owned(), local_rank });
        }
    }
    found.sort_by(|a, b| (&a.node, a.local_rank).cmp(&(&b.node, b.local_rank)));
    found
}

/// A patch set and a bucket in a folder that goes with them.
pub struct Place {
    pub folder: tempfile::TempDir,
    pub bucket: Store,
    pub data: String,
}

/// With a patch set of `slides` slides of side × side patches.
pub async fn place(slides: u64, side: i32) -> Place {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("patches").display().to_string();
    patch_set(&Store::open(&data).unwrap(), slides, side).await;
    let bucket = Store::open(&folder.path().join("bucket").display().to_string()).unwrap();
    Place { folder, bucket, data }
}

impl Place {
    /// The part of the bucket of the run called `name`.
    pub fn run(&self, name: &str) -> Store {
        RunName::new(name).unwrap().store(&self.bucket)
    }
}

/// Every stored tensor of the newest commit, by part kind and name.
pub async fn state(run: &Store) -> Vec<(String, Tensor)> {
    let commit = Commits::new(run).newest_intact().await.unwrap().unwrap().commit;
    let mut state = Vec::new();
    for part in &commit.progress.parts {
        for tensor in read_tensors(run, part).await.unwrap() {
            state.push((format!("{:?} {} {}", part.kind, part.path.rsplit('/').next().unwrap(), tensor.name), tensor));
        }
    }
    state.sort_by(|a, b| a.0.cmp(&b.0));
    state
}
