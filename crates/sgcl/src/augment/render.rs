//! From drawn parameters to normalised views.

use fast_image_resize::images::{CroppedImage, Image, ImageRef};
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use rayon::prelude::*;
use tch::{Device, Tensor};

use super::draw::{Crop, PatchDraw, ViewDraw, ViewParams, draw_patch};
use super::{IMAGENET_MEAN, IMAGENET_STD, color};
use crate::image::RgbImage;
use crate::model::Views;

/// Makes views. Keeps its buffers: one a thread.
#[derive(Default)]
pub struct Renderer {
    resizer: Resizer,
    pixels: Vec<u8>,
}

impl Renderer {
    /// A renderer with empty buffers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// One view of `px` × `px` pixels: crop and resize ▸ grey ▸ jitter ▸ flip ▸ normalise. `out` takes 3 × px × px values, CHW.
    ///
    /// # Panics
    /// If the crop is not inside the image or `out` has another length: a bug of the caller.
    pub fn view(&mut self, image: &RgbImage, draw: &ViewDraw, px: u32, out: &mut [f32]) {
        self.resize(image, draw.crop, px);
        if draw.grayscale {
            color::grayscale(&mut self.pixels);
        }
        color::jitter(&mut self.pixels, &draw.jitter);
        normalize(&self.pixels, px as usize, draw.flip, out);
    }

    /// The cut and resized bytes of a view before anything happens to its colours, RGB row-major.
    ///
    /// # Panics
    /// If the crop is not inside the image: a bug of the caller.
    pub fn resized(&mut self, image: &RgbImage, crop: Crop, px: u32) -> &[u8] {
        self.resize(image, crop, px);
        &self.pixels
    }

    /// The view that features are extracted from: shorter side to `px`, central square, normalised; nothing random.
    ///
    /// # Panics
    /// If `out` has not 3 × px × px values: a bug of the caller.
    pub fn eval_view(&mut self, image: &RgbImage, px: u32, out: &mut [f32]) {
        let side = image.width().min(image.height());
        let (left, top) = ((image.width() - side) / 2, (image.height() - side) / 2);
        self.resize(image, Crop { left, top, width: side, height: side }, px);
        normalize(&self.pixels, px as usize, false, out);
    }

    /// The bytes of torchvision's `Resize(resize)` and `CenterCrop(px)`, RGB row-major; a longer side is cut to a square first.
    ///
    /// # Panics
    /// If `px` is larger than `resize`: a bug of the caller.
    pub fn central(&mut self, image: &RgbImage, resize: u32, px: u32) -> &[u8] {
        assert!(px <= resize, "a centre of {px} pixels out of {resize}");
        let side = image.width().min(image.height());
        let (left, top) = ((image.width() - side) / 2, (image.height() - side) / 2);
        self.resize(image, Crop { left, top, width: side, height: side }, resize);
        // torchvision rounds half of the margin to even.
        let margin = (f64::from(resize - px) / 2.0).round_ties_even() as usize;
        let (resize, px) = (resize as usize, px as usize);
        for row in 0..px {
            let from = 3 * ((row + margin) * resize + margin);
            self.pixels.copy_within(from..from + 3 * px, 3 * row * px);
        }
        self.pixels.truncate(3 * px * px);
        &self.pixels
    }

    #[expect(clippy::expect_used, reason = "sizes are made to fit here")]
    /// Cuts first, then resizes (bilinear, antialiased) within the cut, as PIL does.
    fn resize(&mut self, image: &RgbImage, crop: Crop, px: u32) {
        self.pixels.resize(3 * (px * px) as usize, 0);
        let source = ImageRef::new(image.width(), image.height(), image.pixels(), PixelType::U8x3)
            .expect("RgbImage holds 3 × width × height bytes");
        let source = CroppedImage::new(&source, crop.left, crop.top, crop.width, crop.height)
            .expect("a crop is drawn inside its image");
        let mut target =
            Image::from_slice_u8(px, px, &mut self.pixels, PixelType::U8x3).expect("the buffer was sized for the view");
        let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Bilinear)).use_alpha(false);
        self.resizer.resize(&source, &mut target, &options).expect("both images are RGB bytes");
    }
}

/// `ToTensor` and `Normalize`: RGB bytes of `px` × `px` pixels to CHW, mirrored where asked.
///
/// # Panics
/// If `out` has another length than `pixels`: a bug of the caller.
pub fn normalize(pixels: &[u8], px: usize, flip: bool, out: &mut [f32]) {
    assert_eq!(out.len(), pixels.len(), "a view of {px} pixels has 3 × {px} × {px} values");
    for (channel, plane) in out.chunks_exact_mut(px * px).enumerate() {
        let (mean, std) = (IMAGENET_MEAN[channel], IMAGENET_STD[channel]);
        let table: [f32; 256] = std::array::from_fn(|value| (value as f32 / 255.0 - mean) / std);
        for (row, line) in plane.chunks_exact_mut(px).zip(pixels.chunks_exact(3 * px)) {
            let values = line.chunks_exact(3).map(|pixel| table[usize::from(pixel[channel])]);
            if flip {
                row.iter_mut().rev().zip(values).for_each(|(to, value)| *to = value);
            } else {
                row.iter_mut().zip(values).for_each(|(to, value)| *to = value);
            }
        }
    }
}

