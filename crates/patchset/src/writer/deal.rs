//! From staged slides to shards: number the patches, deal them group by group, write the index, commit.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use rand::seq::SliceRandom;
use sgcl_draw::{Purpose, rng};
use tokio::task::JoinSet;

use super::staging::{self, Head};
use super::webdataset::{Annotation, ShardBuilder};
use super::{Shared, WriteError};
use crate::index::{INDEX, Index, Row};
use crate::manifest::{FileEntry, MANIFEST, Manifest, ShardEntry, SlideEntry};
use crate::store::{Created, Store};

const REQUESTS: usize = 16;
/// Shards being uploaded while the next is built; with the shard size it bounds memory.
const UPLOADS: usize = 3;
/// A set is cut into this many shards even if one would hold it, so that ranks can be dealt whole ones,
const FEW_SHARDS: u64 = 16;
/// unless they would hold fewer patches than this.
const FEW_PATCHES: u64 = 64;

pub(super) async fn deal(
    shared: &Arc<Shared>,
    heads: Vec<Head>,
    progress: impl Fn(u64, u64) + Send,
) -> Result<Manifest, WriteError> {
    let (store, options) = (&shared.store, &shared.options);
    if heads.is_empty() {
        return Err(WriteError::NoSlides { url: store.url().to_owned() });
    }
    let mut manifest = Manifest::new(options.patch_px, options.jpeg_quality, options.seed);
    manifest.settings.clone_from(&options.settings);
    manifest.classes = classes(&options.classes, &heads);
    number(store, &mut manifest, &heads)?;
    let index = load_rows(store, &manifest, &heads).await?;

    let mut dealer = Dealer {
        shared,
        heads: Arc::new(heads),
        manifest: Arc::new(manifest),
        index: Arc::new(index),
        placed: Vec::new(),
        shards: Vec::new(),
    };
    dealer.deal_all(progress).await?;
    dealer.commit().await
}

/// Declared classes in their order, then the others by name.
fn classes(declared: &[String], heads: &[Head]) -> Vec<String> {
    let mut classes = Vec::new();
    let mut found: Vec<_> = heads.iter().flat_map(|head| &head.classes).collect();
    found.sort();
    for class in declared.iter().chain(found) {
        if !classes.contains(class) {
            classes.push(class.clone());
        }
    }
    classes
}

/// Gives every slide its first patch id.
fn number(store: &Store, manifest: &mut Manifest, heads: &[Head]) -> Result<(), WriteError> {
    let mut next = 0_u32;
    for head in heads {
        let info = &head.info;
        manifest.slides.push(SlideEntry {
            name: info.name.clone(),
            source: info.source.clone(),
            fingerprint: info.fingerprint.clone(),
            level: info.level,
            mpp: info.mpp,
            downsample: head.downsample,
            width: info.width,
            height: info.height,
            grid: info.grid,
            spatial: info.spatial,
            patches: head.patches,
            first_id: next,
            preview: head.preview.clone(),
        });
        next = next.checked_add(head.patches).filter(|&n| n <= 1 << 31).ok_or_else(|| WriteError::TooMany {
            url: store.url().to_owned(),
            reason: "more than 2^31 patches; split the slides over several sets".to_owned(),
        })?;
    }
    manifest.patches = next.into();
    Ok(())
}

/// The index before dealing: `shard` is unset and `offset` is that in the staged slide.
async fn load_rows(store: &Store, manifest: &Manifest, heads: &[Head]) -> Result<Index, WriteError> {
    let mut index = Index::with_capacity(usize::try_from(manifest.patches).unwrap_or(0));
    let mut all = futures::stream::iter(heads).map(|head| staging::rows(store, head)).buffered(REQUESTS);
    let mut slide = 0;
    while let Some(rows) = all.try_next().await? {
        let local = &heads[slide as usize].classes;
        let global: Vec<_> = local
            .iter()
            .map(|class| manifest.classes.iter().position(|known| known == class).and_then(|at| u16::try_from(at).ok()))
            .collect();
        for row in rows {
            index.push(Row {
                slide,
                x: row.x,
                y: row.y,
                label: row.label.and_then(|label| global[usize::from(label)]),
                shard: 0,
                offset: row.offset,
                length: row.length,
            });
        }
        slide += 1;
    }
    Ok(index)
}

struct Dealer<'a> {
    shared: &'a Arc<Shared>,
    heads: Arc<Vec<Head>>,
    manifest: Arc<Manifest>,
    index: Arc<Index>,
    /// By shard: patch ids and where their images start.
    placed: Vec<Vec<(u32, u64)>>,
    shards: Vec<ShardEntry>,
}

