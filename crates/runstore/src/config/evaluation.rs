//! Evaluations of a run's weights, made once they are exported.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ConfigError;

/// Most evaluations of a run.
const MOST: usize = 20;
/// Longest name.
const LONGEST_NAME: usize = 30;
/// Most trainings of a protocol.
const MOST_TRIALS: u64 = 100;
/// Names under which `sgclctl eval` keeps results of other kinds.
const TAKEN: [&str; 3] = ["detection", "finetune", "segmentation"];

/// What to do with the encoder, as `sgclctl eval --protocol` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// 10 and 20 nearest neighbours.
    Knn,
    /// A linear classifier on the frozen encoder.
    Linear,
    /// Everything trained, with labels.
    Finetune,
}

/// How `linear` is trained, as `sgclctl eval --recipe` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Recipe {
    /// Logistic regression to its optimum.
    Lbfgs,
    /// SGD on crops, 100 epochs.
    Seed,
    /// AdamW, stopped early.
    Eva,
}

/// What stands beside the run's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Baseline {
    /// Random weights of the same architecture.
    Random,
    /// A histogram of colours.
    ColourHistogram,
}

impl Baseline {
    /// What `sgclctl eval --weights` calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::ColourHistogram => "colour-histogram",
        }
    }
}

/// An evaluation on a labelled patch set, made when the run's weights are exported; its figures lie with the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Evaluation {
    /// What its figures are kept under: of a-z, 0-9 and `-`.
    #[schemars(length(min = 1, max = 30))]
    pub name: String,
    /// Path or URL of a labelled patch set.
    pub dataset: String,
    /// What to do with the encoder.
    #[schemars(length(min = 1))]
    pub protocol: Vec<Protocol>,
    /// How `linear` is trained.
    #[schemars(length(min = 1))]
    pub recipe: Vec<Recipe>,
    /// Shares of the training labels that `finetune` learns from, in percent.
    #[schemars(length(min = 1))]
    pub labels: Vec<f64>,
    /// Trainings of each protocol that draws.
    #[schemars(range(min = 1, max = 100))]
    pub trials: u64,
    /// Epochs of `finetune` and of the recipe `seed`; none means as published.
    pub epochs: Option<u64>,
    /// Seed of all that is drawn.
    pub seed: u64,
    /// What is evaluated beside the run's weights.
    pub baselines: Vec<Baseline>,
}

impl Default for Evaluation {
    fn default() -> Self {
        Self {
            name: String::new(),
            dataset: String::new(),
            protocol: vec![Protocol::Knn, Protocol::Linear],
            recipe: vec![Recipe::Lbfgs],
            labels: vec![100.0],
            trials: 1,
            epochs: None,
            seed: 0,
            baselines: Vec::new(),
        }
    }
}

impl std::str::FromStr for Evaluation {
    type Err = ConfigError;

    /// One alone, as JSON, held to what a configuration's are held to.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        // JSON is YAML.
        let evaluation = super::load::yaml(text, "evaluation")?;
        let wrong = wrong(std::slice::from_ref(&evaluation));
        if wrong.is_empty() { Ok(evaluation) } else { Err(ConfigError::Invalid(wrong)) }
    }
}

/// Whether this can name something that follows a run: part of a path, and of a Job's arguments.
pub(super) fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=LONGEST_NAME).contains(&name.len()) && name.chars().all(plain)
}

pub(super) fn not_a_name(name: &str) -> String {
    format!("name {name:?} is not 1 to {LONGEST_NAME} of a-z, 0-9 and '-'")
}

/// What is wrong with a list of them, each by its key.
pub(super) fn wrong(evaluations: &[Evaluation]) -> Vec<String> {
    let mut wrong = Vec::new();
    if evaluations.len() > MOST {
        wrong.push(format!("evaluations has {}, more than {MOST}", evaluations.len()));
    }
    for (at, one) in evaluations.iter().enumerate() {
        let mut need = |ok: bool, text: String| {
            if !ok {
                wrong.push(format!("evaluations[{at}].{text}"));
            }
        };
        need(is_name(&one.name), not_a_name(&one.name));
        need(!TAKEN.contains(&one.name.as_str()), format!("name {:?} is taken; choose another", one.name));
        need(
            evaluations[..at].iter().all(|other| other.name != one.name),
            format!("name {:?} is that of another; name each once", one.name),
        );
        need(!one.dataset.is_empty(), "dataset is missing: the URL of a labelled patch set".to_owned());
        need(!one.protocol.is_empty(), "protocol is empty; leave it out for knn and linear".to_owned());
        need(!one.recipe.is_empty(), "recipe is empty; leave it out for lbfgs".to_owned());
        need(!one.labels.is_empty(), "labels is empty; leave it out for 100".to_owned());
        for share in &one.labels {
            need(*share > 0.0 && *share <= 100.0, format!("labels {share} is not a percentage above 0 and up to 100"));
        }
        need((1..=MOST_TRIALS).contains(&one.trials), format!("trials {} is not in 1..={MOST_TRIALS}", one.trials));
        need(
            one.epochs.is_none_or(|epochs| (1..=10_000).contains(&epochs)),
            format!("epochs {:?} is not in 1..=10000", one.epochs.unwrap_or(0)),
        );
    }
    wrong
}
