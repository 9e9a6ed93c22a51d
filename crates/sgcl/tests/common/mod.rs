//! Running the Python that a test compares with.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use tch::Tensor;

/// The seed of tests that draw: `SGCL_SEED`, or a fixed one.
pub(crate) fn seed() -> u64 {
    std::env::var("SGCL_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(20_251)
}

/// Runs `tests/oracles/<script>` and waits for it.
pub(crate) fn oracle(script: &str, arguments: &[&str]) {
    let python = std::env::var("SGCL_PYTHON")
        .expect("this test compares with Python: run `make setup`, or set SGCL_PYTHON to a Python with torchvision");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracles").join(script);
    let output = Command::new(python)
        .arg(path)
        .args(arguments)
        // libtorch's own copies must not shadow the ones that Python's torch brings.
        .env_remove("LD_LIBRARY_PATH")
        .env("OMP_NUM_THREADS", "1")
        .output()
        .expect("Python starts");
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

/// Largest difference over the largest magnitude expected.
pub(crate) fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(found.size(), expected.size());
    let kind = tch::Kind::Double;
    let difference = (found.to_kind(kind) - expected.to_kind(kind)).abs().max().double_value(&[]);
    difference / expected.to_kind(kind).abs().max().double_value(&[]).max(1e-12)
}
