//! Probes against scikit-learn's.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{oracle, seed, tensors};
use sgcl::probe::{LinearParams, Prediction, ProbeError, Split, knn, linear};
use tch::{Device, Kind, Tensor};

fn assert_close(what: &str, prediction: &Prediction, expected: &serde_json::Value) {
    let scores = prediction.scores(&[]);
    let confusion: Vec<Vec<usize>> = serde_json::from_value(expected["confusion"].clone()).unwrap();
    assert_eq!(scores.confusion, confusion, "{what}, seed {}", seed());
    for (name, found) in ["accuracy", "balanced", "f1", "auc"].into_iter().zip(scores.figures.values()) {
        let expected = expected[name].as_f64().unwrap();
        // Areas of votes that float32 ranks otherwise than float64 may differ in the last pair.
        let tolerance = if name == "auc" { 1e-5 } else { 1e-9 };
        assert!((found.unwrap() - expected).abs() < tolerance, "{what} {name}: {found:?}, scikit-learn {expected}");
    }
}

#[test]
fn probes_answer_as_scikit_learn() {
    let dir = tempfile::tempdir().unwrap();
    oracle("probe.py", &[dir.path().to_str().unwrap(), &seed().to_string()]);
    let file = tensors(&dir.path().join("data.safetensors"));
    let answer: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(dir.path().join("answer.json")).unwrap()).unwrap();
    let labels: Vec<i64> = (&file["labels"]).try_into().unwrap();
    let slides: Vec<i64> = (&file["slides"]).try_into().unwrap();
    // Unlabelled rows are handed in too: the probes leave them out.
    let (test, train) = (0..labels.len()).partition(|&row| slides[row] < 5);
    let split = Split { train, test };
    for k in [10, 20] {
        let prediction = knn(&file["x"], &labels, 4, &split, k, 0.07).unwrap();
        assert_close(&format!("knn {k}"), &prediction, &answer[format!("knn{k}")]);
    }
    let params = LinearParams { tolerance: 1e-9, iterations: 2_000, ..LinearParams::default() };
    let probe = linear(&file["x"], &labels, 4, &split, &params).unwrap();
    assert!(probe.converged, "{probe:?}");
    assert_close("linear", &probe.prediction, &answer["linear"]);
    let loss = answer["loss"].as_f64().unwrap();
    assert!((probe.train_loss / loss - 1.0).abs() < 1e-6, "loss {}, scikit-learn {loss}", probe.train_loss);
    // The default tolerance is near enough.
    let quick = linear(&file["x"], &labels, 4, &split, &LinearParams::default()).unwrap();
    let train: Vec<i64> = split.train.iter().map(|&row| labels[row]).collect();
    let (near, exact) = (quick.prediction.scores(&train), probe.prediction.scores(&train));
    assert!(quick.converged && (near.figures.accuracy - exact.figures.accuracy).abs() < 0.01, "{near:?}");
    let again = linear(&file["x"], &labels, 4, &split, &LinearParams::default()).unwrap();
    assert_eq!(quick.train_loss.to_bits(), again.train_loss.to_bits(), "the same data give the same fit");
    let class = &near.classes[3];
    assert_eq!(class.test, split.test.iter().filter(|&&row| labels[row] == 3).count());
    assert_eq!(class.train, split.train.iter().filter(|&&row| labels[row] == 3).count());
}

#[test]
fn input_that_makes_no_sense_is_refused_by_name() {
    let x = Tensor::ones([4, 2], (Kind::Float, Device::Cpu));
    let split = Split { train: vec![0, 1], test: vec![2, 3] };
    assert_eq!(knn(&x, &[0, 1], 2, &split, 1, 0.07), Err(ProbeError::Length { features: 4, other: 2, what: "labels" }));
    assert_eq!(knn(&x, &[0, 1, -1, -1], 2, &split, 1, 0.07), Err(ProbeError::Empty { half: "test" }));
    assert_eq!(knn(&x, &[0, 1, 2, 0], 2, &split, 1, 0.07), Err(ProbeError::Label { row: 2, label: 2, classes: 2 }));
    assert!(knn(&x, &[0, 1, 1, 0], 2, &split, 3, 0.07).unwrap_err().to_string().contains("k is 3"));
    let nan = Tensor::full([4, 2], f64::NAN, (Kind::Float, Device::Cpu));
    assert!(linear(&nan, &[0, 1, 1, 0], 2, &split, &LinearParams::default()).unwrap_err().to_string().contains("NaN"));
}
