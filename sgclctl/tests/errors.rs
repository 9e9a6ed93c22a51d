//! What a user sees when something is wrong: what it is, the remedy, the exit code.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;

use assert_cmd::Command;
use sgcl_patchset::{Opened, PatchSetWriter, SlideInfo, Store, WriterOptions};
use tempfile::TempDir;

struct Said {
    code: i32,
    out: String,
    err: String,
}

fn sgclctl(folder: &Path, arguments: &[&str]) -> Said {
    let output = Command::new(env!("CARGO_BIN_EXE_sgclctl")).current_dir(folder).args(arguments).output().unwrap();
    Said {
        code: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// A patch set `set` of one slide with 4 × 4 patches.
fn small_set(folder: &Path) {
    let mut jpeg = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_pixel(16, 16, image::Rgb([120, 60, 140]))
        .write_to(&mut jpeg, image::ImageFormat::Jpeg)
        .unwrap();
    let store = Store::open(folder.join("set").to_str().unwrap()).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let Opened::Writer(writer) = PatchSetWriter::open(store, WriterOptions::new(16, 90, 0)).await.unwrap() else {
            panic!("the set is there already");
        };
        let mut slide = writer
            .slide(SlideInfo {
                name: "a".into(),
                source: "a.svs".into(),
                fingerprint: "1".into(),
                level: 0,
                mpp: None,
                width: 64,
                height: 64,
                grid: [4, 4],
                spatial: true,
            })
            .unwrap();
        for y in 0..4 {
            for x in 0..4 {
                slide.push(x, y, None, jpeg.get_ref()).unwrap();
            }
        }
        slide.finish().await.unwrap();
        writer.finish(|_, _| {}).await.unwrap();
    });
}

#[test]
fn a_misspelt_key_names_the_right_one() {
    let folder = folder();
    std::fs::write(folder.path().join("c.yaml"), "epoch: 3\n").unwrap();
    for arguments in [&["config", "check", "-f", "c.yaml"][..], &["config", "check", "--set", "epoch=3"]] {
        let said = sgclctl(folder.path(), arguments);
        assert_eq!(said.code, 78, "{}", said.err);
        assert!(said.err.starts_with("error: "), "{}", said.err);
        assert!(said.err.contains("\nhint: ") && said.err.contains("epochs"), "{}", said.err);
        assert!(said.out.is_empty());
    }
}

#[test]
fn a_url_of_unknown_kind_is_a_usage_error() {
    let folder = folder();
    let said = sgclctl(folder.path(), &["list", "--bucket", "gopher://x/y"]);
    assert_eq!(said.code, 64, "{}", said.err);
    assert!(said.err.contains("gopher") && said.err.contains("hint: ") && said.err.contains("s3://"), "{}", said.err);
}

#[test]
fn a_missing_patch_set_is_named_and_nothing_is_made() {
    let folder = folder();
    let said = sgclctl(folder.path(), &["run", "--local", "--data", "nowhere", "--bucket", "runs", "--name", "a"]);
    assert_eq!(said.code, 65, "{}", said.err);
    assert!(said.err.contains("nowhere/patchset.json") && said.err.contains("hint: "), "{}", said.err);
    assert!(!folder.path().join("runs").exists());
}

#[test]
fn a_missing_bucket_folder_is_named() {
    let folder = folder();
    for arguments in [&["status", "a", "--bucket", "nowhere"][..], &["pull", "a", "w", "--bucket", "nowhere"]] {
        let said = sgclctl(folder.path(), arguments);
        assert_eq!(said.code, 65, "{}", said.err);
        assert!(said.err.contains("nowhere") && said.err.contains("hint: "), "{}", said.err);
    }
    assert!(!folder.path().join("w").exists());
}

#[test]
fn an_unknown_run_is_told_from_a_missing_bucket() {
    let folder = folder();
    std::fs::create_dir(folder.path().join("runs")).unwrap();
    let said = sgclctl(folder.path(), &["status", "a", "--bucket", "runs"]);
    assert_eq!(said.code, 65, "{}", said.err);
    assert!(said.err.contains("there is no run a in"), "{}", said.err);
    let said = sgclctl(folder.path(), &["status", "Not A Name", "--bucket", "runs"]);
    assert_eq!(said.code, 64, "{}", said.err);
}

#[test]
fn a_batch_larger_than_the_set_is_refused_with_the_numbers() {
    let folder = folder();
    small_set(folder.path());
    let fits = ["--set", "objective.hard=2", "--set", "objective.nearest=8", "--set", "kmeans.clusters=4"];
    let run = ["run", "--local", "--data", "set", "--bucket", "runs", "--name", "a", "--dry-run"];
    let said = sgclctl(folder.path(), &[&run[..], &fits, &["--set", "batch.per_rank=64"]].concat());
    assert_eq!(said.code, 78, "{}", said.err);
    assert!(said.err.contains("= 64 patches, the set has 16"), "{}", said.err);
    assert!(!folder.path().join("runs").exists());
}

#[test]
fn resuming_without_a_name_is_refused_by_the_command_line() {
    let folder = folder();
    let said = sgclctl(folder.path(), &["run", "--local", "--bucket", "runs", "--resume"]);
    assert_eq!(said.code, 2, "{}", said.err);
    assert!(said.err.contains("--name"), "{}", said.err);
}

#[test]
fn the_help_lists_every_exit_code() {
    let said = sgclctl(folder().path(), &["--help"]);
    assert_eq!(said.code, 0);
    for code in [0, 1, 2, 64, 65, 69, 73, 74, 75, 78] {
        let listed = said.out.lines().any(|line| line.trim_start().starts_with(&format!("{code}  ")));
        assert!(listed, "{code} is not listed:\n{}", said.out);
    }
}

#[test]
fn what_config_show_prints_can_be_given_back() {
    let folder = folder();
    let shown = sgclctl(folder.path(), &["config", "show", "--set", "epochs=7"]);
    assert_eq!(shown.code, 0, "{}", shown.err);
    std::fs::write(folder.path().join("c.yaml"), &shown.out).unwrap();
    let again = sgclctl(folder.path(), &["config", "show", "-f", "c.yaml"]);
    assert_eq!((again.code, again.out), (0, shown.out), "{}", again.err);
}

#[test]
fn a_worker_that_is_not_there_says_how_to_get_it() {
    let folder = folder();
    let output = Command::new(env!("CARGO_BIN_EXE_sgclctl"))
        .env("SGCL_WORKER", folder.path().join("none"))
        .args(["eval", "--data", "set", "--weights", "random"])
        .output()
        .unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{err}");
    assert!(err.contains("SGCL_WORKER") && err.contains("hint: "), "{err}");
}
