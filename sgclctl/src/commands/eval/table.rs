//! Results as a table for people, and remarks on what was loaded.

use serde_json::Value;

use crate::output::{count, percent};
use crate::table;

/// Keys that are named in a remark; the rest are counted.
const KEYS_SHOWN: usize = 3;

/// Every encoder under every protocol, side by side.
pub(in crate::commands) fn comparison(results: &[Value]) -> String {
    let mut rows = Vec::new();
    for result in results {
        let weights = result["weights"].as_str().unwrap_or("?");
        for protocol in protocols(result) {
            rows.push([
                weights.to_owned(),
                protocol["protocol"].as_str().unwrap_or("?").to_owned(),
                figure(&protocol["accuracy"]),
                figure(&protocol["balanced_accuracy"]),
                figure(&protocol["macro_f1"]),
                figure(&protocol["roc_auc"]),
                protocol["train_patches"].as_u64().map_or_else(|| "–".to_owned(), count),
            ]);
        }
    }
    // Protocol by protocol, encoders in the order given: what is to be compared stands together.
    let order: Vec<String> = rows.iter().map(|row| row[1].clone()).collect();
    rows.sort_by_key(|row| order.iter().position(|name| *name == row[1]));
    let header = ["weights", "protocol", "accuracy", "balanced", "macro F1", "ROC-AUC", "learnt from"];
    let mut text = table::text(&header, rows);
    if let Some(first) = results.first() {
        text.push('\n');
        text.push_str(&footer(first));
    }
    let knn = |result: &Value| result["knn"]["20"].as_f64();
    let random = results.iter().find(|r| r["weights"] == "random").and_then(knn);
    let trained = |r: &&Value| r["weights"] != "random" && r["weights"] != "colour-histogram";
    let best = results.iter().filter(trained).filter_map(knn).reduce(f64::max);
    if let (Some(random), Some(best)) = (random, best) {
        text.push_str(&format!("\nkNN-20 {:+.1} points against random weights", 100.0 * (best - random)));
    }
    for result in results {
        for skipped in result["skipped"].as_array().into_iter().flatten() {
            let word = |value: &Value| value.as_str().unwrap_or("?").to_owned();
            text.push_str(&format!(
                "\n{} was left out of {}: {}",
                word(&result["weights"]),
                word(&skipped["protocol"]),
                word(&skipped["why"])
            ));
        }
    }
    text
}

fn protocols(result: &Value) -> impl Iterator<Item = &Value> {
    result["protocols"].as_array().into_iter().flatten()
}

/// `91.4 % (88.0–94.1)`, with more trials `91.4 ± 0.8 % (88.0–94.1)`.
pub(crate) fn figure(figure: &Value) -> String {
    let Some(value) = figure["value"].as_f64() else { return "–".to_owned() };
    let mut text = match figure["std"].as_f64() {
        Some(deviation) => format!("{:.1} ± {:.1} %", 100.0 * value, 100.0 * deviation),
        None => percent(value),
    };
    if let (Some(low), Some(high)) = (figure["low"].as_f64(), figure["high"].as_f64()) {
        text.push_str(&format!(" ({:.1}–{:.1})", 100.0 * low, 100.0 * high));
    }
    text
}

/// What all rows share.
pub(crate) fn footer(result: &Value) -> String {
    let number = |value: &Value| count(value.as_u64().unwrap_or(0));
    let bootstrap = &result["bootstrap"];
    let interval = if bootstrap["slides"].as_u64() < Some(2) {
        "one test slide, so no intervals".to_owned()
    } else {
        format!("in brackets 95 % intervals over {} resamples of the test slides", number(&bootstrap["resamples"]))
    };
    format!(
        "{} classes; learnt from {} patches of {} slides, tested on {} of {} others; {interval}",
        result["classes"].as_array().map_or(0, Vec::len),
        number(&result["train_patches"]),
        number(&result["train_slides"]),
        number(&result["test_patches"]),
        number(&result["test_slides"]),
    )
}

/// What a weights file's keys were taken for.
pub(in crate::commands) fn remarks(result: &Value) -> Vec<String> {
    let weights = result["weights"].as_str().unwrap_or("?");
    let keys = &result["keys"];
    let mut remarks = Vec::new();
    if let Some(prefix) = keys["prefix"].as_str().filter(|prefix| !prefix.is_empty()) {
        remarks.push(format!(
            "{weights}: {} keys were taken from under `{prefix}`",
            count(keys["matched"].as_u64().unwrap_or(0))
        ));
    }
    // Counters have no say in what a network answers.
    let missing = names(&keys["missing"], |key| !key.ends_with("num_batches_tracked"));
    if !missing.is_empty() {
        remarks.push(format!(
            "warning: {weights} lacks {} of the backbone's keys, which keep random values: {}",
            missing.len(),
            some(&missing)
        ));
    }
    let unexpected = names(&keys["unexpected"], |_| true);
    if !unexpected.is_empty() {
        remarks.push(format!("{weights}: {} keys were not used: {}", unexpected.len(), some(&unexpected)));
    }
    remarks
}

fn names(keys: &Value, counts: impl Fn(&str) -> bool) -> Vec<&str> {
    keys.as_array().into_iter().flatten().filter_map(Value::as_str).filter(|key| counts(key)).collect()
}

fn some(keys: &[&str]) -> String {
    let shown = keys.iter().take(KEYS_SHOWN).map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
    match keys.len().saturating_sub(KEYS_SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn result(weights: &str, knn: f64) -> Value {
        let figure = json!({ "value": knn, "low": knn - 0.05, "high": knn + 0.04 });
        json!({ "weights": weights, "knn": {"20": knn}, "classes": ["a", "b"], "train_patches": 900, "test_patches": 300,
            "train_slides": 9, "test_slides": 3, "bootstrap": {"slides": 3, "resamples": 1000},
            "protocols": [{ "protocol": "knn-20", "accuracy": figure, "balanced_accuracy": figure, "macro_f1": figure,
                "roc_auc": {"value": null}, "train_patches": 900 }], "skipped": [] })
    }

    #[test]
    fn the_comparison_states_intervals_and_the_gain_over_random_weights() {
        let text = comparison(&[result("demo", 0.9), result("random", 0.6), result("colour-histogram", 0.95)]);
        assert!(text.contains("90.0 % (85.0–94.0)") && text.contains("+30.0 points"), "{text}");
        assert!(
            text.contains("1,000 resamples of the test slides") && text.contains("900 patches of 9 slides"),
            "{text}"
        );
    }

    #[test]
    fn trials_are_shown_as_mean_and_deviation() {
        assert_eq!(
            figure(&json!({ "value": 0.5, "std": 0.012, "low": 0.4, "high": 0.61 })),
            "50.0 ± 1.2 % (40.0–61.0)"
        );
        assert_eq!(figure(&json!({ "value": null })), "–");
    }

    #[test]
    fn keys_that_do_not_fit_are_counted_and_some_are_named() {
        let keys = json!({ "matched": 118, "prefix": "module.", "missing": ["conv1.weight", "bn1.num_batches_tracked"],
            "unexpected": ["a", "b", "c", "d", "e"] });
        let words = remarks(&json!({ "weights": "w.pth", "keys": keys })).join("\n");
        for part in [
            "118 keys were taken from under `module.`",
            "lacks 1 of",
            "`conv1.weight`",
            "5 keys were not used: `a`, `b`, `c` and 2 more",
        ] {
            assert!(words.contains(part), "{words}");
        }
        assert!(remarks(&json!({ "weights": "random", "keys": null })).is_empty());
    }
}
