//! Bills of materials of the images' programs (`scripts/sbom`).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn bill(program: &str) -> (String, Value) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let python = std::env::var_os("SGCL_PYTHON").unwrap_or_else(|| "python3".into());
    let out = Command::new(python).arg(root.join("scripts/sbom")).arg(program).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout).unwrap();
    let read = serde_json::from_str(&text).unwrap();
    (text, read)
}

fn names(bill: &Value) -> Vec<&str> {
    bill["components"].as_array().unwrap().iter().map(|component| component["name"].as_str().unwrap()).collect()
}

#[rstest::rstest]
#[case("sgcl-coordinator", &["tonic", "kube", "rustls"], &["tch", "torch", "sgcl-openslide"])]
#[case("sgcl-worker", &["tonic", "tch", "torch"], &["kube", "sgcl-openslide"])]
#[case("sgclctl", &["tonic", "kube", "sgcl-openslide"], &["tch", "torch"])]
fn a_bill_lists_what_is_linked_with_its_origin_and_licence(
    #[case] program: &str,
    #[case] has: &[&str],
    #[case] lacks: &[&str],
) {
    let (text, bill) = bill(program);
    assert_eq!((&bill["bomFormat"], &bill["metadata"]["component"]["name"]), (&"CycloneDX".into(), &program.into()));
    let names = names(&bill);
    assert!(has.iter().all(|name| names.contains(name)), "{names:?}");
    assert!(!lacks.iter().any(|name| names.contains(name)), "{names:?}");
    let mut seen = BTreeSet::new();
    for component in bill["components"].as_array().unwrap() {
        assert!(seen.insert(component["purl"].as_str().unwrap()), "{component} is listed twice");
        assert!(component["licenses"][0]["expression"].is_string(), "{component} has no licence");
        let name = component["name"].as_str().unwrap();
        let ours = name.starts_with("sgcl") || name == "torch";
        assert!(ours || component["hashes"][0]["content"].as_str().is_some_and(|sum| sum.len() == 64), "{component}");
    }
    // The same sources make the same file.
    assert_eq!(self::bill(program).0, text);
}
