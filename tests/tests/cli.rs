//! The user's command from slides to weights, as a user types it: storage over HTTP, and storage that is full.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use sgcl_tests::{Programs, S3Server, SmallDisk};

/// A configuration that trains in seconds on some dozen patches of 64 px.
const SMALL: [&str; 9] = [
    "epochs=2",
    "views.global_px=32",
    "views.local_px=32",
    "batch.per_rank=8",
    "objective.negatives=64",
    "objective.hard=4",
    "objective.nearest=16",
    "kmeans.clusters=4",
    "device=cpu",
];

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Draws two slides into `folder` and returns their paths.
fn slides(programs: &Programs, folder: &Path) -> Vec<String> {
    let out = text(folder);
    let _ =
        programs.call(&["phantom", "--out", &out, "--slides", "2", "--size", "640", "--seed", "3"]).unwrap().success();
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|e| e == "tif")).map(|path| text(&path)).collect()
}

fn ingest(programs: &Programs, slides: &[String], to: &str) {
    let mut arguments = vec!["ingest", "--to", to, "--patch-px", "64", "--level", "0"];
    arguments.extend(slides.iter().map(String::as_str));
    let _ = programs.call(&arguments).unwrap().success();
}

fn train<'a>(data: &'a str, bucket: &'a str, name: &'a str) -> Vec<&'a str> {
    let mut arguments = vec!["run", "--local", "--nodes", "1", "--ranks-per-node", "2", "--output", "json"];
    arguments.extend(["--data", data, "--bucket", bucket, "--name", name]);
    arguments.extend(SMALL.iter().flat_map(|set| ["--set", set]));
    arguments
}

#[test]
fn it_starts_where_neither_libtorch_nor_openslide_is_installed() {
    let sgclctl = Programs::find().unwrap().sgclctl(&[]);
    let read =
        Command::new("readelf").arg("-d").arg(sgclctl.get_program()).output().expect("binutils: run `make setup`");
    let text = String::from_utf8_lossy(&read.stdout);
    let needed: Vec<&str> = text.lines().filter(|line| line.contains("(NEEDED)")).collect();
    assert!(needed.iter().any(|line| line.contains("libc.so")), "{text}");
    let optional: Vec<_> = needed.iter().filter(|line| line.contains("torch") || line.contains("openslide")).collect();
    assert!(optional.is_empty(), "sgclctl is linked with {optional:?}");
}

#[test]
fn slides_become_weights_through_an_s3_server_alone() {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start(&folder.path().join("s3"), &["lab"]).unwrap();
    let programs = Programs::find().unwrap().with(server.environment());
    let (data, bucket) = ("s3://lab/patches", "s3://lab/runs");
    ingest(&programs, &slides(&programs, &folder.path().join("slides")), data);

    let run = programs.call(&train(data, bucket, "first")).unwrap().success();
    let lines: Vec<Value> = run.stdout.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    assert!(lines.iter().any(|line| line["progress"]["step"].as_u64() > Some(1)), "steps are told as they happen");
    assert!(!(run.stdout + &run.stderr).contains("sgcl-test-secret"), "a secret is on the screen");

    let weights = folder.path().join("weights");
    let _ = programs.call(&["pull", "first", &text(&weights), "--bucket", bucket]).unwrap().success();
    assert!(weights.join("backbone.pth").is_file() && weights.join("model.safetensors").is_file());

    let cache = text(&folder.path().join("cache"));
    let scores = programs.call(&[
        "eval",
        "--data",
        data,
        "--bucket",
        bucket,
        "--weights",
        "first",
        "--output",
        "json",
        "--cache",
        &cache,
    ]);
    let scores: Value = serde_json::from_str(&scores.unwrap().success().stdout).unwrap();
    assert!(scores.to_string().contains("knn"), "{scores}");
    detects(&programs, bucket, &text(&folder.path().join("fields")));

    let again = programs.call(&train(data, bucket, "first")).unwrap();
    assert_eq!(again.code, Some(73), "{}", again.stderr);
}

/// The run's weights find their way into a detector, and its figures into the bucket.
fn detects(programs: &Programs, bucket: &str, fields: &str) {
    let drawn = ["phantom", "--layout", "nucls", "--out", fields, "--slides", "2", "--size", "1024"];
    let _ =
        programs.call(&[&drawn[..], &["--fields", "2", "--field-px", "64", "--seed", "5"]].concat()).unwrap().success();
    let what = ["eval", "detection", "--data", fields, "--bucket", bucket, "--weights", "first", "--output", "json"];
    let little = ["--trials", "1", "--iterations", "2", "--batch", "1", "--crop", "48", "--scale", "1.5"];
    let less = ["--regions", "8", "--proposals", "8", "--resamples", "0"];
    let found = programs.call(&[&what[..], &little, &less].concat()).unwrap().success();
    let found: Value = serde_json::from_str(&found.stdout).unwrap();
    assert_eq!(found["weights"], "first");
    assert_eq!((&found["keys"]["missing"], &found["keys"]["unexpected"]), (&json!([]), &json!([])));
    let status = programs.call(&["status", "first", "--bucket", bucket, "--output", "json"]).unwrap().success();
    let status: Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!(status["evals"]["first-detection"]["protocols"], found["protocols"], "{status}");
    let words = programs.call(&["status", "first", "--bucket", bucket, "--output", "human"]).unwrap().success().stdout;
    assert!(words.contains("first-detection: AP "), "{words}");
}

