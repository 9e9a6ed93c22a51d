//! Classifiers trained by SGD on views that are drawn anew every epoch: a linear layer on a frozen encoder, or the whole encoder.

use tch::{Device, Kind, Tensor};

use super::head::Head;
use super::rows::batches;
use super::{Prediction, ProbeError, Split, numbers, pick, predict};
use crate::backbone::Backbone;
use crate::optim::Sgd;

/// How a classifier is trained: momentum SGD, the rate falling by a factor at two epochs.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// Learning rate at first.
    pub lr: f64,
    /// Momentum.
    pub momentum: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Epochs.
    pub epochs: u64,
    /// Epochs at which the rate falls.
    pub milestones: [u64; 2],
    /// By what it is multiplied there.
    pub factor: f64,
    /// Patches a step at most.
    pub batch: usize,
}

impl Recipe {
    /// The published linear protocol. Its batch is not published: 256, as MoCo's.
    #[must_use]
    pub fn linear() -> Self {
        Recipe {
            lr: 0.03,
            momentum: 0.9,
            weight_decay: 0.0,
            epochs: 100,
            milestones: [60, 80],
            factor: 0.1,
            batch: 256,
        }
    }

    /// The published fine-tuning with this share of the labels, below 1 by the low-label schedule. Its batch is not published: 64.
    #[must_use]
    pub fn finetune(labels: f64) -> Self {
        let whole = Recipe { lr: 0.001, weight_decay: 1e-4, batch: 64, ..Recipe::linear() };
        if labels < 1.0 { Recipe { epochs: 20, milestones: [12, 16], factor: 0.2, ..whole } } else { whole }
    }

    /// The same shape over another number of epochs.
    #[must_use]
    pub fn over(self, epochs: u64) -> Self {
        let milestones = self.milestones.map(|at| at * epochs / self.epochs.max(1));
        Recipe { epochs, milestones, ..self }
    }

    /// The learning rate of an epoch, from 0.
    #[must_use]
    pub fn lr_at(&self, epoch: u64) -> f64 {
        let falls = self.milestones.iter().filter(|&&at| epoch >= at).count();
        self.lr * self.factor.powi(i32::try_from(falls).unwrap_or(0))
    }
}

/// What is to be learnt.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// Class of every row; negative where it has none.
    pub labels: &'a [i64],
    /// Number of classes.
    pub classes: usize,
    /// Rows to learn from and to test on.
    pub split: &'a Split,
    /// Width of the features.
    pub width: i64,
    /// Where to compute.
    pub device: Device,
}

/// Which views of rows are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Drawn for this epoch.
    Train {
        /// From 0.
        epoch: u64,
    },
    /// Nothing random.
    Test,
}

/// Trains a linear layer and, where one is given, the backbone before it; answers for the test rows. `inputs` gives what goes in
/// for some rows: images (B, 3, H, W) for a backbone, else features (B, width). `told` hears the epochs that are done.
///
/// # Errors
/// [`ProbeError`] where labels or rows do not fit or the training diverges; whatever `inputs` meets.
pub fn train<E: From<ProbeError>>(
    problem: Problem<'_>,
    backbone: Option<&Backbone>,
    recipe: &Recipe,
    seed: u64,
    mut inputs: impl FnMut(Pass, &[usize]) -> Result<Tensor, E>,
    mut told: impl FnMut(u64),
) -> Result<Prediction, E> {
    let Problem { labels, classes, width, device, .. } = problem;
    let split = checked(problem, backbone.is_some())?;
    let head = Head::new(width, classes, seed, device);
    let parameters = backbone.map(Backbone::parameters).unwrap_or_default();
    let mut sgd = Sgd::new(parameters.into_iter().chain(head.parameters()), recipe.momentum, recipe.weight_decay);
    let logits = |x: Tensor, train: bool| match backbone {
        Some(backbone) => head.logits(&backbone.features(&x, train)),
        None => head.logits(&x),
    };
    for epoch in 0..recipe.epochs {
        for batch in batches(&split.train, recipe.batch, seed, epoch) {
            let target = Tensor::from_slice(&pick(labels, &batch)).to_device(device);
            let loss = logits(inputs(Pass::Train { epoch }, &batch)?, true).cross_entropy_for_logits(&target);
            sgd.zero_grad();
            loss.backward();
            sgd.step(recipe.lr_at(epoch)).map_err(ProbeError::from)?;
        }
        told(epoch + 1);
    }
    let mut probabilities = Vec::with_capacity(split.test.len() * classes);
    for batch in split.test.chunks(recipe.batch.max(1)) {
        let x = inputs(Pass::Test, batch)?;
        probabilities.extend(numbers(&tch::no_grad(|| logits(x, false).softmax(1, Kind::Double)))?);
    }
    if probabilities.iter().any(|p| !p.is_finite()) {
        return Err(
            ProbeError::Invalid("the classifier's training diverged: its answers are not finite".to_owned()).into()
        );
    }
    Ok(predict(split.test, labels, probabilities, classes))
}

/// Both halves without unlabelled rows.
fn checked(problem: Problem<'_>, whole: bool) -> Result<Split, ProbeError> {
    let Problem { labels, classes, split, .. } = problem;
    if let Some((row, &label)) = labels.iter().enumerate().find(|&(_, &label)| label >= classes as i64) {
        return Err(ProbeError::Label { row, label, classes });
    }
    let half = |rows: &[usize], half| {
        let rows: Vec<usize> = rows.iter().copied().filter(|&row| labels[row] >= 0).collect();
        if rows.is_empty() { Err(ProbeError::Empty { half }) } else { Ok(rows) }
    };
    let split = Split { train: half(&split.train, "train")?, test: half(&split.test, "test")? };
    if whole && split.train.len() < 2 {
        return Err(ProbeError::Invalid(
            "fine-tuning needs two labelled patches or more: BatchNorm has no spread over one".to_owned(),
        ));
    }
    Ok(split)
}
