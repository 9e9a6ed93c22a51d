//! Reading patches by id.
//!
//! A set in a folder is read where it lies; one over a network through the cache on disk, shard by shard; without a cache, or where
//! the disk is full, patch by patch. Every shard's length and checksum are verified before the first patch is taken from it (not
//! patch by patch reads, which see no whole shard).

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::runtime::Handle;

use crate::cache::{CacheError, CacheOptions, ShardCache};
use crate::decode::{Rgb8, decode};
use crate::index::Index;
use crate::manifest::{Manifest, ShardEntry};
use crate::store::{Store, StoreError};

/// Open files kept; a lane uses a window of a few shards.
const OPEN_SHARDS: usize = 256;
/// Locks that keep two tasks from fetching one shard.
const STRIPES: usize = 64;
const VERIFY_BYTES: usize = 1 << 20;

/// A patch that cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// No such patch.
    #[error("patch {id}: the set ends at {patches}")]
    NoSuchPatch {
        /// Patch id.
        id: u32,
        /// Patches in the set.
        patches: usize,
    },
    /// A shard is not what the manifest says.
    #[error(
        "{object}: expected {expected_bytes} bytes with crc32c {expected_crc32c:08x}, found {bytes} with {crc32c:08x}; the shard is damaged, copy it again or ingest again"
    )]
    Corrupt {
        /// Full name of the shard.
        object: String,
        /// Length by the manifest.
        expected_bytes: u64,
        /// Checksum by the manifest.
        expected_crc32c: u32,
        /// Length found.
        bytes: u64,
        /// Checksum found.
        crc32c: u32,
    },
    /// A patch is not an image.
    #[error("{object}, patch {id}: {reason}")]
    Image {
        /// Full name of the shard.
        object: String,
        /// Patch id.
        id: u32,
        /// What is wrong.
        reason: String,
    },
    /// A local file failed.
    #[error("{object}: {source}")]
    File {
        /// Full name of the shard.
        object: String,
        /// Why.
        source: std::io::Error,
    },
    /// A blocking read needs the network, but the reader was made outside a tokio runtime.
    #[error("{object}: make the reader inside a tokio runtime to read over a network from threads")]
    NoRuntime {
        /// Full name of the shard.
        object: String,
    },
    /// Storage failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Reads patches of one set. Cheap to clone; use it from any task or thread.
#[derive(Clone, Debug)]
pub struct ShardReader {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    manifest: Arc<Manifest>,
    index: Arc<Index>,
    cache: Option<ShardCache>,
    open: Mutex<OpenShards>,
    stripes: Vec<tokio::sync::Mutex<()>>,
    runtime: Option<Handle>,
    warned: AtomicBool,
}

/// How a shard is read.
#[derive(Debug)]
enum Source {
    /// From a verified file.
    File(File),
    /// Patch by patch from the store.
    Remote,
}

#[derive(Debug, Default)]
struct OpenShards {
    sources: HashMap<u32, (u64, Arc<Source>)>,
    clock: u64,
}

impl OpenShards {
    fn get(&mut self, shard: u32) -> Option<Arc<Source>> {
        self.clock += 1;
        let (used, source) = self.sources.get_mut(&shard)?;
        *used = self.clock;
        Some(Arc::clone(source))
    }

    fn insert(&mut self, shard: u32, source: Source) -> Arc<Source> {
        if self.sources.len() >= OPEN_SHARDS
            && let Some(&oldest) = self.sources.iter().min_by_key(|(_, (used, _))| used).map(|(shard, _)| shard)
        {
            self.sources.remove(&oldest);
        }
        self.clock += 1;
        let source = Arc::new(source);
        self.sources.insert(shard, (self.clock, Arc::clone(&source)));
        source
    }
}