/// A shard that was built.
struct Built {
    placed: Vec<(u32, u64)>,
    tar: bytes::Bytes,
    crc32c: u32,
}

impl Dealer<'_> {
    async fn deal_all(&mut self, progress: impl Fn(u64, u64) + Send) -> Result<(), WriteError> {
        let seed = self.shared.options.seed;
        let total = self.manifest.patches;
        let mut order: Vec<usize> = (0..self.heads.len()).collect();
        order.shuffle(&mut rng(seed, Purpose::Ingest, 0, 0));
        let mut dealt = 0;
        let mut uploads = JoinSet::new();
        for (group, slides) in (1..).zip(self.groups(&order)) {
            let sources = Arc::new(self.sources(&order[slides]).await?);
            let mut ids: Vec<u32> =
                sources.keys().flat_map(|&slide| self.manifest.slides[slide as usize].ids()).collect();
            ids.shuffle(&mut rng(seed, Purpose::Ingest, 0, group));
            for ids in chunks(ids.len(), self.shard_count(&ids)).map(|range| ids[range].to_vec()) {
                let patches = ids.len();
                let built = self.build(Arc::clone(&sources), ids).await?;
                let path = format!("shards/{:05}.tar", self.shards.len());
                self.shards.push(ShardEntry {
                    path: path.clone(),
                    bytes: built.tar.len() as u64,
                    patches: u32::try_from(patches).unwrap_or(u32::MAX),
                    crc32c: built.crc32c,
                });
                self.placed.push(built.placed);
                while uploads.len() >= UPLOADS {
                    join(&mut uploads).await?;
                }
                let store = self.shared.store.clone();
                uploads.spawn(async move { store.put(&path, built.tar).await });
                dealt += patches as u64;
                progress(dealt, total);
            }
        }
        while !uploads.is_empty() {
            join(&mut uploads).await?;
        }
        Ok(())
    }

    /// Cuts the order of slides into groups of at most `group_bytes`, or one slide where it is larger.
    fn groups(&self, order: &[usize]) -> Vec<Range<usize>> {
        let mut groups = Vec::new();
        let (mut from, mut bytes) = (0, 0);
        for (at, &slide) in order.iter().enumerate() {
            let more = self.heads[slide].jpeg_bytes;
            if at > from && bytes + more > self.shared.options.group_bytes {
                groups.push(from..at);
                (from, bytes) = (at, 0);
            }
            bytes += more;
        }
        groups.push(from..order.len());
        groups
    }

    fn shard_count(&self, ids: &[u32]) -> usize {
        let lengths = self.index.lengths();
        let bytes: u64 = ids.iter().map(|&id| u64::from(lengths[id as usize])).sum();
        let patches = ids.len() as u64;
        let by_size = bytes.div_ceil(self.shared.options.shard_bytes.max(1));
        let share = (FEW_SHARDS * patches).div_ceil(self.manifest.patches).min(patches / FEW_PATCHES);
        usize::try_from(by_size.max(share).clamp(1, patches)).unwrap_or(1)
    }

    /// The staged files of some slides, fetched to scratch files where they are not local.
    async fn sources(&self, slides: &[usize]) -> Result<BTreeMap<u32, File>, WriteError> {
        let mut sources = BTreeMap::new();
        for &slide in slides {
            let head = &self.heads[slide];
            let file = fetch(self.shared, head).await?;
            sources.insert(u32::try_from(slide).unwrap_or(u32::MAX), file);
        }
        Ok(sources)
    }

    async fn build(&self, sources: Arc<BTreeMap<u32, File>>, ids: Vec<u32>) -> Result<Built, WriteError> {
        let (index, manifest, heads) = (Arc::clone(&self.index), Arc::clone(&self.manifest), Arc::clone(&self.heads));
        let store = self.shared.store.clone();
        let work = move || -> Result<Built, WriteError> {
            let bytes = ids.iter().map(|&id| index.lengths()[id as usize] as usize).sum();
            let mut shard = ShardBuilder::with_capacity(ids.len(), bytes);
            let mut placed = Vec::with_capacity(ids.len());
            for id in ids {
                let Some(row) = index.row(id) else { continue };
                let annotation = Annotation {
                    slide: &manifest.slides[row.slide as usize].name,
                    x: row.x,
                    y: row.y,
                    label: row.label,
                    class: row.label.map(|label| manifest.classes[usize::from(label)].as_str()),
                };
                let source = &sources[&row.slide];
                let read = |into: &mut [u8]| source.read_exact_at(into, row.offset);
                let start = shard.push(id, row.length, &annotation, read).map_err(|e| WriteError::Staged {
                    object: store.object(&heads[row.slide as usize].data()),
                    reason: format!("cannot be read: {e}"),
                })?;
                placed.push((id, start));
            }
            let tar = shard.finish();
            let crc32c = crc32c::crc32c(&tar);
            Ok(Built { placed, tar, crc32c })
        };
        tokio::task::spawn_blocking(work).await.map_err(|e| lost(&self.shared.store, &e))?
    }

    /// Index, then manifest; what an earlier attempt left in `shards/` beyond ours goes before.
    async fn commit(self) -> Result<Manifest, WriteError> {
        let store = &self.shared.store;
        let keep: std::collections::HashSet<_> = self.shards.iter().map(|shard| shard.path.as_str()).collect();
        for left in store.list("shards").await? {
            if !keep.contains(left.rel.as_str()) {
                store.delete(&left.rel).await?;
            }
        }

        let mut index = Arc::unwrap_or_clone(self.index);
        for (shard, placed) in (0_u32..).zip(&self.placed) {
            for &(id, offset) in placed {
                index.place(id, shard, offset);
            }
        }
        let encode = |rel: &str, reason: String| WriteError::Encode { object: store.object(rel), reason };
        let parquet = index.to_parquet().map_err(|e| encode(INDEX, e.to_string()))?;
        let mut manifest = Arc::unwrap_or_clone(self.manifest);
        manifest.shards = self.shards;
        manifest.index =
            FileEntry { path: INDEX.to_owned(), bytes: parquet.len() as u64, crc32c: crc32c::crc32c(&parquet) };
        manifest.content_id = content_id(&manifest, &index);
        store.put(INDEX, parquet).await?;

        let json = manifest.to_json().map_err(|e| encode(MANIFEST, e.to_string()))?;
        match store.create(MANIFEST, json, &manifest.content_id).await? {
            Created::Created => Ok(manifest),
            Created::Exists(_) => Err(WriteError::Committed { url: store.url().to_owned() }),
        }
    }
}

