//! `backbone.detectron2.pkl`: keys as detectron2's `tools/convert-torchvision-to-d2.py` makes them, arrays as numpy pickles them.
//!
//! Protocol 3, the lowest that has bytes: it loads with `pickle.load` whatever its `encoding`.

use super::ExportError;
use super::pickle::Pickle;
use crate::checkpoint::{Dtype, Tensor};

/// `{"model": {name: array}, "__author__": author, "matching_heuristics": True}`.
pub(super) fn pkl(tensors: &[Tensor], author: &str) -> Result<Vec<u8>, ExportError> {
    let mut p = Pickle::new(3);
    p.empty_dict().mark().text("model").empty_dict().mark();
    for tensor in tensors {
        let dtype = match tensor.dtype {
            Dtype::F32 => "f4",
            Dtype::I64 => "i8",
            other => return Err(ExportError::Dtype { name: tensor.name.clone(), dtype: format!("{other:?}") }),
        };
        p.text(&key(&tensor.name));
        p.global("numpy.core.multiarray", "_reconstruct").mark();
        p.global("numpy", "ndarray").sizes(&[0]).bytes(b"b").tuple().reduce();
        p.mark().int(1).sizes(&tensor.shape);
        p.global("numpy", "dtype").mark().text(dtype).bool(false).bool(true).tuple().reduce();
        p.mark().int(3).text("<").none().none().none().int(-1).int(-1).int(0).tuple().build();
        p.bool(false).bytes(&tensor.data).tuple().build();
    }
    p.set_items().text("__author__").text(author).text("matching_heuristics").bool(true).set_items();
    Ok(p.stop())
}

/// torchvision's name as detectron2 has it.
fn key(name: &str) -> String {
    let mut key = if name.contains("layer") { name.to_owned() } else { format!("stem.{name}") };
    for t in 1..=4 {
        key = key.replace(&format!("layer{t}"), &format!("res{}", t + 1));
    }
    for t in 1..=3 {
        key = key.replace(&format!("bn{t}"), &format!("conv{t}.norm"));
    }
    key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
}
