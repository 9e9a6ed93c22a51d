//! Semantic segmentation on a pretrained backbone: a class for every pixel, learnt by a convolutional head and the dilated backbone
//! below it.

pub mod bcss;
pub mod head;
pub mod score;
pub mod train;
pub mod views;

pub use head::FcnHead;
pub use score::{PixelConfusion, SegmentIntervals};
pub use train::{Recipe, Segmenter, train};
pub use views::{Augment, Tile};

/// Class of pixels that are neither learnt from nor tested on.
pub const IGNORED: u8 = 255;
