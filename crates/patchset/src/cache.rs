//! Shards on the local disk, shared by the processes of a node.
//!
//! `<dir>/<content id>/<shard>.tar`: a shard is downloaded beside its name, checked, and renamed, so that what has the name is
//! whole. The time of change is the time of last use; the least recently used shards of any set go when `max_bytes` would be
//! passed. A file that is removed while another process reads it stays readable to that process.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::manifest::ShardEntry;
use crate::store::{Store, StoreError};

/// A partial download older than this belongs to a process that is gone.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Where shards are kept, and how much of them.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// The folder; it is made if it does not exist.
    pub dir: PathBuf,
    /// Bytes that the shards in it may take.
    pub max_bytes: u64,
}

/// The cache of one patch set.
#[derive(Debug)]
pub(crate) struct ShardCache {
    options: CacheOptions,
    folder: PathBuf,
}

/// A shard that could not be brought into the cache.
#[derive(Debug)]
pub(crate) enum CacheError {
    /// The cache cannot take it; read from the store instead.
    NoRoom { reason: String },
    /// It is not what the manifest says.
    Corrupt { bytes: u64, crc32c: u32 },
    /// The store failed.
    Store(StoreError),
}

impl From<StoreError> for CacheError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<std::io::Error> for CacheError {
    fn from(error: std::io::Error) -> Self {
        Self::NoRoom { reason: error.to_string() }
    }
}

impl ShardCache {
    pub(crate) fn new(options: CacheOptions, content_id: &str) -> Self {
        let folder: String = content_id.chars().filter(char::is_ascii_alphanumeric).take(16).collect();
        Self { folder: options.dir.join(folder), options }
    }

    fn path(&self, shard: &ShardEntry) -> PathBuf {
        self.folder.join(shard.path.replace('/', "_"))
    }

    /// The cached file of a shard, marked as used now.
    pub(crate) fn lookup(&self, shard: &ShardEntry) -> Option<File> {
        let file = File::open(self.path(shard)).ok()?;
        // Only the order of eviction depends on it.
        let _ = file.set_modified(SystemTime::now());
        Some(file)
    }

    pub(crate) fn remove(&self, shard: &ShardEntry) {
        // Either it is gone or the next check finds it again.
        let _ = std::fs::remove_file(self.path(shard));
    }

    /// Downloads a shard and checks its length and checksum. A full disk is met by emptying the cache once.
    pub(crate) async fn download(&self, store: &Store, shard: &ShardEntry) -> Result<File, CacheError> {
        if shard.bytes > self.options.max_bytes {
            let reason = format!("a shard has {} bytes, the cache {}", shard.bytes, self.options.max_bytes);
            return Err(CacheError::NoRoom { reason });
        }
        std::fs::create_dir_all(&self.folder)?;
        self.make_room(self.options.max_bytes - shard.bytes);
        match self.fetch(store, shard).await {
            Err(Fetch::Disk(e)) if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
                self.make_room(0);
                self.fetch(store, shard).await
            }
            outcome => outcome,
        }
        .map_err(|e| match e {
            Fetch::Disk(e) => e.into(),
            Fetch::Other(e) => e,
        })
    }

    async fn fetch(&self, store: &Store, shard: &ShardEntry) -> Result<File, Fetch> {
        let mut part = tempfile::Builder::new().prefix(".part-").tempfile_in(&self.folder).map_err(Fetch::Disk)?;
        let (mut bytes, mut crc32c) = (0, 0);
        store
            .get_streamed(&shard.path, |chunk| {
                bytes += chunk.len() as u64;
                crc32c = crc32c::crc32c_append(crc32c, &chunk);
                if bytes > shard.bytes {
                    return Err(Fetch::Other(CacheError::Corrupt { bytes, crc32c }));
                }
                part.write_all(&chunk).map_err(Fetch::Disk)
            })
            .await?;
        if bytes != shard.bytes || crc32c != shard.crc32c {
            return Err(Fetch::Other(CacheError::Corrupt { bytes, crc32c }));
        }
        part.persist(self.path(shard)).map_err(|e| Fetch::Disk(e.error))?;
        File::open(self.path(shard)).map_err(Fetch::Disk)
    }

    /// Removes the least recently used shards until at most `keep` bytes are left.
    fn make_room(&self, keep: u64) {
        let mut shards = Vec::new();
        for folder in entries(&self.options.dir) {
            for path in entries(&folder) {
                let Ok(meta) = path.metadata() else { continue };
                let used = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if name.starts_with(".part-") {
                    if used.elapsed().is_ok_and(|age| age > ABANDONED) {
                        let _ = std::fs::remove_file(&path);
                    }
                } else if name.ends_with(".tar") {
                    // Nothing else in the folder is ours to remove.
                    shards.push((used, meta.len(), path));
                }
            }
        }
        shards.sort();
        let mut total: u64 = shards.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in shards {
            if total <= keep {
                break;
            }
            // Another process may have been faster: then it is gone as well.
            let _ = std::fs::remove_file(path);
            total -= bytes;
        }
    }
}

/// Why a download ended.
enum Fetch {
    Disk(std::io::Error),
    Other(CacheError),
}

impl From<StoreError> for Fetch {
    fn from(error: StoreError) -> Self {
        Self::Other(CacheError::Store(error))
    }
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}
