//! `sgclctl eval detection` and the package behind it, on phantom fields in NuCLS's layout.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use serde_json::Value;
use sgcl_tests::{Programs, Run};
use tempfile::TempDir;

/// Tests run side by side: threads of torch's that wait for each other would slow all of them down.
const THREADS: [(&str, &str); 1] = [("OMP_NUM_THREADS", "1")];

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../transfer");

/// Fields of three slides, drawn once for all tests.
static FIELDS: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["--slides", "3", "--size", "1024", "--fields", "2", "--field-px", "64", "--seed", "5"];
    let out = ["phantom", "--layout", "nucls", "--out", text(folder.path())];
    let _ = Programs::find().unwrap().call(&[&out[..], &arguments].concat()).unwrap().success();
    folder
});

/// An interpreter that has what the package needs: the environment that `sgclctl` makes for itself.
static PYTHON: LazyLock<PathBuf> = LazyLock::new(|| {
    if let Some(named) = std::env::var_os("SGCL_TRANSFER_PYTHON") {
        return named.into();
    }
    let lender = lender();
    let cache = std::env::var_os("SGCL_CACHE").map(PathBuf::from).unwrap_or_else(|| {
        let home = |name: &str, below: &str| std::env::var_os(name).map(|folder| PathBuf::from(folder).join(below));
        home("XDG_CACHE_HOME", "sgcl").or_else(|| home("HOME", ".cache/sgcl")).expect("there is a home folder")
    });
    let made = Command::new(&lender)
        .arg(format!("{SOURCE}/sgcl_transfer/environment.py"))
        .arg("--cache")
        .arg(cache)
        .arg("--torch-from")
        .arg(&lender)
        .env_remove("LD_LIBRARY_PATH")
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    String::from_utf8(made.stdout).unwrap().trim().into()
});

