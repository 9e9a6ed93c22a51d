//! Where patch sets and runs live: a directory or an S3 bucket behind one small interface.
//!
//! | URL | means |
//! |---|---|
//! | `s3://bucket/prefix` | S3 or anything that speaks it; endpoint, region and credentials as the AWS tools read them |
//! | `file:///data/set` | a directory |
//! | `data/set`, `/data/set` | a directory, relative to the working directory or not |
//!
//! Objects appear whole or not at all: S3 promises it, and a directory gets it by writing beside the target and renaming. A write
//! that must not overwrite goes through [`Store::create`]. Errors name the object and the remedy and never hold a secret. What passes by
//! itself is reported, or waited for by a [`Store::patient`] one.

mod aws;
mod error;
pub mod faults;
mod patience;

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Component, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt, PutMode, PutOptions, WriteMultipart};

pub use error::StoreError;
use patience::Patience;

/// Objects above this size are uploaded in parts.
const MULTIPART_BYTES: usize = 32 << 20;
/// Size of a part; with [`PARTS_IN_FLIGHT`] it bounds the memory of an upload.
const PART_BYTES: usize = 16 << 20;
const PARTS_IN_FLIGHT: usize = 4;
/// What [`Store::create`] is ready to read back.
const CREATE_BYTES: u64 = 256 << 20;
/// Before the next try of a transfer that brought nothing.
const NO_BYTES_PAUSE: Duration = Duration::from_millis(200);

/// A place for objects: a bucket or directory and a prefix in it. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    prefix: Path,
    url: String,
    local_root: Option<PathBuf>,
    patience: Option<Arc<Patience>>,
}

/// What came of [`Store::create`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Created {
    /// The object did not exist and now holds our bytes.
    Created,
    /// Somebody else's object was there first; these are its bytes.
    Exists(Bytes),
}

/// An object found by [`Store::list`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Name relative to the store it was listed from.
    pub rel: String,
    /// Size in bytes.
    pub bytes: u64,
}

impl std::fmt::Debug for Store {
    /// The URL alone: the inner store's own text could hold what it was configured with.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Store").field(&self.url).finish()
    }
}

impl std::fmt::Display for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.url)
    }
}

impl Store {
    /// Opens a URL or local path. Nothing is read yet: a wrong endpoint or bucket shows at the first request.
    ///
    /// # Errors
    /// A URL that is none of the forms above, an AWS profile that is missing or of a kind we cannot use, or no credentials at all.
    pub fn open(url: &str) -> Result<Self, StoreError> {
        Self::open_with_env(url, &|name| std::env::var(name).ok())
    }

