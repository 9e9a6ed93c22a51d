//! Manifests are what they are printed from. `SGCL_UPDATE=1` writes them instead.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

use std::path::{Path, PathBuf};

use serde_json::Value;
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

fn documents(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    let parts =
        text.split("\n---\n").filter(|part| part.lines().any(|line| !line.is_empty() && !line.starts_with('#')));
    parts.map(|part| serde_saphyr::from_str(part).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).collect()
}

fn identity(object: &Value) -> (String, String) {
    (object["kind"].as_str().unwrap().to_owned(), object["metadata"]["name"].as_str().unwrap().to_owned())
}

/// What an overlay is made of fits together, whether or not a kustomize is there to put it together.
#[rstest::rstest]
#[case("demo")]
#[case("kueue")]
#[case("workload-identity")]
#[case("rdma")]
fn an_overlay_changes_what_there_is_and_its_defaults_are_taken(#[case] name: &str) {
    let folder = deploy().join("overlays").join(name);
    let base = documents(&deploy().join("sgcl.yaml"));
    let [kustomization] = &documents(&folder.join("kustomization.yaml"))[..] else { panic!("one document") };
    let words = |list: &Value| -> Vec<String> {
        list.as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
    };
    let resources = words(&kustomization["resources"]);
    assert!(resources.contains(&"../../base".to_owned()));
    for file in resources.iter().filter(|file| *file != "../../base") {
        for object in documents(&folder.join(file)) {
            assert!(base.iter().all(|known| identity(known) != identity(&object)), "{file}: {:?}", identity(&object));
        }
    }
    let mut defaults: Option<std::collections::BTreeMap<String, String>> = None;
    for patch in kustomization["patches"].as_array().unwrap() {
        for object in documents(&folder.join(patch["path"].as_str().unwrap())) {
            let found = base.iter().find(|known| identity(known) == identity(&object));
            let found = found.unwrap_or_else(|| panic!("there is no {:?} to patch", identity(&object)));
            assert_eq!(found["metadata"]["namespace"], object["metadata"]["namespace"]);
            if object["kind"] == "ConfigMap" {
                defaults = Some(serde_json::from_value(object["data"].clone()).unwrap());
            }
        }
    }
    // As the coordinator reads them.
    let read = sgcl_coordinator::kube::defaults::Defaults::read(&defaults.unwrap()).unwrap();
    match name {
        "kueue" => assert_eq!(read.queue.as_deref(), Some("sgcl")),
        "rdma" => assert!(!read.worker_env.is_empty() && !read.worker_resources.is_empty()),
        "workload-identity" => assert_eq!(read.credentials_secret.as_deref(), Some("none")),
        _ => {}
    }
}

#[test]
fn applying_again_takes_back_no_default_that_was_set() {
    let base = documents(&deploy().join("sgcl.yaml"));
    let map = base.iter().find(|object| object["kind"] == "ConfigMap").unwrap();
    assert!(map.get("data").is_none(), "kubectl apply would set these to what they are here: {}", map["data"]);
    let told = map["metadata"]["annotations"]["sgcl.dev/keys"].as_str().unwrap();
    let missing: Vec<_> = sgcl_coordinator::kube::defaults::KEYS.iter().filter(|key| !told.contains(*key)).collect();
    assert!(missing.is_empty(), "the annotation does not tell of {missing:?}");
}

/// The same put together by kubectl, where there is one.
#[rstest::rstest]
#[case("overlays/demo", &["Deployment/sgcl-s3"])]
#[case("overlays/kueue", &["ResourceFlavor/sgcl-gpu", "ClusterQueue/sgcl", "LocalQueue/sgcl"])]
#[case("overlays/workload-identity", &[])]
#[case("overlays/rdma", &["NetworkPolicy/sgcl-worker-egress"])]
#[case("observability", &["PodMonitor/sgcl-worker", "PodMonitor/sgcl-coordinator", "PrometheusRule/sgcl", "ConfigMap/sgcl-dashboard"])]
fn kubectl_renders_it(#[case] folder: &str, #[case] more: &[&str]) {
    let rendered = std::process::Command::new("kubectl").arg("kustomize").arg(deploy().join(folder)).output();
    let Ok(rendered) = rendered else {
        eprintln!("skipped: kubectl is not installed");
        return;
    };
    assert!(rendered.status.success(), "{}", String::from_utf8_lossy(&rendered.stderr));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &rendered.stdout).unwrap();
    let objects = documents(file.path());
    let name = |object: &Value| format!("{}/{}", identity(object).0, identity(object).1);
    let names: Vec<String> = objects.iter().map(name).collect();
    let missing: Vec<_> = more.iter().filter(|name| !names.iter().any(|found| found == **name)).collect();
    assert!(missing.is_empty(), "{missing:?} in {names:?}");
    let find = |wanted: &str| objects.iter().find(|object| name(object) == wanted).unwrap();
    if folder == "overlays/workload-identity" {
        let coordinator = find("Deployment/sgcl-coordinator");
        assert!(!coordinator.to_string().contains("sgcl-bucket"), "it still looks for the Secret: {coordinator}");
        for account in ["ServiceAccount/sgcl-worker", "ServiceAccount/sgcl-coordinator"] {
            assert!(find(account)["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].is_string());
        }
    }
    if folder == "overlays/rdma" {
        assert!(!String::from_utf8_lossy(&rendered.stdout).contains("hostNetwork"));
    }
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
