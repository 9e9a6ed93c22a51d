//! `backbone.pth`: the zip that `torch.save` writes, so that a bare `torch.load` reads it.
//!
//! Layout after PyTorch's `torch/serialization.py` and `caffe2/serialize/inline_container.cc`: stored entries, each tensor's bytes at
//! a multiple of 64. libtorch's own `pickle_save` writes type tags that `weights_only=True` refuses.

use std::io::{Cursor, Write};

use sha2::{Digest, Sha256};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::ExportError;
use super::pickle::Pickle;
use crate::checkpoint::{Dtype, Tensor};

const ALIGNMENT: u16 = 64;

/// `{"state_dict": OrderedDict(name → tensor), "author": author}`.
pub(super) fn pth(tensors: &[Tensor], author: &str) -> Result<Vec<u8>, ExportError> {
    archive("backbone", &pickle(tensors, author)?, tensors)
}

/// The tensor itself, which `torch.load` returns.
pub(crate) fn pt(tensor: &Tensor) -> Result<Vec<u8>, ExportError> {
    let mut p = Pickle::new(2);
    rebuild(&mut p, 0, tensor)?;
    archive("archive", &p.stop(), std::slice::from_ref(tensor))
}

fn archive(folder: &str, pickle: &[u8], tensors: &[Tensor]) -> Result<Vec<u8>, ExportError> {
    let id = hex(&Sha256::digest(pickle));
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .with_alignment(ALIGNMENT)
        .last_modified_time(zip::DateTime::default());
    let mut entry = |name: &str, bytes: &[u8]| -> Result<(), ExportError> {
        let options = options.large_file(u32::try_from(bytes.len()).is_err());
        zip.start_file(format!("{folder}/{name}"), options).map_err(|e| ExportError::Zip(e.to_string()))?;
        zip.write_all(bytes).map_err(|e| ExportError::Zip(e.to_string()))
    };
    entry("data.pkl", pickle)?;
    entry(".format_version", b"1")?;
    entry(".storage_alignment", ALIGNMENT.to_string().as_bytes())?;
    entry("byteorder", b"little")?;
    for (i, tensor) in tensors.iter().enumerate() {
        entry(&format!("data/{i}"), &tensor.data)?;
    }
    entry("version", b"3\n")?;
    entry(".data/serialization_id", id.as_bytes())?;
    Ok(zip.finish().map_err(|e| ExportError::Zip(e.to_string()))?.into_inner())
}

fn pickle(tensors: &[Tensor], author: &str) -> Result<Vec<u8>, ExportError> {
    let mut p = Pickle::new(2);
    p.empty_dict().mark().text("state_dict");
    p.global("collections", "OrderedDict").empty_tuple().reduce().mark();
    for (i, tensor) in tensors.iter().enumerate() {
        p.text(&tensor.name);
        rebuild(&mut p, i, tensor)?;
    }
    p.set_items().text("author").text(author).set_items();
    Ok(p.stop())
}

/// Puts a tensor over storage `number` on the pickle's stack.
fn rebuild(p: &mut Pickle, number: usize, tensor: &Tensor) -> Result<(), ExportError> {
    let storage = match tensor.dtype {
        Dtype::F32 => "FloatStorage",
        Dtype::I64 => "LongStorage",
        other => return Err(ExportError::Dtype { name: tensor.name.clone(), dtype: format!("{other:?}") }),
    };
    p.global("torch._utils", "_rebuild_tensor_v2").mark();
    p.mark().text("storage").global("torch", storage).text(&number.to_string()).text("cpu");
    p.size(tensor.shape.iter().product()).tuple().persistent_id();
    p.int(0).sizes(&tensor.shape).sizes(&strides(&tensor.shape)).bool(false);
    p.global("collections", "OrderedDict").empty_tuple().reduce();
    p.tuple().reduce();
    Ok(())
}

/// Of a contiguous tensor.
fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1] * shape[i + 1].max(1);
    }
    strides
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
