//! Procedurally drawn H&E-like slides. So far: the pyramidal TIFF that they are written as.

mod tiff;

pub use tiff::{TiffError, encode_pyramid};
