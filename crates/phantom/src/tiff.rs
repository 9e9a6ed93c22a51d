//! Tiled pyramidal TIFF (classic, little-endian, JPEG tiles): what OpenSlide reads and the `image` crate cannot write.
//! Tags as in TIFF 6.0 and its Technical Note 2 (JPEG compression, value 7).

use jpeg_encoder::{ColorType, Encoder, EncodingError, SamplingFactor};
use rayon::prelude::*;

const TILE: u32 = 256;
/// Classic TIFF holds 32-bit offsets; three bytes a pixel at this side and all its levels stay below them.
const MAX_SIDE: u32 = 30_000;

/// Why a slide could not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum TiffError {
    /// Sides out of range, or a buffer that is not `width * height * 3` bytes.
    #[error(
        "slide of {width} x {height} px with {bytes} bytes: sides must be 1 to {MAX_SIDE} px and the buffer RGB, 3 bytes a pixel"
    )]
    Size {
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
        /// Length of the buffer.
        bytes: usize,
    },
    /// Micrometres per pixel must be positive and finite.
    #[error("mpp {0}: give micrometres per pixel as a positive number, e.g. 0.5")]
    Mpp(f64),
    /// JPEG quality out of range.
    #[error("JPEG quality {0}: give 1 to 100")]
    Quality(u8),
    /// A tile that the JPEG encoder refused.
    #[error("encoding a tile as JPEG: {0}")]
    Jpeg(#[from] EncodingError),
    /// More than classic TIFF can address.
    #[error("the encoded slide passes 4 GiB: draw a smaller one or lower the JPEG quality")]
    TooLarge,
}

struct Level {
    width: u32,
    height: u32,
    rgb: Vec<u8>,
}

/// Encodes `rgb` (`height * width * 3` bytes, row-major) with levels halved until one tile holds the slide.
/// The same input gives the same bytes. The description is Aperio's, the one form of TIFF whose `mpp` OpenSlide 3.4.1 reads.
pub fn encode_pyramid(rgb: &[u8], width: u32, height: u32, mpp: f64, quality: u8) -> Result<Vec<u8>, TiffError> {
    let sides = 1..=MAX_SIDE;
    if !sides.contains(&width)
        || !sides.contains(&height)
        || rgb.len() as u64 != u64::from(width) * u64::from(height) * 3
    {
        return Err(TiffError::Size { width, height, bytes: rgb.len() });
    }
    if !(mpp.is_finite() && mpp > 0.0) {
        return Err(TiffError::Mpp(mpp));
    }
    if !(1..=100).contains(&quality) {
        return Err(TiffError::Quality(quality));
    }
    let mut out = b"II\x2a\0\0\0\0\0".to_vec();
    let mut link = 4;
    let mut level = Level { width, height, rgb: rgb.to_vec() };
    for index in 0.. {
        let description = format!("Aperio phantom drawn by sgcl\r\n{}x{}|MPP = {mpp}\0", level.width, level.height);
        link = append_level(&mut out, link, &level, index, &description, quality)?;
        if level.width <= TILE && level.height <= TILE {
            break;
        }
        level = halve(&level);
    }
    Ok(out)
}

