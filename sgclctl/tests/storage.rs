//! Storage, slides and objects that are not what they should be: what is said, and with which code. And S3 in place of folders.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::path::Path;

use assert_cmd::Command;
use rstest::rstest;
use sgcl_patchset::Store;
use sgcl_tests::S3Server;
use support::store::finished_run;
use tempfile::TempDir;

struct Said {
    code: i32,
    out: String,
    err: String,
}

impl Said {
    /// One screen: `error:` with all of `words`, and a `hint:`.
    fn fails(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, code, "{}", self.err);
        assert!(self.err.contains("error: ") && self.err.contains("hint: "), "{}", self.err);
        assert!(self.err.lines().count() <= 24, "more than a screen:\n{}", self.err);
        for word in words {
            assert!(self.err.contains(word), "{word:?} is not in\n{}", self.err);
        }
    }
}

fn sgclctl_with(folder: &Path, environment: &[(&str, String)], arguments: &[&str]) -> Said {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sgclctl"));
    let output = command.current_dir(folder).envs(environment.iter().cloned()).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Said { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

fn sgclctl(folder: &Path, arguments: &[&str]) -> Said {
    sgclctl_with(folder, &[], arguments)
}

/// A folder with the run `first` in `bucket` on the set `patches`.
fn with_run() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str| Store::open(folder.path().join(name).to_str().unwrap()).unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(finished_run(open));
    folder
}

/// A picture of tissue on a white slide, `side` pixels wide.
fn tissue(file: &Path, side: u32) {
    let image = image::RgbImage::from_fn(side, side, |x, y| {
        let inside = (x.abs_diff(side / 2)).pow(2) + (y.abs_diff(side / 2)).pow(2) < (side / 3).pow(2);
        let grain = (x * 7 + y * 13 + x * y / 5) % 50;
        if inside { image::Rgb([190 - grain as u8, 80 + grain as u8, 160]) } else { image::Rgb([245, 245, 246]) }
    });
    image.save(file).unwrap();
}

#[test]
fn a_missing_bucket_is_told_from_a_missing_run() {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start(&folder.path().join("s3"), &["there"]).unwrap();
    let call = |arguments: &[&str]| sgclctl_with(folder.path(), &server.environment(), arguments);
    for command in
        [&["list", "--bucket", "s3://nowhere/runs"][..], &["status", "first", "--bucket", "s3://nowhere/runs"]]
    {
        call(command).fails(69, &["s3://nowhere", "bucket does not exist"]);
    }
    call(&["status", "first", "--bucket", "s3://there/runs"]).fails(65, &["first", "s3://there/runs"]);
}

#[test]
fn a_folder_and_a_bucket_of_s3_are_equal_citizens() {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start(&folder.path().join("s3"), &["lab"]).unwrap();
    let environment = server.environment();
    let variable = |name: &str| environment.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
    let open = |name: &str| Store::open_with_env(&format!("s3://lab/{name}"), &variable).unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(finished_run(open));
    let call = |arguments: &[&str]| sgclctl_with(folder.path(), &environment, arguments);
    let said = call(&["report", "first", "--bucket", "s3://lab/bucket", "--out", "r.html"]);
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(!said.err.contains("left out"), "{}", said.err);
    let html = std::fs::read_to_string(folder.path().join("r.html")).unwrap();
    assert!(html.contains("<polyline") && html.contains("class=\"tile same\""));
    assert!(call(&["list", "--bucket", "s3://lab/bucket"]).out.contains("finished"));
}

#[test]
fn storage_where_nobody_answers_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let environment = [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "hush"),
    ]
    .map(|(key, value)| (key, value.to_owned()));
    let said = sgclctl_with(folder.path(), &environment, &["list", "--bucket", "s3://lab/runs"]);
    said.fails(69, &["s3://lab/runs"]);
    assert!(!said.err.contains("hush"), "a secret is on the screen");
}

