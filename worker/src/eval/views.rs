//! From patches to what an encoder takes: decoded, cut, resized on all cores.

use anyhow::Result;
use rayon::prelude::*;
use sgcl::augment::{Renderer, render::normalize};
use sgcl::image::RgbImage;
use sgcl::probe::views::{HISTOGRAM, colour_histogram, resize_before_crop, train_crop};
use sgcl_patchset::ShardReader;
use tch::Tensor;

use super::encoder::Loaded;

/// Patches by id, as views of `px` pixels.
#[derive(Clone)]
pub(crate) struct Patches {
    pub(crate) reader: ShardReader,
    pub(crate) px: u32,
}

/// How a patch is looked at.
#[derive(Clone, Copy)]
pub(crate) enum View {
    /// Whole, for features that are kept.
    Whole,
    /// The supervised protocols' crop and flip of an epoch.
    Train { seed: u64, epoch: u64 },
    /// The supervised protocols' central cut.
    Test,
}

impl Patches {
    /// Images (B, 3, px, px) for a network; histograms (B, 512) where there is none.
    pub(super) fn views(&self, ids: &[u32], view: View, encoder: &Loaded) -> Result<Tensor> {
        let colour = matches!(encoder, Loaded::Colour);
        let side = i64::from(self.px);
        let views = Tensor::from_slice(&self.values(ids, view, colour)?);
        let views = if colour { views.view([-1, HISTOGRAM as i64]) } else { views.view([-1, 3, side, side]) };
        Ok(views.to_device(encoder.device()))
    }

    /// The same in host memory, row-major: images, or colour histograms.
    pub(crate) fn values(&self, ids: &[u32], view: View, colour: bool) -> Result<Vec<f32>> {
        let values = if colour { HISTOGRAM } else { 3 * (self.px * self.px) as usize };
        let mut views = vec![0_f32; ids.len() * values];
        views.par_chunks_mut(values).zip(ids).try_for_each_init(
            Renderer::new,
            |renderer, (out, &id)| -> Result<()> {
                let image = self.reader.decode_blocking(id)?;
                let image = RgbImage::new(image.width, image.height, image.pixels)?;
                self.render(renderer, &image, id, view, colour, out);
                Ok(())
            },
        )?;
        Ok(views)
    }

    fn render(&self, renderer: &mut Renderer, image: &RgbImage, id: u32, view: View, colour: bool, out: &mut [f32]) {
        let (pixels, flip) = match view {
            // Of all its pixels: resizing would mix colours.
            View::Whole if colour => (image.pixels(), false),
            View::Whole => return renderer.eval_view(image, self.px, out),
            View::Train { seed, epoch } => {
                let (crop, flip) = train_crop(image.width(), image.height(), seed, epoch, id.into());
                (renderer.resized(image, crop, self.px), flip)
            }
            View::Test => (renderer.central(image, resize_before_crop(self.px), self.px), false),
        };
        if colour { colour_histogram(pixels, out) } else { normalize(pixels, self.px as usize, flip, out) }
    }
}
