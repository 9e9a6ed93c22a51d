//! `sgclctl eval` as a user types it, on phantom slides: every protocol, the same figures for the same seed, weights as others wrote
//! them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use serde_json::Value;
use sgcl_tests::{Programs, Run};
use tempfile::TempDir;

/// A labelled set of some hundred patches, ingested once for all tests.
static SET: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let (slides, set) = (text(&folder.path().join("slides")), text(&folder.path().join("set")));
    let programs = Programs::find().unwrap();
    let _ = programs
        .call(&["phantom", "--out", &slides, "--slides", "7", "--size", "512", "--seed", "5"])
        .unwrap()
        .success();
    let files = std::fs::read_dir(&slides).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<String> =
        files.filter(|path| path.extension().is_some_and(|e| e == "tif")).map(|path| text(&path)).collect();
    let mut arguments = vec!["ingest", "--to", &set, "--patch-px", "64", "--level", "0"];
    arguments.extend(files.iter().map(String::as_str));
    let _ = programs.call(&arguments).unwrap().success();
    folder
});

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Evaluates at 32 pixels, with a cache folder of its own.
fn eval(cache: &Path, more: &[&str]) -> Run {
    let (set, cache) = (text(&SET.path().join("set")), text(cache));
    let mut arguments = vec!["eval", "--data", &set, "--px", "32", "--cache", &cache, "--output", "json"];
    arguments.extend(more);
    Programs::find().unwrap().call(&arguments).unwrap()
}