/// The Python that tests compare with; it lends its torch.
fn lender() -> PathBuf {
    std::env::var_os("SGCL_PYTHON").expect("SGCL_PYTHON names a Python with torch; `make setup` sets it").into()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn python(arguments: &[&str]) -> Run {
    let output = Command::new(&*PYTHON)
        .args(arguments)
        // cargo puts libtorch there; Python finds its own.
        .env_remove("LD_LIBRARY_PATH")
        .env("PYTHONPATH", SOURCE)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .envs(THREADS)
        .output()
        .unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A detector trained for moments: the fifth stage over every region is what costs.
fn detect(more: &[&str]) -> Run {
    let small = ["--iterations", "4", "--batch", "1", "--crop", "48", "--scale", "1.5", "--regions", "8"];
    let few = ["--proposals", "20", "--resamples", "20", "--trials", "1", "--lr", "0.02"];
    let data = ["eval", "detection", "--output", "json", "--data", text(FIELDS.path())];
    let programs = Programs::find().unwrap();
    let mut command = programs.sgclctl(&[&data[..], &small, &few, more].concat());
    // No interpreter is named: it is found, or made, as for any user.
    let output = command.env_remove("LD_LIBRARY_PATH").envs(THREADS).output().unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn results(run: Run) -> Vec<Value> {
    run.success().stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

/// COCO's figures of files in its format, by nothing of ours.
const COCO: &str = r#"
import contextlib, io, json, sys
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
with contextlib.redirect_stdout(io.StringIO()):
    truth = COCO(sys.argv[1])
    found = COCOeval(truth, truth.loadRes(sys.argv[2]), "bbox")
    found.params.maxDets = [1, 100, 300]
    found.evaluate()
    found.accumulate()
p = found.eval["precision"][:, :, :, 0, 2]
print(json.dumps([float(v[v > -1].mean()) for v in (p, p[0], p[5])]))
"#;

#[test]
fn detectors_are_trained_from_weights_and_find_the_same_for_the_same_seed() {
    let folder = tempfile::tempdir().unwrap();
    let weights = folder.path().join("backbone.pth");
    let write = "import sys, torch, torchvision; torch.manual_seed(1); state = torchvision.models.resnet18().state_dict(); \
                 torch.save({'state_dict': {'module.' + k: v for k, v in state.items()}}, sys.argv[1])";
    let _ = python(&["-c", write, text(&weights)]).success();
    let call = |name: &str| {
        let to = folder.path().join(name);
        let run = detect(&["--weights", text(&weights), "random", "--seed", "3", "--to", text(&to)]);
        assert!(run.stderr.contains("120 keys were taken from under `state_dict.module.`"), "{}", run.stderr);
        (results(run), to)
    };
    let (first, to) = call("first");
    let (second, again) = call("second");
    assert_eq!(first, second, "the same seed gave other figures");

    let names: Vec<&Value> = first.iter().map(|result| &result["weights"]).collect();
    assert_eq!(names, [text(&weights), "random"]);
    assert_eq!(first[0]["keys"]["unexpected"].as_array().unwrap().len(), 2, "the classifier");
    let truth = to.join("ground-truth.json");
    let mut boxes = Vec::new();
    for (result, file) in first.iter().zip(["detections-backbone-pth-0.json", "detections-random-0.json"]) {
        assert_eq!((&result["test_slides"], &result["train_slides"]), (&1.into(), &2.into()));
        let found = &result["protocols"][0];
        assert_eq!((&found["protocol"], &found["trials"]), (&"detection".into(), &1.into()));
        let written = std::fs::read_to_string(to.join(file)).unwrap();
        assert!(serde_json::from_str::<Vec<Value>>(&written).unwrap().len() > 10, "nothing was found");
        // To the last digit, scores and corners alike.
        assert_eq!(written, std::fs::read_to_string(again.join(file)).unwrap(), "the same seed found other boxes");
        boxes.push(written);
        let figures = python(&["-c", COCO, text(&truth), text(&to.join(file))]).success();
        let theirs: Vec<f64> = serde_json::from_str(&figures.stdout).unwrap();
        for (name, theirs) in ["ap", "ap50", "ap75"].iter().zip(theirs) {
            let ours = found[name]["value"].as_f64().unwrap();
            assert!((ours - theirs).abs() < 1e-9, "{file}, {name}: {ours}, pycocotools {theirs}");
        }
    }
    assert_ne!(boxes[0], boxes[1], "the weights had no say");
}

#[test]
fn what_cannot_be_evaluated_is_refused_before_anything_is_trained() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("resnet34.pth");
    let write = "import sys, torch, torchvision; torch.save(torchvision.models.resnet34().state_dict(), sys.argv[1])";
    let _ = python(&["-c", write, text(&file)]).success();
    for (arguments, code, words) in [
        (["--arch", "resnet18", "--weights", text(&file)], 65, "is no resnet18"),
        (["--fold", "9", "--weights", "random"], 65, "fold_9_train.csv"),
        (["--fold", "1", "--weights", "colour-histogram"], 64, "finds no boxes"),
        (["--fold", "1", "--weights", "a-run"], 64, "--bucket"),
    ] {
        let run = detect(&arguments);
        assert_eq!(run.code, Some(code), "{arguments:?}: {}", run.stderr);
        assert!(run.stderr.contains(words) && run.stdout.is_empty(), "{arguments:?}: {}", run.stderr);
        assert!(run.stderr.contains("hint:"), "{arguments:?} has no remedy: {}", run.stderr);
    }
}

#[test]
fn an_interpreter_that_is_not_there_is_named() {
    let arguments = ["eval", "detection", "--data", text(FIELDS.path()), "--weights", "random"];
    let mut command = Programs::find().unwrap().sgclctl(&arguments);
    let output = command.env("SGCL_TRANSFER_PYTHON", "/nowhere/python").output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(78), "{words}");
    assert!(words.contains("SGCL_TRANSFER_PYTHON names /nowhere/python") && words.contains("hint:"), "{words}");
}

#[test]
fn the_packages_own_tests_pass() {
    let run = python(&["-m", "unittest", "discover", "-s", &format!("{SOURCE}/tests")]);
    assert_eq!(run.code, Some(0), "{}\n{}", run.stdout, run.stderr);
    assert!(!run.stderr.contains("Ran 0 tests"), "{}", run.stderr);
}

/// Configurations for libraries that are not here: what can be read of them is.
const READ: &str = r#"
import ast, pathlib, runpy, sys, yaml
root = pathlib.Path(sys.argv[1])
def merged(path):
    own = yaml.safe_load(path.read_text())
    base = own.pop("_BASE_", None)
    def into(a, b):
        for key, value in b.items():
            a[key] = into(a.get(key, {}), value) if isinstance(value, dict) else value
        return a
    return into(merged(path.parent / base), own) if base else own
for depth, width in (("18", 64), ("50", 256)):
    found = merged(root / f"detectron2/R-{depth}-C4-nucls.yaml")
    model = found["MODEL"]
    assert model["RESNETS"] == {"NORM": "SyncBN", "STRIDE_IN_1X1": False, "DEPTH": int(depth), "RES2_OUT_CHANNELS": width}, model
    assert model["PIXEL_MEAN"] == [123.675, 116.28, 103.53] and model["PIXEL_STD"] == [58.395, 57.12, 57.375]
    assert found["INPUT"]["FORMAT"] == "RGB" and model["BACKBONE"]["FREEZE_AT"] == 0
    heads = [n.name for n in ast.walk(ast.parse((root / "detectron2/train_net.py").read_text())) if isinstance(n, ast.ClassDef)]
    assert model["ROI_HEADS"]["NAME"] in heads, heads
    other = runpy.run_path(root / f"mmsegmentation/fcn_r{depth}-d8_bcss.py")["model"]
    assert other["backbone"]["depth"] == int(depth) and other["decode_head"]["in_channels"] == {"18": 512, "50": 2048}[depth]
base = runpy.run_path(root / "mmsegmentation/fcn_r50-d8_bcss.py")["model"]
assert base["backbone"]["type"] == "ResNet" and base["backbone"]["style"] == "pytorch" and base["data_preprocessor"]["bgr_to_rgb"]
for script in root.glob("*/*.py"):
    compile(script.read_text(), script, "exec")
"#;

#[test]
fn configurations_for_other_libraries_are_whole() {
    let run = Command::new(lender()).args(["-c", READ, SOURCE]).env_remove("LD_LIBRARY_PATH").output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
}
