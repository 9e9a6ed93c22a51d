//! The protocols: what is trained on what, and what comes out.

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use serde_json::{Value, json};
use sgcl::backbone::Backbone;
use sgcl::probe::rows::{trial_seed, validation, with_labels};
use sgcl::probe::supervised::{Pass, Problem, Recipe, train};
use sgcl::probe::{self, EvaParams, LinearParams, Prediction, Split};
use tch::Tensor;

use super::EvalArgs;
use super::encoder::Loaded;
use super::task::Task;
use super::views::{Patches, View};

/// Neighbours of the kNN probe.
const NEIGHBOURS: [usize; 2] = [10, 20];
/// Temperature of the kNN votes, exp(cosine / T).
pub(crate) const KNN_TEMPERATURE: f64 = 0.07;

/// Families of protocols.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Family {
    /// 10 and 20 nearest neighbours
    Knn,
    /// A linear classifier on frozen features
    Linear,
    /// The whole backbone, trained with labels
    Finetune,
}

/// How the linear classifier is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LinearRecipe {
    /// Logistic regression to its optimum
    Lbfgs,
    /// SGD on crops, 100 epochs
    Seed,
    /// AdamW, stopped early
    Eva,
}

/// One protocol.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Protocol {
    Knn(usize),
    Linear(LinearRecipe),
    /// With this share of the labels.
    Finetune(f64),
}

impl Protocol {
    /// What was asked for, each once, in order.
    pub(super) fn asked(args: &EvalArgs) -> Vec<Self> {
        let mut asked = Vec::new();
        for family in &args.protocol {
            match family {
                Family::Knn => asked.extend(NEIGHBOURS.map(Self::Knn)),
                Family::Linear => asked.extend(args.recipe.iter().map(|&recipe| Self::Linear(recipe))),
                Family::Finetune => asked.extend(args.labels.iter().map(|&share| Self::Finetune(share))),
            }
        }
        let mut once: Vec<Self> = Vec::new();
        for protocol in asked {
            if !once.contains(&protocol) {
                once.push(protocol);
            }
        }
        once
    }

    /// Its name in tables and files.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Knn(k) => format!("knn-{k}"),
            Self::Linear(LinearRecipe::Lbfgs) => "linear".to_owned(),
            Self::Linear(LinearRecipe::Seed) => "linear-seed".to_owned(),
            Self::Linear(LinearRecipe::Eva) => "linear-eva".to_owned(),
            // To a millionth: 7 % must not read 7.000000000000001 %.
            Self::Finetune(share) => format!("finetune-{}%", (1e8 * share).round() / 1e6),
        }
    }

    /// Whether it works on frozen features of whole patches.
    pub(super) fn is_frozen(&self) -> bool {
        matches!(self, Self::Knn(_) | Self::Linear(LinearRecipe::Lbfgs | LinearRecipe::Eva))
    }
}

/// What a protocol found.
pub(super) struct Outcome {
    pub(super) protocol: Protocol,
    /// One for each trial, on the same test rows.
    pub(super) predictions: Vec<Prediction>,
    /// Labels learnt from in the first trial.
    pub(super) train_labels: Vec<i64>,
    /// How it was trained, as JSON.
    pub(super) settings: Value,
}

/// One encoder at work.
pub(super) struct Bench<'a> {
    pub(super) task: &'a Task,
    pub(super) encoder: &'a Loaded,
    pub(super) patches: &'a Patches,
    pub(super) args: &'a EvalArgs,
}

