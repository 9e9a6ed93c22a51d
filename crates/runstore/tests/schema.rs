//! What is committed under `configs/` is what the code says.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use sgcl_runstore::RunConfig;

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs")
}

#[test]
fn the_committed_schema_is_the_generated_one() {
    let file = configs().join("schema.json");
    let text = format!("{}\n", serde_json::to_string_pretty(&RunConfig::json_schema()).unwrap());
    if std::env::var_os("SGCL_UPDATE").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    let committed = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(committed == text, "configs/schema.json has drifted; run this test with SGCL_UPDATE=1 and commit it");
}

#[test]
fn every_committed_configuration_loads() {
    let mut seen = 0;
    for entry in std::fs::read_dir(configs()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "yaml") {
            RunConfig::load(Some(&path), &[]).unwrap();
            seen += 1;
        }
    }
    assert!(seen >= 3, "only {seen} configurations in configs/");
}

#[test]
fn the_published_file_is_the_default() {
    let file = RunConfig::load(Some(&configs().join("sgcl.yaml")), &[]).unwrap();
    assert_eq!(file, RunConfig::default());
}
