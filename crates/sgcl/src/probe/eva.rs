//! The linear protocol of the eva framework: one linear layer on frozen features, AdamW, stopped early.

use tch::{Kind, Tensor};

use super::head::Head;
use super::rows::batches;
use super::{Prediction, ProbeError, Split, labelled, numbers, pick, predict, take};

/// How the layer is trained. The default is the published setting.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaParams {
    /// Learning rate, constant.
    pub lr: f64,
    /// Decoupled weight decay, on the bias too: torch's default.
    pub weight_decay: f64,
    /// Rows a step.
    pub batch: usize,
    /// Steps at most.
    pub steps: u64,
    /// Ends after so many epochs in a row that were not better on the validation rows.
    pub patience: u64,
}

impl Default for EvaParams {
    fn default() -> Self {
        EvaParams { lr: 3e-4, weight_decay: 0.01, batch: 256, steps: 12_500, patience: 7 }
    }
}

/// A trained layer's answers.
#[derive(Debug)]
pub struct EvaProbe {
    /// On the test rows.
    pub prediction: Prediction,
    /// Steps done.
    pub steps: u64,
    /// Balanced accuracy on the validation rows of the weights that were kept; `None` without such rows.
    pub validation: Option<f64>,
}

/// Trains on the training rows and keeps the weights of the epoch that was best on the `validation` rows by balanced accuracy (the
/// first of equals), or the last ones where there are none. Features (n, d) are used as they are.
///
/// # Errors
/// [`ProbeError`] where columns, labels or parameters do not fit, or the training diverges.
pub fn eva(
    features: &Tensor,
    labels: &[i64],
    classes: usize,
    split: &Split,
    validation: &[usize],
    params: &EvaParams,
    seed: u64,
) -> Result<EvaProbe, ProbeError> {
    let split = labelled(features, labels, classes, split)?;
    if params.batch == 0 || params.steps == 0 {
        return Err(ProbeError::Invalid("the eva protocol needs a batch and steps above 0".to_owned()));
    }
    let device = features.device();
    let validation: Vec<usize> = validation.iter().copied().filter(|&row| labels[row] >= 0).collect();
    let head = Head::new(features.size()[1], classes, seed, device);
    tch::no_grad(|| {
        let answer = |rows_asked: &[usize]| -> Result<Prediction, ProbeError> {
            let x = take(features, rows_asked).to_kind(Kind::Float);
            let probabilities = numbers(&head.logits(&x).softmax(1, Kind::Double))?;
            if probabilities.iter().any(|p| !p.is_finite()) {
                return Err(ProbeError::Invalid("the linear layer's training diverged".to_owned()));
            }
            Ok(predict(rows_asked.to_vec(), labels, probabilities, classes))
        };
        let mut weights = [AdamW::new(&head.weight), AdamW::new(&head.bias)];
        let (mut steps, mut epoch, mut waited) = (0, 0, 0);
        let mut best: Option<(f64, Tensor, Tensor)> = None;
        while steps < params.steps && waited < params.patience {
            for batch in batches(&split.train, params.batch, seed, epoch) {
                let x = take(features, &batch).to_kind(Kind::Float);
                let target = Tensor::from_slice(&pick(labels, &batch)).to_device(device);
                // Gradient of the mean cross-entropy by the logits: (softmax - one-hot) / B.
                let mut error = head.logits(&x).softmax(1, Kind::Float);
                let minus = Tensor::full([batch.len() as i64, 1], -1.0, (Kind::Float, device));
                let _ = error.scatter_add_(1, &target.unsqueeze(1), &minus);
                let error = error / batch.len() as f64;
                weights[0].step(&error.tr().matmul(&x), params);
                weights[1].step(&error.sum_dim_intlist([0_i64].as_slice(), false, Kind::Float), params);
                steps += 1;
                if steps == params.steps {
                    break;
                }
            }
            epoch += 1;
            if validation.is_empty() {
                continue;
            }
            let balanced = answer(&validation)?.scores(&[]).figures.balanced_accuracy;
            if best.as_ref().is_none_or(|(before, ..)| balanced > *before) {
                best = Some((balanced, head.weight.copy(), head.bias.copy()));
                waited = 0;
            } else {
                waited += 1;
            }
        }
        let validation = best.map(|(balanced, weight, bias)| {
            head.weight.detach().copy_(&weight);
            head.bias.detach().copy_(&bias);
            balanced
        });
        Ok(EvaProbe { prediction: answer(&split.test)?, steps, validation })
    })
}

/// `torch.optim.AdamW` of one tensor: betas 0.9 and 0.999, epsilon 1e-8.
struct AdamW {
    parameter: Tensor,
    mean: Tensor,
    square: Tensor,
    steps: i32,
}

impl AdamW {
    fn new(parameter: &Tensor) -> Self {
        let parameter = parameter.detach();
        AdamW { mean: parameter.zeros_like(), square: parameter.zeros_like(), parameter, steps: 0 }
    }

    fn step(&mut self, gradient: &Tensor, params: &EvaParams) {
        const BETAS: (f64, f64) = (0.9, 0.999);
        self.steps += 1;
        let _ = self.parameter.g_mul_scalar_(1.0 - params.lr * params.weight_decay);
        self.mean = &self.mean * BETAS.0 + gradient * (1.0 - BETAS.0);
        self.square = &self.square * BETAS.1 + gradient * gradient * (1.0 - BETAS.1);
        let (first, second) = (1.0 - BETAS.0.powi(self.steps), 1.0 - BETAS.1.powi(self.steps));
        let scale = self.square.sqrt() / second.sqrt() + 1e-8;
        let _ = self.parameter.g_sub_(&(&self.mean / scale * (params.lr / first)));
    }
}
