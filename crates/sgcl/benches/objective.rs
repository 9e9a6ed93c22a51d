//! The objective's step against a dense one, on the same data in the same call: time, peak memory, ratio.
//!
//! ```text
//! make bench-objective [ARGS="--n 681486 --batch 32 --dense-n 100000 --sampled 100000,4000000 --worlds 4"]
//! ```
//!
//! Each measurement is a process of its own, so that peak memory is its own: resident memory, or on a GPU (`--device cuda`) what
//! `nvidia-smi` sees in use there, CUDA's own included, while nobody else is on it. `dense.py` is METHOD as it reads, in PyTorch: every (B, N) matrix,
//! gathered negatives, autograd through the bank. It works on the tensors that ours has written down, and both losses are compared.
//! The last line is one JSON object.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::{Value, json};
use sgcl::bank::{BankRows, Banks, ShardPlan, Widths, unit};
use sgcl::collective::{Collective, Solo, Threads};
use sgcl::draws::{HardRanks, negatives};
use sgcl::model::{Model, Views};
use sgcl::neighbours::Lattice;
use sgcl::objective::{HardKey, Local, Negatives, Params, Pool, StepInputs, StepOutput, step};
use tch::{Device, Kind, Tensor};

/// ResNet-18's.
const DIM: i64 = 128;
const BACKBONE: i64 = 512;
const SEED: u64 = 7;
const HELP: &str = "\
objective [--n ROWS] [--batch ANCHORS] [--repeat TIMES] [--dtype fp32|bf16|fp16] [--threads COUNT] [--device cpu|cuda]
          [--dense-n ROWS]      rows of the comparison with the dense step; 0 leaves it out (at 681,486 it needs 21 GB)
          [--sampled ROWS,ROWS] bank sizes that the sampled mode is timed at; 0 leaves it out
          [--worlds RANKS]      ranks of the scaling table, as threads of one process; 0 leaves it out
          [--device cuda]       nothing here asks for CUDA's half of libtorch by name: LD_PRELOAD=LIBTORCH/lib/libtorch_cuda.so
          [--global-only]       no local views (npid-mcrop's terms and SGCL's neighbours without corner banks): 10,000,000 rows in bf16 take
                                13 GB so, and 23 GB with them; comparison and scaling are left out
          [--network]           times ResNet-18, forward and backward, on the same cores";

#[derive(Clone)]
struct Args {
    n: i64,
    batch: i64,
    repeat: usize,
    dtype: Kind,
    threads: i32,
    device: Device,
    dense: i64,
    sampled: Vec<i64>,
    world: usize,
    network: bool,
    local: bool,
    child: Option<String>,
    data: Option<String>,
}

fn args() -> Args {
    let mut args = Args {
        n: 681_486,
        batch: 32,
        repeat: 3,
        dtype: Kind::Float,
        threads: std::thread::available_parallelism().map_or(1, |n| n.get() as i32),
        device: Device::Cpu,
        dense: 100_000,
        sampled: vec![100_000, 4_000_000],
        world: 4,
        network: false,
        local: true,
        child: None,
        data: None,
    };
    let mut given = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(arg) = given.next() {
        let mut value = || given.next().unwrap_or_else(|| panic!("{arg} wants a value\n{HELP}"));
        match arg.as_str() {
            "--n" => args.n = value().parse().expect(HELP),
            "--batch" => args.batch = value().parse().expect(HELP),
            "--repeat" => args.repeat = value().parse().expect(HELP),
            "--threads" => args.threads = value().parse().expect(HELP),
            "--device" => {
                args.device = match value().as_str() {
                    "cpu" => Device::Cpu,
                    "cuda" => Device::Cuda(0),
                    other => panic!("{other}?\n{HELP}"),
                }
            }
            "--dense-n" => args.dense = value().parse().expect(HELP),
            "--worlds" => args.world = value().parse().expect(HELP),
            "--sampled" => {
                args.sampled = value().split(',').map(|n| n.parse().expect(HELP)).filter(|&n| n > 0).collect()
            }
            "--network" => args.network = true,
            "--global-only" => (args.local, args.dense, args.world) = (false, 0, 0),
            "--dtype" => {
                args.dtype = match value().as_str() {
                    "fp32" => Kind::Float,
                    "bf16" => Kind::BFloat16,
                    "fp16" => Kind::Half,
                    other => panic!("{other}?\n{HELP}"),
                }
            }
            "--child" => args.child = Some(value()),
            "--data" => args.data = Some(value()),
            _ => {
                println!("{HELP}");
                std::process::exit(if arg == "--help" { 0 } else { 64 });
            }
        }
    }
    args
}

