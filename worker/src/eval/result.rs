//! What an encoder's protocols found, as JSON: every figure with its interval, and what the pages draw.

use serde_json::{Map, Value, json};
use sgcl::probe::bootstrap::{LEVEL, RESAMPLES, intervals};
use sgcl::probe::roc::Curve;
use sgcl::probe::{Figures, Prediction};

use super::protocol::{LinearRecipe, Outcome, Protocol};
use super::task::Task;

/// Mistakes that are kept of a protocol.
const MISTAKES: usize = 12;
/// Points that are kept of a ROC curve.
const ROC_POINTS: usize = 64;

/// How the intervals are made.
pub(super) fn bootstrap(task: &Task) -> Value {
    json!({ "unit": "slide", "slides": task.slides_of(&task.split.test), "resamples": RESAMPLES, "level": LEVEL, "method": "percentile" })
}

/// One protocol's figures. Of several trials: means, standard deviations and each trial's values; the confusion is their sum, curves
/// and mistakes are the first trial's.
pub(super) fn of(outcome: &Outcome, task: &Task, seed: u64) -> Value {
    let scores: Vec<_> = outcome.predictions.iter().map(|p| p.scores(&outcome.train_labels)).collect();
    let found = intervals(&outcome.predictions, &task.slides, seed, RESAMPLES);
    let mut result = Map::new();
    result.insert("protocol".into(), json!(outcome.protocol.name()));
    for (at, name) in Figures::NAMES.into_iter().enumerate() {
        let values: Option<Vec<f64>> = scores.iter().map(|s| s.figures.values()[at]).collect();
        let (mean, deviation) = values.as_deref().map(mean_and_deviation).unzip();
        let mut figure = json!({ "value": mean, "low": null, "high": null });
        if let Some(interval) = found[at] {
            figure["low"] = json!(interval.low);
            figure["high"] = json!(interval.high);
            figure["resamples"] = json!(interval.resamples);
        }
        if scores.len() > 1 {
            figure["std"] = json!(deviation);
            figure["trials"] = json!(values);
        }
        result.insert(name.into(), figure);
    }
    result.insert("trials".into(), json!(scores.len()));
    result.insert("train_patches".into(), json!(outcome.train_labels.len()));
    result.insert("settings".into(), outcome.settings.clone());
    let mut confusion = vec![vec![0; task.classes().len()]; task.classes().len()];
    for (row, column, count) in scores.iter().flat_map(|s| {
        s.confusion.iter().enumerate().flat_map(|(r, row)| row.iter().enumerate().map(move |(c, &n)| (r, c, n)))
    }) {
        confusion[row][column] += count;
    }
    result.insert("confusion".into(), json!(confusion));
    if let (Some(first), Some(scores)) = (outcome.predictions.first(), scores.first()) {
        let by_class = task.classes().iter().zip(&scores.classes).map(|(class, score)| {
            json!({ "class": class, "train": score.train, "test": score.test, "precision": score.precision,
                "recall": score.recall, "f1": score.f1 })
        });
        result.insert("by_class".into(), by_class.collect());
        result.insert("roc".into(), curves(first, task.classes()));
        result.insert("mistakes".into(), mistakes(first, task));
    }
    Value::Object(result)
}

/// The figures that a run's report shows, beside the rest: accuracies by name, the linear classifier's confusion.
pub(super) fn summary(protocols: &[(Protocol, Value)], result: &mut Map<String, Value>) {
    let find = |wanted: &dyn Fn(&Protocol) -> bool| protocols.iter().find(|(p, _)| wanted(p)).map(|(_, value)| value);
    let lbfgs = find(&|p| *p == Protocol::Linear(LinearRecipe::Lbfgs));
    let linear = lbfgs.or_else(|| find(&|p| matches!(p, Protocol::Linear(_))));
    let knn: Map<String, Value> = protocols
        .iter()
        .filter_map(|(protocol, value)| match protocol {
            Protocol::Knn(k) => Some((k.to_string(), value["accuracy"]["value"].clone())),
            _ => None,
        })
        .collect();
    let widest = protocols.iter().rev().find(|(p, _)| matches!(p, Protocol::Knn(_))).map(|(_, value)| value);
    let both = |figure: &str| {
        let of = |value: Option<&Value>| value.map_or(Value::Null, |value| value[figure]["value"].clone());
        json!({ "knn": of(widest), "linear": of(linear) })
    };
    result.insert("knn".into(), Value::Object(knn));
    result.insert("linear".into(), linear.map_or(Value::Null, |value| value["accuracy"]["value"].clone()));
    result.insert("balanced".into(), both("balanced_accuracy"));
    result.insert("macro_f1".into(), both("macro_f1"));
    let shown = linear.or(protocols.last().map(|(_, value)| value));
    result.insert("confusion".into(), shown.map_or(Value::Null, |value| value["confusion"].clone()));
}

/// Mean and, of two values or more, the deviation of a sample.
pub(super) fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, if values.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 })
}

fn curves(prediction: &Prediction, classes: &[String]) -> Value {
    let round = |value: f64| (value * 1e4).round() / 1e4;
    let curves = classes.iter().enumerate().filter_map(|(class, name)| {
        let curve = Curve::of(prediction, class)?;
        let points: Vec<[f64; 2]> = curve.thinned(ROC_POINTS).into_iter().map(|(x, y)| [round(x), round(y)]).collect();
        Some(json!({ "class": name, "area": curve.area, "points": points }))
    });
    curves.collect()
}

/// Test patches that were called something else most surely: by the lead of the wrong class over the true one.
fn mistakes(prediction: &Prediction, task: &Task) -> Value {
    let (manifest, index) = (task.set.manifest(), task.set.index());
    let lead = |at: usize| {
        prediction.probability(at, prediction.predicted[at]) - prediction.probability(at, prediction.truth[at])
    };
    let mut wrong: Vec<usize> =
        (0..prediction.rows.len()).filter(|&at| prediction.predicted[at] != prediction.truth[at]).collect();
    wrong.sort_by(|&a, &b| lead(b).total_cmp(&lead(a)));
    let class = |class: usize| task.classes().get(class).map_or("?", String::as_str);
    let shown = wrong.into_iter().take(MISTAKES).filter_map(|at| {
        let id = task.ids[prediction.rows[at]];
        let row = index.row(id)?;
        Some(json!({
            "patch": id,
            "slide": manifest.slides.get(row.slide as usize).map(|slide| slide.name.as_str()),
            "x": row.x,
            "y": row.y,
            "true": class(prediction.truth[at]),
            "called": class(prediction.predicted[at]),
            "probability": prediction.probability(at, prediction.predicted[at]),
            "probability_of_true": prediction.probability(at, prediction.truth[at]),
        }))
    });
    shown.collect()
}
