//! Faults in front of any store.

use std::fmt::{Debug, Display, Formatter};
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

use super::{Fault, Faults, Hit, Op};

/// A store whose requests fail as [`Faults`] says.
#[derive(Clone, Debug)]
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    faults: Faults,
}

impl FaultyStore {
    /// `inner`, disturbed.
    #[must_use]
    pub fn new(inner: Arc<dyn ObjectStore>, faults: Faults) -> Self {
        Self { inner, faults }
    }
}

impl Display for FaultyStore {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "Faulty({})", self.inner)
    }
}

fn failed(what: &str) -> object_store::Error {
    object_store::Error::Generic { store: "Faulty", source: format!("injected: {what}").into() }
}

fn exists(path: &Path) -> object_store::Error {
    object_store::Error::AlreadyExists { path: path.to_string(), source: "injected: conflict".into() }
}

/// A request that suffers what was drawn. `work` is the request itself.
async fn suffer<T>(faults: &Faults, op: Op, work: impl Future<Output = Result<T>>) -> Result<T> {
    match before(faults, op).await? {
        Some(Hit { fault: Fault::Lost, .. }) => {
            work.await?;
            Err(failed("the connection was lost before the answer"))
        }
        _ => work.await,
    }
}

/// What happens before anything is done. Faults that come later are handed back.
async fn before(faults: &Faults, op: Op) -> Result<Option<Hit>> {
    let Some(hit) = faults.draw(op) else { return Ok(None) };
    match hit.fault {
        Fault::Error => Err(failed("503 Service Unavailable")),
        Fault::Outage => Err(failed("Connection refused, as in an outage")),
        Fault::Full => {
            let source = Box::new(std::io::Error::from(std::io::ErrorKind::StorageFull));
            Err(object_store::Error::Generic { store: "Faulty", source })
        }
        Fault::Timeout => {
            tokio::time::sleep(faults.plan().timeout_after).await;
            Err(failed("operation timed out"))
        }
        Fault::Slow => {
            tokio::time::sleep(faults.plan().slow_by).await;
            Ok(None)
        }
        Fault::Lost | Fault::Conflict | Fault::Truncate => Ok(Some(hit)),
    }
}

#[async_trait::async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let op = if opts.mode == PutMode::Create { Op::Create } else { Op::Put };
        match before(&self.faults, op).await? {
            Some(hit) if hit.fault == Fault::Conflict => {
                // A true conflict after the write, or a false one instead of it.
                if hit.coin(0) {
                    self.inner.put_opts(location, payload, opts).await?;
                }
                Err(exists(location))
            }
            Some(_) => {
                self.inner.put_opts(location, payload, opts).await?;
                Err(failed("the connection was lost before the answer"))
            }
            None => self.inner.put_opts(location, payload, opts).await,
        }
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let upload = suffer(&self.faults, Op::Start, self.inner.put_multipart_opts(location, opts)).await?;
        Ok(Box::new(FaultyUpload { upload, faults: self.faults.clone(), done: false }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let op = if options.head { Op::Head } else { Op::Get };
        let hit = before(&self.faults, op).await?;
        let reply = self.inner.get_opts(location, options).await?;
        match hit {
            Some(hit) if hit.fault == Fault::Truncate => {
                let (meta, range, attributes) = (reply.meta.clone(), reply.range.clone(), reply.attributes.clone());
                let extensions = reply.extensions.clone();
                let left = hit.part_of(range.end - range.start);
                // A connection that ends early may be noticed below us or not.
                let told = hit.coin(0).then(|| failed("the body ended early"));
                let body = cut(reply.into_stream(), left, told);
                Ok(GetResult { payload: GetResultPayload::Stream(body), meta, range, attributes, extensions })
            }
            _ => Ok(reply),
        }
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        locations
            .and_then(move |path| {
                let this = this.clone();
                async move {
                    let one = futures::stream::iter([Ok(path)]).boxed();
                    let delete = async {
                        let mut done = this.inner.delete_stream(one);
                        done.try_next().await?.ok_or_else(|| failed("nothing was deleted"))
                    };
                    suffer(&this.faults, Op::Delete, delete).await
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (this, prefix) = (self.clone(), prefix.cloned());
        async move {
            match before(&this.faults, Op::List).await {
                Ok(_) => this.inner.list(prefix.as_ref()),
                Err(error) => futures::stream::iter([Err(error)]).boxed(),
            }
        }
        .into_stream()
        .flatten()
        .boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        suffer(&self.faults, Op::List, self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        suffer(&self.faults, Op::Put, self.inner.copy_opts(from, to, options)).await
    }
}

/// The first `left` bytes, then the end, or `told`.
fn cut(
    body: BoxStream<'static, Result<Bytes>>,
    left: u64,
    told: Option<object_store::Error>,
) -> BoxStream<'static, Result<Bytes>> {
    let state = (body, usize::try_from(left).unwrap_or(usize::MAX), told);
    futures::stream::unfold(state, |(mut body, left, mut told)| async move {
        if left == 0 {
            let error = told.take()?;
            return Some((Err(error), (body, 0, None)));
        }
        match body.next().await? {
            Ok(mut bytes) => {
                bytes.truncate(left);
                let left = left - bytes.len();
                Some((Ok(bytes), (body, left, told)))
            }
            Err(error) => Some((Err(error), (body, 0, None))),
        }
    })
    // Whoever collects a body may ask once more after its end.
    .fuse()
    .boxed()
}

/// An upload in parts that fails as [`Faults`] says.
struct FaultyUpload {
    upload: Box<dyn MultipartUpload>,
    faults: Faults,
    done: bool,
}

impl Debug for FaultyUpload {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        self.upload.fmt(f)
    }
}

#[async_trait::async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (part, faults) = (self.upload.put_part(data), self.faults.clone());
        async move { suffer(&faults, Op::Part, part).await }.boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        if self.done {
            // As S3 answers once the upload has become an object.
            let source = "injected: NoSuchUpload".into();
            return Err(object_store::Error::NotFound { path: "the upload".to_owned(), source });
        }
        let hit = before(&self.faults, Op::Complete).await?;
        let result = self.upload.complete().await?;
        self.done = true;
        match hit {
            Some(_) => Err(failed("the connection was lost before the answer")),
            None => Ok(result),
        }
    }

    async fn abort(&mut self) -> Result<()> {
        suffer(&self.faults, Op::Delete, self.upload.abort()).await
    }
}
