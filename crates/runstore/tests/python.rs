//! What we write, read by those it is for: torch, torchvision, timm, safetensors, numpy, TensorBoard.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use jiff::Timestamp;
use sgcl_patchset::Store;
use sgcl_runstore::checkpoint::{PartKind, PartRef, decode};
use sgcl_runstore::export::{ExportError, pull, verify_export, write_export};
use sgcl_runstore::{Commit, MetricsWriter, Progress, RunConfig, RunName, Spec, StepMetrics, Tensor};

fn python(script: &str, args: &[&Path]) -> String {
    let Some(python) = std::env::var_os("SGCL_PYTHON") else {
        panic!("SGCL_PYTHON is not set; run `make setup`, which installs the Python these tests need");
    };
    // The test's own library path is for our libtorch; Python has its own.
    let out = Command::new(python).arg("-c").arg(script).args(args).env_remove("LD_LIBRARY_PATH").output().unwrap();
    assert!(out.status.success(), "{}\n{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn now() -> Timestamp {
    Timestamp::from_second(1_700_000_000).unwrap()
}

fn spec(arch: &str) -> Spec {
    let config = RunConfig::from_yaml("", "", &[format!("backbone.arch={arch}")]).unwrap();
    Spec::new(RunName::new("demo").unwrap(), "s3://bucket/set", "b3:abc", 1, 1, 1, config, now())
}

fn commit() -> Commit {
    let ledger = PartRef { kind: PartKind::Ledger, path: "checkpoints/1-9/ledger".into(), bytes: 0, crc32c: 0 };
    let progress = Progress {
        generation: 1,
        lease_epoch: 0,
        step: 9,
        epoch: 2,
        epoch_step: 3,
        cursor: 3,
        lanes: 1,
        window: 4,
        segments: Vec::new(),
        history: Vec::new(),
        world: 1,
        plan_base: None,
        ledger,
        parts: vec![],
        losses: BTreeMap::new(),
        done: true,
    };
    Commit::after(None, progress, now())
}

/// torchvision's own weights, seeded, as a safetensors file in torchvision's order.
fn weights(dir: &Path, arch: &str) -> Vec<Tensor> {
    let file = dir.join("reference.safetensors");
    let order = python(
        &format!(
            "import sys, torch, torchvision\nfrom safetensors.torch import save_file\ntorch.manual_seed(5)\n\
             m = torchvision.models.{arch}()\nm.train(); m(torch.rand(4, 3, 64, 64))\n\
             s = {{k: v.contiguous() for k, v in m.state_dict().items() if not k.startswith('fc.')}}\n\
             save_file(s, sys.argv[1])\nprint('\\n'.join(s))"
        ),
        &[&file],
    );
    let mut tensors = decode(&std::fs::read(&file).unwrap().into(), "reference").unwrap();
    let order: Vec<&str> = order.lines().collect();
    tensors.sort_by_key(|t| order.iter().position(|n| *n == t.name).unwrap());
    tensors
}

const LOADS: &str = r#"
import json, pickle, sys, warnings, zipfile
import torch, torchvision
from safetensors.torch import load_file
folder, reference, arch = sys.argv[1], load_file(sys.argv[2]), sys.argv[3]

# torch: bare load, weights only
saved = torch.load(f"{folder}/backbone.pth")
assert sorted(saved) == ["author", "state_dict"], sorted(saved)
assert "demo" in saved["author"] and "b3:abc" in saved["author"], saved["author"]
state = saved["state_dict"]
assert list(torch.load(f"{folder}/backbone.pth", weights_only=True, mmap=True)["state_dict"]) == list(state)
assert set(state) == set(reference)
for name, tensor in reference.items():
    assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
assert state["bn1.num_batches_tracked"].shape == () and state["bn1.num_batches_tracked"].item() == 1
with zipfile.ZipFile(f"{folder}/backbone.pth") as z:
    assert z.testzip() is None
    for info in z.infolist():
        if "/data/" in info.filename:
            z.fp.seek(info.header_offset + 26)
            n, e = int.from_bytes(z.fp.read(2), "little"), int.from_bytes(z.fp.read(2), "little")
            assert (info.header_offset + 30 + n + e) % 64 == 0, info.filename

# torchvision: strict, classifier aside
model = getattr(torchvision.models, arch)()
model.fc = torch.nn.Identity()
model.load_state_dict(state, strict=True)
model.eval()
x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    want = model(x)

# timm
import timm
other = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
with torch.no_grad():
    got = other(x)
assert got.shape == want.shape
gap = (got - want).abs().max().item()
assert gap <= 1e-5 * want.abs().max().item(), gap
data = timm.data.resolve_model_data_config(other)
assert list(data["mean"]) == [0.485, 0.456, 0.406] and list(data["input_size"]) == [3, 224, 224], data

# the example in transfer/, key by key, and the package that trains detectors on it
import pathlib, runpy
transfer = pathlib.Path(sys.argv[4])
example, transform = runpy.run_path(str(transfer / "examples/timm_load.py"))["encoder"](pathlib.Path(folder))
with torch.no_grad():
    assert (example(x) - want).abs().max().item() <= 1e-5 * want.abs().max().item()
sys.path.insert(0, str(transfer))
from sgcl_transfer import weights
for name in ["backbone.pth", "model.safetensors"]:
    source = weights.read(f"{folder}/{name}")
    assert weights.architecture(source) == sys.argv[3], name
    network = weights.backbone(sys.argv[3])
    report = weights.load(network, source, name, sys.argv[3])
    assert report.missing == report.unexpected == [], (name, report)
    assert all(torch.equal(value, reference[key]) for key, value in network.state_dict().items()), name

# detectron2: keys as its own script makes them
def convert(k):
    if "layer" not in k:
        k = "stem." + k
    for t in [1, 2, 3, 4]:
        k = k.replace(f"layer{t}", f"res{t + 1}")
    for t in [1, 2, 3]:
        k = k.replace(f"bn{t}", f"conv{t}.norm")
    return k.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
for encoding in ["ASCII", "latin1"]:
    with open(f"{folder}/backbone.detectron2.pkl", "rb") as f:
        pkl = pickle.load(f, encoding=encoding)
    assert pkl["matching_heuristics"] is True and "demo" in pkl["__author__"]
    assert set(pkl["model"]) == {convert(k) for k in reference}
    for k, v in reference.items():
        array = pkl["model"][convert(k)]
        assert array.dtype == v.numpy().dtype and array.shape == tuple(v.shape) and (array == v.numpy()).all(), k
assert "stem.conv1.norm.weight" in pkl["model"] and "res3.0.shortcut.norm.bias" in pkl["model"]
print("ok", gap)
"#;

const TRANSFER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../transfer");

async fn an_export_loads(arch: &str) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("run").to_str().unwrap()).unwrap();
    let tensors = weights(dir.path(), arch);
    write_export(&store, &spec(arch), &commit(), &tensors, now()).await.unwrap();
    let target = dir.path().join("pulled");
    let mut seen = (0, 0);
    let pulled = pull(&store, None, &target, |done, all| seen = (done, all)).await.unwrap();
    assert_eq!(pulled.manifest.from.commit, 1);
    assert!(seen.0 == seen.1 && seen.1 > 1 << 20, "{seen:?}");
    let out =
        python(LOADS, &[&target, &dir.path().join("reference.safetensors"), Path::new(arch), Path::new(TRANSFER)]);
    assert!(out.contains("ok"), "{out}");
}

