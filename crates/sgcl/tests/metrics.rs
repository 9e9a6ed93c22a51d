//! Metrics and their intervals against scikit-learn's, on drawn predictions.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{oracle, seed};
use rand::Rng as _;
use serde_json::{Value, json};
use sgcl::probe::Prediction;
use sgcl::probe::bootstrap::{draws, intervals};
use sgcl::probe::roc::Curve;
use sgcl_draw::{Purpose, Rng, rng};

/// Resamples compared: the slow computation takes its time.
const RESAMPLES: u64 = 200;

struct Case {
    classes: usize,
    /// Slide of each row that a prediction may name.
    slides: Vec<u32>,
    trials: Vec<Prediction>,
}

/// Predictions better than chance; probabilities in steps, so that many are equal. `missing` is a class no row has.
fn drawn(rng: &mut Rng, rows: usize, slides: u32, classes: usize, trials: usize, missing: Option<usize>) -> Case {
    let all: Vec<u32> = (0..2 * rows).map(|_| 10 + 3 * rng.random_range(0..slides)).collect();
    let tested: Vec<usize> = (0..2 * rows).step_by(2).collect();
    let truth: Vec<usize> = tested
        .iter()
        .map(|&row| {
            loop {
                // Slides differ in their classes, as tissue does.
                let class = (all[row] as usize / 3 + rng.random_range(0..classes.min(3))) % classes;
                if Some(class) != missing {
                    break class;
                }
            }
        })
        .collect();
    let trials = (0..trials)
        .map(|_| {
            let probabilities = truth
                .iter()
                .flat_map(|&class| {
                    let raw: Vec<u32> =
                        (0..classes).map(|c| rng.random_range(0..8) + if c == class { 3 } else { 0 }).collect();
                    let sum = raw.iter().sum::<u32>().max(1);
                    raw.into_iter().map(move |v| f64::from(v) / f64::from(sum)).collect::<Vec<_>>()
                })
                .collect();
            Prediction::new(tested.clone(), truth.clone(), probabilities, classes)
        })
        .collect();
    Case { classes, slides: all, trials }
}

fn close(what: &str, found: f64, expected: &Value) {
    let expected = expected.as_f64().unwrap_or_else(|| panic!("{what}: Python says {expected}"));
    assert!((found - expected).abs() < 1e-9, "{what}: {found}, scikit-learn {expected}, seed {}", seed());
}

#[test]
fn figures_curves_and_intervals_are_those_of_scikit_learn() {
    let mut rng = rng(seed(), Purpose::Probe, 0, 77);
    let cases = [
        drawn(&mut rng, 400, 12, 5, 1, None),
        drawn(&mut rng, 300, 7, 2, 1, None),
        drawn(&mut rng, 250, 9, 4, 3, None),
        drawn(&mut rng, 200, 6, 4, 1, Some(2)),
        drawn(&mut rng, 60, 3, 7, 1, None),
    ];
    let asked: Vec<Value> = cases
        .iter()
        .map(|case| {
            let slides: Vec<u32> = case.trials[0].rows.iter().map(|&row| case.slides[row]).collect();
            let mut names = slides.clone();
            names.sort_unstable();
            names.dedup();
            let draws: Vec<Vec<u64>> = (0..RESAMPLES).map(|n| draws(seed(), n, names.len())).collect();
            let trials: Vec<Value> = case
                .trials
                .iter()
                .map(|p| json!({ "predicted": p.predicted, "probabilities": p.probabilities }))
                .collect();
            json!({ "classes": case.classes, "truth": case.trials[0].truth, "slides": slides, "draws": draws, "trials": trials })
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("cases.json"), serde_json::to_string(&asked).unwrap()).unwrap();
    oracle("metrics.py", &[dir.path().to_str().unwrap()]);
    let answers = std::fs::read_to_string(dir.path().join("answers.json")).unwrap();
    let answers: Vec<Value> = serde_json::from_str(&answers).unwrap();
    for (number, (case, answer)) in cases.iter().zip(&answers).enumerate() {
        let prediction = &case.trials[0];
        let scores = prediction.scores(&[]);
        let found = intervals(&case.trials, &case.slides, seed(), RESAMPLES);
        for (at, figure) in scores.figures.values().into_iter().enumerate() {
            let what = format!("case {number}, figure {at}");
            close(&what, figure.unwrap(), &answer["figures"][at]);
            let interval = found[at].unwrap();
            close(&format!("{what}, low"), interval.low, &answer["low"][at]);
            close(&format!("{what}, high"), interval.high, &answer["high"][at]);
            assert_eq!(json!(interval.resamples), answer["resamples"][at], "{what}");
        }
        assert_eq!(json!(scores.confusion), answer["confusion"], "case {number}");
        if !answer["sklearn_ovr"].is_null() {
            close("one against the rest", scores.figures.roc_auc.unwrap(), &answer["sklearn_ovr"]);
        }
        let curve = Curve::of(prediction, case.classes - 1).unwrap();
        let points: Vec<Vec<f64>> = serde_json::from_value(answer["curve"].clone()).unwrap();
        assert_eq!(curve.points.len(), points[0].len(), "case {number}");
        for (at, point) in curve.points.iter().enumerate() {
            assert!((point.0 - points[0][at]).abs() < 1e-12 && (point.1 - points[1][at]).abs() < 1e-12, "{point:?}");
        }
        let thin = curve.thinned(5);
        assert!(thin.len() <= 5 && thin[0] == (0.0, 0.0) && thin.last() == Some(&(1.0, 1.0)), "{thin:?}");
    }
}

#[test]
fn the_same_seed_draws_the_same_slides_each_about_once() {
    assert_eq!(draws(3, 5, 40), draws(3, 5, 40));
    assert_ne!(draws(3, 5, 40), draws(4, 5, 40));
    let mut sums = [0; 8];
    for resample in 0..4_000 {
        let times = draws(seed(), resample, 8);
        assert_eq!(times.iter().sum::<u64>(), 8);
        sums.iter_mut().zip(times).for_each(|(sum, n)| *sum += n);
    }
    // Binomial, 32,000 draws of 1/8: six standard deviations are 355.
    assert!(sums.iter().all(|&sum| sum.abs_diff(4_000) < 355), "{sums:?}, seed {}", seed());
}

#[test]
fn one_slide_has_no_interval_and_one_class_no_area() {
    let prediction =
        |truth: Vec<usize>| Prediction::new((0..truth.len()).collect(), truth, vec![0.7, 0.2, 0.1, 0.2, 0.7, 0.1], 3);
    assert_eq!(intervals(&[prediction(vec![0, 1])], &[4, 4], 1, 50), [None; 4]);
    let one = prediction(vec![0, 0]);
    assert_eq!(one.scores(&[]).figures.roc_auc, None);
    let found = intervals(std::slice::from_ref(&one), &[4, 5], 1, 50);
    assert!(found[0].is_some() && found[3].is_none(), "{found:?}");
    assert_eq!(Curve::of(&one, 0), None);
    assert_eq!(Curve::of(&one, 2), None);
}
