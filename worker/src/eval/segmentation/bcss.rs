//! The layout of the Breast Cancer Semantic Segmentation dataset: a folder of images, a folder of masks, the same names in both.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use sgcl::segment::bcss::institute;

use super::SegmentationError;

/// What the folder of images is called, by where it comes from: the published archive, or the download script.
const IMAGES: [&str; 4] = ["rgbs_colorNormalized", "rgbs_colorCorrected", "rgbs", "images"];
const MASKS: &str = "masks";
/// Most images that are taken.
const MAX_IMAGES: usize = 100_000;

/// An image and its mask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    /// The file's name without extension.
    pub(super) name: String,
    /// The slide it was cut from: what stands before the first underscore.
    pub(super) slide: String,
    pub(super) image: PathBuf,
    pub(super) mask: PathBuf,
}

/// All pairs of a folder, in the order of their names.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) train: Vec<Pair>,
    /// Those of the institutes to validate on.
    pub(super) validation: Vec<Pair>,
}

impl Folder {
    /// Finds images and masks under `root`.
    pub(super) fn find(root: &Path, institutes: &[String]) -> Result<Self> {
        let images = images_of(root)?;
        let (mut pictures, mut masks) = (pngs(&images)?, pngs(&root.join(MASKS))?);
        let mut folder = Folder { train: Vec::new(), validation: Vec::new() };
        while let Some((name, image)) = pictures.pop_first() {
            let Some(mask) = masks.remove(&name) else {
                return Err(bad(
                    &image,
                    &format!("has no mask; {} of the same name belongs in {MASKS}/", file(&image)),
                ));
            };
            let Some(institute) = institute(&name) else {
                return Err(bad(
                    &image,
                    "is not called by a TCGA barcode (TCGA-XX-…), whose XX says the institute; rename it",
                ));
            };
            let slide = name.split('_').next().unwrap_or(&name).to_owned();
            let half = if institutes.iter().any(|wanted| wanted == institute) {
                &mut folder.validation
            } else {
                &mut folder.train
            };
            half.push(Pair { name, slide, image, mask });
        }
        if let Some((_, mask)) = masks.pop_first() {
            return Err(bad(
                &mask,
                &format!("has no image; {} of the same name belongs in {}/", file(&mask), file(&images)),
            ));
        }
        let institutes = institutes.join(", ");
        if folder.validation.is_empty() {
            return Err(bad(
                &images,
                &format!(
                    "holds no image of the institutes to validate on ({institutes}); name others with --validation"
                ),
            ));
        }
        if folder.train.is_empty() {
            return Err(bad(
                &images,
                &format!(
                    "holds no image to learn from, all are of the institutes to validate on ({institutes}); name fewer with --validation"
                ),
            ));
        }
        Ok(folder)
    }
}

fn images_of(root: &Path) -> Result<PathBuf> {
    let there: Vec<PathBuf> = IMAGES.iter().map(|name| root.join(name)).filter(|path| path.is_dir()).collect();
    match there.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(bad(
            root,
            &format!("holds no folder of images; as BCSS it has one of {} and {MASKS}", IMAGES.join(", ")),
        )),
        [first, second, ..] => {
            Err(bad(root, &format!("holds {} and {}; move one of them away", file(first), file(second))))
        }
    }
}

/// The PNGs of a folder by their names without extension.
fn pngs(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let entries = std::fs::read_dir(folder)
        .map_err(|e| bad(folder, &format!("cannot be read ({e}); as BCSS the data has it")))?;
    let mut files = BTreeMap::new();
    for entry in entries {
        let path = entry.map_err(|e| bad(folder, &e.to_string()))?.path();
        let is_png = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("png"));
        if let Some(name) = path.file_stem().and_then(|stem| stem.to_str()).filter(|n| is_png && !n.starts_with('.')) {
            files.insert(name.to_owned(), path);
        }
        if files.len() > MAX_IMAGES {
            return Err(bad(folder, &format!("holds more than {MAX_IMAGES} images; give fewer")));
        }
    }
    Ok(files)
}

fn file(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// What is wrong with a file, and what to do.
pub(super) fn bad(path: &Path, what: &str) -> anyhow::Error {
    SegmentationError(format!("{} {what}", path.display())).into()
}