#[tokio::test]
async fn a_resnet18_loads_in_torch_torchvision_timm_and_numpy() {
    an_export_loads("resnet18").await;
}

#[tokio::test]
async fn a_resnet50_loads_in_torch_torchvision_timm_and_numpy() {
    an_export_loads("resnet50").await;
}

fn tiny() -> Vec<Tensor> {
    let data: Vec<u8> = (0..16_u8).collect();
    vec![Tensor { name: "conv1.weight".into(), dtype: sgcl_runstore::Dtype::F32, shape: vec![4], data: data.into() }]
}

#[tokio::test]
async fn a_pull_of_damaged_files_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("run").to_str().unwrap()).unwrap();
    let target = dir.path().join("out").join("pulled");
    let none = pull(&store, None, &target, |_, _| ()).await.unwrap_err();
    assert!(matches!(none, ExportError::None { .. }), "{none}");
    let folder = write_export(&store, &spec("resnet18"), &commit(), &tiny(), now()).await.unwrap();
    let rel = format!("{folder}/backbone.pth");
    let mut bytes = store.get(&rel, 1 << 20).await.unwrap().to_vec();
    bytes[100] ^= 1;
    store.put(&rel, bytes).await.unwrap();
    let error = pull(&store, None, &target, |_, _| ()).await.unwrap_err().to_string();
    assert!(error.contains("backbone.pth") && error.contains("sha256"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path().join("out")).unwrap().count(), 0);
    write_export(&store, &spec("resnet18"), &commit(), &tiny(), now()).await.unwrap();
    pull(&store, Some(1), &target, |_, _| ()).await.unwrap();
    verify_export(&target).unwrap();
    let occupied = pull(&store, None, &target, |_, _| ()).await.unwrap_err();
    assert!(matches!(occupied, ExportError::Occupied { .. }), "{occupied}");
    std::fs::write(target.join("config.json"), "{}").unwrap();
    verify_export(&target).unwrap_err();
}