/// The staged file of a slide, checked for its length.
async fn fetch(shared: &Shared, head: &Head) -> Result<File, WriteError> {
    let (store, rel) = (&shared.store, head.data());
    let file = if let Some(path) = store.local_path(&rel) {
        File::open(&path)
            .map_err(|e| WriteError::Staged { object: store.object(&rel), reason: format!("cannot be opened: {e}") })?
    } else {
        let mut scratch = shared.scratch_file()?;
        store.get_streamed(&rel, |chunk| scratch.write_all(&chunk).map_err(|e| shared.scratch_error(e))).await?;
        scratch.rewind().map_err(|e| shared.scratch_error(e))?;
        scratch
    };
    let found = file.metadata().map_err(|e| shared.scratch_error(e))?.len();
    if found != head.data_bytes() {
        let reason = format!("expected {} bytes, found {found}", head.data_bytes());
        return Err(WriteError::Staged { object: store.object(&rel), reason });
    }
    Ok(file)
}

async fn join(uploads: &mut JoinSet<Result<(), crate::store::StoreError>>) -> Result<(), WriteError> {
    match uploads.join_next().await {
        Some(Ok(outcome)) => Ok(outcome?),
        Some(Err(e)) => std::panic::resume_unwind(e.into_panic()),
        None => Ok(()),
    }
}

fn lost(store: &Store, error: &tokio::task::JoinError) -> WriteError {
    WriteError::Encode { object: store.object("shards"), reason: error.to_string() }
}

/// `count` ranges over `0..len` whose lengths differ by at most one.
fn chunks(len: usize, count: usize) -> impl Iterator<Item = Range<usize>> {
    (0..count).map(move |at| len * at / count..len * (at + 1) / count)
}

/// Hash of all that training can see: equal sets have equal ids wherever they lie and wherever they came from.
fn content_id(manifest: &Manifest, index: &Index) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut text = |part: String| {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    };
    text(format!("sgcl-patchset {} {}", manifest.version, manifest.patch_px));
    for class in &manifest.classes {
        text(class.clone());
    }
    for s in &manifest.slides {
        text(s.name.clone());
        text(format!("{} {:?} {} {} {:?} {} {}", s.level, s.mpp, s.width, s.height, s.grid, s.spatial, s.patches));
    }
    for shard in &manifest.shards {
        text(format!("{} {} {:08x}", shard.bytes, shard.patches, shard.crc32c));
    }
    index.hash_into(&mut hasher);
    hasher.finalize().to_hex().to_string()
}
