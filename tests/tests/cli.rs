//! The user's command from slides to weights, as a user types it: storage over HTTP, and storage that is full.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use sgcl_tests::{Programs, S3Server};

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

    let scores = programs.call(&["eval", "--data", data, "--bucket", bucket, "--weights", "first", "--output", "json"]);
    let scores: Value = serde_json::from_str(&scores.unwrap().success().stdout).unwrap();
    assert!(scores.to_string().contains("knn"), "{scores}");

    let again = programs.call(&train(data, bucket, "first")).unwrap();
    assert_eq!(again.code, Some(73), "{}", again.stderr);
}

/// A file system of `megabytes`, unmounted when dropped; none where the test may not mount.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(megabytes: u32) -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        let size = format!("size={megabytes}m");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder.path()).output();
        match mount {
            Ok(done) if done.status.success() => Ok(Self(folder)),
            Ok(done) => Err(String::from_utf8_lossy(&done.stderr).trim().to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A mount left behind goes with the machine.
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
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
    let bucket = text(&disk.0.path().join("runs"));
    let run = programs.call(&train(&data, &bucket, "first")).unwrap();
    assert_eq!(run.code, Some(73), "stdout:\n{}\nstderr:\n{}", run.stdout, run.stderr);
    assert!(run.stderr.contains("no space left") && run.stderr.contains(&bucket), "{}", run.stderr);
    assert!(run.stderr.contains("hint: "), "{}", run.stderr);
    let commits = disk.0.path().join("runs/runs/first/commits");
    let left = std::fs::read_dir(commits).map_or(0, Iterator::count);
    assert_eq!(left, 0, "no commit names parts that are not whole");

    // A patch set that does not fit is not there.
    let small = text(&disk.0.path().join("set"));
    std::fs::write(disk.0.path().join("filler"), vec![0; 7 << 20]).ok();
    let mut arguments = vec!["ingest", "--to", &small, "--patch-px", "64", "--level", "0"];
    arguments.extend(slides.iter().map(String::as_str));
    let ingest = programs.call(&arguments).unwrap();
    assert_eq!(ingest.code, Some(73), "{}", ingest.stderr);
    assert!(ingest.stderr.contains("no space left") && ingest.stderr.contains("hint: "), "{}", ingest.stderr);
    assert!(!disk.0.path().join("set/patchset.json").exists());
}