    /// [`Store::open`] with the environment passed in.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with_env(url: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, StoreError> {
        let store = Self::open_plain(url, env)?;
        #[cfg(feature = "faults")]
        let store = faults::as_asked(store, env)?;
        Ok(store)
    }

    fn open_plain(url: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, StoreError> {
        let trimmed = url.trim();
        if let Some(rest) = trimmed.strip_prefix("s3://") {
            return Self::open_s3(rest, env);
        }
        let bad = |reason: &str| StoreError::BadUrl { url: error::without_query(trimmed), reason: reason.to_owned() };
        let path = if trimmed.starts_with("file://") {
            let parsed = url::Url::parse(trimmed).map_err(|e| bad(&e.to_string()))?;
            parsed.to_file_path().map_err(|()| bad("a file URL has three slashes and an absolute path"))?
        } else if let Some((scheme, _)) = trimmed.split_once("://") {
            return Err(StoreError::BadUrl {
                url: format!("{scheme}://…"),
                reason: format!("{scheme:?} is not a kind of storage we know"),
            });
        } else if trimmed.is_empty() {
            return Err(bad("it is empty"));
        } else {
            PathBuf::from(trimmed)
        };
        let root = absolute(&path).map_err(|e| bad(&e.to_string()))?;
        let prefix = Path::from_absolute_path(&root).map_err(|e| bad(&e.to_string()))?;
        let url = url::Url::from_file_path(&root).map_err(|()| bad("it is not an absolute path"))?.to_string();
        let inner = LocalFileSystem::new().with_fsync(true);
        Ok(Self { inner: Arc::new(inner), prefix, url, local_root: Some(root), patience: None })
    }

    fn open_s3(rest: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, StoreError> {
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.contains('@') {
            return Err(StoreError::BadUrl {
                url: "s3://…".to_owned(),
                reason: "credentials do not belong in a URL; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                    .to_owned(),
            });
        }
        let url = format!("s3://{}", rest.trim_end_matches('/'));
        let bad = |reason: String| StoreError::BadUrl { url: url.clone(), reason };
        let named = (3..=255).contains(&bucket.len())
            && bucket.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
        if !named {
            return Err(bad(format!("{bucket:?} is not a bucket name (3 or more of a-z, 0-9, '.', '-')")));
        }
        let prefix = Path::parse(prefix).map_err(|e| bad(e.to_string()))?;
        let inner = aws::s3(bucket, &url, env)?;
        Ok(Self { inner: Arc::new(inner), prefix, url, local_root: None, patience: None })
    }

    /// A store over any [`ObjectStore`]: an in-memory one in tests, or a wrapper that injects faults. `url` is what errors call it.
    #[must_use]
    pub fn from_parts(inner: Arc<dyn ObjectStore>, prefix: Path, url: impl Into<String>) -> Self {
        Self { inner, prefix, url: url.into(), local_root: None, patience: None }
    }

    /// The same place seen through another [`ObjectStore`], for wrappers that inject faults or count requests.
    #[must_use]
    pub fn wrapped(&self, wrap: impl FnOnce(Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore>) -> Self {
        Self { inner: wrap(Arc::clone(&self.inner)), local_root: None, ..self.clone() }
    }

    /// The store of everything below `rel`.
    #[must_use]
    pub fn child(&self, rel: &str) -> Self {
        let rel = rel.trim_matches('/');
        if rel.is_empty() {
            return self.clone();
        }
        Self {
            inner: Arc::clone(&self.inner),
            prefix: self.path(rel),
            url: self.object(rel),
            local_root: self.local_root.as_ref().map(|root| root.join(rel)),
            patience: self.patience.clone(),
        }
    }

    /// The URL this store was opened with, in a form that [`Store::open`] takes.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Path of an object in the inner store.
    #[must_use]
    pub fn path(&self, rel: &str) -> Path {
        self.prefix.parts().chain(Path::from(rel).parts()).collect()
    }

    /// The object's file, where this store is a directory.
    #[must_use]
    pub fn local_path(&self, rel: &str) -> Option<PathBuf> {
        // Names that Path would escape have no plain file of that name.
        let plain = Path::from(rel);
        self.local_root.as_ref().map(|root| root.join(plain.as_ref()))
    }

    /// Full name of an object, as errors give it.
    #[must_use]
    pub fn object(&self, rel: &str) -> String {
        format!("{}/{}", self.url.trim_end_matches('/'), rel.trim_start_matches('/'))
    }

    /// Reads a whole object of at most `max_bytes`.
    ///
    /// # Errors
    /// Not found, larger than the limit, cut short, or the storage cannot be used.
    pub async fn get(&self, rel: &str, max_bytes: u64) -> Result<Bytes, StoreError> {
        self.retrying("to read", || self.get_once(rel, max_bytes)).await
    }

    async fn get_once(&self, rel: &str, max_bytes: u64) -> Result<Bytes, StoreError> {
        let fail = |e| self.error(rel, e);
        let reply = self.inner.get(&self.path(rel)).await.map_err(fail)?;
        let size = reply.meta.size;
        if size > max_bytes {
            return Err(StoreError::TooLarge { object: self.object(rel), bytes: size, limit: max_bytes });
        }
        let bytes = reply.bytes().await.map_err(fail)?;
        self.expect_length(rel, bytes, size)
    }

    /// Reads `range` of an object, all of it.
    ///
    /// # Errors
    /// Not found, shorter than the range, or the storage cannot be used.
    pub async fn get_range(&self, rel: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.retrying("to read", || self.get_range_once(rel, range.clone())).await
    }

    async fn get_range_once(&self, rel: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let expected = range.end.saturating_sub(range.start);
        if expected == 0 {
            return Ok(Bytes::new());
        }
        let error = match self.inner.get_range(&self.path(rel), range.clone()).await {
            Ok(bytes) if bytes.len() as u64 == expected => return Ok(bytes),
            Ok(bytes) => StoreError::CutShort { object: self.object(rel), expected, found: bytes.len() as u64 },
            Err(error) => self.error(rel, error),
        };
        if error.is_permanent() {
            return Err(error);
        }
        // The transfer broke off, which passes, or the object ends before the range does, which does not.
        match self.inner.head(&self.path(rel)).await {
            Ok(meta) if meta.size < range.end => {
                Err(StoreError::TooShort { object: self.object(rel), bytes: meta.size, needed: range.end })
            }
            _ => Err(error),
        }
    }

    /// Streams an object into `sink` chunk by chunk, every byte once; returns the bytes seen. Where the transfer breaks off, a
    /// patient store goes on behind the last byte that came.
    ///
    /// # Errors
    /// As [`Store::get`], and what `sink` reports.
    pub async fn get_streamed<E: From<StoreError>>(
        &self,
        rel: &str,
        mut sink: impl FnMut(Bytes) -> Result<(), E>,
    ) -> Result<u64, E> {
        let (mut seen, mut etag) = (0, None);
        loop {
            let reply = self.retrying("to read", || self.get_from(rel, seen, etag.as_ref())).await?;
            let size = reply.meta.size;
            etag = reply.meta.e_tag.clone();
            let before = seen;
            let mut chunks = reply.into_stream();
            let broken = loop {
                match chunks.try_next().await {
                    Ok(Some(chunk)) => {
                        seen += chunk.len() as u64;
                        sink(chunk)?;
                    }
                    Ok(None) if seen == size => return Ok(seen),
                    Ok(None) => {
                        break StoreError::CutShort { object: self.object(rel), expected: size, found: seen };
                    }
                    Err(error) => break self.error(rel, error),
                }
            };
            if self.patience.is_none() || broken.is_permanent() {
                return Err(broken.into());
            }
            if seen == before {
                tokio::time::sleep(NO_BYTES_PAUSE).await;
            }
        }
    }

    /// An object from byte `start` on, where it is still the one with `etag`.
    async fn get_from(&self, rel: &str, start: u64, etag: Option<&String>) -> Result<GetResult, StoreError> {
        let options = GetOptions {
            range: (start > 0).then_some(GetRange::Offset(start)),
            if_match: etag.cloned(),
            ..GetOptions::default()
        };
        self.inner.get_opts(&self.path(rel), options).await.map_err(|e| self.error(rel, e))
    }

    /// Writes an object whole, over what was there. Large ones go up in parts.
    ///
    /// # Errors
    /// The storage is full, forbids it, or cannot be used; nothing half-written is left under the name.
    pub async fn put(&self, rel: &str, bytes: impl Into<Bytes>) -> Result<(), StoreError> {
        let bytes = bytes.into();
        if bytes.len() > MULTIPART_BYTES {
            return self.put_chunks(rel, || std::iter::once(Ok(bytes.clone()))).await;
        }
        self.retrying("to write", || async {
            let written = self.inner.put(&self.path(rel), bytes.clone().into()).await;
            written.map(drop).map_err(|e| self.unwritten(rel, e))
        })
        .await
    }

    /// Writes all of an open file as an object, in bounded memory.
    ///
    /// # Errors
    /// As [`Store::put`], or the file cannot be read.
    pub async fn put_open_file(&self, rel: &str, file: std::fs::File) -> Result<(), StoreError> {
        let unreadable = |source: std::io::Error| StoreError::Unreadable { object: self.object(rel), source };
        let length = file.metadata().map_err(unreadable)?.len();
        let chunk_at = |at: u64, bytes: u64| {
            #[allow(clippy::cast_possible_truncation)]
            let mut chunk = vec![0; bytes as usize];
            file.read_exact_at(&mut chunk, at).map_err(unreadable)?;
            Ok(Bytes::from(chunk))
        };
        if length <= MULTIPART_BYTES as u64 {
            return self.put(rel, chunk_at(0, length)?).await;
        }
        let starts = || (0..length).step_by(PART_BYTES);
        self.put_chunks(rel, || starts().map(|at| chunk_at(at, (length - at).min(PART_BYTES as u64)))).await
    }

    /// Writes a local file as an object, in bounded memory.
    ///
    /// # Errors
    /// As [`Store::put`], or the file cannot be read.
    pub async fn put_file(&self, rel: &str, path: &std::path::Path) -> Result<(), StoreError> {
        let file =
            std::fs::File::open(path).map_err(|source| StoreError::LocalFile { file: path.to_owned(), source })?;
        self.put_open_file(rel, file).await
    }

    /// `chunks` gives them anew for every try.
    async fn put_chunks<I: Iterator<Item = Result<Bytes, StoreError>>>(
        &self,
        rel: &str,
        chunks: impl Fn() -> I,
    ) -> Result<(), StoreError> {
        self.retrying("to write", || self.put_chunks_once(rel, chunks())).await
    }

    async fn put_chunks_once(
        &self,
        rel: &str,
        chunks: impl Iterator<Item = Result<Bytes, StoreError>>,
    ) -> Result<(), StoreError> {
        let fail = |e| self.unwritten(rel, e);
        let upload = self.inner.put_multipart(&self.path(rel)).await.map_err(fail)?;
        let mut writer = WriteMultipart::new_with_chunk_size(upload, PART_BYTES);
        for chunk in chunks {
            let mut rest = match chunk {
                Ok(chunk) => chunk,
                Err(e) => {
                    // The reason to stop is worth more than whether the parts could be cleaned up.
                    let _ = writer.abort().await;
                    return Err(e);
                }
            };
            while !rest.is_empty() {
                if let Err(e) = writer.wait_for_capacity(PARTS_IN_FLIGHT).await {
                    let _ = writer.abort().await;
                    return Err(fail(e));
                }
                writer.put(rest.split_to(rest.len().min(PART_BYTES)));
            }
        }
        writer.finish().await.map_err(fail)?;
        Ok(())
    }

    /// Writes an object that must not exist yet. `bytes` contains `write_id`, something no other writer has, so that equal bytes
    /// read back can only be ours.
    ///
    /// Storage may say "exists" after a lost reply or a conflict although the object is ours, or fail although it was written: so
    /// whatever the answer, the object is read back and compared.
    ///
    /// # Errors
    /// The storage is full, forbids it, or cannot be used. Then the object may or may not be there: calling again settles it.
    pub async fn create(&self, rel: &str, bytes: impl Into<Bytes>, write_id: &str) -> Result<Created, StoreError> {
        let bytes = bytes.into();
        debug_assert!(
            bytes.windows(write_id.len().max(1)).any(|w| w == write_id.as_bytes()),
            "the object must hold its write id"
        );
        self.retrying("to create", || self.create_once(rel, bytes.clone())).await
    }

    async fn create_once(&self, rel: &str, bytes: Bytes) -> Result<Created, StoreError> {
        let path = self.path(rel);
        let mut pause = Duration::from_millis(50);
        for _ in 0..4 {
            let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
            let error = match self.inner.put_opts(&path, bytes.clone().into(), options).await {
                Ok(_) => return Ok(Created::Created),
                Err(e) => e,
            };
            let exists = matches!(error, object_store::Error::AlreadyExists { .. });
            let error = self.error(rel, error);
            if !exists && error.is_permanent() {
                return Err(error);
            }
            match self.get_once(rel, CREATE_BYTES.max(bytes.len() as u64)).await {
                Ok(found) if found == bytes => return Ok(Created::Created),
                Ok(found) => return Ok(Created::Exists(found)),
                // Neither ours nor anyone's: the rival of a conflict gave up, or our request never arrived.
                Err(StoreError::NotFound { .. }) => {}
                Err(_) if !exists => return Err(error),
                Err(e) => return Err(e),
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        Err(StoreError::Unsettled { object: self.object(rel) })
    }

    /// Everything below `rel`, by name. Objects still being written are not listed.
    ///
    /// # Errors
    /// The storage cannot be used.
    pub async fn list(&self, rel: &str) -> Result<Vec<Listed>, StoreError> {
        let prefix = self.path(rel);
        let found: Vec<_> = self
            .retrying("to list", || async {
                self.inner.list(Some(&prefix)).try_collect().await.map_err(|e| self.error(&format!("{rel}/"), e))
            })
            .await?;
        let mut listed: Vec<_> = found
            .into_iter()
            .filter_map(|meta| {
                let parts: Vec<_> = meta.location.prefix_match(&self.prefix)?.collect();
                let rel = parts.iter().map(AsRef::as_ref).collect::<Vec<&str>>().join("/");
                Some(Listed { rel, bytes: meta.size })
            })
            .collect();
        listed.sort_by(|a, b| a.rel.cmp(&b.rel));
        Ok(listed)
    }

    /// Size of an object in bytes, `None` where there is none.
    ///
    /// # Errors
    /// The storage cannot be used.
    pub async fn size(&self, rel: &str) -> Result<Option<u64>, StoreError> {
        let path = self.path(rel);
        let head = || async { self.inner.head(&path).await.map_err(|e| self.error(rel, e)) };
        match self.retrying("to look", head).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Whether an object is there.
    ///
    /// # Errors
    /// The storage cannot be used.
    pub async fn exists(&self, rel: &str) -> Result<bool, StoreError> {
        Ok(self.size(rel).await?.is_some())
    }

    /// Deletes an object; one that is not there is fine.
    ///
    /// # Errors
    /// The storage forbids it or cannot be used.
    pub async fn delete(&self, rel: &str) -> Result<(), StoreError> {
        let path = self.path(rel);
        let delete = || async { self.inner.delete(&path).await.map_err(|e| self.error(rel, e)) };
        match self.retrying("to delete", delete).await {
            Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn expect_length(&self, rel: &str, bytes: Bytes, expected: u64) -> Result<Bytes, StoreError> {
        let found = bytes.len() as u64;
        if found == expected {
            Ok(bytes)
        } else {
            Err(StoreError::CutShort { object: self.object(rel), expected, found })
        }
    }

    fn error(&self, rel: &str, source: object_store::Error) -> StoreError {
        StoreError::classify(self.object(rel), source)
    }

    /// What a write failed of. That an upload in parts is not known says nothing about the object: the answer to its end may have been
    /// lost, and the next try found it gone.
    fn unwritten(&self, rel: &str, source: object_store::Error) -> StoreError {
        match self.error(rel, source) {
            StoreError::NotFound { object } => {
                StoreError::Other { object, detail: "the storage lost the upload before its end".to_owned() }
            }
            error => error,
        }
    }
}

/// An absolute path without `.` and `..`. The folder need not exist, so only the part that does is resolved through links.
fn absolute(path: &std::path::Path) -> std::io::Result<PathBuf> {
    let mut done = PathBuf::new();
    for component in std::path::absolute(path)?.components() {
        match component {
            Component::ParentDir => {
                done.pop();
            }
            Component::CurDir => {}
            other => done.push(other),
        }
        if let Ok(resolved) = done.canonicalize() {
            done = resolved;
        }
    }
    Ok(done)
}
