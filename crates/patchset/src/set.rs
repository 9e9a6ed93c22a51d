//! A patch set, opened: manifest, index and what is read from them.

use std::sync::Arc;

use roaring::RoaringBitmap;

use crate::cache::CacheOptions;
use crate::index::{Index, IndexError};
use crate::manifest::{Manifest, ManifestError};
use crate::reader::ShardReader;
use crate::store::{Store, StoreError};

/// An open patch set. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PatchSet {
    store: Store,
    manifest: Arc<Manifest>,
    index: Arc<Index>,
}

/// A patch set that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Its manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Its index.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// Its URL.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A slide that is not in the set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("slide {number} is not in the set of {slides} slides")]
pub struct NoSuchSlide {
    /// The number asked for.
    pub number: u32,
    /// Slides in the set.
    pub slides: usize,
}

impl PatchSet {
    /// Opens the set at `url` and validates manifest and index.
    ///
    /// # Errors
    /// There is no set, it is damaged, or storage fails.
    pub async fn open(url: &str) -> Result<Self, OpenError> {
        Self::load(Store::open(url)?).await
    }

    /// Opens the set at `store`.
    ///
    /// # Errors
    /// As [`PatchSet::open`].
    pub async fn load(store: Store) -> Result<Self, OpenError> {
        let manifest = Manifest::load(&store).await?;
        let index = Index::load(&store, &manifest).await?;
        Ok(Self { store, manifest: Arc::new(manifest), index: Arc::new(index) })
    }

    /// Where it lies.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Its manifest.
    #[must_use]
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// Its index.
    #[must_use]
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// Patches.
    #[must_use]
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// Never: a set without patches is not written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// A reader of its patches. A set over a network wants a cache.
    #[must_use]
    pub fn reader(&self, cache: Option<CacheOptions>) -> ShardReader {
        ShardReader::new(self.store.clone(), Arc::clone(&self.manifest), Arc::clone(&self.index), cache)
    }

    /// The patches of some slides, by number in the manifest, in any order; a slide named twice counts once.
    ///
    /// # Errors
    /// A number that is no slide.
    pub fn subset(&self, slides: &[u32]) -> Result<Subset, NoSuchSlide> {
        let mut slides = slides.to_vec();
        slides.sort_unstable();
        slides.dedup();
        let mut ranges = Vec::with_capacity(slides.len());
        let mut rows = 0;
        for &number in &slides {
            let slide = self
                .manifest
                .slides
                .get(number as usize)
                .ok_or(NoSuchSlide { number, slides: self.manifest.slides.len() })?;
            ranges.push(Range { first_id: slide.first_id, first_row: rows, patches: slide.patches });
            rows += slide.patches;
        }
        Ok(Subset { slides, ranges, rows })
    }

    /// All patches.
    #[must_use]
    pub fn everything(&self) -> Subset {
        let slides = &self.manifest.slides;
        let ranges = slides.iter().map(|s| Range { first_id: s.first_id, first_row: s.first_id, patches: s.patches });
        Subset {
            slides: (0_u32..).zip(slides).map(|(number, _)| number).collect(),
            ranges: ranges.collect(),
            rows: u32::try_from(self.index.len()).unwrap_or(u32::MAX),
        }
    }
}

/// Patches of some slides. They keep their ids in plan, ledger and reader; *rows* number them from 0 without gaps, in the order of
/// ids, for what has one row a patch (the bank).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subset {
    slides: Vec<u32>,
    ranges: Vec<Range>,
    rows: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    first_id: u32,
    first_row: u32,
    patches: u32,
}

impl Subset {
    /// Numbers of its slides, ascending.
    #[must_use]
    pub fn slides(&self) -> &[u32] {
        &self.slides
    }

    /// Patches, and so rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows as usize
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Its patch ids: what is unused when an epoch begins.
    #[must_use]
    pub fn unused(&self) -> RoaringBitmap {
        let mut ids = RoaringBitmap::new();
        for range in &self.ranges {
            ids.insert_range(range.first_id..range.first_id + range.patches);
        }
        ids
    }

    /// Patch ids by row, ascending.
    #[must_use]
    pub fn rows(&self) -> Vec<u32> {
        self.ranges.iter().flat_map(|range| range.first_id..range.first_id + range.patches).collect()
    }

    /// Row of a patch id; `None` where it is not in the subset.
    #[must_use]
    pub fn row_of(&self, id: u32) -> Option<u32> {
        let at = self.ranges.partition_point(|range| range.first_id <= id).checked_sub(1)?;
        let range = self.ranges[at];
        let within = id - range.first_id;
        (within < range.patches).then(|| range.first_row + within)
    }

    /// Patch id of a row; `None` past the end.
    #[must_use]
    pub fn id_of(&self, row: u32) -> Option<u32> {
        let at = self.ranges.partition_point(|range| range.first_row <= row).checked_sub(1)?;
        let range = self.ranges[at];
        let within = row - range.first_row;
        (within < range.patches).then(|| range.first_id + within)
    }
}
