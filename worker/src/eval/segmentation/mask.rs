//! Masks: PNGs of one channel, a code a pixel.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::Result;
use sgcl::image::MAX_SIDE;
use sgcl::segment::bcss;

use super::bcss::bad;

/// Memory that a mask may take while it is read.
const MAX_BYTES: usize = 1 << 30;

/// The class of each pixel, row-major, and the mask's width and height. Grey masks hold codes, masks with a palette hold them as indices.
pub(super) fn read(path: &Path) -> Result<(u32, u32, Vec<u8>)> {
    let (width, height, codes) =
        codes(path).map_err(|reason| bad(path, &format!("cannot be read as a mask: {reason}")))?;
    let classes = codes.iter().map(|&code| {
        bcss::class(code).ok_or_else(|| {
            let most = bcss::CODES.len() - 1;
            bad(path, &format!("holds the class {code}, but BCSS has 0 to {most}; is it a mask of another dataset?"))
        })
    });
    Ok((width, height, classes.collect::<Result<_>>()?))
}

fn codes(path: &Path) -> Result<(u32, u32, Vec<u16>), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let file = File::open(path).map_err(|e| text(&e))?;
    let mut decoder = png::Decoder::new_with_limits(BufReader::new(file), png::Limits { bytes: MAX_BYTES });
    decoder.set_transformations(png::Transformations::IDENTITY);
    let mut reader = decoder.read_info().map_err(|e| text(&e))?;
    let info = reader.info();
    let (width, height, kind, depth) = (info.width, info.height, info.color_type, info.bit_depth);
    if width > MAX_SIDE || height > MAX_SIDE {
        return Err(format!("{width}×{height} px, more than {MAX_SIDE} a side"));
    }
    let bits = match (kind, depth) {
        (png::ColorType::Grayscale, png::BitDepth::Eight | png::BitDepth::Sixteen) | (png::ColorType::Indexed, _) => {
            depth as usize
        }
        _ => return Err(format!("{kind:?} of {depth:?} bits; wanted is one channel of 8 or 16 bits, or a palette")),
    };
    let size = reader.output_buffer_size().filter(|&size| size <= MAX_BYTES).ok_or_else(|| "too large".to_owned())?;
    let mut packed = vec![0; size];
    let line = reader.next_frame(&mut packed).map_err(|e| text(&e))?.line_size;
    let code = |row: &[u8], at: usize| match bits {
        16 => u16::from_be_bytes([row[2 * at], row[2 * at + 1]]),
        8 => u16::from(row[at]),
        // Several to a byte, the first in the highest bits.
        _ => u16::from((row[at * bits / 8] >> (8 - bits - at * bits % 8)) & (u8::MAX >> (8 - bits))),
    };
    let rows = packed.chunks_exact(line).take(height as usize);
    Ok((width, height, rows.flat_map(|row| (0..width as usize).map(move |at| code(row, at))).collect()))
}
