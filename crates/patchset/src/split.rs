//! Slides for training and slides for testing: never patches of one slide on both sides.

use std::collections::HashMap;

use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use sgcl_draw::{Purpose, rng};

use crate::index::Index;
use crate::manifest::Manifest;
use crate::store::{Store, StoreError};

/// A split by slide. Numbers are those of the manifest, ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// Slides to train on.
    pub train: Vec<u32>,
    /// Slides to test on.
    pub test: Vec<u32>,
    /// Classes that only one side has, by index: too few slides show them.
    pub one_sided: Vec<u16>,
}

/// `split.json` beside a labelled set: which slides to learn from and which to test on, so that whoever uses the set elsewhere compares
/// like with like. It is the split that `sgclctl eval` draws with the same seed.
pub const SPLIT: &str = "split.json";
/// Share of slides that it tests on.
pub const TEST_FRACTION: f64 = 0.3;
/// Version of the file that this code writes, and the only one it reads.
const VERSION: u32 = 1;
const MAX_BYTES: u64 = 256 << 20;

#[derive(Serialize)]
struct SplitFile<'a> {
    version: u32,
    /// Content id of the set.
    data: &'a str,
    by: &'static str,
    seed: u64,
    test_fraction: f64,
    train: Vec<&'a str>,
    test: Vec<&'a str>,
    /// Classes that only one side has.
    one_sided: Vec<&'a str>,
}

/// Contents of `split.json`; none for a set without labels or with one slide.
pub(crate) fn file(manifest: &Manifest, index: &Index, seed: u64) -> Option<Vec<u8>> {
    if !index.is_labelled() {
        return None;
    }
    let split = split(manifest, index, TEST_FRACTION, seed, 0).ok()?;
    let names = |side: &[u32]| side.iter().map(|&number| manifest.slides[number as usize].name.as_str()).collect();
    let file = SplitFile {
        version: VERSION,
        data: &manifest.content_id,
        // Images without places are dealt into groups that stand for slides.
        by: if manifest.slides.iter().all(|slide| slide.spatial) { "slide" } else { "slide, or group of images" },
        seed,
        test_fraction: TEST_FRACTION,
        train: names(&split.train),
        test: names(&split.test),
        one_sided: split.one_sided.iter().map(|&class| manifest.classes[usize::from(class)].as_str()).collect(),
    };
    serde_json::to_vec_pretty(&file).ok()
}

/// What is read of the file.
#[derive(Deserialize)]
struct Stored {
    version: u32,
    data: String,
    train: Vec<String>,
    test: Vec<String>,
}

/// A `split.json` that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SplitFileError {
    /// It is not a split of this set.
    #[error("{object}: {reason}; ingest writes it anew where it is missing")]
    Unfit {
        /// Full name of the file.
        object: String,
        /// What is wrong.
        reason: String,
    },
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The split that lies beside the set at `store`; `None` where there is none.
///
/// # Errors
/// The file is damaged, or does not name each slide of the set once; storage.
pub async fn stored(store: &Store, manifest: &Manifest, index: &Index) -> Result<Option<Split>, SplitFileError> {
    let bytes = match store.get(SPLIT, MAX_BYTES).await {
        Ok(bytes) => bytes,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let unfit = |reason: String| SplitFileError::Unfit { object: store.object(SPLIT), reason };
    let file: Stored = serde_json::from_slice(&bytes).map_err(|e| unfit(e.to_string()))?;
    if file.version != VERSION {
        return Err(unfit(format!("format version {}, but this program reads version {VERSION}", file.version)));
    }
    if file.data != manifest.content_id {
        return Err(unfit(format!("it splits other patches ({}) than lie here ({})", file.data, manifest.content_id)));
    }
    let numbers: HashMap<&str, usize> =
        manifest.slides.iter().enumerate().map(|(number, slide)| (slide.name.as_str(), number)).collect();
    let mut test = vec![None; manifest.slides.len()];
    for (names, side) in [(&file.train, false), (&file.test, true)] {
        for name in names {
            let number = numbers.get(name.as_str()).ok_or_else(|| unfit(format!("the set has no slide {name:?}")))?;
            if test[*number].replace(side).is_some() {
                return Err(unfit(format!("it names slide {name:?} twice")));
            }
        }
    }
    let test: Vec<bool> = (manifest.slides.iter().zip(test))
        .map(|(slide, side)| side.ok_or_else(|| unfit(format!("it does not name slide {:?}", slide.name))))
        .collect::<Result<_, _>>()?;
    Ok(Some(Split::of(&test, &Shown::count(manifest, index))))
}

/// A set that cannot be split.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SplitError {
    /// One slide cannot be on both sides.
    #[error("a split by slide needs 2 slides or more, the set has {slides}; ingest more, or test on another set")]
    TooFewSlides {
        /// Slides in the set.
        slides: usize,
    },
    /// Not a fraction.
    #[error("the fraction of test slides must lie between 0 and 1, not at {fraction}")]
    Fraction {
        /// The fraction given.
        fraction: f64,
    },
}

