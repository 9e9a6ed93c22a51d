//! Where patches come from: `sgclctl`, which reads slides, or a patch set. Rendered here, a batch at a time, ahead of the forward pass.

use std::borrow::Cow;
use std::io::{BufReader, Read};

use anyhow::{Context, Result};
use crossbeam_channel::Sender;
use rayon::prelude::*;
use sgcl::augment::Renderer;
use sgcl::image::RgbImage;
use sgcl_patchset::cache::CacheOptions;
use sgcl_patchset::{PatchSet, manifest::SlideEntry};
use sgcl_runstore::features::wire::{self, SlideHeader};
use sgcl_runstore::features::{Geometry, Output};
use tokio::runtime::Handle;

const PIPE_BUFFER: usize = 1 << 20;
/// Bytes of a remote patch set's shards that are kept on disk meanwhile.
const CACHE_BYTES: u64 = 8 << 30;

/// A slide's head.
pub(super) type Slide = SlideHeader;

/// What happens, in order: each slide begins, has its patches, and ends.
pub(super) enum Item {
    Begin(Box<Slide>),
    /// (patches, 3, px, px), normalised.
    Batch {
        views: Vec<f32>,
        patches: usize,
    },
    End,
    /// It could not be read to its end.
    Abandoned,
    /// It was complete already.
    Resumed {
        name: String,
        patches: usize,
    },
}

/// Slides on a stream, see [`wire`].
pub(super) fn stream(from: &mut impl Read, px: u32, batch: usize, items: &Sender<Item>) -> Result<()> {
    let mut from = BufReader::with_capacity(PIPE_BUFFER, from);
    let broken = "the slides on standard input broke off";
    while let Some(head) = wire::read_header(&mut from).context(broken)? {
        let (bytes, side) = (head.patch_bytes(), head.geometry.patch_px);
        let mut left = head.coords.len();
        if items.send(Item::Begin(Box::new(head))).is_err() {
            return Ok(());
        }
        let mut whole = true;
        while left > 0 && whole {
            let mut images = Vec::with_capacity(batch.min(left));
            while images.len() < batch.min(left) {
                let mut pixels = vec![0; bytes];
                whole = wire::read_patch(&mut from, &mut pixels).context(broken)?;
                if !whole {
                    break;
                }
                images.push(RgbImage::new(side, side, pixels)?);
            }
            if !whole {
                break;
            }
            left -= images.len();
            let views = render(px, &images, |image| Ok(Cow::Borrowed(image)))?;
            if items.send(Item::Batch { views, patches: images.len() }).is_err() {
                return Ok(());
            }
        }
        if items.send(if whole { Item::End } else { Item::Abandoned }).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// The slides of a patch set in its order, but those that are complete.
pub(super) fn patch_set(
    runtime: &Handle,
    set: &PatchSet,
    output: &Output,
    px: u32,
    batch: usize,
    items: &Sender<Item>,
) -> Result<()> {
    // A remote set's patches are read in the order of slides, which no shard is in: without a cache each would be a request.
    let scratch = match set.store().local_path("") {
        Some(_) => None,
        None => Some(tempfile::tempdir().context("no folder for the patch set's shards")?),
    };
    let cache = scratch.as_ref().map(|dir| CacheOptions { dir: dir.path().to_owned(), max_bytes: CACHE_BYTES });
    // The reader of a remote set keeps the runtime it is made in.
    let reader = runtime.block_on(async { set.reader(cache) });
    let content = &set.manifest().content_id;
    for slide in &set.manifest().slides {
        if let Some(record) = runtime.block_on(output.complete(&slide.name, content))? {
            let item = Item::Resumed { name: slide.name.clone(), patches: record.patches };
            if items.send(item).is_err() {
                return Ok(());
            }
            continue;
        }
        let ids: Vec<u32> = slide.ids().collect();
        let head = SlideHeader {
            name: slide.name.clone(),
            fingerprint: content.clone(),
            geometry: geometry(slide, set.manifest().patch_px),
            coords: ids.iter().map(|&id| corner(slide, set, id)).collect(),
        };
        if items.send(Item::Begin(Box::new(head))).is_err() {
            return Ok(());
        }
        for chunk in ids.chunks(batch) {
            let views = render(px, chunk, |&id| {
                let image = reader.decode_blocking(id)?;
                Ok(Cow::Owned(RgbImage::new(image.width, image.height, image.pixels)?))
            })?;
            if items.send(Item::Batch { views, patches: chunk.len() }).is_err() {
                return Ok(());
            }
        }
        if items.send(Item::End).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

fn geometry(slide: &SlideEntry, patch_px: u32) -> Geometry {
    let level0 = slide.downsample.map(|d| [slide.width, slide.height].map(|side| (side as f64 * d).round() as u32));
    Geometry { patch_px, mpp: slide.mpp, downsample: slide.downsample, level0, overlap: 0, spatial: slide.spatial }
}

/// A patch's corner in pixels of level 0, or of the patches where the set does not say how large those are.
fn corner(slide: &SlideEntry, set: &PatchSet, id: u32) -> [i64; 2] {
    let (x, y) = (set.index().xs()[id as usize], set.index().ys()[id as usize]);
    let side = f64::from(set.manifest().patch_px) * slide.downsample.unwrap_or(1.0);
    [x, y].map(|n| (f64::from(n) * side).round() as i64)
}

/// (n, 3, px, px): the views that features are extracted from, made on all cores.
fn render<T: Sync>(px: u32, patches: &[T], image: impl Fn(&T) -> Result<Cow<'_, RgbImage>> + Sync) -> Result<Vec<f32>> {
    let values = 3 * (px * px) as usize;
    let mut views = vec![0_f32; patches.len() * values];
    views.par_chunks_mut(values).zip(patches).try_for_each_init(Renderer::new, |renderer, (view, patch)| {
        let image = image(patch)?;
        renderer.eval_view(&image, px, view);
        Ok::<_, anyhow::Error>(())
    })?;
    Ok(views)
}
