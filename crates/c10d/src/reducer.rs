//! The reducer under PyTorch's DistributedDataParallel: averages gradients over ranks while backward still runs.

use std::ffi::c_void;
use std::ptr::{NonNull, null_mut};

use tch::Tensor;

use crate::error::{Error, check};
use crate::{ProcessGroup, ffi};

/// How gradients are packed for the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buckets {
    /// Bytes of the first bucket to be sent: small, so that the ring starts early.
    pub first_bytes: usize,
    /// Bytes of every other bucket.
    pub bytes: usize,
    /// Allows parameters that took no part in a loss, at the price of one more all-reduce a step.
    pub find_unused: bool,
}

impl Default for Buckets {
    /// DistributedDataParallel's: 1 MiB, then 25 MiB; every parameter takes part.
    fn default() -> Self {
        Self { first_bytes: 1 << 20, bytes: 25 << 20, find_unused: false }
    }
}

/// Averages `.grad` of a fixed list of parameters over a group.
///
/// One step: [`zero_grad`], then [`Reducer::prepare`], the forward pass, [`backward`]. To accumulate over micro-batches, call
/// `prepare` before the last one only: without it gradients add up on this rank, and the last backward reduces their sum. Every
/// rank prepares equally often. `.grad` are views of the buckets: zero them in place, never replace them.
#[derive(Debug)]
pub struct Reducer(NonNull<ffi::SgclReducer>);

// SAFETY: the reducer locks internally, since autograd's threads call its hooks.
unsafe impl Send for Reducer {}

impl Reducer {
    /// Watches `parameters`: leaves that require gradients, in the same order and of the same shapes on every rank. Collective.
    ///
    /// Drop an older reducer over the same parameters first.
    ///
    /// # Errors
    /// Ranks disagree about the parameters, one requires no gradient, or a peer is gone.
    pub fn new(parameters: &[Tensor], group: &ProcessGroup, buckets: Buckets) -> Result<Self, Error> {
        let operation = "make the gradient reducer";
        if parameters.is_empty() {
            return Err(Error::refused(operation, "there are no parameters"));
        }
        for (index, parameter) in parameters.iter().enumerate() {
            if !parameter.requires_grad() || !parameter.is_leaf() {
                return Err(Error::refused(
                    operation,
                    format!("parameter {index} is no leaf that requires a gradient"),
                ));
            }
            if parameter.device() != group.device() {
                return Err(Error::refused(
                    operation,
                    format!("parameter {index} is on {:?}, the group on {:?}", parameter.device(), group.device()),
                ));
            }
        }
        let bytes = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let mut pointers: Vec<*mut c_void> = parameters.iter().map(ffi::tensor).collect();
        let mut out = null_mut();
        check(operation, |message| {
            // SAFETY: the tensors outlive the call, which takes references of its own; `out` is set on success.
            unsafe {
                ffi::sgcl_reducer_new(
                    pointers.as_mut_ptr(),
                    pointers.len(),
                    group.as_ptr(),
                    bytes(buckets.first_bytes),
                    bytes(buckets.bytes),
                    i32::from(buckets.find_unused),
                    &raw mut out,
                    message,
                )
            }
        })?;
        NonNull::new(out).map(Self).ok_or_else(|| Error::refused(operation, "the shim returned nothing"))
    }

    /// Says that the next backward pass reduces. Call it before the forward pass: after the first step it also packs the buckets
    /// anew, in the order gradients came, which is a collective.
    ///
    /// # Errors
    /// A peer is gone, or the last backward pass did not reach every parameter.
    pub fn prepare(&self) -> Result<(), Error> {
        // SAFETY: the reducer is alive.
        check("prepare the gradient reduction", |message| unsafe {
            ffi::sgcl_reducer_prepare(self.0.as_ptr(), message)
        })
    }
}

impl Drop for Reducer {
    fn drop(&mut self) {
        // SAFETY: the pointer is ours and is not used again.
        unsafe { ffi::sgcl_reducer_free(self.0.as_ptr()) }
    }
}

/// Backward from a scalar `loss`. `Tensor::backward` panics where a peer is lost on the way; this returns the error.
///
/// # Errors
/// A peer is gone or late, or the loss has no graph.
pub fn backward(loss: &Tensor) -> Result<(), Error> {
    // SAFETY: the tensor is alive.
    check("backward", |message| unsafe { ffi::sgcl_backward(ffi::tensor(loss), message) })
}

/// Sets existing gradients to zero in place: they are views of the reducer's buckets, which `Tensor::zero_grad` cannot detach.
pub fn zero_grad(parameters: &[Tensor]) {
    tch::no_grad(|| {
        for parameter in parameters {
            let mut gradient = parameter.grad();
            if gradient.defined() {
                let _ = gradient.zero_();
            }
        }
    });
}
