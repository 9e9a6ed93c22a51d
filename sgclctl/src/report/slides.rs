//! Slides with their tiles laid over them, and patches beside their nearest neighbours.

use std::collections::BTreeMap;

use anyhow::Result;
use image::RgbImage;
use sgcl_patchset::manifest::SlideEntry;
use sgcl_patchset::{PatchSet, ShardReader, decode};

use super::bank::Bank;
use super::pictures;

/// Neighbours shown of a query.
const NEIGHBOURS: usize = 6;
/// Largest preview read.
const MAX_PREVIEW_BYTES: u64 = 32 << 20;
/// A slide without a preview is put together from its patches up to this many.
const MAX_MOSAIC: u32 = 1500;
/// Grids above this many tiles are not laid over a picture.
const MAX_TILES: u64 = 4 << 20;
/// Columns up to which the tiles' borders are drawn.
const RULED: u32 = 48;

/// Colours of classes, apart in light and dark and to most colour-blind eyes; they repeat beyond ten.
const CLASSES: [[u8; 3]; 10] = [
    [64, 120, 220],
    [224, 122, 48],
    [46, 160, 110],
    [150, 92, 200],
    [212, 72, 92],
    [32, 164, 184],
    [190, 156, 40],
    [226, 112, 176],
    [120, 130, 144],
    [134, 96, 66],
];

/// The colour of a class.
pub(crate) fn class_colour(class: u16) -> [u8; 3] {
    CLASSES[usize::from(class) % CLASSES.len()]
}

/// A slide as the page shows it.
pub(crate) struct SlideView {
    pub(crate) name: String,
    pub(crate) patches: u32,
    pub(crate) mpp: Option<f64>,
    pub(crate) held_out: bool,
    /// Width to height of the picture.
    pub(crate) aspect: f64,
    pub(crate) picture: Option<String>,
    /// Tiles by class, by cluster, or plain: what there is.
    pub(crate) by_class: Option<String>,
    pub(crate) by_cluster: Option<String>,
    pub(crate) plain: Option<String>,
    /// Share of the picture that the grid covers, in percent: width, height.
    pub(crate) cover: [f64; 2],
    /// Columns and rows, where their borders are to be drawn.
    pub(crate) ruled: Option<[u32; 2]>,
}

impl SlideView {
    /// Where the grid lies on the picture, as CSS.
    pub(crate) fn place(&self) -> String {
        let [width, height] = self.cover;
        let ruled = self.ruled.map(|[columns, rows]| format!(";--columns:{columns};--rows:{rows}")).unwrap_or_default();
        format!("width:{width:.3}%;height:{height:.3}%{ruled}")
    }
}

/// Up to `count` slides, spread over the set.
pub(crate) async fn views(
    set: &PatchSet,
    bank: Option<&Bank>,
    held_out: &[usize],
    count: usize,
    tell: &impl Fn(&str),
) -> Result<Vec<SlideView>> {
    let manifest = set.manifest();
    let all = manifest.slides.len();
    let reader = set.reader(None);
    let shown = count.min(all);
    let mut views = Vec::with_capacity(shown);
    for at in 0..shown {
        let number = at * all / shown;
        let slide = &manifest.slides[number];
        tell(&format!("slide {}/{shown}: {}", at + 1, slide.name));
        views.push(view(set, &reader, bank, slide, held_out.contains(&number)).await?);
    }
    Ok(views)
}

#[allow(clippy::cast_precision_loss)]
async fn view(
    set: &PatchSet,
    reader: &ShardReader,
    bank: Option<&Bank>,
    slide: &SlideEntry,
    held_out: bool,
) -> Result<SlideView> {
    let grid = slide.grid;
    let place = |id: u32| {
        let row = set.index().row(id)?;
        Some((u32::try_from(row.x).ok()?, u32::try_from(row.y).ok()?, row.label))
    };
    let laid = slide.spatial && u64::from(grid[0]) * u64::from(grid[1]) <= MAX_TILES && grid[0] > 0 && grid[1] > 0;
    let overlay = |colour: &dyn Fn(u32, Option<u16>) -> Option<[u8; 3]>| {
        let tiles: Vec<(u32, u32, [u8; 3])> =
            slide.ids().filter_map(|id| place(id).and_then(|(x, y, label)| Some((x, y, colour(id, label)?)))).collect();
        (laid && !tiles.is_empty()).then(|| pictures::tiles(grid, tiles.into_iter())).flatten()
    };
    let by_class = overlay(&|_, label| label.map(class_colour));
    let by_cluster = overlay(&|id, _| bank.and_then(|bank| bank.clusters.get(&id)).map(|&cluster| hue(cluster)));
    let plain = overlay(&|_, _| Some(CLASSES[0]));

    let mut picture = match &slide.preview {
        Some(path) => pictures::slide(&set.store().get(path, MAX_PREVIEW_BYTES).await?),
        None => None,
    };
    let px = u64::from(set.manifest().patch_px);
    let mut size = [slide.width.max(1), slide.height.max(1)];
    if picture.is_none() && laid && slide.patches <= MAX_MOSAIC {
        let mut patches = Vec::new();
        for id in slide.ids() {
            let Some((x, y, _)) = place(id) else { continue };
            let rgb = decode(&reader.read(id).await?)?;
            if let Some(image) = RgbImage::from_raw(rgb.width, rgb.height, rgb.pixels) {
                patches.push((x, y, image));
            }
        }
        picture = pictures::mosaic(grid, patches.into_iter());
        size = grid.map(|side| u64::from(side) * px);
    }
    let cover = [0, 1].map(|i| 100.0 * (u64::from(grid[i]) * px) as f64 / size[i] as f64);
    Ok(SlideView {
        name: slide.name.clone(),
        patches: slide.patches,
        mpp: slide.mpp,
        held_out,
        aspect: (size[0] as f64 / size[1] as f64).clamp(0.25, 4.0),
        picture,
        by_class,
        by_cluster,
        plain,
        cover,
        ruled: (laid && grid[0] <= RULED && grid[1] <= 2 * RULED).then_some(grid),
    })
}

