//! From objects to conductors: one task a run, told of each change of its object. Watches alone, no polling.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::runtime::controller::Action;
use kube::runtime::{Controller, WatchStreamExt, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;

use super::conduct::{Shared, conduct};
use super::defaults::{self, Defaults};
use super::gang::Gangs;
use super::pods::Pods;
use super::queue::Queues;
use super::resource::{Phase, SgclRun};
use super::{GRPC_PORT, SERVICE, trust};
use crate::metrics::Measures;
use crate::streams::listen;
use crate::switchboard::Switchboard;
use crate::trust::Refusals;

/// The conductors of this leader's term.
#[derive(Clone, Default)]
pub struct Runs {
    table: Arc<Mutex<BTreeMap<String, Conducted>>>,
}

struct Conducted {
    uid: Option<String>,
    object: watch::Sender<Arc<SgclRun>>,
    task: JoinHandle<()>,
}

/// What is needed to lead.
pub struct Leader {
    /// The API server.
    pub client: Client,
    /// Namespace of runs, pods and this coordinator.
    pub namespace: String,
    /// Name of this pod.
    pub me: String,
    /// Where the streams of workers come in.
    pub listener: TcpListener,
    /// The Lease's transitions.
    pub lease_epoch: u64,
    /// Runs by name.
    pub runs: Runs,
    /// Who was not let in.
    pub refusals: Refusals,
    /// How the runs are doing.
    pub measures: Measures,
}

struct Context {
    shared: Arc<Shared>,
    runs: Runs,
}

impl Leader {
    /// Leads until dropped.
    ///
    /// # Errors
    /// The listener breaks, or there is no authority for TLS; everything else is tried again.
    pub async fn lead(self) -> Result<()> {
        let Self { client, namespace, me, listener, lease_epoch, runs, refusals, measures } = self;
        let (door, certificate) = trust::door(&client, &namespace, refusals).await?;
        let board = Switchboard::default();
        let pods = Pods::default();
        let watching = pods.clone().watch(Api::namespaced(client.clone(), &namespace));
        let (sender, defaults) = watch::channel(Err("the ConfigMap sgcl-defaults was not read yet".to_owned()));
        let reading = read_defaults(Api::namespaced(client.clone(), &namespace), sender);
        let shared = Arc::new(Shared {
            me,
            url: format!("https://{SERVICE}.{namespace}.svc:{GRPC_PORT}"),
            certificate,
            board: board.clone(),
            pods: pods.clone(),
            queues: Queues::of(client.clone(), namespace.clone()),
            gangs: Gangs::default(),
            measures,
            defaults: defaults.clone(),
            client: client.clone(),
            namespace: namespace.clone(),
            lease_epoch,
        });
        let conducting = async {
            // What is there must be known before anything is made.
            pods.listed().await;
            let mut defaults = defaults;
            if defaults.changed().await.is_err() {
                return;
            }
            let context = Arc::new(Context { shared, runs });
            Controller::new(Api::<SgclRun>::namespaced(client, &namespace), watcher::Config::default())
                .run(reconcile, |_, error, _| again(error), context)
                .for_each(|result| async move {
                    if let Err(error) = result {
                        tracing::debug!(%error, "reconcile");
                    }
                })
                .await;
        };
        tokio::select! {
            served = listen(board, door, listener, std::future::pending()) => served.context("the gRPC listener broke"),
            watched = watching => watched.context("the watch over pods ended"),
            () = reading => anyhow::bail!("the watch over {} ended", defaults::NAME),
            () = conducting => anyhow::bail!("the watch over runs ended"),
        }
    }
}

async fn reconcile(run: Arc<SgclRun>, context: Arc<Context>) -> Result<Action, std::convert::Infallible> {
    let mut table = context.runs.table.lock().await;
    table.retain(|_, known| !known.task.is_finished());
    let (name, uid) = (run.name_any(), run.uid());
    match table.get(&name) {
        Some(known) if known.uid == uid => drop(known.object.send_replace(run)),
        known => {
            if let Some(known) = known {
                known.task.abort();
            }
            tracing::info!(run = name, "conducting");
            let object = watch::Sender::new(run);
            let task = tokio::spawn(conduct(Arc::clone(&context.shared), object.subscribe()));
            table.insert(name, Conducted { uid, object, task });
        }
    }
    Ok(Action::await_change())
}

fn again(error: &std::convert::Infallible) -> Action {
    tracing::warn!(%error, "trying again");
    Action::requeue(Duration::from_secs(5))
}

/// Keeps the defaults as they are; a ConfigMap that is gone is an empty one.
async fn read_defaults(api: Api<ConfigMap>, defaults: watch::Sender<Result<Defaults, String>>) {
    let mut changes = watcher::watch_object(api, defaults::NAME).default_backoff().boxed();
    loop {
        match changes.try_next().await {
            Ok(Some(map)) => {
                let read = Defaults::read(&map.and_then(|map| map.data).unwrap_or_default());
                if let Err(error) = &read {
                    tracing::warn!("{error}");
                }
                drop(defaults.send_replace(read));
            }
            Ok(None) => return,
            Err(error) => tracing::warn!(%error, "the watch over {} broke, it is made anew", defaults::NAME),
        }
    }
}

impl Runs {
    /// Runs by phase, as their objects last said.
    pub async fn by_phase(&self) -> BTreeMap<String, usize> {
        let mut count = BTreeMap::new();
        for known in self.table.lock().await.values() {
            let phase = known.object.borrow().status.as_ref().map_or(Phase::Pending, |status| status.phase);
            *count.entry(phase.to_string()).or_default() += 1;
        }
        count
    }
}
