//! `sgclctl eval segmentation` as a user types it, on drawn data in BCSS's layout: figures as NumPy finds them, the same for the same
//! seed, and what does not fit refused with its file.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use rstest::rstest;
use serde_json::Value;
use sgcl_tests::{Programs, Run};
use tempfile::TempDir;

/// Pictures of 256 pixels, two of six to validate on.
static DATA: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    draw(folder.path(), 6);
    folder
});

fn draw(folder: &Path, pictures: u64) {
    let (out, count) = (text(folder), pictures.to_string());
    let arguments = ["phantom", "--layout", "bcss", "--out", &out, "--slides", &count, "--size", "256", "--seed", "11"];
    let _ = Programs::find().unwrap().call(&arguments).unwrap().success();
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn oracle(arguments: &[&str]) -> Vec<Value> {
    let python = std::env::var_os("SGCL_PYTHON").expect("SGCL_PYTHON is not set; run `make setup`");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracles/segmentation.py");
    let out = Command::new(python).arg(script).args(arguments).env_remove("LD_LIBRARY_PATH").output().unwrap();
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// On small tiles.
fn segment(data: &Path, more: &[&str]) -> Run {
    let data = text(data);
    let mut arguments = vec!["eval", "segmentation", "--data", &data, "--output", "json"];
    arguments.extend(["--batch", "6"]);
    arguments.extend(more);
    Programs::find().unwrap().call(&arguments).unwrap()
}

fn results(run: Run) -> Vec<Value> {
    run.success().stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

fn near(found: &Value, expected: &Value, what: &str) {
    if expected.is_null() {
        return assert!(found.is_null(), "{what}: {found}, by NumPy there is none");
    }
    let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
    assert!((found - expected).abs() < 1e-9, "{what}: {found}, by NumPy {expected}");
}

/// Weights as others write them: a network, under a prefix and without, and none. Without residual branches at first it learns fast.
const WRITE: &str = r#"
import sys, torch, torchvision
folder = sys.argv[1]
torch.manual_seed(1)
state = torchvision.models.resnet18(zero_init_residual=True).state_dict()
torch.save(state, f"{folder}/plain.pth")
torch.save({"state_dict": {"module." + k: v for k, v in state.items()}}, f"{folder}/module.pth")
torch.save({"head.weight": torch.zeros(3)}, f"{folder}/none.pth")
"#;

fn write_weights(folder: &Path) {
    let python = std::env::var("SGCL_PYTHON").expect("SGCL_PYTHON names a Python with torch; `make setup` sets it");
    let written =
        Command::new(python).args(["-c", WRITE, &text(folder)]).env_remove("LD_LIBRARY_PATH").status().unwrap();
    assert!(written.success());
}

#[test]
fn figures_are_numpys_better_than_guesses_and_the_same_for_the_same_seed() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    draw(&data, 6);
    oracle(&["paint", &text(&data), "1"]);
    write_weights(folder.path());
    let (save, page) = (folder.path().join("saved"), text(&folder.path().join("page.html")));
    let weights = text(&folder.path().join("plain.pth"));
    let call = |trials: &str, save: &Path| {
        let more = ["--weights", &weights, "--steps", "20", "--lr", "0.03", "--tile-px", "36", "--augment", "flip"];
        let save = text(save);
        let rest = ["--seed", "3", "--page", &page, "--trials", trials, "--save", &save];
        results(segment(&data, &[&more[..], &rest[..]].concat()))
    };
    let found = &call("2", &save)[0];
    let by_numpy = oracle(&["scores", &text(&data), &text(&save.join("0-plain.pth"))]);
    assert_eq!(by_numpy.len(), 2);
    for (trial, expected) in by_numpy.iter().enumerate() {
        near(&found["mean_iou"]["trials"][trial], &expected["mean_iou"], "mean IoU");
        near(&found["accuracy"]["trials"][trial], &expected["accuracy"], "accuracy");
        for (class, name) in ["other", "tumour", "stroma", "inflammatory", "necrosis"].iter().enumerate() {
            near(&found["iou"][*name]["trials"][trial], &expected["iou"][class], name);
        }
        let reached = expected["mean_iou"].as_f64().unwrap();
        let guessed = expected["guess"].as_f64().unwrap().max(expected["most"].as_f64().unwrap());
        assert!(reached > 1.5 * guessed, "trial {trial} learnt {reached}, guessing reaches {guessed}");
    }
    let sum = |row: usize, column: usize| -> u64 {
        by_numpy.iter().map(|trial| trial["confusion"][row][column].as_u64().unwrap()).sum()
    };
    let confusion: Vec<Vec<u64>> = serde_json::from_value(found["confusion"].clone()).unwrap();
    assert_eq!(confusion, (0..5).map(|row| (0..5).map(|column| sum(row, column)).collect()).collect::<Vec<Vec<u64>>>());
    let mean = &found["mean_iou"];
    let [value, low, high] = ["value", "low", "high"].map(|part| mean[part].as_f64().unwrap());
    assert!(low <= high && value > 0.0 && mean["std"].is_number(), "{mean}");
    assert_eq!((&found["validation_images"], &found["train_images"]), (&2.into(), &4.into()));
    assert_eq!(found["bootstrap"]["slides"], 2);

    let pictures = std::fs::read_dir(save.join("0-plain.pth/pictures")).unwrap().count();
    assert_eq!(pictures, 2);
    let html = std::fs::read_to_string(&page).unwrap();
    assert_eq!(html.matches("data:image/jpeg;base64,").count(), 2);
    for outside in ["src=\"http", "href=\"http", "url(", "@import", "<script"] {
        assert!(!html.contains(outside), "{outside}");
    }

    // The first trial's seed is the seed itself, however many follow.
    let again = &call("1", &folder.path().join("again"))[0];
    for name in ["mean_iou", "accuracy"] {
        assert_eq!(again[name]["value"], found[name]["trials"][0], "the same seed gave another {name}");
    }
    assert_eq!(serde_json::from_value::<Vec<Vec<u64>>>(again["confusion"].clone()).unwrap(), of_trial(&by_numpy[0]));
}

fn of_trial(trial: &Value) -> Vec<Vec<u64>> {
    serde_json::from_value(trial["confusion"].clone()).unwrap()
}

#[test]
fn weights_of_files_are_taken_and_those_that_match_nothing_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_weights(folder.path());
    let at = |name: &str| text(&folder.path().join(name));
    let quick = ["--steps", "1", "--trials", "1", "--augment", "none", "--tile-px", "128"];
    let run = segment(DATA.path(), &[&quick[..], &["--weights", &at("module.pth"), "random"]].concat());
    assert!(run.stderr.contains("were taken from under `state_dict.module.`"), "{}", run.stderr);
    let found = results(run);
    assert_eq!(found[0]["keys"]["missing"], serde_json::json!([]));
    assert_eq!(found[0]["settings"]["augment"], serde_json::json!({ "crop": false, "flip": false, "colour": false }));
    assert_ne!(found[0]["confusion"], found[1]["confusion"], "other weights, the same network");
    assert!(found[0]["mean_iou"]["std"].is_null());

    let run = segment(DATA.path(), &[&quick[..], &["--weights", &at("none.pth")]].concat());
    assert_eq!(run.code, Some(65), "{}", run.stderr);
    assert!(run.stderr.contains("none.pth") && run.stderr.contains("no weight matches") && run.stdout.is_empty());
}

#[rstest]
#[case::size("size", "both must be of one size")]
#[case::class("class", "holds the class 22, but BCSS has 0 to 21")]
#[case::colour("colour", "wanted is one channel")]
#[case::truncated("truncated", "cannot be read as a mask")]
#[case::missing("missing", "has no mask")]
fn a_file_that_does_not_fit_is_named_with_the_reason(#[case] how: &str, #[case] says: &str) {
    let folder = tempfile::tempdir().unwrap();
    draw(folder.path(), 3);
    let victim = oracle(&["spoil", &text(folder.path()), how])[0]["file"].as_str().unwrap().to_owned();
    let run = segment(folder.path(), &["--weights", "random"]);
    assert_eq!(run.code, Some(65), "{}", run.stderr);
    assert!(run.stderr.contains(&victim) && run.stderr.contains(says) && run.stdout.is_empty(), "{}", run.stderr);
}

#[test]
fn folders_without_what_is_needed_are_refused_and_other_masks_of_one_channel_taken() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |data: &Path, more: &[&str], says: &str| {
        let run = segment(data, &[&["--weights", "random"], more].concat());
        assert_eq!(run.code, Some(65), "{}", run.stderr);
        assert!(run.stderr.contains(says), "{}", run.stderr);
    };
    refused(folder.path(), &[], "holds no folder of images");
    draw(folder.path(), 3);
    refused(folder.path(), &["--validation", "ZZ"], "no image of the institutes to validate on (ZZ)");
    refused(folder.path(), &["--validation", "A1,A2,OL"], "holds no image to learn from");
    oracle(&["spoil", &text(folder.path()), "empty"]);
    refused(folder.path(), &[], "no pixel of the training images has a class");

    let quick = ["--weights", "random", "--steps", "1", "--trials", "1", "--tile-px", "128"];
    let figures = |how: Option<&str>| {
        let folder = tempfile::tempdir().unwrap();
        draw(folder.path(), 3);
        if let Some(how) = how {
            oracle(&["spoil", &text(folder.path()), how]);
        }
        results(segment(folder.path(), &quick))[0]["confusion"].clone()
    };
    let plain = figures(None);
    assert_eq!(figures(Some("sixteen")), plain);
    assert_eq!(figures(Some("palette")), plain);
}

#[test]
fn eval_asks_for_its_own_arguments_where_no_task_is_named() {
    let programs = Programs::find().unwrap().with(vec![("SGCL_BUCKET", "nowhere".to_owned())]);
    let run = programs.call(&["eval"]).unwrap();
    assert_eq!(run.code, Some(2));
    assert!(run.stderr.contains("--data") && run.stderr.contains("--weights"), "{}", run.stderr);
    let run = programs.call(&["eval", "segmentation"]).unwrap();
    assert_eq!(run.code, Some(2));
    let run = programs.call(&["eval", "segmentation", "--help"]).unwrap().success();
    assert!(run.stdout.contains("--tile-px") && run.stdout.contains("rgbs_colorNormalized"), "{}", run.stdout);
    let run = programs.call(&["eval", "segmentation", "--data", "d", "--weights", "random", "--lr", "0"]).unwrap();
    assert_eq!(run.code, Some(2), "{}", run.stderr);
}