#[test]
fn a_slide_that_is_a_text_file_is_skipped_by_name_and_the_set_holds_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("notes.svs"), "not a slide\n").unwrap();
    tissue(&folder.path().join("real.png"), 640);
    let arguments = ["ingest", "notes.svs", "real.png", "--to", "set", "--patch-px", "64", "--level", "0"];
    let said = sgclctl(folder.path(), &arguments);
    assert_eq!(said.code, 65, "{}\n{}", said.out, said.err);
    assert!(said.err.contains("skipped: ") && said.err.contains("notes.svs"), "{}", said.err);
    assert!(said.out.contains("real") && said.out.contains("of 1 slide"), "{}", said.out);
    assert!(folder.path().join("set/patchset.json").is_file());
}

#[test]
fn slides_of_which_none_can_be_read_leave_no_patch_set() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("notes.svs"), "not a slide\n").unwrap();
    let said = sgclctl(folder.path(), &["ingest", "notes.svs", "--to", "set", "--level", "0"]);
    assert_eq!(said.code, 65, "{}\n{}", said.out, said.err);
    assert!(said.err.contains("notes.svs"), "{}", said.err);
    assert!(!folder.path().join("set/patchset.json").exists());
}

#[test]
fn a_truncated_shard_is_named_by_the_report() {
    let folder = with_run();
    let shards = folder.path().join("patches/shards");
    let shard = std::fs::read_dir(shards).unwrap().next().unwrap().unwrap().path();
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    let said = sgclctl(folder.path(), &["report", "first", "--bucket", "bucket"]);
    assert_eq!(said.code, 0, "{}", said.err);
    let name = shard.file_name().unwrap().to_str().unwrap();
    assert!(said.err.contains("left out: ") && said.err.contains(name), "{}", said.err);
}

#[rstest]
#[case::spec("spec.json")]
#[case::commit("commits/00000001.json")]
fn a_truncated_record_is_named(#[case] record: &str) {
    let folder = with_run();
    let file = folder.path().join("bucket/runs/first").join(record);
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let said = sgclctl(folder.path(), &["status", "first", "--bucket", "bucket"]);
    assert_eq!(said.code, 65, "{}", said.err);
    assert!(said.err.contains("error: ") && said.err.contains(record), "{}", said.err);
}

#[test]
fn a_pull_without_an_export_leaves_no_folder() {
    let folder = with_run();
    let said = sgclctl(folder.path(), &["pull", "first", "weights", "--bucket", "bucket"]);
    said.fails(65, &["no export yet"]);
    assert!(!folder.path().join("weights").exists());
}

#[test]
fn a_run_is_not_begun_over_another_of_its_name() {
    let folder = with_run();
    let run = ["run", "--local", "--data", "patches", "--bucket", "bucket", "--name", "first", "--set", "epochs=8"];
    let small = ["--set", "objective.hard=16", "--set", "objective.nearest=32", "--set", "kmeans.clusters=12"];
    sgclctl(folder.path(), &[&run[..], &small].concat()).fails(73, &["first", "--resume"]);
    let other = ["--set", "batch.per_rank=32", "--resume", "--dry-run"];
    let said = sgclctl(folder.path(), &[&run[..], &small, &other].concat());
    assert_eq!(said.code, 78, "{}", said.err);
    assert!(said.err.contains("config.batch.per_rank: the run has 16, asked for is 32"), "{}", said.err);
}

#[test]
fn resuming_takes_the_runs_own_configuration_and_data() {
    let folder = with_run();
    let worker = assert_cmd::cargo::cargo_bin("sgclctl");
    let run = ["run", "--local", "--bucket", "bucket", "--name", "first", "--resume", "--dry-run"];
    let said = sgclctl_with(folder.path(), &[("SGCL_WORKER", worker.display().to_string())], &run);
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(said.err.contains("8 epochs") && said.err.contains("2 rank(s) × 16 = 32 patches"), "{}", said.err);
}

#[test]
fn a_configuration_file_that_is_not_there_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let said = sgclctl(folder.path(), &["config", "show", "-f", "none.yaml"]);
    assert_eq!(said.code, 78, "{}", said.err);
    assert!(said.err.contains("none.yaml"), "{}", said.err);
}
