//! From JPEG bytes to pixels.

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// The largest side decoded, pixels.
const MAX_SIDE: usize = 4096;

/// An image, three bytes a pixel, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rgb8 {
    /// Pixels a row.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// width × height × 3 bytes: red, green, blue.
    pub pixels: Vec<u8>,
}

/// A JPEG that cannot be decoded: the decoder's reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a readable JPEG: {0}")]
pub struct DecodeError(pub String);

/// Decodes a JPEG; grey ones become RGB. A truncated one is an error, not a grey area.
///
/// # Errors
/// Not a JPEG, damaged, or a side above 4,096 pixels.
pub fn decode(jpeg: &[u8]) -> Result<Rgb8, DecodeError> {
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(MAX_SIDE)
        .set_max_height(MAX_SIDE)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(jpeg), options);
    let pixels = decoder.decode().map_err(|e| DecodeError(e.to_string()))?;
    let info = decoder.info().ok_or_else(|| DecodeError("it has no header".to_owned()))?;
    let (width, height) = (u32::from(info.width), u32::from(info.height));
    let expected = u64::from(width) * u64::from(height) * 3;
    if pixels.len() as u64 != expected {
        return Err(DecodeError(format!("{} bytes of pixels instead of {expected}", pixels.len())));
    }
    Ok(Rgb8 { width, height, pixels })
}
