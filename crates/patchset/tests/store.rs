//! Storage: create-once writes under faults, and errors a person can act on.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use sgcl_patchset::{Created, Store, StoreError};

/// What a [`Faulty`] store does to the first create.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Writes, then says that it failed.
    LostReply,
    /// Writes, then says that the object was there: a retry that met its own first try.
    OwnWriteSeenAsRival,
    /// Writes nothing and says that there is a conflict: a rival that then gave up.
    Conflict,
}

#[derive(Debug)]
struct Faulty {
    inner: InMemory,
    fault: Fault,
    creates: AtomicUsize,
}

impl std::fmt::Display for Faulty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        if options.mode != PutMode::Create || self.creates.fetch_add(1, Ordering::SeqCst) > 0 {
            return self.inner.put_opts(at, payload, options).await;
        }
        let exists = || Error::AlreadyExists { path: at.to_string(), source: "409".into() };
        match self.fault {
            Fault::Conflict => return Err(exists()),
            Fault::LostReply | Fault::OwnWriteSeenAsRival => self.inner.put_opts(at, payload, options).await?,
        };
        match self.fault {
            Fault::LostReply => Err(Error::Generic { store: "faulty", source: "connection reset".into() }),
            _ => Err(exists()),
        }
    }
    async fn put_multipart_opts(&self, at: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(at, options).await
    }
    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(at, options).await
    }
    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(paths)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

