//! Stochastic gradient descent with momentum, as `torch.optim.SGD`.

use std::collections::BTreeMap;

use sgcl_c10d::optim::same_layout;
use tch::Tensor;

/// State that does not fit the parameters.
#[derive(Debug, thiserror::Error)]
pub enum OptimError {
    /// No parameter of that name.
    #[error("the optimiser has no parameter {0}; the checkpoint is of another model")]
    Unknown(String),
    /// A momentum of another shape.
    #[error("momentum of {name} has shape {got:?}, its parameter {expected:?}; the checkpoint is of another model")]
    Shape {
        /// Parameter.
        name: String,
        /// Shape of the parameter.
        expected: Vec<i64>,
        /// Shape of the state.
        got: Vec<i64>,
    },
    /// libtorch refused.
    #[error(transparent)]
    Kernel(#[from] sgcl_c10d::Error),
}

/// `tensor` as `parameter` lies in memory: a convolution may leave its gradient channels-last.
fn laid_out_like(parameter: &Tensor, tensor: Tensor) -> Tensor {
    if same_layout(parameter, &tensor) {
        return tensor;
    }
    tch::no_grad(|| {
        let mut out = parameter.detach().zeros_like();
        out.copy_(&tensor);
        out
    })
}

/// Tensors that one kernel walks, place by place.
#[derive(Default)]
struct Group {
    parameters: Vec<Tensor>,
    gradients: Vec<Tensor>,
    momenta: Vec<Tensor>,
}

/// Momentum SGD over named parameters; weight decay applies to all of them.
#[derive(Debug)]
pub struct Sgd {
    parameters: BTreeMap<String, Tensor>,
    momenta: BTreeMap<String, Tensor>,
    momentum: f64,
    weight_decay: f64,
}

impl Sgd {
    /// `parameters` share storage with the model's. Published values: momentum 0.9, weight decay 1e-4.
    #[must_use]
    pub fn new(parameters: impl IntoIterator<Item = (String, Tensor)>, momentum: f64, weight_decay: f64) -> Self {
        Self { parameters: parameters.into_iter().collect(), momenta: BTreeMap::new(), momentum, weight_decay }
    }

    /// d = gradient + decay·p; m ← momentum·m + d (m = d at first); p ← p − lr·m. A parameter without gradient stays.
    ///
    /// # Errors
    /// [`OptimError::Kernel`]: a bug.
    pub fn step(&mut self, lr: f64) -> Result<(), OptimError> {
        // Those that have a momentum, and those that begin one: each is one kernel over all of its parameters.
        let (mut going, mut beginning) = (Group::default(), Group::default());
        for (name, parameter) in &self.parameters {
            let gradient = parameter.grad();
            if !gradient.defined() {
                continue;
            }
            let group = if self.momenta.contains_key(name) { &mut going } else { &mut beginning };
            let momentum =
                self.momenta.entry(name.clone()).or_insert_with(|| tch::no_grad(|| parameter.detach().zeros_like()));
            group.momenta.push(momentum.shallow_clone());
            group.parameters.push(parameter.detach());
            group.gradients.push(laid_out_like(parameter, gradient));
        }
        for (group, first) in [(going, false), (beginning, true)] {
            let Self { momentum, weight_decay, .. } = *self;
            let how = sgcl_c10d::optim::Sgd { lr, momentum, weight_decay, first };
            sgcl_c10d::optim::sgd(&group.parameters, &group.gradients, &group.momenta, how)?;
        }
        Ok(())
    }

    /// Zeroes the gradients in place (their storage may belong to a reducer).
    pub fn zero_grad(&mut self) {
        for parameter in self.parameters.values() {
            let mut gradient = parameter.grad();
            if gradient.defined() {
                let _ = tch::no_grad(|| gradient.zero_());
            }
        }
    }

    /// Momentum by parameter name, in name order; copies. Parameters that had no gradient yet are absent.
    #[must_use]
    pub fn state(&self) -> Vec<(String, Tensor)> {
        self.momenta.iter().map(|(name, m)| (name.clone(), m.copy())).collect()
    }

    /// Replaces the momenta by those of [`Sgd::state`].
    pub fn load_state(&mut self, state: impl IntoIterator<Item = (String, Tensor)>) -> Result<(), OptimError> {
        let mut momenta = BTreeMap::new();
        for (name, m) in state {
            let Some(parameter) = self.parameters.get(&name) else {
                return Err(OptimError::Unknown(name));
            };
            if parameter.size() != m.size() {
                return Err(OptimError::Shape { name, expected: parameter.size(), got: m.size() });
            }
            let mut own = tch::no_grad(|| parameter.detach().zeros_like());
            own.copy_(&m);
            momenta.insert(name, own);
        }
        self.momenta = momenta;
        Ok(())
    }
}
