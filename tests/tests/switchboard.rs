//! Several runs behind one port, as a cluster's coordinator has them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::Arc;

use jiff::Timestamp;
use sgcl_coordinator::{Coordinator, Door, Outcome, ProcessLauncher, RunView, Switchboard, listen};
use sgcl_patchset::{PatchSet, Store};
use sgcl_runstore::status::{Phase, RunStatus};
use sgcl_runstore::{RunName, Spec};
use support::{config, patch_set, worker};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread")]
async fn two_runs_behind_one_port_both_finish_each_with_its_own_nodes() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("patches").display().to_string();
    patch_set(&Store::open(&data).unwrap(), 2, 7).await;
    let bucket = Store::open(&folder.path().join("bucket").display().to_string()).unwrap();
    let id = PatchSet::open(&data).await.unwrap().manifest().content_id.clone();

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (board, end) = (Switchboard::default(), CancellationToken::new());
    let serving = tokio::spawn(listen(board.clone(), Door::open(), listener, end.clone().cancelled_owned()));

    let mut runs = Vec::new();
    for name in ["left", "right"] {
        let run = RunName::new(name).unwrap();
        let store = run.store(&bucket);
        let spec = Spec::new(run, &data, &id, 1, 1, 1, config(&["epochs=1"]), Timestamp::now());
        spec.create(&store).await.unwrap();
        let coordinator = Coordinator {
            spec,
            run: store.clone(),
            launcher: Arc::new(ProcessLauncher::new(worker(), name.to_owned(), 1, 1).with_threads(1)),
            view: watch::channel(RunView::default()).0,
            stop: CancellationToken::new(),
            kill: CancellationToken::new(),
        };
        let (board, url) = (board.clone(), url.clone());
        runs.push((store, tokio::spawn(async move { coordinator.attend(&board, url).await })));
    }
    for (store, run) in runs {
        assert_eq!(run.await.unwrap().unwrap(), Outcome::Finished);
        assert_eq!(RunStatus::read(&store).await.unwrap().phase, Phase::Finished);
    }
    end.cancel();
    serving.await.unwrap().unwrap();
}