#[tokio::test]
async fn an_export_without_a_manifest_counts_for_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().to_str().unwrap()).unwrap();
    let folder = write_export(&store, &spec("resnet18"), &commit(), &tiny(), now()).await.unwrap();
    store.delete(&format!("{folder}/export.json")).await.unwrap();
    assert_eq!(sgcl_runstore::export::list_exports(&store).await.unwrap(), Vec::<u64>::new());
}

#[tokio::test]
async fn a_manifest_cannot_name_files_outside_its_folder() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("run").to_str().unwrap()).unwrap();
    let folder = write_export(&store, &spec("resnet18"), &commit(), &tiny(), now()).await.unwrap();
    let rel = format!("{folder}/export.json");
    let text = String::from_utf8(store.get(&rel, 1 << 20).await.unwrap().to_vec()).unwrap();
    store.put(&rel, text.replace("README.md", "../evil")).await.unwrap();
    let error = pull(&store, None, &dir.path().join("p"), |_, _| ()).await.unwrap_err().to_string();
    assert!(error.contains("../evil"), "{error}");
}

#[tokio::test]
async fn tensorboard_reads_what_was_measured() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().to_str().unwrap()).unwrap();
    let mut writer = MetricsWriter::new(&store, "demo");
    for step in 1..=1300_u64 {
        let values = BTreeMap::from([
            ("loss/total".to_owned(), 1.0 / step as f64),
            ("lr".to_owned(), 0.015),
            ("loss/inter".to_owned(), if step == 7 { f64::NAN } else { step as f64 }),
        ]);
        let time = now() + jiff::SignedDuration::from_millis(250 * step as i64);
        writer.push(StepMetrics { step, generation: 1, epoch: 2, epoch_step: step, epoch_steps: 2000, time, values });
    }
    writer.flush().await.unwrap();
    let script = r#"
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], size_guidance={"scalars": 0})
events.Reload()
assert sorted(events.Tags()["scalars"]) == ["epoch", "loss/inter", "loss/total", "lr"], events.Tags()
total = events.Scalars("loss/total")
assert [e.step for e in total] == list(range(1, 1301)), len(total)
assert all(abs(e.value - 1 / e.step) <= 1e-6 / e.step for e in total)
assert all(abs(e.wall_time - (1700000000 + 0.25 * e.step)) < 1e-6 for e in total)
assert len(events.Scalars("loss/inter")) == 1299
assert {e.value for e in events.Scalars("epoch")} == {2.0}
"#;
    python(script, &[&dir.path().join("tensorboard")]);
}
