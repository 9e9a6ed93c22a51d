//! Host memory to a device, without waiting for it.

use std::ffi::c_void;
use std::ptr::null_mut;

use tch::{Device, Tensor};

use crate::error::{Error, check};
use crate::ffi;

/// A copy of `host` on `device`. On a GPU it goes through pinned memory and is queued: what is queued after it sees it, and nobody waits. On
/// the CPU it is the same tensor.
///
/// # Errors
/// No such device, or its memory is full.
pub fn to_device(host: &Tensor, device: Device) -> Result<Tensor, Error> {
    let operation = "copy to a device";
    let index = match device {
        Device::Cpu => return Ok(host.shallow_clone()),
        Device::Cuda(index) => i32::try_from(index).ok(),
        Device::Mps | Device::Vulkan => None,
    };
    let index = index.ok_or_else(|| Error::refused(operation, format!("{device:?} is none that is copied to")))?;
    let mut out: *mut c_void = null_mut();
    // SAFETY: the tensor outlives the call; `out` is set on success.
    check(operation, |message| unsafe { ffi::sgcl_to_gpu(ffi::tensor(host), index, &raw mut out, message) })?;
    if out.is_null() {
        return Err(Error::refused(operation, "the shim returned nothing"));
    }
    // SAFETY: a new `at::Tensor` that nobody else holds.
    Ok(unsafe { Tensor::from_ptr(out.cast()) })
}