fn main() {
    let args = args();
    tch::set_num_threads(args.threads);
    match args.child.as_deref() {
        Some("ours") => println!("{}", ours(&args)),
        Some("sampled") => println!("{}", sampled(&args)),
        Some("world") => println!("{}", world(&args)),
        Some("network") => println!("{}", network(&args)),
        Some(other) => panic!("no measurement {other}"),
        None => parent(&args),
    }
}

fn parent(args: &Args) {
    let folder = tempfile::tempdir().expect("a scratch folder");
    let data = folder.path().join("step.safetensors");
    let mut summary =
        json!({ "n": args.n, "batch": args.batch, "threads": args.threads, "device": args.device_name() });
    let mib = |v: &Value| v.as_f64().unwrap() / f64::from(1 << 20);
    let show = |what: &str, found: &Value| {
        println!("{what:<44} {:>8.3} s {:>10.0} MiB", found["seconds"].as_f64().unwrap(), mib(&found["peak_bytes"]));
    };
    println!("{:<44} {:>10} {:>14}", "one step: forward, backward, bank update", "time", "peak memory");
    let exact = child(args, "ours", args.n, None);
    show(&format!("exact, N = {}", args.n), &exact);
    summary["exact"] = exact;
    for &n in &args.sampled {
        let found = child(args, "sampled", n, None);
        show(&format!("sampled, N = {n}"), &found);
        summary[format!("sampled_{n}")] = found;
    }
    if args.network {
        let found = child(args, "network", args.n, None);
        show("ResNet-18, fp32, 224 px and 4 × 96 px", &found);
        summary["network"] = found;
    }
    if args.dense > 0 {
        let ours = child(args, "ours", args.dense, Some(&data));
        let dense = dense(args, &data);
        show(&format!("exact, N = {}", args.dense), &ours);
        show(&format!("dense, N = {}", args.dense), &dense);
        for name in ["intra", "inter", "inner"] {
            let (a, b) = (ours[name].as_f64().unwrap(), dense[name].as_f64().unwrap());
            assert!((a - b).abs() <= 1e-4 * b.abs(), "{name}: {a} here, {b} dense");
        }
        let ratio = |key: &str| dense[key].as_f64().unwrap() / ours[key].as_f64().unwrap();
        println!("the same losses to 1e-4; {:.1} × faster, {:.1} × less memory", ratio("seconds"), ratio("peak_bytes"));
        summary["dense_n"] = args.dense.into();
        (summary["ratio"], summary["ratio_memory"]) = (ratio("seconds").into(), ratio("peak_bytes").into());
        (summary["ours_at_dense_n"], summary["dense"]) = (ours, dense);
    }
    if args.world > 1 {
        summary["scaling"] = child(args, "world", 50_000, None);
        for row in summary["scaling"].as_array().unwrap() {
            println!(
                "world {} {:<16} bank {:>5.1} % of one rank's, wire {:>9} bytes a step, formula {:>9}",
                row["world"],
                row["replicas"].as_str().unwrap(),
                100.0 * row["bank_share"].as_f64().unwrap(),
                row["wire_bytes"],
                row["wire_formula"]
            );
        }
    }
    println!("{summary}");
}

/// Runs one measurement as a process and reads its last line.
fn child(args: &Args, what: &str, n: i64, data: Option<&Path>) -> Value {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--child", what, "--n", &n.to_string(), "--batch", &args.batch.to_string()]);
    command.args(["--repeat", &args.repeat.to_string(), "--threads", &args.threads.to_string()]);
    command.args(["--worlds", &args.world.to_string(), "--device", args.device_name()]);
    let dtype = match args.dtype {
        Kind::BFloat16 => "bf16",
        Kind::Half => "fp16",
        _ => "fp32",
    };
    command.args(["--dtype", dtype]);
    if !args.local {
        command.arg("--global-only");
    }
    if let Some(data) = data {
        command.arg("--data").arg(data);
    }
    run(args, &mut command, what)
}

