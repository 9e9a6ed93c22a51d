//! DenseCL's pairs: which position of one view's feature map is matched with which of the other's.

use tch::Tensor;

use crate::projector::l2_normalize;

/// A map as rows: (B, C, H, W) → (B, H·W, C).
pub(crate) fn positions(map: &Tensor) -> Tensor {
    map.flatten(2, -1).transpose(1, 2)
}

/// Of each query position the key position whose features of the backbone are most similar by their angle: `queries` and `keys`
/// (B, P, Db) to (B, P) i64.
pub(crate) fn matches(queries: &Tensor, keys: &Tensor) -> Tensor {
    l2_normalize(queries).bmm(&l2_normalize(keys).transpose(1, 2)).argmax(2, false)
}

/// Rows by position, position-major: (B, P, D) → (P·B, D).
pub(crate) fn by_position(rows: &Tensor) -> Tensor {
    let [b, p, d] = [0, 1, 2].map(|at| rows.size()[at]);
    rows.transpose(0, 1).reshape([p * b, d])
}