fn env(pairs: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> + use<> {
    let map: HashMap<String, String> = pairs.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
    move |name| map.get(name).cloned()
}

#[rstest::rstest]
#[case(Fault::LostReply)]
#[case(Fault::OwnWriteSeenAsRival)]
#[case(Fault::Conflict)]
#[tokio::test]
async fn a_create_that_is_ours_is_known_as_ours_whatever_the_storage_says(#[case] fault: Fault) {
    let inner = Faulty { inner: InMemory::new(), fault, creates: AtomicUsize::new(0) };
    let store = Store::from_parts(Arc::new(inner), Path::default(), "mem://b");
    assert_eq!(store.create("commit", "writer-1", "writer-1").await.unwrap(), Created::Created);
    let rival = store.create("commit", "writer-2", "writer-2").await.unwrap();
    assert_eq!(rival, Created::Exists("writer-1".into()));
}

#[tokio::test]
async fn a_folder_holds_objects_under_prefixes_and_lists_them_by_name() {
    let dir = tempfile::tempdir().unwrap();
    // A path with a space, a percent sign and a parent step in it.
    let store = Store::open(&format!("{}/x/../a b%20c", dir.path().display())).unwrap();
    store.put("runs/1/b", "two").await.unwrap();
    store.put("runs/1/a", "one").await.unwrap();
    let child = store.child("runs/1/");
    assert_eq!(child.get("a", 10).await.unwrap(), "one");
    assert_eq!(std::fs::read(child.local_path("a").unwrap()).unwrap(), b"one");
    assert_eq!(child.list("").await.unwrap().iter().map(|l| l.rel.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(store.list("runs").await.unwrap()[0].rel, "runs/1/a");
    assert!(store.list("nothing").await.unwrap().is_empty());
    let again = Store::open(child.url()).unwrap();
    assert_eq!(again.get_range("a", 1..3).await.unwrap(), "ne", "the URL a store gives opens it again");
    assert_eq!(child.create("a", "rival", "rival").await.unwrap(), Created::Exists("one".into()));

    store.delete("runs/1/a").await.unwrap();
    store.delete("runs/1/a").await.unwrap();
    assert!(!child.exists("a").await.unwrap());
    let error = child.get("a", 10).await.unwrap_err();
    assert!(error.is_not_found() && error.to_string().contains("a%20b%2520c/runs/1/a"), "{error}");
    assert!(matches!(child.get("b", 2).await, Err(StoreError::TooLarge { bytes: 3, limit: 2, .. })));
}

#[tokio::test]
async fn large_objects_go_up_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().to_str().unwrap()).unwrap();
    let bytes: Vec<u8> = (0..40 << 20).map(|i: u32| (i % 251) as u8).collect();
    store.put("large", bytes.clone()).await.unwrap();
    assert!(store.get("large", u64::MAX).await.unwrap() == bytes);
    store.put_file("copy", &store.local_path("large").unwrap()).await.unwrap();
    assert!(store.get("copy", u64::MAX).await.unwrap() == bytes);
    assert_eq!(store.list("").await.unwrap().len(), 2, "no part is left beside them");
}

#[rstest::rstest]
#[case("gs://bucket/x", "not a kind of storage we know")]
#[case("s3://key:secret@bucket/x", "credentials do not belong in a URL")]
#[case("s3://a b", "not a bucket name")]
#[case("file://data/x", "three slashes")]
#[case("", "empty")]
fn a_wrong_url_says_what_is_wrong_and_what_is_right(#[case] url: &str, #[case] says: &str) {
    let error = Store::open_with_env(url, &env(&[])).unwrap_err().to_string();
    assert!(error.contains(says) && error.contains("s3://bucket/prefix") && !error.contains("secret@"), "{error}");
}

#[tokio::test]
async fn an_endpoint_that_nobody_serves_fails_in_seconds_and_is_named() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let endpoint = format!("http://127.0.0.1:{port}");
    let vars =
        [("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "hunter2"), ("AWS_ENDPOINT_URL_S3", &*endpoint)];
    let store = Store::open_with_env("s3://bucket/prefix", &env(&vars)).unwrap();
    let begun = std::time::Instant::now();
    let error = store.get("x", 1).await.unwrap_err();
    assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
    let text = error.to_string();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error:?}");
    assert!(text.contains("s3://bucket/prefix/x") && text.contains("AWS_ENDPOINT_URL_S3"), "{text}");
    assert!(!format!("{text} {store:?} {error:?}").contains("hunter2"));
}

#[test]
fn no_credentials_at_all_is_said_at_once() {
    let error = Store::open_with_env("s3://bucket", &env(&[("AWS_EC2_METADATA_DISABLED", "true")])).unwrap_err();
    assert!(matches!(error, StoreError::NoCredentials { .. }), "{error}");
}

#[tokio::test]
async fn a_profile_gives_endpoint_and_credentials_as_it_does_to_the_aws_tools() {
    let dir = tempfile::tempdir().unwrap();
    let aws = dir.path().join(".aws");
    std::fs::create_dir(&aws).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    std::fs::write(
        aws.join("config"),
        format!(
            "[default]\nregion = eu-west-1\n\n[profile lab]\nservices = here\n\n[profile sso]\nsso_session = x\n\n\
             [services here]\ndynamodb =\n  endpoint_url = http://127.0.0.1:1\ns3 =\n  endpoint_url = http://127.0.0.1:{port}\n"
        ),
    )
    .unwrap();
    std::fs::write(aws.join("credentials"), "[lab]\naws_access_key_id = k\naws_secret_access_key = a+b/\\c\"d\n")
        .unwrap();
    let home = dir.path().to_str().unwrap();
    let with = |profile| env(&[("HOME", home), ("AWS_PROFILE", profile), ("AWS_EC2_METADATA_DISABLED", "true")]);

    let store = Store::open_with_env("s3://bucket/p", &with("lab")).unwrap();
    let error = store.get("x", 1).await.unwrap_err().to_string();
    assert!(error.contains("does not answer"), "it asks the profile's endpoint: {error}");
    let error = Store::open_with_env("s3://bucket/p", &with("lba")).unwrap_err().to_string();
    assert!(error.contains("\"lba\"") && error.contains("AWS_PROFILE"), "{error}");
    let error = Store::open_with_env("s3://bucket/p", &with("sso")).unwrap_err().to_string();
    assert!(error.contains("aws configure export-credentials --profile sso"), "{error}");
}
