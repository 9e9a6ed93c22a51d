//! Fields of phantom slides in NuCLS's layout: a picture, a box and an outline for every nucleus, folds by slide.
//!
//! | file | holds |
//! |---|---|
//! | `rgb/<field>.png` | the field; `<field>` is `<slide>_id-…_left-…_top-…_bottom-…_right-…` |
//! | `csv/<field>.csv` | a line for each nucleus: its classification in three grains, its box and its outline in pixels of the field |
//! | `train_test_splits/fold_<k>_{train,test}.csv` | the slides of each part |
//!
//! What NuCLS ships beside that (`mask/`, pictures to look at) is left out.

use std::f32::consts::TAU;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use rand::Rng as _;
use sgcl_draw::{Purpose, Rng, rng};

use super::{CLASSES, Layout};
use crate::PhantomError;
use crate::stain::Stain;
use crate::tissue::{Cell, Nucleus, Tile};

/// Sides of a field, pixels.
pub const FIELD_SIDES: std::ops::RangeInclusive<u32> = 64..=2048;
/// Folds, where there are as many slides.
const FOLDS: u64 = 5;
/// Pixels of a nucleus that must be inside its field, across and down.
const VISIBLE: i32 = 3;
/// Corners of an outline.
const CORNERS: u8 = 16;
/// Places that are tried for a field in the tissue it is to show.
const TRIES: u32 = 200;
/// Tissues whose nuclei are a cell's each; fields are dealt among them.
const SHOWN: [&str; 5] = ["tumour", "stroma", "lymphocytes", "glands", "fat"];

/// NuCLS's names for a cell: as annotated, main class, super-class.
fn names(cell: Cell) -> [&'static str; 3] {
    match cell {
        Cell::Fibroblast => ["fibroblast", "nonTILnonMQ_stromal", "nonTIL_stromal"],
        Cell::Tumour => ["tumor", "tumor_nonMitotic", "tumor_any"],
        Cell::Lymphocyte => ["lymphocyte", "lymphocyte", "sTIL"],
        Cell::Epithelium => ["ductal_epithelium", "other_nucleus", "other_nucleus"],
        // NuCLS has no class for fat.
        Cell::Adipocyte => ["unlabeled", "AMBIGUOUS", "AMBIGUOUS"],
    }
}

/// Writes `fields` fields of `px` pixels a side of slide number `slide` of a series; returns their pictures. The slide itself, of `side` pixels,
/// is the one [`crate::Phantom::draw`] draws.
///
/// # Errors
/// A side that is not drawn, of slide or field; files that cannot be written.
pub fn write_slide(
    folder: &Path,
    seed: u64,
    slide: u64,
    side: u32,
    fields: u64,
    px: u32,
) -> Result<Vec<PathBuf>, PhantomError> {
    if !crate::SIDES.contains(&side) {
        return Err(PhantomError::Side(side));
    }
    if !FIELD_SIDES.contains(&px) || px > side {
        return Err(PhantomError::Field { px, side });
    }
    let layout = Layout::new(seed, slide, side);
    let stain = Stain::new(seed, slide);
    let texture: u64 = rng(seed, Purpose::Phantom, slide, 2).random();
    let mut draws = rng(seed, Purpose::Phantom, slide, 3);
    for name in ["rgb", "csv"] {
        make(&folder.join(name))?;
    }
    let mut written = Vec::new();
    for field in 0..fields {
        let (left, top) = place(&layout, &mut draws, side, px, SHOWN[(field % SHOWN.len() as u64) as usize]);
        let id = draws.random::<u128>() >> 32;
        let (right, bottom) = (left + px, top + px);
        let name = format!("{}_id-{id:024x}_left-{left}_top-{top}_bottom-{bottom}_right-{right}", slide_name(slide));
        let tile = Tile::draw(&layout, texture, i64::from(left), i64::from(top), px as usize);
        let pixels: Vec<u8> =
            tile.haematoxylin.iter().zip(&tile.eosin).flat_map(|(&h, &e)| stain.colour(h, e)).collect();
        let table = folder.join("csv").join(format!("{name}.csv"));
        fs::write(&table, csv(&tile.nuclei, left, top, px)).map_err(io(&table))?;
        let picture = folder.join("rgb").join(format!("{name}.png"));
        image::save_buffer(&picture, &pixels, px, px, image::ColorType::Rgb8)
            .map_err(|source| PhantomError::Labels { file: picture.display().to_string(), source })?;
        written.push(picture);
    }
    Ok(written)
}

/// Writes the folds of a series of `slides`: each slide is tested on in one of them. A series of one slide has none.
///
/// # Errors
/// Files that cannot be written.
pub fn write_folds(folder: &Path, slides: u64) -> Result<(), PhantomError> {
    if slides < 2 {
        return Ok(());
    }
    let folder = folder.join("train_test_splits");
    make(&folder)?;
    let folds = FOLDS.min(slides);
    for fold in 0..folds {
        for part in ["train", "test"] {
            let mut text = ",slide_name,hospital,type,fold\n".to_owned();
            let of = (0..slides).filter(|slide| (slide % folds == fold) == (part == "test"));
            for (line, slide) in of.enumerate() {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{line},{},PH,{part},{}", slide_name(slide), fold + 1);
            }
            let file = folder.join(format!("fold_{}_{part}.csv", fold + 1));
            fs::write(&file, text).map_err(io(&file))?;
        }
    }
    Ok(())
}

