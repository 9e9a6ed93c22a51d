//! Drawn regions in the layout of the Breast Cancer Semantic Segmentation dataset: `rgbs_colorNormalized/` and `masks/` with the same
//! names, `TCGA-<institute>-<patient>-DX1_xmin<x>_ymin<y>_MPP-0.2500.png`, masks of 8 bits with the dataset's codes.
//!
//! What is learnt as one class has several codes here too: a tumour may be DCIS or angioinvasion, an infiltrate of plasma cells, and
//! glass is outside the region of interest.

use std::path::{Path, PathBuf};

use rand::Rng as _;
use rayon::prelude::*;
use sgcl_draw::{Purpose, rng};

use super::{Layout, Region};
use crate::{Phantom, PhantomError};

/// Folder of the pictures.
pub const IMAGES: &str = "rgbs_colorNormalized";
/// Folder of the masks.
pub const MASKS: &str = "masks";

/// Institutes whose slides are learnt from.
const TRAIN: [&str; 8] = ["A1", "A2", "A7", "AR", "BH", "C8", "D8", "E9"];
/// Institutes whose slides the published split validates on.
const VALIDATION: [&str; 6] = ["OL", "LL", "E2", "EW", "GM", "S3"];
/// Every so many pictures one is of the latter.
const VALIDATE_EVERY: u64 = 3;

/// Codes by which a region of each tissue may go, by [`crate::CLASSES`].
const CODES: [&[u8]; 7] = [&[2], &[1, 1, 1, 20, 19], &[3, 3, 10, 11, 14], &[9], &[13], &[4], &[21, 16, 18]];

/// Draws picture number `number` of a series and writes it with its mask. Returns the picture's path.
///
/// # Errors
/// A side that is not drawn; a file that cannot be written.
pub fn write(folder: &Path, seed: u64, number: u64, side: u32) -> Result<PathBuf, PhantomError> {
    let phantom = Phantom::draw(seed, number, side)?;
    let layout = Layout::new(seed, number, side);
    let mask: Vec<u8> = (0..side)
        .into_par_iter()
        .flat_map_iter(|y| {
            let layout = &layout;
            (0..side).map(move |x| layout.at(x as f32 + 0.5, y as f32 + 0.5).map_or(0, code))
        })
        .collect();
    let name = name(seed, number);
    let save = |sub: &str, pixels: &[u8], colour: image::ColorType| {
        let folder = folder.join(sub);
        let file = folder.join(&name);
        let said = file.display().to_string();
        std::fs::create_dir_all(&folder).map_err(|source| PhantomError::Io { file: said.clone(), source })?;
        image::save_buffer(&file, pixels, side, side, colour)
            .map_err(|source| PhantomError::Labels { file: said, source })?;
        Ok::<PathBuf, PhantomError>(file)
    };
    save(MASKS, &mask, image::ColorType::L8)?;
    save(IMAGES, &phantom.pixels, image::ColorType::Rgb8)
}

fn code(region: &Region) -> u8 {
    let codes = CODES[usize::from(region.class)];
    // A region's own number, of what is drawn for it anyway.
    codes[(region.angle.to_bits() >> 3) as usize % codes.len()]
}

fn name(seed: u64, number: u64) -> String {
    let mut rng = rng(seed, Purpose::Phantom, number, 3);
    let turn = number / VALIDATE_EVERY;
    let institute = if number % VALIDATE_EVERY == VALIDATE_EVERY - 1 {
        VALIDATION[turn as usize % VALIDATION.len()]
    } else {
        TRAIN[(number - turn) as usize % TRAIN.len()]
    };
    let [x, y] = [0, 1].map(|_| rng.random_range(10_000..90_000));
    format!("TCGA-{institute}-A{number:03X}-DX1_xmin{x}_ymin{y}_MPP-0.2500.png")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn pictures_and_masks_have_the_datasets_names_sizes_and_codes() {
        let folder = tempfile::tempdir().unwrap();
        let mut seen = [false; 256];
        let mut validated = 0;
        for number in 0..6 {
            let path = write(folder.path(), 4, number, 256).unwrap();
            let name = path.file_name().unwrap().to_str().unwrap();
            validated += usize::from(VALIDATION.contains(&&name[5..7]));
            assert!(
                name.starts_with("TCGA-") && name.contains("-DX1_xmin") && name.ends_with("_MPP-0.2500.png"),
                "{name}"
            );
            let mask = image::open(folder.path().join(MASKS).join(name)).unwrap();
            assert_eq!((mask.width(), mask.height(), mask.color()), (256, 256, image::ColorType::L8));
            assert_eq!(image::image_dimensions(&path).unwrap(), (256, 256));
            mask.into_luma8().pixels().for_each(|pixel| seen[usize::from(pixel.0[0])] = true);
        }
        assert_eq!(validated, 2);
        let codes: Vec<usize> = (0..256).filter(|&code| seen[code]).collect();
        assert!(codes.iter().all(|&code| code <= 21), "{codes:?}");
        for code in [0, 1, 2, 3, 4] {
            assert!(codes.contains(&code), "{codes:?} lack {code}");
        }
    }
}