/// Appends tiles, then their directory, and points `link` at it; returns where the next directory's offset goes.
fn append_level(
    out: &mut Vec<u8>,
    link: usize,
    level: &Level,
    index: u32,
    description: &str,
    quality: u8,
) -> Result<usize, TiffError> {
    let across = level.width.div_ceil(TILE);
    let tiles = (0..across * level.height.div_ceil(TILE))
        .into_par_iter()
        .map(|tile| encode_tile(level, tile % across, tile / across, quality))
        .collect::<Result<Vec<_>, _>>()?;
    let (mut offsets, mut lengths) = (Vec::new(), Vec::new());
    for tile in &tiles {
        offsets.push(offset(out)?);
        lengths.push(u32::try_from(tile.len()).map_err(|_| TiffError::TooLarge)?);
        out.extend_from_slice(tile);
    }
    // (tag, type, values): 2 is ASCII, 3 SHORT, 4 LONG; ascending by tag.
    let ascii: Vec<u32> = description.bytes().map(u32::from).collect();
    let entries: [(u16, u16, Vec<u32>); 13] = [
        (254, 4, vec![u32::from(index > 0)]),
        (256, 4, vec![level.width]),
        (257, 4, vec![level.height]),
        (258, 3, vec![8, 8, 8]),
        (259, 3, vec![7]),
        (262, 3, vec![6]),
        (270, 2, ascii),
        (277, 3, vec![3]),
        (322, 4, vec![TILE]),
        (323, 4, vec![TILE]),
        (324, 4, offsets),
        (325, 4, lengths),
        (530, 3, vec![1, 1]),
    ];
    let mut directory = Vec::new();
    for (tag, kind, values) in &entries {
        let mut bytes: Vec<u8> = match kind {
            2 => values.iter().map(|v| *v as u8).collect(),
            3 => values.iter().flat_map(|v| (*v as u16).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        directory.extend(tag.to_le_bytes());
        directory.extend(kind.to_le_bytes());
        directory.extend((values.len() as u32).to_le_bytes());
        if bytes.len() > 4 {
            pad(out);
            let at = offset(out)?;
            out.append(&mut bytes);
            bytes = at.to_le_bytes().to_vec();
        }
        bytes.resize(4, 0);
        directory.append(&mut bytes);
    }
    pad(out);
    let at = offset(out)?;
    out[link..link + 4].copy_from_slice(&at.to_le_bytes());
    out.extend((entries.len() as u16).to_le_bytes());
    out.append(&mut directory);
    out.extend([0; 4]);
    offset(out)?;
    Ok(out.len() - 4)
}

fn offset(out: &[u8]) -> Result<u32, TiffError> {
    u32::try_from(out.len()).map_err(|_| TiffError::TooLarge)
}

fn pad(out: &mut Vec<u8>) {
    if out.len() % 2 == 1 {
        out.push(0);
    }
}

/// One tile; what lies beyond the slide repeats its last row and column, which JPEG compresses best.
fn encode_tile(level: &Level, column: u32, row: u32, quality: u8) -> Result<Vec<u8>, TiffError> {
    let mut pixels = Vec::with_capacity((TILE * TILE * 3) as usize);
    for y in row * TILE..(row + 1) * TILE {
        for x in column * TILE..(column + 1) * TILE {
            let (x, y) = (x.min(level.width - 1), y.min(level.height - 1));
            let at = (y as usize * level.width as usize + x as usize) * 3;
            pixels.extend_from_slice(&level.rgb[at..at + 3]);
        }
    }
    let mut jpeg = Vec::new();
    let mut encoder = Encoder::new(&mut jpeg, quality);
    encoder.set_sampling_factor(SamplingFactor::F_1_1);
    encoder.encode(&pixels, TILE as u16, TILE as u16, ColorType::Rgb)?;
    Ok(jpeg)
}

/// Half the size, by the mean of 2 x 2 pixels; an odd last row or column is repeated.
fn halve(level: &Level) -> Level {
    let (width, height) = (level.width.div_ceil(2), level.height.div_ceil(2));
    let mut rgb = vec![0; width as usize * height as usize * 3];
    rgb.par_chunks_mut(width as usize * 3).enumerate().for_each(|(y, row)| {
        for (i, value) in row.iter_mut().enumerate() {
            let (x, channel) = (i / 3, i % 3);
            let sum: u32 = [(0, 0), (1, 0), (0, 1), (1, 1)]
                .iter()
                .map(|(dx, dy)| {
                    let x = (2 * x + dx).min(level.width as usize - 1);
                    let y = (2 * y + dy).min(level.height as usize - 1);
                    u32::from(level.rgb[(y * level.width as usize + x) * 3 + channel])
                })
                .sum();
            *value = ((sum + 2) / 4) as u8;
        }
    });
    Level { width, height, rgb }
}
