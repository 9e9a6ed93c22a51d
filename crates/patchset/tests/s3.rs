//! The same over a real S3 protocol: HTTP, signatures, listing, parts, conditional puts.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::collections::HashMap;
use std::io::{Read, Write};

use sgcl_patchset::{CacheOptions, Created, PatchSet, Store, StoreError};
use sgcl_tests::S3Server;
use support::{jpeg, open, options, stage};

struct Bucket {
    server: S3Server,
    _folder: tempfile::TempDir,
}

fn bucket() -> Bucket {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start(folder.path(), &["patches"]).unwrap();
    Bucket { server, _folder: folder }
}

fn run(work: impl Future<Output = ()>) {
    tokio::runtime::Runtime::new().unwrap().block_on(work);
}

impl Bucket {
    fn open(&self, url: &str, change: &[(&str, &str)]) -> Store {
        let mut env: HashMap<_, _> = self.server.environment().into_iter().collect();
        env.insert("AWS_EC2_METADATA_DISABLED", "true".into());
        let env = |name: &str| {
            let changed = change.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
            changed.or_else(|| env.get(name).cloned())
        };
        Store::open_with_env(url, &env).unwrap()
    }
}

#[test]
fn a_patch_set_goes_through_s3_and_comes_back() {
    let bucket = bucket();
    let store = bucket.open("s3://patches/some/set", &[]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (set, cache) = runtime.block_on(async {
        let writer = open(&store, options()).await;
        stage(&writer, 0, 12).await;
        drop(writer);
        let writer = open(&store, options()).await;
        assert_eq!(writer.resume("slide 0", "v1"), Some(144));
        stage(&writer, 1, 12).await;
        writer.finish(|_, _| {}).await.unwrap();
        assert!(store.list("staging").await.unwrap().is_empty());
        (PatchSet::load(store.clone()).await.unwrap(), tempfile::tempdir().unwrap())
    });
    let _inside = runtime.enter();
    for cache in [None, Some(CacheOptions { dir: cache.path().into(), max_bytes: 1 << 30 })] {
        let reader = set.reader(cache);
        for id in (0..288).step_by(7) {
            let row = set.index().row(id).unwrap();
            let expected = jpeg(u8::try_from(row.slide).unwrap(), row.x, row.y);
            let reader = reader.clone();
            // A loader's thread, not one of the runtime.
            let found = std::thread::spawn(move || reader.read_blocking(id).unwrap()).join().unwrap();
            assert_eq!(found, expected);
        }
    }
}

#[test]
fn objects_are_created_once_listed_and_deleted() {
    let bucket = bucket();
    run(async {
        let store = bucket.open("s3://patches/run", &[]);
        assert_eq!(store.create("commits/1", "w1", "w1").await.unwrap(), Created::Created);
        assert_eq!(store.create("commits/1", "w1", "w1").await.unwrap(), Created::Created, "ours, told twice");
        assert_eq!(store.create("commits/1", "w2", "w2").await.unwrap(), Created::Exists("w1".into()));
        let large: Vec<u8> = (0..40 << 20).map(|i: u32| (i % 251) as u8).collect();
        store.put("large", large.clone()).await.unwrap();
        assert!(store.get("large", u64::MAX).await.unwrap() == large);
        let names: Vec<_> = store.list("").await.unwrap().into_iter().map(|l| l.rel).collect();
        assert_eq!(names, ["commits/1", "large"]);
        store.delete("large").await.unwrap();
        store.delete("large").await.unwrap();
        assert_eq!(store.size("large").await.unwrap(), None);
    });
}

#[test]
fn wrong_keys_are_told_from_missing_objects() {
    let bucket = bucket();
    run(async {
        let wrong = bucket.open("s3://patches/x", &[("AWS_SECRET_ACCESS_KEY", "hunter2")]);
        let error = wrong.put("a", "b").await.unwrap_err();
        assert!(matches!(error, StoreError::Denied { .. }), "{error}");
        assert!(!error.to_string().contains("hunter2"));
        let there = bucket.open("s3://patches/x", &[]).get("a", 9).await.unwrap_err();
        assert!(there.is_not_found(), "{there}");
    });
}

/// s3s makes a missing bucket when it is written to, so this answer is played back as S3 gives it.
#[test]
fn a_missing_bucket_is_told_from_a_missing_object() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let body = "<Error><Code>NoSuchBucket</Code><Message>The specified bucket does not exist</Message></Error>";
            let head = format!("HTTP/1.1 404 Not Found\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            let _ = stream.write_all((head + body).as_bytes());
        }
    });
    let vars = [("AWS_ENDPOINT_URL", &*endpoint), ("AWS_ACCESS_KEY_ID", "k"), ("AWS_SECRET_ACCESS_KEY", "s")];
    let env = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
    let store = Store::open_with_env("s3://nowhere/x", &env).unwrap();
    run(async {
        for error in [store.put("a", "b").await.unwrap_err(), store.get("a", 9).await.unwrap_err()] {
            assert!(matches!(error, StoreError::NoBucket { .. }), "{error}");
        }
    });
}