/// The last line that a measurement prints; on a GPU with the memory that was in use there.
fn run(args: &Args, command: &mut Command, what: &str) -> Value {
    let used = Arc::new(AtomicU64::new(0));
    let meter = (args.device != Device::Cpu).then(|| GpuMeter::start(&used));
    let output = command.stderr(Stdio::inherit()).output().unwrap();
    drop(meter);
    assert!(output.status.success(), "{what} ended with {}; out of memory? a smaller --n helps", output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().unwrap_or_default();
    let mut found: Value = serde_json::from_str(last).unwrap_or_else(|e| panic!("{what}: {e}:\n{text}"));
    if args.device != Device::Cpu {
        found["peak_bytes"] = used.load(Ordering::Relaxed).into();
    }
    found
}

/// Asks `nvidia-smi` twenty times a second, and keeps the most.
struct GpuMeter(Child);

impl GpuMeter {
    fn start(most: &Arc<AtomicU64>) -> Self {
        let mut smi = Command::new("nvidia-smi")
            .args(["--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop-ms=50"])
            .stdout(Stdio::piped())
            .spawn()
            .expect("nvidia-smi, which comes with the driver");
        let (lines, most) = (BufReader::new(smi.stdout.take().unwrap()), Arc::clone(most));
        std::thread::spawn(move || {
            for mib in lines.lines().map_while(Result::ok).filter_map(|line| line.trim().parse::<u64>().ok()) {
                most.fetch_max(mib << 20, Ordering::Relaxed);
            }
        });
        Self(smi)
    }
}

impl Drop for GpuMeter {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn dense(args: &Args, data: &Path) -> Value {
    let python = std::env::var("SGCL_PYTHON").expect("SGCL_PYTHON names a Python with torch; `make setup` sets it");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/dense.py");
    let mut command = Command::new(python);
    // A minute a step on a CPU, where nothing has to warm up.
    let repeat = if args.device == Device::Cpu { 0 } else { args.repeat };
    command.arg(script).arg(data).args([args.threads.to_string(), args.device_name().into(), repeat.to_string()]);
    run(args, command.env_remove("LD_LIBRARY_PATH"), "dense.py")
}

/// Highest resident memory of this process.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok()).map_or(0, |kb| kb * 1024)
}

/// Everything of a step but the banks, for the anchors of one rank.
struct Case {
    ids: Vec<Vec<i64>>,
    spatial: Vec<Vec<i64>>,
    slides: Vec<u32>,
    xs: Vec<i32>,
    ys: Vec<i32>,
    negatives: Vec<i64>,
    ranks: Tensor,
    q: Tensor,
    x: Tensor,
    ql: Tensor,
}

/// Slides of 100 × 100 patches.
fn place(row: i64) -> (u32, i32, i32) {
    ((row / 10_000) as u32, (row % 100) as i32, (row / 100 % 100) as i32)
}

impl Case {
    fn new(args: &Args, params: &Params, total: i64, rank: usize, world: usize) -> Self {
        let n = args.n;
        let (mut slides, mut xs, mut ys) = (Vec::new(), Vec::new(), Vec::new());
        for (slide, x, y) in (0..n).map(place) {
            slides.push(slide);
            xs.push(x);
            ys.push(y);
        }
        let lattice = Lattice::new(&slides, &xs, &ys).unwrap();
        let all = args.batch * world as i64;
        let anchors: Vec<i64> = (0..all).map(|anchor| anchor * (n / all)).collect();
        let spatial = anchors.iter().map(|&row| lattice.neighbours(row, params.radius).unwrap()).collect();
        tch::manual_seed(SEED as i64 + rank as i64);
        let rows =
            |count, width| unit(&Tensor::randn([count, width], (Kind::Float, Device::Cpu)).to_device(args.device));
        let hard = HardRanks::new(params.top(total) as usize, params.hard as usize, [5.0, 15.0]);
        Self {
            ids: anchors.chunks(args.batch as usize).map(<[i64]>::to_vec).collect(),
            spatial,
            slides,
            xs,
            ys,
            negatives: negatives(SEED, 0, 0, 0, params.negatives as usize, n),
            ranks: Tensor::from_slice(&hard.draw(SEED, 0, 0, 0)).to_device(args.device),
            q: rows(args.batch, DIM).set_requires_grad(true),
            x: rows(args.batch, BACKBONE),
            ql: rows(4 * args.batch, args.widths().local).set_requires_grad(true),
        }
    }

    /// Forward, backward and bank update.
    fn step(
        &self,
        banks: &mut Banks,
        params: &Params,
        pool: &Pool,
        clusters: &Tensor,
        ring: &dyn Collective,
    ) -> StepOutput {
        for leaf in [&self.q, &self.ql] {
            let mut grad = leaf.grad();
            if grad.defined() {
                let _ = grad.zero_();
            }
        }
        let inputs = StepInputs {
            q: &self.q,
            x: &self.x,
            ql: &self.ql,
            dense_keys: None,
            keys: None,
            ids: &self.ids,
            spatial: &self.spatial,
            clusters,
            pool,
            hard_ranks: &self.ranks,
            negatives: &Negatives::Shared(self.negatives.clone()),
            key: HardKey::new(SEED, 0, 0),
            inter_weight: 1.0,
        };
        let out = step(&inputs, banks, params, ring).unwrap();
        out.total.backward();
        banks.apply(&self.ids.concat(), &out.features, params.bank_momentum).unwrap();
        out
    }
}

/// As many labels as k-means gives, spread over slides.
fn clusters(rows: &Tensor) -> Tensor {
    rows.divide_scalar_mode(97, "floor").remainder(1000)
}

impl Args {
    fn params(&self) -> Params {
        let local = if self.local { Local::Corners } else { Local::None };
        Params { local, ..Params::default() }
    }

    fn widths(&self) -> Widths {
        Widths { dim: DIM, backbone: BACKBONE, local: if self.local { DIM } else { 0 } }
    }

    /// Those of `rank`.
    fn banks(&self, plan: ShardPlan, rank: usize) -> Banks {
        Banks::random(SEED, self.n, self.widths(), plan, rank, (self.dtype, self.device))
    }

    fn device_name(&self) -> &'static str {
        if self.device == Device::Cpu { "cpu" } else { "cuda" }
    }

    /// Seconds that `work` takes, until the device is through with it.
    fn timed<T>(&self, work: impl FnOnce() -> T) -> (f64, T) {
        let through = || {
            if let Device::Cuda(index) = self.device {
                tch::Cuda::synchronize(index as i64);
            }
        };
        through();
        let began = Instant::now();
        let done = work();
        through();
        (began.elapsed().as_secs_f64(), done)
    }
}