/// A run of many epochs that trains in the background until it is told otherwise.
fn train_long(programs: &Programs, data: &str, bucket: &str) -> std::process::Child {
    let mut arguments = train(data, bucket, "long");
    arguments.extend(["--set", "epochs=2000"]);
    quiet(programs.sgclctl(&arguments))
}

fn quiet(mut command: Command) -> std::process::Child {
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap()
}

fn status(programs: &Programs, bucket: &str) -> Value {
    let told = programs.call(&["status", "long", "--bucket", bucket, "--output", "json"]).unwrap().success();
    serde_json::from_str(&told.stdout).unwrap()
}

/// Waits until the run has trained beyond `step`.
fn trained(programs: &Programs, bucket: &str, step: u64) {
    for _ in 0..600 {
        if Path::new(bucket).join("runs/long/spec.json").exists() {
            let status = status(programs, bucket);
            if status["phase"] == "running" && status["step"].as_u64() > Some(step) {
                return;
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    panic!("the run never got beyond step {step}");
}

#[test]
fn a_run_under_way_is_drained_suspended_resumed_and_cancelled_from_another_process() {
    let folder = tempfile::tempdir().unwrap();
    let programs = Programs::find().unwrap();
    let data = text(&folder.path().join("patches"));
    let bucket = text(&folder.path().join("bucket"));
    ingest(&programs, &slides(&programs, &folder.path().join("slides")), &data);
    let order = |words: &[&str]| {
        let mut arguments = words.to_vec();
        arguments.extend(["--bucket", &bucket]);
        programs.call(&arguments).unwrap()
    };

    let mut run = train_long(&programs, &data, &bucket);
    trained(&programs, &bucket, 20);
    let unknown = order(&["drain", "long", "7"]);
    assert_eq!(unknown.code, Some(65), "{}", unknown.stderr);
    assert!(unknown.stderr.contains("there is no node 7; the run has long-0-0"), "{}", unknown.stderr);
    let _ = order(&["suspend", "long"]).success();
    assert_eq!(run.wait().unwrap().code(), Some(75));
    let suspended = status(&programs, &bucket);
    assert_eq!(suspended["phase"], "suspended");
    let _ = order(&["suspend", "long"]).success();
    let step = suspended["step"].as_u64().unwrap();

    let mut run = quiet(programs.sgclctl(&["resume", "long", "--bucket", &bucket]));
    trained(&programs, &bucket, step + 20);
    let _ = order(&["drain", "long", "0"]).success();
    let described = (0..300).find_map(|_| {
        std::thread::sleep(std::time::Duration::from_millis(200));
        let text = order(&["describe", "long"]).success().stdout;
        text.contains("was told to leave").then_some(text)
    });
    let described = described.expect("the drain is told of");
    assert!(described.contains("drain 0") && described.contains("suspend"), "{described}");
    let _ = order(&["cancel", "long"]).success();
    assert_eq!(run.wait().unwrap().code(), Some(1));
    assert_eq!(status(&programs, &bucket)["phase"], "cancelled");
    let again = order(&["resume", "long"]);
    assert_eq!(again.code, Some(65), "{}", again.stderr);
    assert!(again.stderr.contains("was cancelled"), "{}", again.stderr);
    let _ = order(&["verify", "long"]).success();
}

#[test]
fn a_full_disk_is_named_and_nothing_half_written_looks_whole() {
    let disk = match SmallDisk::mount(8) {
        Ok(disk) => disk,
        Err(reason) => {
            println!("skipped: a small file system cannot be mounted here ({reason})");
            return;
        }
    };
    let folder = tempfile::tempdir().unwrap();
    let programs = Programs::find().unwrap();
    let slides = slides(&programs, &folder.path().join("slides"));
    let data = text(&folder.path().join("patches"));
    ingest(&programs, &slides, &data);

    // A checkpoint of ResNet-18 needs ten times this disk.
    let bucket = text(&disk.path().join("runs"));
    let run = programs.call(&train(&data, &bucket, "first")).unwrap();
    assert_eq!(run.code, Some(73), "stdout:\n{}\nstderr:\n{}", run.stdout, run.stderr);
    assert!(run.stderr.contains("no space left") && run.stderr.contains(&bucket), "{}", run.stderr);
    assert!(run.stderr.contains("hint: "), "{}", run.stderr);
    let commits = disk.path().join("runs/runs/first/commits");
    let left = std::fs::read_dir(commits).map_or(0, Iterator::count);
    assert_eq!(left, 0, "no commit names parts that are not whole");

    // A patch set that does not fit is not there.
    let small = text(&disk.path().join("set"));
    std::fs::write(disk.path().join("filler"), vec![0; 7 << 20]).ok();
    let mut arguments = vec!["ingest", "--to", &small, "--patch-px", "64", "--level", "0"];
    arguments.extend(slides.iter().map(String::as_str));
    let ingest = programs.call(&arguments).unwrap();
    assert_eq!(ingest.code, Some(73), "{}", ingest.stderr);
    assert!(ingest.stderr.contains("no space left") && ingest.stderr.contains("hint: "), "{}", ingest.stderr);
    assert!(!disk.path().join("set/patchset.json").exists());
}
