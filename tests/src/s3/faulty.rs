//! What the server does to a request that a fault was drawn for.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::TryStreamExt as _;
use hyper::body::{Frame, SizeHint};
use hyper::header::IF_NONE_MATCH;
use hyper::{Method, StatusCode};
use s3s::service::S3Service;
use s3s::{Body, HttpRequest, HttpResponse, StdError};
use sgcl_patchset::faults::{Fault, Faults, Hit, Op};
use tokio::sync::Mutex;

/// Longest body of a conditional put.
const MAX_CREATE_BYTES: usize = 256 << 20;

/// The service behind faults. Clones share them.
#[derive(Clone)]
pub(super) struct Faulty {
    pub(super) service: S3Service,
    pub(super) faults: Faults,
    /// s3s-fs looks whether an object exists and writes it later: of two conditional puts at once both would win.
    pub(super) creating: Arc<Mutex<()>>,
    /// Uploads in parts that became objects. Asked about one again, S3 says that there is none; s3s-fs says that it is not allowed.
    pub(super) ended: Arc<std::sync::Mutex<BTreeSet<String>>>,
}

impl Faulty {
    /// Answers a request. An error closes the connection without an answer.
    pub(super) async fn call(self, mut request: HttpRequest) -> Result<HttpResponse, StdError> {
        let op = kind(&request);
        let Some(hit) = self.faults.draw(op) else { return self.carry_out(request).await };
        match hit.fault {
            Fault::Error => refuse(request, if hit.coin(0) { UNAVAILABLE } else { INTERNAL }).await,
            Fault::Full => refuse(request, FULL).await,
            Fault::Outage if hit.coin(0) => refuse(request, UNAVAILABLE).await,
            Fault::Outage => Err("injected: outage".into()),
            Fault::Timeout => {
                tokio::time::sleep(self.faults.plan().timeout_after).await;
                Err("injected: no answer".into())
            }
            Fault::Slow => {
                tokio::time::sleep(self.faults.plan().slow_by).await;
                self.carry_out(request).await
            }
            Fault::Lost => {
                self.carry_out(request).await?;
                Err("injected: the answer is lost".into())
            }
            Fault::Conflict => {
                let answer = if hit.coin(0) { CONFLICT } else { EXISTS };
                if hit.coin(1) {
                    let body = std::mem::take(request.body_mut());
                    self.carry_out(request.map(|_| body)).await?;
                    return Ok(answered(answer));
                }
                refuse(request, answer).await
            }
            Fault::Truncate => Ok(cut(self.carry_out(request).await?, hit)),
        }
    }

    async fn carry_out(&self, mut request: HttpRequest) -> Result<HttpResponse, StdError> {
        let upload = query(&request, "uploadId").map(str::to_owned);
        if let Some(upload) = &upload
            && self.ended.lock().unwrap_or_else(PoisonError::into_inner).contains(upload)
        {
            return refuse(request, NO_UPLOAD).await;
        }
        let ends = kind(&request) == Op::Complete;
        let _alone = if request.headers().contains_key(IF_NONE_MATCH) && request.method() == Method::PUT {
            // All of it first: a client that stops in the middle holds up nobody.
            request.body_mut().store_all_limited(MAX_CREATE_BYTES).await?;
            Some(self.creating.lock().await)
        } else {
            None
        };
        let response = self.service.call(request).await.map_err(|error| format!("{error:?}"))?;
        if let (Some(upload), true, true) = (upload, ends, response.status().is_success()) {
            self.ended.lock().unwrap_or_else(PoisonError::into_inner).insert(upload);
        }
        Ok(response)
    }
}

/// The value of a parameter, empty where it has none.
fn query<'a>(request: &'a HttpRequest, name: &str) -> Option<&'a str> {
    let pairs = request.uri().query()?.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value)
}

/// What a request is, as S3 tells them apart.
fn kind(request: &HttpRequest) -> Op {
    let has = |name| query(request, name).is_some();
    match *request.method() {
        Method::HEAD => Op::Head,
        Method::GET if has("list-type") || has("prefix") => Op::List,
        Method::PUT if has("partNumber") => Op::Part,
        Method::PUT if request.headers().contains_key(IF_NONE_MATCH) => Op::Create,
        Method::PUT => Op::Put,
        Method::POST if has("uploadId") => Op::Complete,
        Method::POST if has("uploads") => Op::Start,
        Method::POST if has("delete") => Op::Delete,
        Method::DELETE => Op::Delete,
        _ => Op::Get,
    }
}

type Answer = (StatusCode, &'static str);
const INTERNAL: Answer = (StatusCode::INTERNAL_SERVER_ERROR, "InternalError");
const UNAVAILABLE: Answer = (StatusCode::SERVICE_UNAVAILABLE, "SlowDown");
const CONFLICT: Answer = (StatusCode::CONFLICT, "ConditionalRequestConflict");
const EXISTS: Answer = (StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
const NO_UPLOAD: Answer = (StatusCode::NOT_FOUND, "NoSuchUpload");
/// As MinIO says it; S3 itself is never full.
const FULL: Answer = (StatusCode::INSUFFICIENT_STORAGE, "XMinioStorageFull");

/// Reads the request to its end, as a polite server does, and carries nothing out.
async fn refuse(mut request: HttpRequest, answer: Answer) -> Result<HttpResponse, StdError> {
    while request.body_mut().try_next().await?.is_some() {}
    Ok(answered(answer))
}

fn answered((status, code): Answer) -> HttpResponse {
    let text = format!("<Error><Code>{code}</Code><Message>injected</Message></Error>");
    let mut response = HttpResponse::new(Body::from(text));
    *response.status_mut() = status;
    response
}

/// Promises the whole body and breaks off in it.
fn cut(response: HttpResponse, hit: Hit) -> HttpResponse {
    response.map(|body| {
        let size = hyper::body::Body::size_hint(&body);
        match size.exact().filter(|&bytes| bytes > 0) {
            Some(bytes) => Body::http_body(Cut { body, left: hit.part_of(bytes), size }),
            None => body,
        }
    })
}

/// A body that fails after `left` bytes.
struct Cut {
    body: Body,
    left: u64,
    size: SizeHint,
}

impl hyper::body::Body for Cut {
    type Data = Bytes;
    type Error = StdError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, StdError>>> {
        if self.left == 0 {
            return Poll::Ready(Some(Err("injected: truncated".into())));
        }
        let left = usize::try_from(self.left).unwrap_or(usize::MAX);
        Pin::new(&mut self.body).poll_frame(cx).map_ok(|frame| {
            frame.map_data(|mut bytes| {
                bytes.truncate(left);
                self.left -= bytes.len() as u64;
                bytes
            })
        })
    }

    fn size_hint(&self) -> SizeHint {
        self.size
    }
}
