//! Label maps beside a slide: `<name>.labels.png` (grey or palette, a class number a pixel, 255 none) and `<name>.labels.json`
//! (`{"classes": […], "downsample": level-0 pixels a map pixel}`).

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::SlideError;

const NONE: u8 = 255;
/// Memory that a map may take.
const MAX_MAP_BYTES: usize = 4 << 30;

/// A slide's label map.
#[derive(Debug)]
pub(crate) struct LabelMap {
    classes: Vec<String>,
    downsample: f64,
    width: u32,
    height: u32,
    labels: Vec<u8>,
}

/// Where the legend and the map of a slide are, if it has them.
pub(crate) fn sidecars(slide: &Path) -> [PathBuf; 2] {
    [slide.with_extension("labels.json"), slide.with_extension("labels.png")]
}

/// Width, height and class numbers of a PNG. A palette's colours are for people; its indices are the classes.
fn class_numbers(file: &Path) -> Result<(u32, u32, Vec<u8>), String> {
    let open = std::fs::File::open(file).map_err(|e| e.to_string())?;
    let limits = png::Limits { bytes: MAX_MAP_BYTES };
    let mut decoder = png::Decoder::new_with_limits(std::io::BufReader::new(open), limits);
    decoder.set_transformations(png::Transformations::IDENTITY);
    let mut reader = decoder.read_info().map_err(|e| e.to_string())?;
    let info = reader.info();
    let (width, height, kind, depth) = (info.width, info.height, info.color_type, info.bit_depth);
    let bits = match (kind, depth) {
        (png::ColorType::Grayscale, png::BitDepth::Eight) => 8,
        (png::ColorType::Indexed, depth) => depth as usize,
        _ => return Err(format!("{kind:?} of {depth:?} bits; wanted is 8-bit grey, or a palette")),
    };
    let too_large = || format!("{width}×{height} px are too many for a label map");
    let size = reader.output_buffer_size().filter(|&size| size <= MAX_MAP_BYTES).ok_or_else(too_large)?;
    let mut packed = vec![0; size];
    let line = reader.next_frame(&mut packed).map_err(|e| e.to_string())?.line_size;
    let mask = u8::MAX >> (8 - bits);
    let number = |row: &[u8], at: usize| row[at * bits / 8] >> (8 - bits - at * bits % 8) & mask;
    let rows = packed.chunks_exact(line).take(height as usize);
    Ok((width, height, rows.flat_map(|row| (0..width as usize).map(move |at| number(row, at))).collect()))
}

#[derive(Deserialize)]
struct Legend {
    classes: Vec<String>,
    downsample: f64,
}

impl LabelMap {
    /// The map of the slide at `slide`, if it has one.
    pub(crate) fn beside(slide: &Path) -> Result<Option<Self>, SlideError> {
        let [legend, raster] = sidecars(slide);
        if !legend.is_file() && !raster.is_file() {
            return Ok(None);
        }
        let skip = |file: &Path, reason: String| SlideError::Skip(format!("{}: {reason}", file.display()));
        let text = std::fs::read(&legend).map_err(|e| skip(&legend, e.to_string()))?;
        let found: Legend = serde_json::from_slice(&text).map_err(|e| skip(&legend, e.to_string()))?;
        if found.classes.is_empty() || found.classes.len() >= usize::from(NONE) || found.downsample < 1.0 {
            return Err(skip(&legend, "1 to 254 classes and a downsample of at least 1 are wanted".into()));
        }
        let (width, height, labels) = class_numbers(&raster).map_err(|reason| skip(&raster, reason))?;
        if let Some(label) = labels.iter().find(|&&l| l != NONE && usize::from(l) >= found.classes.len()) {
            return Err(skip(&raster, format!("class {label} is not among the {} named", found.classes.len())));
        }
        Ok(Some(Self { classes: found.classes, downsample: found.downsample, width, height, labels }))
    }

    /// The class that covers at least `min` of a square of level-0 pixels.
    pub(crate) fn class(&self, x: f64, y: f64, side: f64, min: f64) -> Option<&str> {
        let cells = |from: f64, end: u32| {
            let edge = |v: f64| (v / self.downsample).round() as u32;
            match (edge(from), edge(from + side)) {
                (first, last) if first < last => first..last.min(end),
                // A square smaller than a map pixel lies in one.
                _ => {
                    let cell = (from / self.downsample).floor() as u32;
                    cell..(cell + 1).min(end)
                }
            }
        };
        let mut counts = vec![0_u32; self.classes.len()];
        let mut all = 0;
        for row in cells(y, self.height) {
            for column in cells(x, self.width) {
                all += 1;
                match self.labels[(row * self.width + column) as usize] {
                    NONE => {}
                    label => counts[usize::from(label)] += 1,
                }
            }
        }
        let (class, count) = counts.iter().enumerate().max_by_key(|&(at, &count)| (count, usize::MAX - at))?;
        (*count > 0 && f64::from(*count) >= min * f64::from(all)).then(|| self.classes[class].as_str())
    }
}
