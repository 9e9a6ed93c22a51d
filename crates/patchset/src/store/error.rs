//! What can go wrong with storage, told by object and remedy.

use std::error::Error as _;
use std::io::ErrorKind;
use std::path::PathBuf;

/// A request to storage that failed. `object` is the full URL of what was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Not a URL or path we can open.
    #[error("{url}: {reason}; give s3://bucket/prefix, file:///path or a path")]
    BadUrl {
        /// The URL, without anything that could be secret.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no such object.
    #[error("{object}: not found; check the URL")]
    NotFound {
        /// Full name of the object.
        object: String,
    },
    /// There is no such bucket.
    #[error("{object}: the bucket does not exist; create it, or check the name and the endpoint (AWS_ENDPOINT_URL_S3)")]
    NoBucket {
        /// Full name of the object.
        object: String,
    },
    /// No credentials were found.
    #[error(
        "{object}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where the machine has a role"
    )]
    NoCredentials {
        /// Full name of the object.
        object: String,
    },
    /// The AWS configuration names something we cannot use.
    #[error("{object}: AWS profile {profile:?}: {reason}")]
    Profile {
        /// Full name of the object.
        object: String,
        /// Name of the profile.
        profile: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// The credentials do not allow it.
    #[error("{object}: not allowed ({detail}); check the credentials and the permissions of the bucket or folder")]
    Denied {
        /// Full name of the object.
        object: String,
        /// The storage's words.
        detail: String,
    },
    /// Nobody answers.
    #[error(
        "{object}: the storage does not answer ({detail}); check the endpoint (AWS_ENDPOINT_URL_S3) and the network"
    )]
    Unreachable {
        /// Full name of the object.
        object: String,
        /// What the connection said.
        detail: String,
    },
    /// No space left.
    #[error("{object}: no space left; free some, or use another place")]
    NoSpace {
        /// Full name of the object.
        object: String,
    },
    /// Larger than anything sensible.
    #[error("{object}: {bytes} bytes, more than the limit of {limit}; is it the right file?")]
    TooLarge {
        /// Full name of the object.
        object: String,
        /// Its size.
        bytes: u64,
        /// What was allowed.
        limit: u64,
    },
    /// The object ends before what is to be read of it does.
    #[error("{object}: {bytes} bytes, {needed} are needed; it is truncated, copy it again")]
    TooShort {
        /// Full name of the object.
        object: String,
        /// Its size.
        bytes: u64,
        /// Where what was asked for ends.
        needed: u64,
    },
    /// Fewer bytes came than the object has.
    #[error("{object}: expected {expected} bytes, {found} came; the transfer broke off")]
    CutShort {
        /// Full name of the object.
        object: String,
        /// Bytes that should be there.
        expected: u64,
        /// Bytes that came.
        found: u64,
    },
    /// A local file could not be read or written.
    #[error("{}: {source}", file.display())]
    LocalFile {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The local data of an upload could not be read.
    #[error("{object}: cannot read what is to be uploaded: {source}")]
    Unreadable {
        /// Full name of the object.
        object: String,
        /// Why.
        source: std::io::Error,
    },
    /// A create that neither succeeded nor found a rival, several times over.
    #[error("{object}: the storage reports a conflict but holds no such object; try again")]
    Unsettled {
        /// Full name of the object.
        object: String,
    },
    /// The storage does not take the request as it is.
    #[error("{object}: the storage refused ({detail}); check region, endpoint and what the storage supports")]
    Refused {
        /// Full name of the object.
        object: String,
        /// The storage's words.
        detail: String,
    },
    /// The faults asked for cannot be read.
    #[cfg(feature = "faults")]
    #[error("{variable}: {source}")]
    Faults {
        /// The variable that asks for them.
        variable: &'static str,
        /// Why.
        source: super::faults::PlanError,
    },
    /// Anything else.
    #[error("{object}: {detail}")]
    Other {
        /// Full name of the object.
        object: String,
        /// The storage's words, without query strings.
        detail: String,
    },
}

impl StoreError {
    /// Whether trying again cannot help: someone has to change something first.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        !matches!(self, Self::Unreachable { .. } | Self::Other { .. } | Self::CutShort { .. } | Self::Unsettled { .. })
    }

    /// Whether this says that an object is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// The failure behind an [`object_store::Error`]. Its text is matched where its types do not tell: a missing bucket is a 404
    /// as a missing object is.
    pub(super) fn classify(object: String, error: object_store::Error) -> Self {
        let (text, io) = describe(&error);
        let asks_machine = text.contains("169.254.169.254") || text.contains("169.254.170.2");
        if asks_machine || text.contains("/latest/api/token") || text.contains("/latest/meta-data") {
            return Self::NoCredentials { object };
        }
        match io {
            Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => return Self::NoSpace { object },
            Some(ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
                return Self::Denied { object, detail: text };
            }
            _ => {}
        }
        if text.contains("NoSuchBucket") {
            return Self::NoBucket { object };
        }
        // S3 is never full; MinIO, Ceph and others are.
        if ["XMinioStorageFull", "507 Insufficient Storage", "QuotaExceeded"].iter().any(|sign| text.contains(sign)) {
            return Self::NoSpace { object };
        }
        match error {
            object_store::Error::NotFound { .. } => Self::NotFound { object },
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
                Self::Denied { object, detail: said(&text) }
            }
            _ if ["error sending request", "dns error", "Connection refused", "tcp connect", "operation timed out"]
                .iter()
                .any(|sign| text.contains(sign)) =>
            {
                Self::Unreachable { object, detail: last_cause(&text) }
            }
            object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. } => {
                Self::Refused { object, detail: text }
            }
            _ if is_refusal(&text) => Self::Refused { object, detail: said(&text) },
            _ => Self::Other { object, detail: text },
        }
    }
}

