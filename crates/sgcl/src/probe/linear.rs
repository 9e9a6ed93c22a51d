//! Multinomial logistic regression on standardised frozen features, by L-BFGS from zero: convex, nothing random.

use std::collections::VecDeque;

use tch::{Kind, Tensor};

use super::{Prediction, ProbeError, Split, labelled, numbers, pick, predict, take};

/// How the linear probe is fitted.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearParams {
    /// Inverse strength of the l2 penalty, scikit-learn's C: the loss is the sum of cross-entropies + |W|² / 2C.
    pub inverse_penalty: f64,
    /// L-BFGS iterations at most.
    pub iterations: usize,
    /// Ends where no entry of the mean loss's gradient is larger.
    pub tolerance: f64,
}

impl Default for LinearParams {
    fn default() -> Self {
        LinearParams { inverse_penalty: 1.0, iterations: 500, tolerance: 1e-5 }
    }
}

/// A fitted probe.
#[derive(Debug)]
pub struct LinearProbe {
    /// On the test rows.
    pub prediction: Prediction,
    /// Mean penalised loss on the training rows.
    pub train_loss: f64,
    /// L-BFGS iterations done.
    pub iterations: usize,
    /// Whether the tolerance was met.
    pub converged: bool,
}

/// Fits on the training rows, scores on the test rows. Features (n, d) are standardised with the training rows' mean and
/// deviation. Rows with a negative label are left out. Works in float64: 8 · n · d bytes.
///
/// # Errors
/// [`ProbeError`] where columns, labels or parameters do not fit.
pub fn linear(
    features: &Tensor,
    labels: &[i64],
    classes: usize,
    split: &Split,
    params: &LinearParams,
) -> Result<LinearProbe, ProbeError> {
    let split = labelled(features, labels, classes, split)?;
    if params.inverse_penalty <= 0.0 || params.iterations == 0 {
        return Err(ProbeError::Invalid("the linear probe needs a positive inverse penalty and iterations".to_owned()));
    }
    tch::no_grad(|| {
        let half = |half: &[usize]| take(features, half).to_kind(Kind::Double);
        let (train, test) = (half(&split.train), half(&split.test));
        let mean = train.mean_dim([0_i64].as_slice(), true, Kind::Double);
        // A constant column carries nothing: it becomes zero, not NaN.
        let std = train.std_dim([0_i64].as_slice(), false, true);
        let std = std.where_self(&std.gt(1e-12), &Tensor::ones_like(&std));
        let with_bias = |x: Tensor| {
            let x = (x - &mean) / &std;
            let ones = Tensor::ones([x.size()[0], 1], (Kind::Double, x.device()));
            Tensor::cat(&[x, ones], 1)
        };
        let (train, test) = (with_bias(train), with_bias(test));
        let target = Tensor::from_slice(&pick(labels, &split.train)).to_device(features.device());
        let problem = Problem::new(&train, &target, classes, params.inverse_penalty);
        let fit = minimize(|w| problem.loss_and_gradient(w), problem.start(), params);
        let probabilities = numbers(&test.matmul(&fit.at).softmax(1, Kind::Double))?;
        let prediction = predict(split.test, labels, probabilities, classes);
        Ok(LinearProbe { prediction, train_loss: fit.loss, iterations: fit.iterations, converged: fit.converged })
    })
}

/// Mean cross-entropy of x (n, d + 1) · W (d + 1, classes), with the penalty on all of W but the bias row.
struct Problem<'a> {
    x: &'a Tensor,
    one_hot: Tensor,
    penalty: Tensor,
}

impl<'a> Problem<'a> {
    fn new(x: &'a Tensor, target: &Tensor, classes: usize, inverse_penalty: f64) -> Self {
        let (n, width) = (x.size()[0], x.size()[1]);
        let penalty = Tensor::full([width, 1], 1.0 / (inverse_penalty * n as f64), (Kind::Double, x.device()));
        let _ = penalty.narrow(0, width - 1, 1).zero_();
        let mut one_hot = Tensor::zeros([n, classes as i64], (Kind::Double, x.device()));
        let _ = one_hot.scatter_value_(1, &target.unsqueeze(1), 1.0);
        Problem { x, one_hot, penalty }
    }

    fn start(&self) -> Tensor {
        Tensor::zeros([self.x.size()[1], self.one_hot.size()[1]], (Kind::Double, self.x.device()))
    }

    fn loss_and_gradient(&self, w: &Tensor) -> (f64, Tensor) {
        let n = self.x.size()[0] as f64;
        let log_p = self.x.matmul(w).log_softmax(1, Kind::Double);
        let weighted = w * &self.penalty;
        let loss = -dot(&log_p, &self.one_hot) / n + 0.5 * dot(w, &weighted);
        let gradient = self.x.tr().matmul(&((log_p.exp() - &self.one_hot) / n)) + weighted;
        (loss, gradient)
    }
}

struct Minimum {
    at: Tensor,
    loss: f64,
    iterations: usize,
    converged: bool,
}

/// L-BFGS (Nocedal & Wright, algorithm 7.5) with a backtracking line search; pairs without positive curvature are dropped.
fn minimize(f: impl Fn(&Tensor) -> (f64, Tensor), start: Tensor, params: &LinearParams) -> Minimum {
    const MEMORY: usize = 10;
    const SUFFICIENT: f64 = 1e-4;
    let mut at = start;
    let (mut loss, mut gradient) = f(&at);
    let mut pairs: VecDeque<(Tensor, Tensor)> = VecDeque::new();
    for iteration in 0..params.iterations {
        if gradient.abs().max().double_value(&[]) <= params.tolerance {
            return Minimum { at, loss, iterations: iteration, converged: true };
        }
        let direction = -two_loop(&gradient, &pairs);
        let slope = dot(&direction, &gradient);
        let mut length = if pairs.is_empty() { (1.0 / gradient.norm().double_value(&[])).min(1.0) } else { 1.0 };
        let accepted = (0..30).find_map(|_| {
            let next = &at + &direction * length;
            let (next_loss, next_gradient) = f(&next);
            let enough = next_loss <= loss + SUFFICIENT * length * slope;
            length *= 0.5;
            enough.then_some((next, next_loss, next_gradient))
        });
        // No step improves the loss: rounding is all that is left.
        let Some((next, next_loss, next_gradient)) = accepted else {
            return Minimum { at, loss, iterations: iteration, converged: false };
        };
        let (step, change) = (&next - &at, &next_gradient - &gradient);
        if dot(&step, &change) > 1e-12 * dot(&change, &change) {
            pairs.push_back((step, change));
            if pairs.len() > MEMORY {
                pairs.pop_front();
            }
        }
        (at, loss, gradient) = (next, next_loss, next_gradient);
    }
    let converged = gradient.abs().max().double_value(&[]) <= params.tolerance;
    Minimum { at, loss, iterations: params.iterations, converged }
}

fn two_loop(gradient: &Tensor, pairs: &VecDeque<(Tensor, Tensor)>) -> Tensor {
    let mut q = gradient.copy();
    let mut shares = Vec::with_capacity(pairs.len());
    for (step, change) in pairs.iter().rev() {
        let share = dot(step, &q) / dot(step, change);
        q -= change * share;
        shares.push(share);
    }
    if let Some((step, change)) = pairs.back() {
        q *= dot(step, change) / dot(change, change);
    }
    for ((step, change), share) in pairs.iter().zip(shares.into_iter().rev()) {
        q += step * (share - dot(change, &q) / dot(step, change));
    }
    q
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    (a * b).sum(Kind::Double).double_value(&[])
}