/// As TCGA names a slide: the hospital is the second part.
fn slide_name(slide: u64) -> String {
    format!("TCGA-PH-{slide:04}-DX1")
}

/// Top left corner of a field whose middle lies in `tissue`, or in any where that is rare.
fn place(layout: &Layout, draws: &mut Rng, side: u32, px: u32, tissue: &str) -> (u32, u32) {
    let mut fallback = None;
    for _ in 0..TRIES {
        let at = (draws.random_range(0..=side - px), draws.random_range(0..=side - px));
        let middle = |corner: u32| (corner + px / 2) as f32;
        if let Some(region) = layout.at(middle(at.0), middle(at.1)) {
            if CLASSES[usize::from(region.class)] == tissue {
                return at;
            }
            fallback = Some(at);
        }
    }
    fallback.unwrap_or(((side - px) / 2, (side - px) / 2))
}

/// The table of a field.
fn csv(nuclei: &[Nucleus], left: u32, top: u32, px: u32) -> String {
    let mut text =
        ",raw_classification,main_classification,super_classification,type,xmin,ymin,xmax,ymax,coords_x,coords_y\n"
            .to_owned();
    let seen = nuclei.iter().filter_map(|nucleus| Some((nucleus, Bounds::of(nucleus, left, top, px)?)));
    for (line, (nucleus, bounds)) in seen.enumerate() {
        let [raw, main, superclass] = names(nucleus.cell);
        // NuCLS has both: every fourth nucleus is a box that nobody outlined.
        let (kind, corners) = match line % 4 {
            3 => ("rectangle", bounds.corners()),
            _ => ("polyline", outline(nucleus, left, top, px)),
        };
        let list = |pick: fn(&(i32, i32)) -> i32| {
            corners.iter().map(|corner| pick(corner).to_string()).collect::<Vec<_>>().join(",")
        };
        let Bounds { x0, y0, x1, y1 } = bounds;
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{line},{raw},{main},{superclass},{kind},{x0},{y0},{x1},{y1},\"{}\",\"{}\"",
            list(|c| c.0),
            list(|c| c.1)
        );
    }
    text
}

/// A box in pixels of its field, the far sides excluded.
struct Bounds {
    x0: i32,
    y0: i32,
    x1: i32,
    y1: i32,
}

impl Bounds {
    /// Of the part inside the field; none where hardly anything is.
    fn of(nucleus: &Nucleus, left: u32, top: u32, px: u32) -> Option<Self> {
        let ((a, b), (s, c)) = (nucleus.axes, nucleus.angle.sin_cos());
        let (x, y) = inside(nucleus.centre, left, top);
        let (wide, high) = ((a * c).hypot(b * s), (a * s).hypot(b * c));
        let clip = |v: f32| v.round().clamp(0.0, px as f32) as i32;
        let found = Self { x0: clip(x - wide), y0: clip(y - high), x1: clip(x + wide), y1: clip(y + high) };
        (found.x1 - found.x0 >= VISIBLE && found.y1 - found.y0 >= VISIBLE).then_some(found)
    }

    fn corners(&self) -> Vec<(i32, i32)> {
        let &Self { x0, y0, x1, y1 } = self;
        vec![(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)]
    }
}

/// Closed, in pixels of the field.
fn outline(nucleus: &Nucleus, left: u32, top: u32, px: u32) -> Vec<(i32, i32)> {
    let (s, c) = nucleus.angle.sin_cos();
    let (x, y) = inside(nucleus.centre, left, top);
    let clip = |v: f32| v.round().clamp(0.0, px as f32) as i32;
    (0..=CORNERS)
        .map(|at| {
            let turn = f32::from(at % CORNERS) / f32::from(CORNERS) * TAU;
            let (u, v) = (nucleus.axes.0 * turn.cos(), nucleus.axes.1 * turn.sin());
            (clip(x + u * c - v * s), clip(y + u * s + v * c))
        })
        .collect()
}

fn inside(place: (f32, f32), left: u32, top: u32) -> (f32, f32) {
    (place.0 - left as f32, place.1 - top as f32)
}

fn make(folder: &Path) -> Result<(), PhantomError> {
    fs::create_dir_all(folder).map_err(io(folder))
}

fn io(file: &Path) -> impl FnOnce(std::io::Error) -> PhantomError {
    let file = file.display().to_string();
    move |source| PhantomError::Io { file, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turned_nucleus_is_boxed_by_what_it_covers() {
        let nucleus = Nucleus {
            cell: Cell::Fibroblast,
            centre: (110.0, 220.0),
            axes: (10.0, 3.0),
            angle: std::f32::consts::FRAC_PI_2,
        };
        let text = csv(&[nucleus], 100, 200, 64);
        let line = text.lines().nth(1).unwrap_or_default();
        assert!(line.starts_with("0,fibroblast,nonTILnonMQ_stromal,nonTIL_stromal,polyline,7,10,13,30,\""), "{line}");
        let far = Nucleus { centre: (90.0, 220.0), ..nucleus };
        assert_eq!(csv(&[far], 100, 200, 64).lines().count(), 1, "what lies outside has no line");
    }
}