/// Whether an HTTP status says that the same request will never do. Some of 400 pass: what broke off, or came too late.
fn is_refusal(text: &str) -> bool {
    const PASS: [&str; 6] =
        ["RequestTimeout", "IncompleteBody", "BadDigest", "ExpiredToken", "SlowDown", "OperationAborted"];
    let status = text.split_once("non-2xx status code: ").and_then(|(_, rest)| rest.get(..3)?.parse::<u16>().ok());
    let refused =
        status.is_some_and(|status| matches!(status, 400..500) && ![408, 409, 412, 425, 429].contains(&status));
    (refused && !PASS.iter().any(|code| text.contains(code))) || text.contains("redirect without LOCATION")
}

/// The chain of causes as one line, each once, and the kind of the I/O error in it.
fn describe(error: &object_store::Error) -> (String, Option<ErrorKind>) {
    let mut text = error.to_string();
    let mut io = None;
    let mut next = error.source();
    while let Some(cause) = next {
        if let Some(e) = cause.downcast_ref::<std::io::Error>() {
            io = io.or(Some(e.kind()));
        }
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = cause.source();
    }
    (without_query(&text.split_whitespace().collect::<Vec<_>>().join(" ")), io)
}

/// S3 answers in XML; its code and message are what a person needs.
fn said(text: &str) -> String {
    let field = |name: &str| {
        let from = text.split_once(&format!("<{name}>"))?.1;
        Some(from.split_once('<')?.0)
    };
    match (field("Code"), field("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code.to_owned(),
        _ => "the storage refused".to_owned(),
    }
}

fn last_cause(text: &str) -> String {
    let tail: Vec<_> = text.rsplit(": ").take(2).collect();
    tail.into_iter().rev().collect::<Vec<_>>().join(": ")
}

/// Query strings can carry tokens (web identity sends one): none is repeated.
pub(super) fn without_query(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('?') {
        out.push_str(&rest[..at]);
        let query = &rest[at..];
        let end = query.find(|c: char| c.is_whitespace() || matches!(c, '"' | ')' | '>')).unwrap_or(query.len());
        if end > 1 {
            out.push_str("?…");
        } else {
            out.push('?');
        }
        rest = &query[end.max(1)..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> StoreError {
        let source = text.to_owned().into();
        StoreError::classify("s3://bucket/a".into(), object_store::Error::Generic { store: "S3", source })
    }

    #[test]
    fn a_missing_role_reads_as_missing_credentials() {
        let error = generic("Error performing PUT http://169.254.169.254/latest/api/token in 1s");
        assert!(matches!(error, StoreError::NoCredentials { .. }), "{error}");
    }

    #[test]
    fn a_missing_bucket_is_told_from_a_missing_object() {
        let source = "status code: 404: <Error><Code>NoSuchBucket</Code></Error>".into();
        let error = object_store::Error::NotFound { path: "a".into(), source };
        let error = StoreError::classify("s3://bucket/a".into(), error);
        assert!(matches!(error, StoreError::NoBucket { .. }), "{error}");
        let error = object_store::Error::NotFound { path: "a".into(), source: "404".into() };
        assert!(StoreError::classify("s3://bucket/a".into(), error).is_not_found());
    }

    #[test]
    fn tokens_in_query_strings_are_not_repeated() {
        let error = generic("GET https://sts.example/?WebIdentityToken=hunter2&x=1 (status 500) failed");
        assert_eq!(
            error.to_string(),
            "s3://bucket/a: Generic S3 error: GET https://sts.example/?… (status 500) failed"
        );
    }

    #[test]
    fn what_passes_by_itself_is_told_from_what_somebody_has_to_mend() {
        let status = |status: &str, code: &str| {
            generic(&format!(
                "Error performing PUT - Server returned non-2xx status code: {status}: <Error><Code>{code}</Code></Error>"
            ))
        };
        for (status, error) in [
            ("503", status("503 Service Unavailable", "SlowDown")),
            ("400", status("400 Bad Request", "RequestTimeout")),
            ("429", status("429 Too Many Requests", "TooManyRequests")),
            ("none", generic("connection reset by peer")),
        ] {
            assert!(!error.is_permanent(), "{status}: {error}");
        }
        for error in [
            status("400 Bad Request", "InvalidRequest"),
            status("507 Insufficient Storage", "XMinioStorageFull"),
            generic("Received redirect without LOCATION, this normally indicates an incorrectly configured region"),
        ] {
            assert!(error.is_permanent(), "{error}");
        }
    }

    #[test]
    fn a_full_disk_says_so() {
        let source = Box::new(std::io::Error::from(ErrorKind::StorageFull));
        let error = object_store::Error::Generic { store: "LocalFileSystem", source };
        assert!(matches!(StoreError::classify("file:///a".into(), error), StoreError::NoSpace { .. }));
    }
}
