//! BatchNorm whose statistics are of all ranks.

use std::ffi::c_void;
use std::ptr::null_mut;

use tch::Tensor;

use crate::error::{Error, check};
use crate::{ProcessGroup, ffi};

/// What a layer normalises with; all (C), f32.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// Trained.
    pub scale: &'a Tensor,
    /// Trained.
    pub shift: &'a Tensor,
    /// Moved towards the batch's, in place.
    pub running_mean: &'a Tensor,
    /// Likewise, unbiased.
    pub running_var: &'a Tensor,
    /// Share of the batch in the running statistics.
    pub momentum: f64,
    /// Added to variances.
    pub eps: f64,
}

/// `torch.nn.SyncBatchNorm` in training: x (B, C, H, W), in its kind, by the mean and variance over the batches of all ranks. Two all-reduces of
/// 2C + 1 and 2C numbers, one here and one when backward comes by, so every rank calls it for every layer in the same order, and
/// goes backward through all of them, even with a batch of none. Gradients of scale and shift are this rank's part.
///
/// # Errors
/// A peer is gone. Backward says so by its own error ([`crate::backward`]).
pub fn sync_batch_norm(x: &Tensor, norm: Norm<'_>, group: &ProcessGroup) -> Result<Tensor, Error> {
    let mut out: *mut c_void = null_mut();
    let operation = "normalise over ranks";
    check(operation, |message| {
        let Norm { scale, shift, running_mean, running_var, momentum, eps } = norm;
        // SAFETY: the tensors and the group outlive the call; what it keeps of them it holds references to. `out` is set on success.
        unsafe {
            ffi::sgcl_sync_norm(
                ffi::tensor(x),
                ffi::tensor(scale),
                ffi::tensor(shift),
                ffi::tensor(running_mean),
                ffi::tensor(running_var),
                group.as_ptr(),
                momentum,
                eps,
                &raw mut out,
                message,
            )
        }
    })?;
    if out.is_null() {
        return Err(Error::refused(operation, "the shim returned nothing"));
    }
    // SAFETY: a new `at::Tensor` that nobody else holds.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}