/// A patch of the montage.
pub(crate) struct PatchView {
    pub(crate) picture: String,
    pub(crate) class: Option<u16>,
    pub(crate) slide: String,
    pub(crate) x: i32,
    pub(crate) y: i32,
    /// Cosine to the query.
    pub(crate) cosine: Option<f32>,
}

/// A query and its nearest neighbours.
pub(crate) struct Query {
    pub(crate) patch: PatchView,
    pub(crate) neighbours: Vec<PatchView>,
}

/// Up to `count` queries, one of each class (or cluster) in turn, each with its nearest neighbours that lie `radius` tiles or more
/// away: nearer ones were trained to be alike.
pub(crate) async fn montage(set: &PatchSet, bank: &Bank, count: usize, radius: f64) -> Result<Vec<Query>> {
    let reader = set.reader(None);
    let mut queries = Vec::new();
    for row in spread(set, bank, count) {
        let id = bank.ids[row];
        let Some(from) = set.index().row(id) else { continue };
        let close = |other: u32| {
            set.index().row(other).is_none_or(|other| {
                let (dx, dy) = (f64::from(other.x) - f64::from(from.x), f64::from(other.y) - f64::from(from.y));
                other.slide == from.slide && dx.hypot(dy) < radius
            })
        };
        let mut neighbours = Vec::new();
        for (other, cosine) in bank.nearest(row, NEIGHBOURS, close) {
            neighbours.extend(patch(set, &reader, other, Some(cosine)).await?);
        }
        if let Some(patch) = patch(set, &reader, id, None).await? {
            queries.push(Query { patch, neighbours });
        }
    }
    Ok(queries)
}

/// Rows to ask about: groups in turn, each from another place of its group, so that slides differ too.
fn spread(set: &PatchSet, bank: &Bank, count: usize) -> Vec<usize> {
    let mut groups: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
    for (row, &id) in bank.ids.iter().enumerate() {
        let label = set.index().label(id).map(i64::from);
        let cluster = || bank.clusters.get(&id).copied();
        groups.entry(label.or_else(cluster).unwrap_or(0)).or_default().push(row);
    }
    let groups: Vec<&Vec<usize>> = groups.values().collect();
    let Some(many) = (!groups.is_empty()).then_some(groups.len()) else { return Vec::new() };
    let mut rows: Vec<usize> = (0..count.min(bank.ids.len()))
        .map(|at| {
            let group = groups[if count <= many { at * many / count } else { at % many }];
            // Steps of the golden ratio never fall together.
            group[(at * 618 + 309) % 1000 * group.len() / 1000]
        })
        .collect();
    rows.dedup();
    rows
}

async fn patch(set: &PatchSet, reader: &ShardReader, id: u32, cosine: Option<f32>) -> Result<Option<PatchView>> {
    let Some(row) = set.index().row(id) else { return Ok(None) };
    let Some(picture) = pictures::patch(&reader.read(id).await?) else { return Ok(None) };
    let slide = set.manifest().slides.get(row.slide as usize).map(|slide| slide.name.clone()).unwrap_or_default();
    Ok(Some(PatchView { picture, class: row.label, slide, x: row.x, y: row.y, cosine }))
}

/// A colour of its own for a cluster: hues a golden angle apart.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
fn hue(cluster: i64) -> [u8; 3] {
    let turn = (cluster as f64 * 0.618_034).rem_euclid(1.0) * 6.0;
    let level = if cluster.rem_euclid(2) == 0 { 0.86 } else { 0.66 };
    let channel = |offset: f64| {
        let at = (turn + offset).rem_euclid(6.0);
        let ramp = (at.min(4.0 - at)).clamp(0.0, 1.0);
        (255.0 * level * (0.25 + 0.75 * ramp)) as u8
    };
    [channel(2.0), channel(0.0), channel(4.0)]
}
