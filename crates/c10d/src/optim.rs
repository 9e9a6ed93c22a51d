//! Optimisers that libtorch runs as one kernel over all parameters.

use tch::Tensor;

use crate::error::{Error, check};
use crate::ffi;

/// What a step of [`sgd`] is taken with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    /// Share of the momentum that stays.
    pub momentum: f64,
    /// Weight decay, part of the gradient.
    pub weight_decay: f64,
    /// Whether momenta hold nothing yet: they become the gradients.
    pub first: bool,
}

/// Whether two tensors have one shape and lie in memory alike, so that a kernel may walk them side by side. What a dimension of one
/// strides by means nothing.
#[must_use]
pub fn same_layout(a: &Tensor, b: &Tensor) -> bool {
    let size = a.size();
    size == b.size() && size.iter().zip(a.stride()).zip(b.stride()).all(|((&n, a), b)| n == 1 || a == b)
}

/// One step of `torch.optim.SGD(fused=True)`, in place: d = gradient + decay·p; m ← momentum·m + d; p ← p − lr·m. Lists go together, tensors of a
/// place have one shape and layout, all are of one kind and device. Gradients are read.
///
/// # Errors
/// Tensors that do not go together.
pub fn sgd(parameters: &[Tensor], gradients: &[Tensor], momenta: &[Tensor], how: Sgd) -> Result<(), Error> {
    let operation = "step the optimiser";
    let count = parameters.len();
    if gradients.len() != count || momenta.len() != count {
        return Err(Error::refused(operation, "lists of different lengths"));
    }
    for at in 0..count {
        let (p, g, m) = (&parameters[at], &gradients[at], &momenta[at]);
        if !same_layout(p, g) || !same_layout(p, m) {
            return Err(Error::refused(
                operation,
                "a parameter, its gradient and its momentum differ in shape or layout",
            ));
        }
    }
    if count == 0 {
        return Ok(());
    }
    let list = |tensors: &[Tensor]| tensors.iter().map(ffi::tensor).collect::<Vec<_>>();
    let (mut p, mut g, mut m) = (list(parameters), list(gradients), list(momenta));
    let Sgd { lr, momentum, weight_decay, first } = how;
    check(operation, |message| {
        // SAFETY: the tensors outlive the call, and every list has `count` of them.
        unsafe {
            ffi::sgcl_sgd(
                p.as_mut_ptr(),
                g.as_mut_ptr(),
                m.as_mut_ptr(),
                count,
                lr,
                momentum,
                weight_decay,
                i32::from(first),
                message,
            )
        }
    })
}
