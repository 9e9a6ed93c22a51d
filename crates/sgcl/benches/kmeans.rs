//! k-means over the bank against faiss on the same rows in the same call: time and inertia.
//!
//! ```text
//! make bench-kmeans [ARGS="--n 200000 --clusters 1000 --iterations 20"]
//! ```
//!
//! Both start from as many random rows and run as many Lloyd iterations over all rows on as many threads. Needs a Python with faiss-cpu
//! and safetensors: `SGCL_PYTHON`. The last line is one JSON object.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};
use sgcl::bank::{Bank, BankRows, Banks, ShardPlan, Widths, unit};
use sgcl::collective::Solo;
use sgcl::kmeans::{KMeans, cluster, inertia};
use tch::{Device, Kind, Tensor};

const SEED: u64 = 7;
const HELP: &str = "kmeans [--n ROWS] [--clusters COUNT] [--iterations COUNT] [--threads COUNT]";

fn main() {
    let mut n = 200_000;
    let mut size = KMeans { runs: 1, ..KMeans::default() };
    let mut threads = std::thread::available_parallelism().map_or(1, |n| n.get() as i64);
    let mut given = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(arg) = given.next() {
        let value = given.next().and_then(|v| v.parse().ok());
        let target = match arg.as_str() {
            "--n" => &mut n,
            "--clusters" => &mut size.clusters,
            "--iterations" => &mut size.iterations,
            "--threads" => &mut threads,
            _ => {
                println!("{HELP}");
                std::process::exit(if arg == "--help" { 0 } else { 64 });
            }
        };
        *target = value.expect(HELP);
    }
    tch::set_num_threads(threads as i32);
    let banks = structured(n);
    let began = Instant::now();
    let labels = cluster(&banks, size, SEED, 0, &Solo).unwrap();
    let ours = json!({
        "seconds": began.elapsed().as_secs_f64(),
        "inertia": inertia(&banks, &labels.get(0), size.clusters, &Solo).unwrap(),
    });
    let faiss = faiss(&banks, size, threads);
    let of = |found: &Value, key: &str| found[key].as_f64().unwrap();
    println!("{n} rows, {} clusters, {} iterations, {threads} threads", size.clusters, size.iterations);
    for (name, found) in [("sgcl", &ours), ("faiss", &faiss)] {
        println!("{name:<6} {:>8.2} s   inertia {:.5}", of(found, "seconds"), of(found, "inertia"));
    }
    let ratio = of(&faiss, "seconds") / of(&ours, "seconds");
    let worse = of(&ours, "inertia") / of(&faiss, "inertia");
    println!("{ratio:.2} × as fast, inertia {:+.2} %", 100.0 * (worse - 1.0));
    println!("{}", json!({ "n": n, "ours": ours, "faiss": faiss, "ratio": ratio, "inertia_ratio": worse }));
}

/// Unit rows around 2,000 directions, some far more frequent than others.
fn structured(n: i64) -> Banks {
    let widths = Widths { dim: 128, backbone: 0, local: 0 };
    let cpu = (Kind::Float, Device::Cpu);
    let plan = || ShardPlan::new(&[0], false);
    let mut banks = Banks::random(SEED, n, widths, plan(), 0, cpu);
    let centres = Banks::random(SEED + 1, 2000, widths, plan(), 0, cpu);
    let ids: Vec<i64> = (0..n).collect();
    let rows = banks.rows(&ids).unwrap();
    let which = (Tensor::from_slice(&ids).remainder(997) * Tensor::from_slice(&ids).remainder(1013)).remainder(2000);
    let global = unit(&(&rows.global * 0.6 + centres.at(Bank::Global, &which)));
    banks.put(&ids, &BankRows { global, ..rows }).unwrap();
    banks
}

fn faiss(banks: &Banks, size: KMeans, threads: i64) -> Value {
    let python = std::env::var("SGCL_PYTHON").expect("SGCL_PYTHON names a Python with faiss-cpu");
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("rows.safetensors");
    Tensor::write_safetensors(&[("rows", banks.bank(Bank::Global))], &data).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/faiss_kmeans.py");
    let numbers = [size.clusters, size.iterations, threads].map(|number| number.to_string());
    let output = Command::new(python)
        .arg(script)
        .arg(&data)
        .args(numbers)
        .env_remove("LD_LIBRARY_PATH")
        .stderr(std::process::Stdio::inherit())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "faiss did not run; `pip install faiss-cpu safetensors` for the Python in SGCL_PYTHON"
    );
    serde_json::from_slice(&output.stdout).unwrap()
}