fn ours(args: &Args) -> Value {
    let params = args.params();
    let mut banks = args.banks(ShardPlan::new(&[0], false), 0);
    let case = Case::new(args, &params, args.n, 0, 1);
    let labels = clusters(banks.slot_rows());
    let pool = Pool::exact(&banks);
    // What the dense step is to work on, before anything is blended in; written once the measuring is over.
    let ids: Vec<i64> = (0..args.n).collect();
    let before = args.data.as_ref().map(|_| banks.rows(&ids).unwrap());
    let (mut seconds, mut first) = (Vec::new(), None);
    for _ in 0..=args.repeat {
        let (took, out) = args.timed(|| case.step(&mut banks, &params, &pool, &labels, &Solo));
        seconds.push(took);
        first.get_or_insert(out);
    }
    let peak = peak();
    if let Some((path, rows)) = args.data.as_ref().zip(before) {
        write(path, &case, rows, &params);
    }
    let first = first.unwrap();
    let mut found = measured(&mut seconds, peak);
    for (name, loss) in [("intra", &first.intra), ("inter", &first.inter), ("inner", &first.inner)] {
        found[name] = loss.double_value(&[]).into();
    }
    found
}

/// The median without the first, which warms up.
fn measured(seconds: &mut [f64], peak: u64) -> Value {
    let rest = &mut seconds[1..];
    rest.sort_by(f64::total_cmp);
    json!({ "seconds": rest[rest.len() / 2], "fastest": rest[0], "slowest": rest[rest.len() - 1], "peak_bytes": peak })
}

fn write(path: &str, case: &Case, rows: BankRows, params: &Params) {
    let [tl, tr, bl, br] = rows.corners;
    let ids = Tensor::from_slice(&(0..rows.global.size()[0]).collect::<Vec<_>>());
    let tensors = [
        ("global", rows.global),
        ("backbone", rows.backbone),
        ("tl", tl),
        ("tr", tr),
        ("bl", bl),
        ("br", br),
        ("q", case.q.detach()),
        ("x", case.x.shallow_clone()),
        ("ql", case.ql.detach()),
        ("ids", Tensor::from_slice(&case.ids.concat())),
        ("slide", Tensor::from_slice(&case.slides.iter().map(|&s| i64::from(s)).collect::<Vec<_>>())),
        ("x_at", Tensor::from_slice(&case.xs)),
        ("y_at", Tensor::from_slice(&case.ys)),
        ("clusters", clusters(&ids)),
        ("negatives", Tensor::from_slice(&case.negatives)),
        ("ranks", case.ranks.shallow_clone()),
        ("nearest", Tensor::from(params.nearest)),
    ];
    Tensor::write_safetensors(&tensors, path).unwrap();
}