impl Bench<'_> {
    /// Runs a protocol; `Err` inside where this encoder has nothing to train. `told` hears (done, total) epochs.
    pub(super) fn run(
        &self,
        protocol: &Protocol,
        features: Option<&Tensor>,
        mut told: impl FnMut(u64, u64),
    ) -> Result<Result<Outcome, &'static str>> {
        let frozen = || features.context("frozen features were not computed");
        let Task { labels, split, .. } = self.task;
        let classes = self.task.classes().len();
        let mut train_rows = split.train.clone();
        let (predictions, settings) = match protocol {
            Protocol::Knn(k) => {
                let found = probe::knn(frozen()?, labels, classes, split, *k, KNN_TEMPERATURE)?;
                (vec![found], json!({ "k": k, "temperature": KNN_TEMPERATURE, "similarity": "cosine" }))
            }
            Protocol::Linear(LinearRecipe::Lbfgs) => {
                let params = LinearParams::default();
                let found = probe::linear(frozen()?, labels, classes, split, &params)?;
                let settings = json!({ "solver": "l-bfgs", "inverse_penalty": params.inverse_penalty,
                    "standardised": true, "iterations": found.iterations, "converged": found.converged });
                (vec![found.prediction], settings)
            }
            Protocol::Linear(LinearRecipe::Eva) => self.eva(frozen()?)?,
            Protocol::Linear(LinearRecipe::Seed) => {
                self.supervised(&Recipe::linear(), 1.0, None, &mut train_rows, &mut told)?
            }
            Protocol::Finetune(share) => {
                let Loaded::Network { backbone, .. } = self.encoder else {
                    return Ok(Err("it has no weights to train"));
                };
                let before: Vec<Tensor> = state(backbone).iter().map(Tensor::copy).collect();
                let found = self.supervised(
                    &Recipe::finetune(*share),
                    *share,
                    Some((backbone, before.as_slice())),
                    &mut train_rows,
                    &mut told,
                );
                restore(backbone, &before);
                found?
            }
        };
        let train_labels = train_rows.iter().map(|&row| labels[row]).collect();
        Ok(Ok(Outcome { protocol: protocol.clone(), predictions, train_labels, settings }))
    }

    fn eva(&self, features: &Tensor) -> Result<(Vec<Prediction>, Value)> {
        let Task { labels, slides, split, .. } = self.task;
        let params = EvaParams::default();
        let (mut predictions, mut fits) = (Vec::new(), Vec::new());
        for trial in 0..self.args.trials {
            let seed = trial_seed(self.args.seed, trial);
            let (train, held) = validation(&split.train, labels, slides, seed);
            let part = Split { train, test: split.test.clone() };
            let found = probe::eva(features, labels, self.task.classes().len(), &part, &held, &params, seed)?;
            fits.push(json!({ "steps": found.steps, "validation_balanced_accuracy": found.validation,
                "validation_slides": self.task.slides_of(&held), "train_patches": part.train.len() }));
            predictions.push(found.prediction);
        }
        let settings = json!({ "optimizer": "adamw", "lr": params.lr, "weight_decay": params.weight_decay,
            "batch": params.batch, "max_steps": params.steps, "patience_epochs": params.patience, "trials": fits });
        Ok((predictions, settings))
    }

    /// Trains on views; with a backbone, all of it, from the weights in `before` each time.
    fn supervised(
        &self,
        recipe: &Recipe,
        share: f64,
        whole: Option<(&Backbone, &[Tensor])>,
        train_rows: &mut Vec<usize>,
        told: &mut impl FnMut(u64, u64),
    ) -> Result<(Vec<Prediction>, Value)> {
        let recipe = self.args.epochs.map_or_else(|| recipe.clone(), |epochs| recipe.clone().over(epochs));
        let Task { labels, split, .. } = self.task;
        let total = recipe.epochs * self.args.trials;
        let mut predictions = Vec::new();
        for trial in 0..self.args.trials {
            let seed = trial_seed(self.args.seed, trial);
            let kept = if share < 1.0 { with_labels(&split.train, labels, share, seed) } else { split.train.clone() };
            let part = Split { train: kept, test: split.test.clone() };
            if let Some((backbone, before)) = whole {
                restore(backbone, before);
            }
            let problem = Problem {
                labels,
                classes: self.task.classes().len(),
                split: &part,
                width: self.encoder.width(),
                device: self.encoder.device(),
            };
            let inputs = |pass, rows: &[usize]| -> Result<Tensor> {
                let view = match pass {
                    Pass::Train { epoch } => View::Train { seed, epoch },
                    Pass::Test => View::Test,
                };
                let views = self.patches.views(&self.task.ids_of(rows), view, self.encoder)?;
                Ok(if whole.is_some() { views } else { self.encoder.features(&views) })
            };
            let backbone = whole.map(|(backbone, _)| backbone);
            predictions.push(train(problem, backbone, &recipe, seed, inputs, |epoch| {
                told(trial * recipe.epochs + epoch, total);
            })?);
            if trial == 0 {
                *train_rows = part.train;
            }
        }
        let settings = json!({ "optimizer": "sgd", "lr": recipe.lr, "momentum": recipe.momentum,
            "weight_decay": recipe.weight_decay, "epochs": recipe.epochs, "milestones": recipe.milestones,
            "factor": recipe.factor, "batch": recipe.batch, "labels": share,
            "train_view": "RandomResizedCrop, flip", "test_view": "resize, centre crop",
            "published_length": self.args.epochs.is_none() });
        Ok((predictions, settings))
    }
}

/// Weights and running statistics, which share storage with the network.
pub(super) fn state(backbone: &Backbone) -> Vec<Tensor> {
    backbone.parameters().into_iter().chain(backbone.buffers()).map(|(_, tensor)| tensor.detach()).collect()
}

/// Writes back what [`state`] gave.
pub(super) fn restore(backbone: &Backbone, before: &[Tensor]) {
    for (mut to, from) in state(backbone).into_iter().zip(before) {
        to.copy_(from);
    }
}

/// A share of the labels as typed: `1%`, `12.5%`, `100%`.
///
/// # Errors
/// No percentage above 0 and up to 100.
pub(crate) fn share(text: &str) -> Result<f64> {
    let percent: f64 = text.strip_suffix('%').unwrap_or(text).trim().parse().context("a percentage, such as 10%")?;
    ensure!(percent > 0.0 && percent <= 100.0, "a percentage above 0 and up to 100");
    Ok(percent / 100.0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_percentages_and_name_their_protocol() {
        let name = |text: &str| Protocol::Finetune(share(text).unwrap()).name();
        assert_eq!(
            [name("7%"), name("10"), name("12.5 %"), name("100%")].join(" "),
            "finetune-7% finetune-10% finetune-12.5% finetune-100%"
        );
        for text in ["", "0%", "101%", "ten", "-1%", "NaN"] {
            assert!(share(text).is_err(), "{text}");
        }
    }
}
