//! Results of evaluations, as a run keeps them: `eval/<weights><task>.json`, each with what was asked for.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::{Value, json};
use sgcl_patchset::Store;

use crate::config::Evaluation;
use crate::status::write_eval;
use crate::{RunName, RunStoreError};

/// Keeps results with a run, each with what `asked` says of the call and without what only a page draws.
///
/// # Errors
/// The storage; those before it are kept.
pub async fn keep(run: &Store, results: &[Value], asked: &Value, task: &str) -> Result<(), RunStoreError> {
    for result in results {
        let Some(weights) = result["weights"].as_str() else { continue };
        let mut kept = result.clone();
        for (key, value) in asked.as_object().into_iter().flatten() {
            kept[key.as_str()] = value.clone();
        }
        kept["time"] = json!(Timestamp::now());
        // What only the page draws would make every `status` long.
        for protocol in kept["protocols"].as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
            let _ = (protocol.remove("roc"), protocol.remove("mistakes"));
        }
        write_eval(run, &format!("{}{task}", file_name(weights)), &kept).await?;
    }
    Ok(())
}

/// A result's name as a file name.
fn file_name(weights: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '-' };
    let last = weights.rsplit('/').next().unwrap_or(weights);
    last.chars().map(plain).take(100).collect()
}

impl Evaluation {
    /// What is evaluated: the run's own weights, then the baselines, each once.
    #[must_use]
    pub fn weights(&self, run: &RunName) -> Vec<String> {
        let mut weights = vec![run.to_string()];
        for baseline in &self.baselines {
            if !weights.iter().any(|known| known == baseline.name()) {
                weights.push(baseline.name().to_owned());
            }
        }
        weights
    }

    /// What its results are kept with: the call, and which of the run's exports it was made of.
    #[must_use]
    pub fn asked(&self, commit: u64) -> Value {
        json!({ "data": self.dataset, "seed": self.seed, "commit": commit, "evaluation": self })
    }

    /// The results of the run's own weights among those that it keeps, where all that the evaluation asks for are there of this commit.
    #[must_use]
    pub fn made<'a>(&self, run: &RunName, commit: u64, kept: &'a BTreeMap<String, Value>) -> Option<&'a Value> {
        let asked = self.asked(commit);
        let of = |weights: &String| {
            kept.values().find(|kept| {
                kept["weights"] == weights.as_str()
                    && ["commit", "evaluation"].iter().all(|key| kept[key] == asked[key])
            })
        };
        let found: Option<Vec<&Value>> = self.weights(run).iter().map(of).collect();
        found?.first().copied()
    }
}

/// Accuracies of a result in a line: `knn-20 52.4%, linear 64.5%`.
#[must_use]
pub fn accuracies(result: &Value) -> String {
    let protocols = result["protocols"].as_array().into_iter().flatten();
    let told = protocols.filter_map(|found| {
        let (name, accuracy) = (found["protocol"].as_str()?, found["accuracy"]["value"].as_f64()?);
        Some(format!("{name} {:.1}%", 100.0 * accuracy))
    });
    told.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::Baseline;
    use crate::status::read_evals;

    fn result(weights: &str) -> Value {
        let accuracy = json!({ "value": 0.5244, "low": 0.5, "high": 0.6 });
        json!({ "weights": weights, "protocols": [
            { "protocol": "knn-20", "accuracy": accuracy, "roc": [1], "mistakes": [2] },
            { "protocol": "linear", "accuracy": { "value": null } },
        ] })
    }

    #[test]
    fn a_weights_file_is_kept_under_its_plain_name() {
        assert_eq!(file_name("../x/backbone.pth"), "backbone-pth");
        assert_eq!(file_name("demo"), "demo");
    }

    #[tokio::test]
    async fn an_evaluation_is_made_once_all_of_its_results_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().to_str().unwrap()).unwrap();
        let run = RunName::new("first").unwrap();
        let evaluation = Evaluation {
            name: "grain".into(),
            dataset: "s3://lab/labelled".into(),
            labels: vec![1.0, 12.5],
            baselines: vec![Baseline::Random, Baseline::ColourHistogram, Baseline::Random],
            ..Evaluation::default()
        };
        let weights = evaluation.weights(&run);
        assert_eq!(weights, ["first", "random", "colour-histogram"]);
        let results: Vec<Value> = weights.iter().map(|weights| result(weights)).collect();
        keep(&store, &results[..2], &evaluation.asked(7), "-grain").await.unwrap();
        assert_eq!(evaluation.made(&run, 7, &read_evals(&store).await.unwrap()), None, "a baseline is missing");
        keep(&store, &results[2..], &evaluation.asked(7), "-grain").await.unwrap();

        let kept = read_evals(&store).await.unwrap();
        let names: Vec<&str> = kept.keys().map(String::as_str).collect();
        assert_eq!(names, ["colour-histogram-grain", "first-grain", "random-grain"]);
        let own = evaluation.made(&run, 7, &kept).unwrap();
        assert_eq!(accuracies(own), "knn-20 52.4%");
        assert_eq!((&own["data"], &own["commit"]), (&json!("s3://lab/labelled"), &json!(7)));
        assert!(own["time"].is_string());
        assert_eq!(
            own["protocols"][0],
            json!({ "protocol": "knn-20", "accuracy": result("first")["protocols"][0]["accuracy"] })
        );

        assert_eq!(evaluation.made(&run, 8, &kept), None, "newer weights");
        let other = Evaluation { trials: 3, ..evaluation };
        assert_eq!(other.made(&run, 7, &kept), None, "asked for otherwise");
    }
}