fn sampled(args: &Args) -> Value {
    const SAMPLE: i64 = 65_536;
    let params = args.params();
    let mut banks = args.banks(ShardPlan::new(&[0], false), 0);
    let case = Case::new(args, &params, SAMPLE, 0, 1);
    let labels = clusters(banks.slot_rows());
    let mut seconds = Vec::new();
    for turn in 0..=args.repeat {
        let (took, _) = args.timed(|| {
            let pool = Pool::sampled(&banks, SAMPLE, SEED, 0, turn as u64);
            case.step(&mut banks, &params, &pool, &labels, &Solo)
        });
        seconds.push(took);
    }
    let mut found = measured(&mut seconds, peak());
    found["sample"] = SAMPLE.into();
    found
}

fn network(args: &Args) -> Value {
    let model = Model::new("resnet18".parse().unwrap(), DIM, args.device);
    model.init(SEED);
    let images = |count, side| Tensor::randn([count, 3, side, side], (Kind::Float, args.device));
    let views = Views { global: images(args.batch, 224), local: Some(images(4 * args.batch, 96)), key: None };
    let mut seconds = Vec::new();
    for _ in 0..=args.repeat {
        let (took, ()) = args.timed(|| {
            let out = model.forward(&views, true);
            (out.q.sum(Kind::Float) + out.ql.unwrap().sum(Kind::Float)).backward();
        });
        seconds.push(took);
    }
    measured(&mut seconds, peak())
}

/// Bank memory and bytes on the wire, by world.
fn world(args: &Args) -> Value {
    let one = args.banks(ShardPlan::new(&[0], false), 0).bytes();
    let mut rows = Vec::new();
    for (world, replicas) in [(2, true), (args.world, false), (args.world, true)] {
        let ranks: Vec<_> = Threads::world(world)
            .into_iter()
            .map(|ring| {
                let args = args.clone();
                std::thread::spawn(move || {
                    let params = args.params();
                    let nodes: Vec<usize> = (0..world).collect();
                    let plan = ShardPlan::new(&nodes, replicas);
                    let mut banks = args.banks(plan, ring.rank());
                    let case = Case::new(&args, &params, args.n, ring.rank(), world);
                    let labels = clusters(banks.slot_rows());
                    let pool = Pool::exact(&banks);
                    let _ = ring.take_sent();
                    case.step(&mut banks, &params, &pool, &labels, &ring);
                    (ring.take_sent(), banks.bytes(), wire(&args, &params, &case, world as f64))
                })
            })
            .collect();
        let ranks: Vec<(u64, usize, f64)> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        let most = ranks.iter().map(|rank| rank.1).max().unwrap();
        let (sent, formula) = (ranks[0].0, ranks[0].2);
        assert!(
            (sent as f64 / formula - 1.0).abs() < 0.01,
            "{sent} bytes were sent, the documented formula says {formula}"
        );
        rows.push(json!({
            "world": world, "replicas": if replicas { "with replicas" } else { "without replicas" },
            "bank_share": most as f64 / one as f64, "wire_bytes": sent, "wire_formula": formula.round(),
        }));
    }
    Value::Array(rows)
}

/// Bytes a rank sends in a step, hard negatives by rank: the table in `objective`'s documentation.
fn wire(args: &Args, params: &Params, case: &Case, world: f64) -> f64 {
    let (d, db) = (DIM as f64, BACKBONE as f64);
    let (b, n, a) = (args.batch as f64 * world, args.n as f64, params.auxiliary as f64);
    let most = (n / world).ceil();
    let even = params.nearest as f64 / world;
    let near = (even + 8.0 * even.sqrt() + 16.0).ceil().min(params.nearest as f64).min(most);
    let neighbours = case.spatial.iter().map(Vec::len).max().unwrap_or(0) as f64;
    let top = (case.ranks.max().int64_value(&[]) as f64 + 1.0).min(most);
    let gathers = 4.0 * (b * (5.0 * d + db) + world * (1.0 + a) * b * near + world * b * top + b * (12.0 * d + 8.0));
    let reduces = 2.0 * (4.0 * b * (neighbours + a * d) + 8.0 * b * (1.0 + a));
    (world - 1.0) / world * (gathers + reduces)
}
