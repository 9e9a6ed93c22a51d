//! Who may import whom (ARCHITECTURE.md, Who holds what), read from `cargo tree`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::process::Command;

use rstest::rstest;

fn dependencies(package: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--edges", "normal", "--prefix", "none", "--format", "{p}", "--package", package])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

#[rstest]
#[case("sgcl-draw", &["tch", "kube", "tonic", "object_store", "tokio"])]
#[case("sgcl-patchset", &["tch", "kube", "tonic"])]
#[case("sgcl-phantom", &["tch", "kube", "tonic", "object_store"])]
#[case("sgcl-runstore", &["tch", "kube", "tonic"])]
#[case("sgcl-telemetry", &["tch", "kube", "object_store"])]
#[case("sgcl-c10d", &["tonic", "kube"])]
#[case("sgcl", &["tonic", "kube", "object_store"])]
#[case("sgcl-coordinator", &["tch", "sgcl", "sgcl-c10d", "sgcl-worker"])]
#[case("sgcl-worker", &["kube", "sgcl-coordinator", "sgcl-openslide"])]
#[case("sgclctl", &["tch", "sgcl", "sgcl-c10d"])]
fn a_crate_imports_only_what_the_map_allows(#[case] package: &str, #[case] never: &[&str]) {
    let found = dependencies(package);
    assert!(found.contains(package), "cargo tree listed nothing for {package}");
    let forbidden: Vec<_> = never.iter().filter(|name| found.contains(**name)).collect();
    assert!(forbidden.is_empty(), "{package} imports {forbidden:?}");
}

#[rstest]
fn the_contract_imports_nothing_of_ours() {
    let found = dependencies("sgcl-proto");
    let ours: Vec<_> = found.iter().filter(|name| name.starts_with("sgcl") && *name != "sgcl-proto").collect();
    assert!(ours.is_empty(), "sgcl-proto imports {ours:?}");
}

#[rstest]
#[case("sgcl-telemetry")]
#[case("sgcl-openslide")]
fn what_knows_nothing_of_runs_imports_nothing_of_ours(#[case] package: &str) {
    let found = dependencies(package);
    let ours: Vec<_> = found.iter().filter(|name| name.starts_with("sgcl") && *name != package).collect();
    assert!(ours.is_empty(), "{package} imports {ours:?}");
}

#[rstest]
fn one_tls_stack_is_linked() {
    for package in ["sgclctl", "sgcl-worker", "sgcl-coordinator"] {
        let found = dependencies(package);
        for stack in ["openssl", "openssl-sys", "native-tls", "ring"] {
            assert!(!found.contains(stack), "{package} links {stack}");
        }
    }
}
