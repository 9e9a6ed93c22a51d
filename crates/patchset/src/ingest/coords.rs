//! Places that CLAM or TRIDENT chose: the dataset `coords` of their .h5 files, (n, 2) upper left corners in pixels of level 0.
//!
//! | written by | told by | side on level 0 | stride |
//! |---|---|---|---|
//! | TRIDENT, `<slide>_patches.h5` or `<slide>.h5` | `patch_size_level0` | `patch_size_level0` | less `overlap` |
//! | CLAM, `<slide>.h5` | `patch_level` | `patch_size` × the level's downsample | what most neighbours in a row are apart |
//!
//! A place in the grid is round((xy - min) / stride). CLAM begins a grid of its own in every contour: places of two contours that come
//! to lie on each other count once.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

use hdf5_pure::{AttrValue, Dataset, File};

/// Largest file read.
const MAX_BYTES: u64 = 1 << 30;
/// Most places.
const MAX_PLACES: u64 = 20_000_000;
/// How far a place of TRIDENT may be off its lattice, in strides: it computes in whole pixels.
const OFF_LATTICE: f64 = 0.05;

/// Row and column of each patch, with its corner in pixels of level 0.
type Corners = BTreeMap<(u32, u32), [u32; 2]>;

/// Where patches lie.
#[derive(Debug, PartialEq)]
pub(crate) struct Places {
    /// Side of a patch in its own pixels.
    pub(crate) patch_px: u32,
    /// Pixels of level 0 for one of a patch.
    pub(crate) downsample: f64,
    /// The level they are read from, where the file says so.
    pub(crate) level: Option<u32>,
    pub(crate) corners: Corners,
    /// Pixels of a patch by which it overlaps the next.
    pub(crate) overlap: u32,
    /// Places that lay on others.
    pub(crate) doubled: u64,
}

/// Reads the places on a slide whose levels are `levels` (width, height, downsample).
pub(crate) fn read(file: &Path, levels: &[(u32, u32, f64)]) -> Result<Places, String> {
    let bytes = file.metadata().map_err(|e| e.to_string())?.len();
    if bytes > MAX_BYTES {
        return Err(format!("{bytes} bytes are too many for a file of coordinates"));
    }
    let open = File::open(file).map_err(|e| format!("not an HDF5 file that can be read: {e}"))?;
    let dataset =
        open.dataset("coords").map_err(|e| format!("it has no dataset `coords` as CLAM and TRIDENT write it: {e}"))?;
    let shape = dataset.shape().map_err(|e| e.to_string())?;
    match *shape.as_slice() {
        [1..=MAX_PLACES, 2] => {}
        _ => return Err(format!("`coords` has shape {shape:?}; 1 to {MAX_PLACES} rows of 2 are taken")),
    }
    let corners = corners(&dataset, levels)?;
    let attributes = dataset.attrs().map_err(|e| format!("the attributes of `coords`: {e}"))?;
    let number = |name: &str| attributes.get(name).and_then(number);
    let lacks = |name: &str| format!("`coords` has no attribute {name}; CLAM and TRIDENT write it");
    let patch_size = number("patch_size").ok_or_else(|| lacks("patch_size"))?;
    if !(16.0..=4096.0).contains(&patch_size) {
        return Err(format!("patch_size {patch_size} is not in 16..=4096"));
    }
    let (downsample, level, stride) = match (number("patch_size_level0"), number("patch_level")) {
        (Some(side), _) => {
            let overlap = number("overlap").unwrap_or(0.0);
            let downsample = side / patch_size;
            if !(downsample.is_finite() && downsample > 0.0 && (0.0..patch_size).contains(&overlap)) {
                return Err(format!(
                    "patch_size_level0 {side} and overlap {overlap} do not go with patch_size {patch_size}"
                ));
            }
            (downsample, None, side - (overlap * downsample).round())
        }
        (None, Some(level)) => {
            let Some(&(_, _, downsample)) = levels.get(level as usize) else {
                return Err(format!("patch_level is {level}, but the slide has {} level(s)", levels.len()));
            };
            (downsample, Some(level as u32), usual_step(&corners).unwrap_or(patch_size * downsample))
        }
        (None, None) => return Err(lacks("patch_size_level0 or patch_level")),
    };
    let (placed, doubled) = place(&corners, stride, level.is_none())?;
    let overlap = (patch_size - stride / downsample).max(0.0).round() as u32;
    Ok(Places { patch_px: patch_size as u32, downsample, level, corners: placed, overlap, doubled })
}

