//! The S3 server of the tests: what it promises, and each of its faults as a client meets it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, Instant};

use sgcl_patchset::faults::{Fault, FaultPlan, Op};
use sgcl_patchset::{Created, Store, StoreError};
use sgcl_tests::S3Server;

struct Bucket {
    server: S3Server,
    store: Store,
    _folder: tempfile::TempDir,
}

fn bucket(plan: &str) -> Bucket {
    let folder = tempfile::tempdir().unwrap();
    let server = S3Server::start_faulty(folder.path(), &["lab"], plan.parse::<FaultPlan>().unwrap()).unwrap();
    let store = server.store("s3://lab/place").unwrap();
    Bucket { server, store, _folder: folder }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_writers_that_create_at_once_one_wins() {
    let Bucket { store, server: _server, _folder } = bucket("");
    for round in 0..50 {
        let writers = (0..4).map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                let id = format!("{round}-{writer}");
                store.create(&format!("commits/{round}"), id.clone(), &id).await.unwrap()
            })
        });
        let ends: Vec<Created> = futures::future::join_all(writers).await.into_iter().map(Result::unwrap).collect();
        let won = ends.iter().filter(|end| **end == Created::Created).count();
        assert_eq!(won, 1, "round {round}: {ends:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_fault_is_met_once_and_passes() {
    let Bucket { store, server, _folder } = bucket("timeout=0:300ms,slow=0:300ms");
    let faults = server.faults();
    store.put("a", "one").await.unwrap();

    // The client tries again by itself.
    for (op, fault) in [(Op::Put, Fault::Error), (Op::Put, Fault::Lost), (Op::Put, Fault::Timeout)] {
        faults.next(op, fault);
        store.put("a", "two").await.unwrap();
        assert_eq!(store.get("a", 9).await.unwrap(), "two", "{fault:?}");
    }
    faults.next(Op::Get, Fault::Truncate);
    let long = vec![7; 1 << 20];
    store.put("long", long.clone()).await.unwrap();
    assert!(store.get("long", 1 << 20).await.unwrap() == long);
    faults.next(Op::Get, Fault::Truncate);
    assert!(store.get_range("long", 5..1000).await.unwrap() == long[5..1000]);
    let began = Instant::now();
    faults.next(Op::Get, Fault::Slow);
    assert_eq!(store.get("a", 9).await.unwrap(), "two");
    assert!(began.elapsed() >= Duration::from_millis(300));

    for (n, fault) in [Fault::Lost, Fault::Conflict, Fault::Conflict, Fault::Conflict, Fault::Error].iter().enumerate()
    {
        faults.next(Op::Create, *fault);
        let id = format!("w{n}");
        assert_eq!(store.create(&format!("c{n}"), id.clone(), &id).await.unwrap(), Created::Created, "{fault:?}");
        assert_eq!(store.create(&format!("c{n}"), "rival", "rival").await.unwrap(), Created::Exists(id.into()));
    }
    faults.next(Op::Delete, Fault::Lost);
    store.delete("a").await.unwrap();
    assert_eq!(store.size("a").await.unwrap(), None);

    // Parts, whose last request may be done without an answer.
    let large: Vec<u8> = (0..40 << 20).map(|i: u32| (i % 251) as u8).collect();
    faults.next(Op::Start, Fault::Error);
    faults.next(Op::Part, Fault::Lost);
    store.put("large", large.clone()).await.unwrap();
    assert!(store.get("large", u64::MAX).await.unwrap() == large);
    // The client asks again and hears that there is no such upload: that passes, it does not blame the object.
    faults.next(Op::Complete, Fault::Lost);
    let error = store.put("large", large.clone()).await.unwrap_err();
    assert!(!error.is_permanent(), "{error}");
    faults.next(Op::Complete, Fault::Lost);
    store.patient().put("large", large.clone()).await.unwrap();
    let injected = faults.injected();
    for fault in [Fault::Error, Fault::Timeout, Fault::Slow, Fault::Lost, Fault::Conflict, Fault::Truncate] {
        assert!(injected.contains_key(&fault), "{fault:?} was never injected: {injected:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_and_an_outage_last_as_long_as_they_are_said_to() {
    let Bucket { store, server, _folder } = bucket("");
    store.put("a", "one").await.unwrap();
    server.faults().full(true);
    let error = store.put("a", "two").await.unwrap_err();
    assert!(matches!(error, StoreError::NoSpace { .. }), "{error}");
    assert_eq!(store.get("a", 9).await.unwrap(), "one");
    server.faults().full(false);
    store.put("a", "two").await.unwrap();

    server.faults().outage(true);
    let error = store.get("a", 9).await.unwrap_err();
    assert!(!error.is_permanent(), "{error}");
    server.faults().outage(false);
    assert_eq!(store.get("a", 9).await.unwrap(), "two");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_seed_draws_the_same_faults() {
    let draw = |seed: u64| {
        let faults = sgcl_patchset::faults::Faults::new(
            format!("seed={seed},error=0.2,lost=0.2,truncate=0.2,slow=0.1").parse().unwrap(),
        );
        (0..200)
            .map(|n| faults.draw(if n % 2 == 0 { Op::Get } else { Op::Put }).map(|hit| hit.fault))
            .collect::<Vec<_>>()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    let count = |fault| draw(3).iter().filter(|hit| **hit == Some(fault)).count();
    assert!((20..=60).contains(&count(Fault::Error)), "{}", count(Fault::Error));
    assert!((10..=40).contains(&count(Fault::Lost)) && (10..=40).contains(&count(Fault::Truncate)));
}
