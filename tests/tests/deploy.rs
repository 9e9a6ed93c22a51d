//! Manifests are what they are printed from. `SGCL_UPDATE=1` writes them instead.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};

use sgcl_coordinator::kube::resource;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn held(path: &Path, wanted: &str) {
    if std::env::var_os("SGCL_UPDATE").is_some() {
        std::fs::write(path, wanted).unwrap();
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    let differs = found.lines().zip(wanted.lines()).position(|(a, b)| a != b);
    assert!(
        found == wanted,
        "{} is not what it is made from (line {}); SGCL_UPDATE=1 cargo test -p sgcl-tests --test deploy writes it",
        path.display(),
        differs.map_or_else(|| found.lines().count() + 1, |line| line + 1)
    );
}

#[test]
fn the_custom_resource_is_printed_from_its_type() {
    held(&deploy().join("base/crd.yaml"), &resource::definition().unwrap());
}

#[test]
fn what_kubectl_applies_is_the_base_in_its_order() {
    the_custom_resource_is_printed_from_its_type();
    let base = deploy().join("base");
    let list = std::fs::read_to_string(base.join("kustomization.yaml")).unwrap();
    let files = list.lines().filter_map(|line| line.strip_prefix("  - "));
    let parts: Vec<String> = files.map(|file| std::fs::read_to_string(base.join(file)).unwrap()).collect();
    assert!(parts.len() > 5);
    let text = format!("# Printed from deploy/base; change it there.\n{}", parts.join("---\n"));
    held(&deploy().join("sgcl.yaml"), &text);
    // Either file in this folder would break `kubectl apply -f deploy/`.
    assert!(!deploy().join("kustomization.yaml").exists() && !deploy().join("kustomization.yml").exists());
}

#[test]
fn the_example_says_everything_that_one_may_say_of_a_run() {
    let text = std::fs::read_to_string(deploy().join("examples/run.yaml")).unwrap();
    let run: resource::SgclRun = serde_saphyr::from_str(&text).unwrap();
    let told = serde_json::to_value(&run.spec).unwrap();
    let known = serde_json::to_value(<resource::SgclRun as kube::CustomResourceExt>::crd()).unwrap();
    let properties = &known["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"];
    // What an example need not be: suspended, cancelled, of another image.
    let left_out = ["suspend", "cancel", "image"];
    let missing: Vec<&String> = properties
        .as_object()
        .unwrap()
        .keys()
        .filter(|key| told.get(key).is_none() && !left_out.contains(&key.as_str()))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}
