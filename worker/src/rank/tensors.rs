//! Tensors to bytes and back: checkpoints and exports hold them little-endian and contiguous.

use anyhow::{Result, bail, ensure};
use sgcl_runstore::{Dtype, Tensor as Stored};
use tch::{Device, Kind, Tensor};

/// A copy of a tensor's elements in host memory.
///
/// # Errors
/// A kind that is never stored.
pub(crate) fn to_stored(name: impl Into<String>, tensor: &Tensor) -> Result<Stored> {
    let name = name.into();
    let dtype = match tensor.kind() {
        Kind::Float => Dtype::F32,
        Kind::Int64 => Dtype::I64,
        Kind::Int => Dtype::I32,
        other => bail!("tensor {name}: {other:?} is not a kind that is stored"),
    };
    let host = tensor.detach().to_device(Device::Cpu).contiguous();
    let mut data = vec![0_u8; host.numel() * host.kind().elt_size_in_bytes()];
    host.copy_data_u8(&mut data, host.numel());
    let shape = host.size().iter().map(|&side| usize::try_from(side)).collect::<Result<_, _>>()?;
    Ok(Stored { name, dtype, shape, data: data.into() })
}

/// A stored tensor in host memory.
///
/// # Errors
/// A kind that is never stored, or bytes that do not fill the shape.
pub(crate) fn from_stored(stored: &Stored) -> Result<Tensor> {
    let kind = match stored.dtype {
        Dtype::F32 => Kind::Float,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        other => bail!("tensor {}: {other:?} is not a kind that is stored", stored.name),
    };
    let elements: usize = stored.shape.iter().product();
    ensure!(
        stored.data.len() == elements * kind.elt_size_in_bytes(),
        "tensor {}: {} bytes do not fill {:?}",
        stored.name,
        stored.data.len(),
        stored.shape
    );
    let shape = stored.shape.iter().map(|&side| i64::try_from(side)).collect::<Result<Vec<_>, _>>()?;
    Ok(Tensor::f_from_data_size(&stored.data, &shape, kind)?)
}
