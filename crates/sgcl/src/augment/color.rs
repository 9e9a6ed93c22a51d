//! Colour changes on RGB bytes, in place, with PIL's arithmetic: `Image.convert("L")`, `ImageEnhance` and torchvision's
//! `adjust_hue` on PIL images.

use super::draw::{ColorOp, JitterDraw};
use super::hsv;

/// PIL's luma, ITU-R 601-2 in 16-bit fixed point.
fn luma(pixel: &[u8]) -> u8 {
    let [r, g, b] = [pixel[0], pixel[1], pixel[2]].map(u32::from);
    ((r * 19_595 + g * 38_470 + b * 7_471 + 0x8000) >> 16) as u8
}

/// PIL's `Image.blend` of one byte: from `base` towards `value`, truncated and clipped.
fn blend(base: u8, value: u8, factor: f32) -> u8 {
    (f32::from(base) + factor * (f32::from(value) - f32::from(base))) as u8
}

/// Each pixel becomes its luma.
pub fn grayscale(pixels: &mut [u8]) {
    for pixel in pixels.chunks_exact_mut(3) {
        pixel.fill(luma(pixel));
    }
}

/// The steps of a jitter in their order.
pub fn jitter(pixels: &mut [u8], draw: &JitterDraw) {
    for op in draw.order {
        match op {
            ColorOp::Brightness => brightness(pixels, draw.brightness),
            ColorOp::Contrast => contrast(pixels, draw.contrast),
            ColorOp::Saturation => saturation(pixels, draw.saturation),
            ColorOp::Hue => hue(pixels, draw.hue),
        }
    }
}

/// `ImageEnhance.Brightness`.
pub fn brightness(pixels: &mut [u8], factor: f64) {
    blend_all(pixels, 0, factor as f32);
}

/// `ImageEnhance.Contrast`: about the mean luma of the image, rounded.
pub fn contrast(pixels: &mut [u8], factor: f64) {
    let sum: u64 = pixels.chunks_exact(3).map(|pixel| u64::from(luma(pixel))).sum();
    let count = (pixels.len() / 3).max(1);
    let mean = (sum as f64 / count as f64 + 0.5) as u8;
    blend_all(pixels, mean, factor as f32);
}

/// `ImageEnhance.Color`: about each pixel's luma.
pub fn saturation(pixels: &mut [u8], factor: f64) {
    let factor = factor as f32;
    if factor == 1.0 {
        return;
    }
    for pixel in pixels.chunks_exact_mut(3) {
        let gray = luma(pixel);
        for value in pixel {
            *value = blend(gray, *value, factor);
        }
    }
}

/// torchvision's `adjust_hue`: the hue byte of PIL's HSV moves by `turns` × 255, truncated, and wraps at 256.
pub fn hue(pixels: &mut [u8], turns: f64) {
    hsv::rotate(pixels, ((turns * 255.0) as i32) as u8);
}

fn blend_all(pixels: &mut [u8], base: u8, factor: f32) {
    // A factor of 1 is a copy in PIL too.
    if factor == 1.0 {
        return;
    }
    let table: [u8; 256] = std::array::from_fn(|value| blend(base, value as u8, factor));
    for value in pixels {
        *value = table[usize::from(*value)];
    }
}