impl ShardReader {
    /// A reader of the set at `store`. Made inside a tokio runtime it can also be read from plain threads over a network.
    #[must_use]
    pub fn new(store: Store, manifest: Arc<Manifest>, index: Arc<Index>, cache: Option<CacheOptions>) -> Self {
        let cache = cache.map(|options| ShardCache::new(options, &manifest.content_id));
        let inner = Inner {
            store,
            manifest,
            index,
            cache,
            open: Mutex::default(),
            stripes: (0..STRIPES).map(|_| tokio::sync::Mutex::new(())).collect(),
            runtime: Handle::try_current().ok(),
            warned: AtomicBool::new(false),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The JPEG of patch `id`.
    ///
    /// # Errors
    /// No such patch, its shard is missing or damaged, or storage fails.
    pub async fn read(&self, id: u32) -> Result<Bytes, ReadError> {
        let row = self.inner.row(id)?;
        let source = self.inner.open(row.shard).await?;
        match &*source {
            Source::File(_) => self.inner.pread(id, &row, &source),
            Source::Remote => self.inner.read_remote(id, &row).await,
        }
    }

    /// [`ShardReader::read`] for threads outside the runtime. On a tokio worker it would panic: use `read` there.
    ///
    /// # Errors
    /// As [`ShardReader::read`], or a network is needed and the reader was made outside a runtime.
    pub fn read_blocking(&self, id: u32) -> Result<Bytes, ReadError> {
        let row = self.inner.row(id)?;
        // The usual case needs no runtime: the shard is open, or lies in a folder.
        let known = self.inner.known(row.shard);
        let source = match known {
            Some(source) => source,
            None if self.inner.store.local_path("").is_some() => self.inner.open_local(row.shard)?,
            None => self.inner.runtime(row.shard)?.block_on(self.inner.open(row.shard))?,
        };
        match &*source {
            Source::File(_) => self.inner.pread(id, &row, &source),
            Source::Remote => self.inner.runtime(row.shard)?.block_on(self.inner.read_remote(id, &row)),
        }
    }

    /// The pixels of patch `id`, for threads outside the runtime.
    ///
    /// # Errors
    /// As [`ShardReader::read_blocking`], or the image is damaged.
    pub fn decode_blocking(&self, id: u32) -> Result<Rgb8, ReadError> {
        let jpeg = self.read_blocking(id)?;
        decode(&jpeg).map_err(|e| self.inner.bad_image(id, e.to_string()))
    }

    /// Fetches and verifies a shard ahead of its first patch.
    ///
    /// # Errors
    /// As [`ShardReader::read`].
    pub async fn prefetch(&self, shard: u32) -> Result<(), ReadError> {
        self.inner.open(shard).await.map(|_| ())
    }

    /// The index that ids refer to.
    #[must_use]
    pub fn index(&self) -> &Arc<Index> {
        &self.inner.index
    }
}

impl Inner {
    fn row(&self, id: u32) -> Result<crate::index::Row, ReadError> {
        self.index.row(id).ok_or_else(|| ReadError::NoSuchPatch { id, patches: self.index.len() })
    }

    fn entry(&self, shard: u32) -> &ShardEntry {
        // The index was validated against the manifest.
        &self.manifest.shards[shard as usize]
    }

    fn object(&self, shard: u32) -> String {
        self.store.object(&self.entry(shard).path)
    }

    fn runtime(&self, shard: u32) -> Result<&Handle, ReadError> {
        self.runtime.as_ref().ok_or_else(|| ReadError::NoRuntime { object: self.object(shard) })
    }

    fn known(&self, shard: u32) -> Option<Arc<Source>> {
        // Nothing panics while the lock is held.
        self.open.lock().unwrap_or_else(PoisonError::into_inner).get(shard)
    }

    fn keep(&self, shard: u32, source: Source) -> Arc<Source> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).insert(shard, source)
    }

    async fn open(self: &Arc<Self>, shard: u32) -> Result<Arc<Source>, ReadError> {
        if let Some(source) = self.known(shard) {
            return Ok(source);
        }
        let _fetching = self.stripes[shard as usize % STRIPES].lock().await;
        if let Some(source) = self.known(shard) {
            return Ok(source);
        }
        if self.store.local_path("").is_some() {
            let this = Arc::clone(self);
            return blocking(move || this.open_local(shard)).await;
        }
        let source = match &self.cache {
            Some(cache) => self.open_cached(cache, shard).await?,
            None => Source::Remote,
        };
        Ok(self.keep(shard, source))
    }