/// Splits the slides of a set: about `test_fraction` of them, and at least one on each side. Slides are drawn within strata of equal
/// main class; then slides are exchanged until every class that two slides show is on both sides, where that can be had. `trial`
/// numbers the splits drawn with one seed.
///
/// # Errors
/// Fewer than two slides, or a fraction outside (0, 1).
pub fn split(
    manifest: &Manifest,
    index: &Index,
    test_fraction: f64,
    seed: u64,
    trial: u64,
) -> Result<Split, SplitError> {
    let slides = manifest.slides.len();
    if !(test_fraction > 0.0 && test_fraction < 1.0) {
        return Err(SplitError::Fraction { fraction: test_fraction });
    }
    if slides < 2 {
        return Err(SplitError::TooFewSlides { slides });
    }
    let shown = Shown::count(manifest, index);
    let mut order: Vec<usize> = (0..slides).collect();
    order.shuffle(&mut rng(seed, Purpose::Probe, 0, trial));

    // Strata end to end, each in random order: every (1/fraction)-th slide is a fair share of each stratum.
    order.sort_by_key(|&slide| shown.main_class(slide));
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let tests = ((slides as f64 * test_fraction).round() as usize).clamp(1, slides - 1);
    let mut test = vec![false; slides];
    for at in 0..tests {
        // The middle of the at-th of `tests` equal parts.
        test[order[(2 * at + 1) * slides / (2 * tests)]] = true;
    }
    shown.mend(&order, &mut test);
    Ok(Split::of(&test, &shown))
}

impl Split {
    fn of(test: &[bool], shown: &Shown) -> Self {
        let side = |wanted: bool| (0_u32..).zip(test).filter(|&(_, &t)| t == wanted).map(|(n, _)| n).collect();
        Self { train: side(false), test: side(true), one_sided: shown.one_sided(test) }
    }
}

/// Patches of each class on each slide.
struct Shown {
    /// Sorted (class, patches) of each slide.
    by_slide: Vec<Vec<(u16, u32)>>,
    classes: usize,
}

impl Shown {
    fn count(manifest: &Manifest, index: &Index) -> Self {
        let count = |ids: std::ops::Range<u32>| {
            let mut counts = std::collections::BTreeMap::new();
            for label in ids.filter_map(|id| index.label(id)) {
                *counts.entry(label).or_insert(0) += 1;
            }
            counts.into_iter().collect()
        };
        Self {
            by_slide: manifest.slides.iter().map(|slide| count(slide.ids())).collect(),
            classes: manifest.classes.len(),
        }
    }

    fn main_class(&self, slide: usize) -> Option<u16> {
        self.by_slide[slide]
            .iter()
            .max_by_key(|&&(class, patches)| (patches, std::cmp::Reverse(class)))
            .map(|&(c, _)| c)
    }

    fn shows(&self, slide: usize, class: u16) -> bool {
        self.by_slide[slide].binary_search_by_key(&class, |&(c, _)| c).is_ok()
    }

    /// Slides that show each class: on the training side, on the test side.
    fn sides(&self, test: &[bool]) -> Vec<[u32; 2]> {
        let mut sides = vec![[0; 2]; self.classes];
        for (slide, shown) in self.by_slide.iter().enumerate() {
            for &(class, _) in shown {
                sides[usize::from(class)][usize::from(test[slide])] += 1;
            }
        }
        sides
    }

    /// Exchanges slides for classes that one side lacks, as long as that takes no class from a side that has it.
    fn mend(&self, order: &[usize], test: &mut [bool]) {
        let mut sides = self.sides(test);
        let mut classes: Vec<u16> = (0..self.classes).filter_map(|class| u16::try_from(class).ok()).collect();
        // Rare classes first: they have the fewest slides to choose from.
        classes.sort_by_key(|&class| sides[usize::from(class)].iter().sum::<u32>());
        for class in classes {
            let counts = sides[usize::from(class)];
            let lacking = match counts {
                [0, have] if have >= 2 => false,
                [have, 0] if have >= 2 => true,
                _ => continue,
            };
            let spare = |sides: &[[u32; 2]], slide: usize, side: bool| {
                self.by_slide[slide].iter().all(|&(c, _)| sides[usize::from(c)][usize::from(side)] != 1)
            };
            let giver = order
                .iter()
                .copied()
                .find(|&s| test[s] != lacking && self.shows(s, class) && spare(&sides, s, !lacking));
            let Some(giver) = giver else { continue };
            self.change_side(giver, test, &mut sides);
            // Keeps the sizes; where no slide can be spared in return, the sides differ by one from what was asked.
            let back = order.iter().copied().find(|&s| test[s] == lacking && s != giver && spare(&sides, s, lacking));
            if let Some(back) = back {
                self.change_side(back, test, &mut sides);
            } else if !test.contains(&!lacking) {
                self.change_side(giver, test, &mut sides);
            }
        }
    }

    fn change_side(&self, slide: usize, test: &mut [bool], sides: &mut [[u32; 2]]) {
        for &(class, _) in &self.by_slide[slide] {
            let side = &mut sides[usize::from(class)];
            side[usize::from(test[slide])] -= 1;
            side[usize::from(!test[slide])] += 1;
        }
        test[slide] = !test[slide];
    }

    fn one_sided(&self, test: &[bool]) -> Vec<u16> {
        let one_sided = |&(_, side): &(u16, [u32; 2])| (side[0] == 0) != (side[1] == 0);
        (0_u16..).zip(self.sides(test)).filter(one_sided).map(|(class, _)| class).collect()
    }
}
