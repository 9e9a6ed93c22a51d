//! Decoded patches: eight-bit RGB, row-major.

use std::io::Cursor;

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// Longest side that is decoded; a patch is a few hundred pixels wide.
pub const MAX_SIDE: u32 = 16_384;

/// An RGB image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbImage {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
}

/// Why bytes are no image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The decoder refused.
    #[error("the image cannot be decoded: {0}")]
    Decode(String),
    /// Sides and bytes do not agree, or a side is zero or beyond [`MAX_SIDE`].
    #[error(
        "an image of {width}×{height} pixels with {bytes} bytes: sides must be 1 to {MAX_SIDE}, bytes 3 × width × height"
    )]
    Size {
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
        /// Bytes given.
        bytes: usize,
    },
}

impl RgbImage {
    /// Takes `3 × width × height` bytes.
    ///
    /// # Errors
    /// [`ImageError::Size`].
    pub fn new(width: u32, height: u32, pixels: Vec<u8>) -> Result<Self, ImageError> {
        let sides = 1..=MAX_SIDE;
        let expected = 3 * u64::from(width) * u64::from(height);
        if !(sides.contains(&width) && sides.contains(&height)) || pixels.len() as u64 != expected {
            return Err(ImageError::Size { width, height, bytes: pixels.len() });
        }
        Ok(RgbImage { width, height, pixels })
    }

    /// Decodes JPEG (zune-jpeg) or anything else the `image` crate was built with; grey becomes RGB, alpha is dropped.
    ///
    /// # Errors
    /// [`ImageError`] for anything damaged or too large.
    pub fn decode(bytes: &[u8]) -> Result<Self, ImageError> {
        if bytes.starts_with(&[0xff, 0xd8]) { Self::decode_jpeg(bytes) } else { Self::decode_other(bytes) }
    }

    fn decode_jpeg(bytes: &[u8]) -> Result<Self, ImageError> {
        let failed = |error: &dyn std::fmt::Display| ImageError::Decode(error.to_string());
        let options = DecoderOptions::default()
            .jpeg_set_out_colorspace(ColorSpace::RGB)
            .set_max_width(MAX_SIDE as usize)
            .set_max_height(MAX_SIDE as usize)
            // Lenient decoding fills what a truncated file lacks with grey.
            .set_strict_mode(true);
        let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
        let pixels = decoder.decode().map_err(|error| failed(&error))?;
        let info = decoder.info().ok_or_else(|| failed(&"no header"))?;
        RgbImage::new(info.width.into(), info.height.into(), pixels)
    }

    fn decode_other(bytes: &[u8]) -> Result<Self, ImageError> {
        let failed = |error: image::ImageError| ImageError::Decode(error.to_string());
        let mut reader = image::ImageReader::new(Cursor::new(bytes))
            .with_guessed_format()
            .map_err(|error| ImageError::Decode(error.to_string()))?;
        let mut limits = image::Limits::default();
        limits.max_image_width = Some(MAX_SIDE);
        limits.max_image_height = Some(MAX_SIDE);
        reader.limits(limits);
        let image = reader.decode().map_err(failed)?.into_rgb8();
        RgbImage::new(image.width(), image.height(), image.into_raw())
    }

    /// Pixels across.
    #[must_use]
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Pixels down.
    #[must_use]
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Row-major RGB bytes.
    #[must_use]
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }
}
