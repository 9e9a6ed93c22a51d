//! Label maps beside a slide: `<name>.labels.png` (8-bit, a class number a pixel, 255 none) and `<name>.labels.json`
//! (`{"classes": […], "downsample": level-0 pixels a map pixel}`).

use std::path::Path;

use serde::Deserialize;

use super::SlideError;

const NONE: u8 = 255;

/// A slide's label map.
#[derive(Debug)]
pub(crate) struct LabelMap {
    classes: Vec<String>,
    downsample: f64,
    width: u32,
    height: u32,
    labels: Vec<u8>,
}

#[derive(Deserialize)]
struct Legend {
    classes: Vec<String>,
    downsample: f64,
}

impl LabelMap {
    /// The map of the slide at `slide`, if it has one.
    pub(crate) fn beside(slide: &Path) -> Result<Option<Self>, SlideError> {
        let (legend, raster) = (slide.with_extension("labels.json"), slide.with_extension("labels.png"));
        if !legend.is_file() && !raster.is_file() {
            return Ok(None);
        }
        let skip = |file: &Path, reason: String| SlideError::Skip(format!("{}: {reason}", file.display()));
        let text = std::fs::read(&legend).map_err(|e| skip(&legend, e.to_string()))?;
        let found: Legend = serde_json::from_slice(&text).map_err(|e| skip(&legend, e.to_string()))?;
        if found.classes.is_empty() || found.classes.len() >= usize::from(NONE) || found.downsample < 1.0 {
            return Err(skip(&legend, "1 to 254 classes and a downsample of at least 1 are wanted".into()));
        }
        let image = image::open(&raster).map_err(|e| skip(&raster, e.to_string()))?.into_luma8();
        if let Some(label) = image.as_raw().iter().find(|&&l| l != NONE && usize::from(l) >= found.classes.len()) {
            return Err(skip(&raster, format!("class {label} is not among the {} named", found.classes.len())));
        }
        let (width, height) = image.dimensions();
        Ok(Some(Self { classes: found.classes, downsample: found.downsample, width, height, labels: image.into_raw() }))
    }

    /// The class that covers at least `min` of a square of level-0 pixels.
    pub(crate) fn class(&self, x: f64, y: f64, side: f64, min: f64) -> Option<&str> {
        let cell = |v: f64, end: u32| ((v / self.downsample).round() as u32).min(end);
        let mut counts = vec![0_u32; self.classes.len()];
        let mut all = 0;
        for row in cell(y, self.height)..cell(y + side, self.height) {
            for column in cell(x, self.width)..cell(x + side, self.width) {
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
