//! Views of a patch: what is drawn ([`draw`]) apart from what is done ([`render`]).
//!
//! The published code runs torchvision's transforms on PIL images; pixels and distributions here are theirs.

pub mod color;
pub mod draw;
mod hsv;
pub mod render;

pub use draw::{ColorOp, Crop, JitterDraw, PatchDraw, ViewDraw, ViewParams, draw_patch};
pub use render::{Renderer, ViewBatch, render_batch};

/// Means of ImageNet's channels, of values 0 to 1.
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// Standard deviations of ImageNet's channels.
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];
