//! Pictures as `data:` URIs: slides, the tiles laid over them, single patches.

use std::io::Cursor;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use image::codecs::jpeg::JpegEncoder;
use image::{DynamicImage, ImageFormat, RgbImage, RgbaImage, imageops::FilterType};

/// Longest side of a slide's picture, pixels.
const SLIDE_PX: u32 = 560;
/// Longest side of a patch's picture, pixels.
const PATCH_PX: u32 = 160;
const QUALITY: u8 = 82;

/// A slide's picture from an encoded image; `None` where it cannot be read.
pub(crate) fn slide(encoded: &[u8]) -> Option<String> {
    let reader = image::ImageReader::new(Cursor::new(encoded)).with_guessed_format().ok()?;
    jpeg(&shrunk(reader.decode().ok()?, SLIDE_PX))
}

/// A slide's picture put together from its patches, each shrunk to a few pixels: (column, row, pixels of a square RGB patch).
pub(crate) fn mosaic(grid: [u32; 2], patches: impl Iterator<Item = (u32, u32, RgbImage)>) -> Option<String> {
    let cell = (SLIDE_PX / grid[0].max(grid[1]).max(1)).clamp(2, 48);
    let mut picture =
        RgbImage::from_pixel(grid[0].min(SLIDE_PX) * cell, grid[1].min(SLIDE_PX) * cell, image::Rgb([244; 3]));
    for (x, y, patch) in patches {
        let small = image::imageops::thumbnail(&patch, cell, cell);
        image::imageops::replace(&mut picture, &small, i64::from(x * cell), i64::from(y * cell));
    }
    jpeg(&DynamicImage::ImageRgb8(picture))
}

/// A patch.
pub(crate) fn patch(encoded: &[u8]) -> Option<String> {
    let image = image::load_from_memory_with_format(encoded, ImageFormat::Jpeg).ok()?;
    jpeg(&shrunk(image, PATCH_PX))
}

/// Pictures side by side in a PNG of ours, as they are.
pub(crate) fn triptych(encoded: &[u8]) -> Option<String> {
    jpeg(&image::load_from_memory_with_format(encoded, ImageFormat::Png).ok()?)
}

/// One pixel a tile: (column, row, colour); transparent elsewhere. The page scales it up without smoothing.
pub(crate) fn tiles(grid: [u32; 2], tiles: impl Iterator<Item = (u32, u32, [u8; 3])>) -> Option<String> {
    let mut picture = RgbaImage::new(grid[0], grid[1]);
    for (x, y, [r, g, b]) in tiles.filter(|(x, y, _)| *x < grid[0] && *y < grid[1]) {
        picture.put_pixel(x, y, image::Rgba([r, g, b, 255]));
    }
    let mut png = Cursor::new(Vec::new());
    picture.write_to(&mut png, ImageFormat::Png).ok()?;
    Some(uri("image/png", png.get_ref()))
}

fn shrunk(image: DynamicImage, side: u32) -> DynamicImage {
    if image.width().max(image.height()) <= side { image } else { image.resize(side, side, FilterType::Triangle) }
}

fn jpeg(image: &DynamicImage) -> Option<String> {
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, QUALITY).encode_image(&image.to_rgb8()).ok()?;
    Some(uri("image/jpeg", &bytes))
}

fn uri(kind: &str, bytes: &[u8]) -> String {
    format!("data:{kind};base64,{}", STANDARD.encode(bytes))
}