/// The views of a batch of patches, in host memory.
#[derive(Clone, Debug, PartialEq)]
pub struct ViewBatch {
    /// Patches B.
    pub len: usize,
    /// Side of a global view.
    pub global_px: u32,
    /// Side of a local view.
    pub local_px: u32,
    /// (B, 3, G, G), row-major.
    pub global: Vec<f32>,
    /// (4B, 3, L, L), corner-major, row-major.
    pub local: Vec<f32>,
    /// (B, 3, G, G), row-major; empty where a method has no keys.
    pub key: Vec<f32>,
    /// Whether it has, which an empty batch does not tell.
    pub has_key: bool,
}

impl ViewBatch {
    /// A batch of zeros, to be filled patch by patch with [`ViewBatch::slots`].
    #[must_use]
    pub fn zeros(params: &ViewParams, len: usize) -> Self {
        let values = |px: u32, views: usize| views * len * 3 * (px * px) as usize;
        ViewBatch {
            len,
            global_px: params.global_px,
            local_px: params.local_px,
            global: vec![0.0; values(params.global_px, 1)],
            local: vec![0.0; values(params.local_px, 4)],
            key: vec![0.0; values(params.global_px, usize::from(params.key))],
            has_key: params.key,
        }
    }

    /// For each patch the places of its views.
    pub fn slots(&mut self) -> Vec<ViewSlot<'_>> {
        let (global, local) =
            (3 * (self.global_px * self.global_px) as usize, 3 * (self.local_px * self.local_px) as usize);
        let corner = (local * self.len).max(1);
        let mut corners: Vec<_> =
            self.local.chunks_exact_mut(corner).map(|corner| corner.chunks_exact_mut(local.max(1))).collect();
        let mut keys = self.key.chunks_exact_mut(global);
        self.global
            .chunks_exact_mut(global)
            .map(|global| ViewSlot {
                global,
                local: corners.iter_mut().filter_map(Iterator::next).collect(),
                key: keys.next(),
            })
            .collect()
    }

    /// Copies the batch to a device. On a GPU the copy is queued: nobody waits for it but what is computed from it.
    ///
    /// # Errors
    /// No such device, or its memory is full.
    pub fn to_views(&self, device: Device) -> Result<Views, sgcl_c10d::Error> {
        let tensor = |values: &[f32], px: u32| {
            let px = i64::from(px);
            // Of an empty batch the number of views cannot be told from what there is of it.
            let views = values.len() as i64 / (3 * px * px);
            sgcl_c10d::to_device(&Tensor::from_slice(values).view([views, 3, px, px]), device)
        };
        let local = (self.local_px > 0).then(|| tensor(&self.local, self.local_px)).transpose()?;
        let key = self.has_key.then(|| tensor(&self.key, self.global_px)).transpose()?;
        Ok(Views { global: tensor(&self.global, self.global_px)?, local, key })
    }
}

/// Where the views of one patch go.
#[derive(Debug)]
pub struct ViewSlot<'a> {
    global: &'a mut [f32],
    local: Vec<&'a mut [f32]>,
    key: Option<&'a mut [f32]>,
}

impl ViewSlot<'_> {
    /// Renders all views of a patch into their places.
    pub fn render(&mut self, renderer: &mut Renderer, params: &ViewParams, image: &RgbImage, draw: &PatchDraw) {
        renderer.view(image, &draw.global, params.global_px, self.global);
        for (slot, draw) in self.local.iter_mut().zip(&draw.local) {
            renderer.view(image, draw, params.local_px, slot);
        }
        if let (Some(slot), Some(draw)) = (&mut self.key, &draw.key) {
            renderer.view(image, draw, params.global_px, slot);
        }
    }
}

/// Draws and renders the views of a batch, `patches` as (patch id, image), on rayon's threads.
#[must_use]
pub fn render_batch(params: &ViewParams, patches: &[(u64, RgbImage)], seed: u64, epoch: u64) -> ViewBatch {
    let mut batch = ViewBatch::zeros(params, patches.len());
    batch.slots().into_par_iter().zip(patches).for_each_init(Renderer::new, |renderer, (mut slot, (id, image))| {
        let draw = draw_patch(params, image.width(), image.height(), seed, epoch, *id);
        slot.render(renderer, params, image, &draw);
    });
    batch
}