    fn open_local(&self, shard: u32) -> Result<Arc<Source>, ReadError> {
        let entry = self.entry(shard);
        let path = self.store.local_path(&entry.path).unwrap_or_default();
        let file = File::open(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => StoreError::NotFound { object: self.object(shard) }.into(),
            _ => ReadError::File { object: self.object(shard), source },
        })?;
        self.verify(&file, shard)?;
        Ok(self.keep(shard, Source::File(file)))
    }

    async fn open_cached(self: &Arc<Self>, cache: &ShardCache, shard: u32) -> Result<Source, ReadError> {
        let entry = self.entry(shard);
        if let Some(file) = cache.lookup(entry) {
            let this = Arc::clone(self);
            let checked = blocking(move || this.verify(&file, shard).map(|()| file)).await;
            match checked {
                Ok(file) => return Ok(Source::File(file)),
                // The disk spoilt it; the store has it still.
                Err(e) => tracing::warn!("cached copy dropped: {e}"),
            }
            cache.remove(entry);
        }
        let mut outcome = cache.download(&self.store, entry).await;
        if matches!(outcome, Err(CacheError::Corrupt { .. })) {
            // A transfer may go wrong once; the object itself stays wrong.
            outcome = cache.download(&self.store, entry).await;
        }
        match outcome {
            Ok(file) => Ok(Source::File(file)),
            Err(CacheError::Corrupt { bytes, crc32c }) => Err(self.corrupt(shard, bytes, crc32c)),
            Err(CacheError::Store(e)) => Err(e.into()),
            Err(CacheError::NoRoom { reason }) => {
                if !self.warned.swap(true, Ordering::Relaxed) {
                    tracing::warn!("shard cache cannot be used ({reason}); reading patch by patch, which is slower");
                }
                Ok(Source::Remote)
            }
        }
    }

    /// Reads all of a shard: its length and checksum must be the manifest's. It also warms the page cache for the reads to come.
    fn verify(&self, file: &File, shard: u32) -> Result<(), ReadError> {
        let fail = |source| ReadError::File { object: self.object(shard), source };
        let entry = self.entry(shard);
        let bytes = file.metadata().map_err(fail)?.len();
        if bytes > entry.bytes {
            return Err(self.corrupt(shard, bytes, 0));
        }
        let mut buffer = vec![0; VERIFY_BYTES];
        let (mut at, mut crc32c) = (0, 0);
        loop {
            match file.read_at(&mut buffer, at) {
                Ok(0) => break,
                Ok(n) => {
                    crc32c = crc32c::crc32c_append(crc32c, &buffer[..n]);
                    at += n as u64;
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(fail(e)),
            }
        }
        if at == entry.bytes && crc32c == entry.crc32c { Ok(()) } else { Err(self.corrupt(shard, at, crc32c)) }
    }

    fn pread(&self, id: u32, row: &crate::index::Row, source: &Source) -> Result<Bytes, ReadError> {
        let Source::File(file) = source else { return Err(self.bad_image(id, "its shard is not open".to_owned())) };
        let mut jpeg = vec![0; row.length as usize];
        file.read_exact_at(&mut jpeg, row.offset)
            .map_err(|source| ReadError::File { object: self.object(row.shard), source })?;
        self.whole(id, jpeg.into())
    }

    async fn read_remote(&self, id: u32, row: &crate::index::Row) -> Result<Bytes, ReadError> {
        let range = row.offset..row.offset + u64::from(row.length);
        let jpeg = self.store.get_range(&self.entry(row.shard).path, range).await?;
        self.whole(id, jpeg)
    }

    fn whole(&self, id: u32, jpeg: Bytes) -> Result<Bytes, ReadError> {
        if jpeg.starts_with(&[0xff, 0xd8]) && jpeg.ends_with(&[0xff, 0xd9]) {
            Ok(jpeg)
        } else {
            Err(self.bad_image(id, "no JPEG where the index says; index and shard do not belong together".to_owned()))
        }
    }

    fn bad_image(&self, id: u32, reason: String) -> ReadError {
        let object = self.index.row(id).map_or_else(|| self.store.url().to_owned(), |row| self.object(row.shard));
        ReadError::Image { object, id, reason }
    }

    fn corrupt(&self, shard: u32, bytes: u64, crc32c: u32) -> ReadError {
        let entry = self.entry(shard);
        ReadError::Corrupt {
            object: self.object(shard),
            expected_bytes: entry.bytes,
            expected_crc32c: entry.crc32c,
            bytes,
            crc32c,
        }
    }
}

/// Runs disk work off the async workers.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}