/// An attribute that is a number, whatever its type; of several the first.
fn number(value: &AttrValue) -> Option<f64> {
    let whole = value.to_i64s().and_then(|all| all.first().map(|&n| n as f64));
    whole.or_else(|| value.to_f64s().and_then(|all| all.first().copied())).filter(|n| n.is_finite())
}

/// The corners, inside the slide.
fn corners(dataset: &Dataset, levels: &[(u32, u32, f64)]) -> Result<Vec<[u32; 2]>, String> {
    let values = dataset.read_i64().map_err(|e| format!("`coords` cannot be read: {e}"))?;
    let (width, height) = levels.first().map_or((0, 0), |&(width, height, _)| (width, height));
    values
        .chunks_exact(2)
        .map(|pair| {
            let inside = |value: i64, end: u32| u32::try_from(value).ok().filter(|&value| value < end);
            match (inside(pair[0], width), inside(pair[1], height)) {
                (Some(x), Some(y)) => Ok([x, y]),
                _ => Err(format!(
                    "{}, {} lies outside the slide of {width}×{height} px; is it another slide's file?",
                    pair[0], pair[1]
                )),
            }
        })
        .collect()
}

/// What most neighbours in a row are apart.
fn usual_step(corners: &[[u32; 2]]) -> Option<f64> {
    let mut sorted: Vec<(u32, u32)> = corners.iter().map(|&[x, y]| (y, x)).collect();
    sorted.sort_unstable();
    let mut steps: BTreeMap<u32, usize> = BTreeMap::new();
    for pair in sorted.windows(2).filter(|pair| pair[0].0 == pair[1].0 && pair[0].1 < pair[1].1) {
        *steps.entry(pair[1].1 - pair[0].1).or_default() += 1;
    }
    // Of equals the smallest: gaps are multiples of it.
    steps.into_iter().max_by_key(|&(step, count)| (count, std::cmp::Reverse(step))).map(|(step, _)| f64::from(step))
}

/// Columns and rows, and how many places were taken already.
fn place(corners: &[[u32; 2]], stride: f64, exact: bool) -> Result<(Corners, u64), String> {
    if stride < 1.0 {
        return Err(format!("patches {stride} px apart are no lattice"));
    }
    let least = [0, 1].map(|axis| corners.iter().map(|corner| corner[axis]).min().unwrap_or(0));
    let (mut placed, mut doubled) = (BTreeMap::new(), 0);
    for &[x, y] in corners {
        let at = [x - least[0], y - least[1]].map(|d| f64::from(d) / stride);
        if exact && at.iter().any(|at| (at - at.round()).abs() > OFF_LATTICE) {
            return Err(format!(
                "{x}, {y} is not on the lattice of {stride} px that begins at {}, {}",
                least[0], least[1]
            ));
        }
        let [column, row] = at.map(|at| at.round() as u32);
        match placed.entry((row, column)) {
            Entry::Vacant(free) => {
                free.insert([x, y]);
            }
            Entry::Occupied(_) => doubled += 1,
        }
    }
    Ok((placed, doubled))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn places_are_counted_from_the_least_in_strides() {
        let corners = [[100, 50], [300, 50], [200, 150], [201, 151]];
        let (placed, doubled) = place(&corners, 100.0, false).unwrap();
        let found: Vec<_> = placed.into_iter().collect();
        assert_eq!(found, [((0, 0), [100, 50]), ((0, 2), [300, 50]), ((1, 1), [200, 150])]);
        assert_eq!(doubled, 1);
    }

    #[test]
    fn what_is_off_the_lattice_is_named() {
        let error = place(&[[0, 0], [130, 0]], 100.0, true).unwrap_err();
        assert!(error.contains("130, 0 is not on the lattice of 100 px"), "{error}");
    }

    #[test]
    fn the_usual_step_is_that_of_most_neighbours() {
        assert_eq!(usual_step(&[[0, 0], [64, 0], [128, 0], [500, 0], [30, 9], [94, 9]]), Some(64.0));
        assert_eq!(usual_step(&[[0, 0], [0, 64]]), None);
    }
}
