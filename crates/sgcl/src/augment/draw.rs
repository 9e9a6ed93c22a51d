//! What is random about a view, drawn as torchvision's `RandomResizedCrop`, `RandomGrayscale`, `ColorJitter` and
//! `RandomHorizontalFlip` draw it.

use rand::Rng as _;
use rand::seq::SliceRandom;
use sgcl_draw::{Purpose, Rng, rng};

/// How views are made. The default is METHOD's.
#[derive(Clone, Debug, PartialEq)]
pub struct ViewParams {
    /// Side of the global view, pixels.
    pub global_px: u32,
    /// Side of the four local views, pixels; 0 where a method has none.
    pub local_px: u32,
    /// Whether there is a second global view, for the key encoder.
    pub key: bool,
    /// Share of the patch's area that the global crop covers, from and to.
    pub global_scale: (f64, f64),
    /// Share of a quadrant's area that a local crop covers, from and to.
    pub local_scale: (f64, f64),
    /// Width over height of a crop, from and to.
    pub ratio: (f64, f64),
    /// Probability of grey.
    pub grayscale: f64,
    /// The factor is uniform in 1 ± this.
    pub brightness: f64,
    /// The factor is uniform in 1 ± this.
    pub contrast: f64,
    /// The factor is uniform in 1 ± this.
    pub saturation: f64,
    /// The shift, in turns, is uniform in 0 ± this; at most 0.5.
    pub hue: f64,
    /// Probability of a mirror image.
    pub flip: f64,
}

impl Default for ViewParams {
    fn default() -> Self {
        ViewParams {
            global_px: 224,
            local_px: 96,
            key: false,
            global_scale: (0.2, 1.0),
            local_scale: (0.2, 0.56),
            ratio: (3.0 / 4.0, 4.0 / 3.0),
            grayscale: 0.2,
            brightness: 0.4,
            contrast: 0.4,
            saturation: 0.4,
            hue: 0.4,
            flip: 0.5,
        }
    }
}

/// A rectangle of an image, pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crop {
    /// First column.
    pub left: u32,
    /// First row.
    pub top: u32,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

/// A step of the colour jitter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColorOp {
    /// Towards black.
    Brightness,
    /// Towards the mean grey.
    Contrast,
    /// Towards grey.
    Saturation,
    /// Round the colour circle.
    Hue,
}

/// A colour jitter: its steps in order, and their factors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct JitterDraw {
    /// Order in which the steps are done.
    pub order: [ColorOp; 4],
    /// Factor; 1 changes nothing.
    pub brightness: f64,
    /// Factor; 1 changes nothing.
    pub contrast: f64,
    /// Factor; 1 changes nothing.
    pub saturation: f64,
    /// Shift in turns, -0.5 to 0.5.
    pub hue: f64,
}

/// All that is random about one view.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ViewDraw {
    /// What is cut from the image, in the image's coordinates.
    pub crop: Crop,
    /// Whether colour is taken away, before the jitter.
    pub grayscale: bool,
    /// The jitter.
    pub jitter: JitterDraw,
    /// Whether left and right are exchanged, last.
    pub flip: bool,
}

/// All that is random about a patch's views.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PatchDraw {
    /// Of the whole patch.
    pub global: ViewDraw,
    /// Of its quadrants: tl, tr, bl, br.
    pub local: [ViewDraw; 4],
    /// Of the whole patch again, where a method has keys.
    pub key: Option<ViewDraw>,
}

/// The views of one patch in one epoch: a pure function of its arguments, whichever rank calls it.
#[must_use]
pub fn draw_patch(params: &ViewParams, width: u32, height: u32, seed: u64, epoch: u64, patch: u64) -> PatchDraw {
    let mut rng = rng(seed, Purpose::Augment, epoch, patch);
    let whole = Crop { left: 0, top: 0, width, height };
    let global = draw_view(params, whole, params.global_scale, &mut rng);
    let local = quadrants(width, height).map(|quadrant| draw_view(params, quadrant, params.local_scale, &mut rng));
    let key = params.key.then(|| draw_view(params, whole, params.global_scale, &mut rng));
    PatchDraw { global, local, key }
}

/// Top left, top right, bottom left, bottom right quarter. Of an odd side the middle line belongs to neither half.
#[must_use]
pub fn quadrants(width: u32, height: u32) -> [Crop; 4] {
    let (w, h) = ((width / 2).max(1), (height / 2).max(1));
    [(0, 0), (width - w, 0), (0, height - h), (width - w, height - h)].map(|(left, top)| Crop {
        left,
        top,
        width: w,
        height: h,
    })
}

/// One view out of the rectangle `of`.
pub fn draw_view(params: &ViewParams, of: Crop, scale: (f64, f64), rng: &mut Rng) -> ViewDraw {
    let crop = draw_crop(of, scale, params.ratio, rng);
    let grayscale = rng.random::<f64>() < params.grayscale;
    let mut order = [ColorOp::Brightness, ColorOp::Contrast, ColorOp::Saturation, ColorOp::Hue];
    order.shuffle(rng);
    let mut around = |center: f64, spread: f64| uniform(rng, ((center - spread).max(center - 1.0), center + spread));
    let jitter = JitterDraw {
        order,
        brightness: around(1.0, params.brightness),
        contrast: around(1.0, params.contrast),
        saturation: around(1.0, params.saturation),
        hue: around(0.0, params.hue),
    };
    ViewDraw { crop, grayscale, jitter, flip: rng.random::<f64>() < params.flip }
}

/// torchvision's `RandomResizedCrop.get_params`: ten tries, then the largest central crop of an allowed ratio.
pub fn draw_crop(of: Crop, scale: (f64, f64), ratio: (f64, f64), rng: &mut Rng) -> Crop {
    let (width, height) = (f64::from(of.width), f64::from(of.height));
    for _ in 0..10 {
        let area = width * height * uniform(rng, scale);
        let aspect = uniform(rng, (ratio.0.ln(), ratio.1.ln())).exp();
        let w = (area * aspect).sqrt().round_ties_even();
        let h = (area / aspect).sqrt().round_ties_even();
        if (1.0..=width).contains(&w) && (1.0..=height).contains(&h) {
            let (w, h) = (w as u32, h as u32);
            let top = rng.random_range(0..=of.height - h);
            let left = rng.random_range(0..=of.width - w);
            return Crop { left: of.left + left, top: of.top + top, width: w, height: h };
        }
    }
    let (w, h) = if width / height < ratio.0 {
        (width, (width / ratio.0).round_ties_even())
    } else if width / height > ratio.1 {
        ((height * ratio.1).round_ties_even(), height)
    } else {
        (width, height)
    };
    let (w, h) = (w as u32, h as u32);
    Crop { left: of.left + (of.width - w) / 2, top: of.top + (of.height - h) / 2, width: w, height: h }
}

fn uniform(rng: &mut Rng, (from, to): (f64, f64)) -> f64 {
    from + (to - from) * rng.random::<f64>()
}