fn results(run: Run) -> Vec<Value> {
    run.success().stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

fn features(cache: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn every_protocol_runs_and_gives_the_same_figures_for_the_same_seed() {
    let folder = tempfile::tempdir().unwrap();
    let page = text(&folder.path().join("page.html"));
    let all = [
        "--weights",
        "random",
        "colour-histogram",
        "--protocol",
        "knn,linear,finetune",
        "--recipe",
        "lbfgs,seed,eva",
        "--labels",
        "10%,100%",
        "--trials",
        "2",
        "--epochs",
        "2",
        "--seed",
        "3",
        "--page",
        &page,
    ];
    let first = results(eval(&folder.path().join("a"), &all));
    let second = results(eval(&folder.path().join("b"), &all));
    assert_eq!(first, second, "the same seed gave other figures");

    let names = |result: &Value| -> Vec<String> {
        let found = result["protocols"].as_array().unwrap().iter();
        found.map(|found| found["protocol"].as_str().unwrap().to_owned()).collect()
    };
    let frozen = ["knn-10", "knn-20", "linear", "linear-seed", "linear-eva"];
    assert_eq!(names(&first[0]), [&frozen[..], &["finetune-10%", "finetune-100%"]].concat());
    assert_eq!(names(&first[1]), frozen, "a histogram has nothing to fine-tune");
    assert_eq!(first[1]["skipped"].as_array().unwrap().len(), 2);
    let classes = first[0]["classes"].as_array().unwrap().len();
    let tested = first[0]["test_patches"].as_u64().unwrap();
    for found in first.iter().flat_map(|result| result["protocols"].as_array().unwrap()) {
        let name = found["protocol"].as_str().unwrap();
        for figure in ["accuracy", "balanced_accuracy", "macro_f1", "roc_auc"] {
            let [value, low, high] = ["value", "low", "high"].map(|part| found[figure][part].as_f64().unwrap());
            assert!((0.0..=1.0).contains(&value) && low <= high, "{name} {figure}: {}", found[figure]);
        }
        let trials = if name == "linear" || name.starts_with("knn") { 1 } else { 2 };
        assert_eq!(found["trials"], trials, "{name}");
        assert_eq!(found["accuracy"]["std"].is_number(), trials == 2, "{name}");
        let confusion: Vec<Vec<u64>> = serde_json::from_value(found["confusion"].clone()).unwrap();
        assert_eq!(confusion.len(), classes);
        assert_eq!(confusion.iter().flatten().sum::<u64>(), trials * tested, "{name}");
        let right: u64 = (0..classes).map(|class| confusion[class][class]).sum();
        let share = right as f64 / (trials * tested) as f64;
        assert!((share - found["accuracy"]["value"].as_f64().unwrap()).abs() < 1e-9, "{name}");
    }
    let labels = |at: usize| first[0]["protocols"][at]["train_patches"].as_u64().unwrap();
    assert_eq!(labels(6), labels(0));
    assert!(labels(5) * 8 < labels(6) && labels(5) > 0, "a tenth of {} is not {}", labels(6), labels(5));
    // What a run's report reads.
    assert_eq!(first[0]["knn"]["20"], first[0]["protocols"][1]["accuracy"]["value"]);
    assert_eq!(first[0]["linear"], first[0]["protocols"][2]["accuracy"]["value"]);
    assert_eq!(first[0]["confusion"], first[0]["protocols"][2]["confusion"]);

    let html = std::fs::read_to_string(page).unwrap();
    assert_eq!(html.matches("<details").count(), 12);
    assert!(html.contains("finetune-10%") && html.contains("data:image/jpeg;base64,") && html.contains("<polyline"));
    for outside in ["src=\"http", "href=\"http", "url(", "@import", "<script"] {
        assert!(!html.contains(outside), "{outside}");
    }
    let other = results(eval(&folder.path().join("a"), &["--weights", "random", "--seed", "4"]));
    assert_ne!(other[0]["protocols"], first[0]["protocols"]);
}

#[test]
fn features_are_computed_once_and_again_where_their_file_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path();
    let call = || eval(cache, &["--weights", "random", "--protocol", "knn"]).success();
    let first = call();
    let files = features(cache);
    assert_eq!(files.len(), 1, "{files:?}");
    let written = std::fs::metadata(&files[0]).unwrap().modified().unwrap();
    let second = call();
    assert_eq!(first.stdout, second.stdout);
    assert_eq!(std::fs::metadata(&files[0]).unwrap().modified().unwrap(), written, "features were computed again");

    let whole = std::fs::read(&files[0]).unwrap();
    let mut damaged = whole.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 16;
    for content in [&damaged[..], &whole[..100], b""] {
        std::fs::write(&files[0], content).unwrap();
        let third = call();
        assert_eq!(first.stdout, third.stdout);
        assert!(third.stderr.contains("warning:") && third.stderr.contains("computing them again"), "{}", third.stderr);
        assert_eq!(std::fs::read(&files[0]).unwrap(), whole, "the damaged file was not replaced");
    }
    let _ = eval(cache, &["--weights", "random", "--protocol", "knn", "--seed", "1"]).success();
    assert_eq!(features(cache).len(), 2, "another network has features of its own");
}

/// Weights as others write them, all of one network.
const WRITE: &str = r#"
import sys, torch, torchvision
torch.manual_seed(1)
state = torchvision.models.resnet18().state_dict()
folder = sys.argv[1]
for prefix in ["", "module.", "backbone.", "encoder_q.", "model."]:
    torch.save({"state_dict": {prefix + k: v for k, v in state.items()}}, f"{folder}/{prefix or 'plain.'}pth")
lacking = {k: v for k, v in state.items() if not k.startswith("layer4.1.conv2")}
torch.save(lacking, f"{folder}/lacking.pth")
torch.save({"head.weight": torch.zeros(3)}, f"{folder}/none.pth")
torch.save(torchvision.models.resnet50().state_dict(), f"{folder}/resnet50.pth")
open(f"{folder}/empty.pth", "w").close()
class Evil:
    def __reduce__(self):
        return open, (f"{folder}/executed", "w")
torch.save({"state_dict": Evil()}, f"{folder}/evil.pth")
"#;

#[test]
fn weights_are_mapped_or_refused_and_never_taken_wrongly() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| text(&folder.path().join(name));
    let python = std::env::var("SGCL_PYTHON").expect("SGCL_PYTHON names a Python with torch; `make setup` sets it");
    let written =
        Command::new(python).args(["-c", WRITE, &text(folder.path())]).env_remove("LD_LIBRARY_PATH").status().unwrap();
    assert!(written.success());
    let cache = folder.path().join("cache");

    let files: Vec<String> = ["plain.pth", "module.pth", "backbone.pth", "encoder_q.pth", "model.pth"].map(at).into();
    let mut arguments = vec!["--protocol", "knn", "--weights"];
    arguments.extend(files.iter().map(String::as_str));
    let run = eval(&cache, &arguments);
    assert!(run.stderr.contains("were taken from under `state_dict.encoder_q.`"), "{}", run.stderr);
    let found = results(run);
    for (result, prefix) in found.iter().zip(["", "module.", "backbone.", "encoder_q.", "model."]) {
        assert_eq!(result["keys"]["prefix"], format!("state_dict.{prefix}"));
        assert_eq!(result["keys"]["unexpected"].as_array().unwrap().len(), 2, "the classifier");
        assert_eq!(result["protocols"], found[0]["protocols"], "{prefix} gave another network");
    }
    assert_eq!(features(&cache).len(), 1, "one network has its features once");

    let run = eval(&cache, &["--protocol", "knn", "--weights", &at("lacking.pth")]);
    assert!(
        run.stderr.contains("lacks 1 of the backbone's keys") && run.stderr.contains("layer4.1.conv2.weight"),
        "{}",
        run.stderr
    );
    assert_eq!(results(run)[0]["keys"]["missing"], serde_json::json!(["layer4.1.conv2.weight"]));

    for name in ["none.pth", "resnet50.pth", "empty.pth", "evil.pth"] {
        let run = eval(&cache, &["--weights", &at(name)]);
        assert_eq!(run.code, Some(65), "{name}: {}", run.stderr);
        assert!(run.stderr.contains(name) && run.stdout.is_empty(), "{}", run.stderr);
    }
    assert!(!folder.path().join("executed").exists());
}

#[test]
fn what_cannot_be_asked_for_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for wrong in
        [["--labels", "0%"], ["--protocol", "svm"], ["--recipe", "seeds"], ["--trials", "0"], ["--labels", "120%"]]
    {
        let run = eval(folder.path(), &["--weights", "random", wrong[0], wrong[1]]);
        assert_eq!(run.code, Some(2), "{wrong:?}: {}", run.stderr);
    }
}
