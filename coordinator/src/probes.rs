//! What the kubelet and Prometheus ask.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use sgcl_coordinator::kube::controller::Runs;
use sgcl_coordinator::trust::Refusals;
use tokio::net::TcpListener;

/// What this replica is. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct State {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    ready: AtomicBool,
    /// 0 while another leads.
    epoch: AtomicU64,
}

impl State {
    /// The API server was reached: this replica could lead.
    pub(crate) fn ready(&self) {
        self.inner.ready.store(true, Ordering::Relaxed);
    }

    /// This replica leads.
    pub(crate) fn leads(&self, epoch: u64) {
        self.inner.epoch.store(epoch, Ordering::Relaxed);
    }
}

/// Answers until the process ends. Its failure shows in the probes.
pub(crate) async fn serve(listener: TcpListener, state: State, runs: Runs, refusals: Refusals) {
    let ready = state.clone();
    let answer = move || {
        let ready = ready.inner.ready.load(Ordering::Relaxed);
        async move { if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE } }
    };
    let router = Router::new()
        .route("/healthz", get(|| async { StatusCode::OK }))
        .route("/readyz", get(answer))
        .route("/metrics", get(move || metrics(state.clone(), runs.clone(), refusals.clone())));
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "probes are answered no more");
    }
}

/// Prometheus' text format.
async fn metrics(state: State, runs: Runs, refusals: Refusals) -> String {
    let epoch = state.inner.epoch.load(Ordering::Relaxed);
    let mut text = format!(
        "# HELP sgcl_coordinator_leader Whether this replica leads.\n# TYPE sgcl_coordinator_leader gauge\n\
         sgcl_coordinator_leader {}\n\
         # HELP sgcl_coordinator_lease_epoch Term of this leader.\n# TYPE sgcl_coordinator_lease_epoch gauge\n\
         sgcl_coordinator_lease_epoch {epoch}\n\
         # HELP sgcl_runs Runs by phase.\n# TYPE sgcl_runs gauge\n",
        u8::from(epoch > 0)
    );
    for (phase, count) in runs.by_phase().await {
        // Writing to a string does not fail.
        let _ = writeln!(text, "sgcl_runs{{phase=\"{phase}\"}} {count}");
    }
    text.push_str(
        "# HELP sgcl_coordinator_refused_total Connections and streams of workers that were refused, by reason.\n\
         # TYPE sgcl_coordinator_refused_total counter\n",
    );
    for (refusal, count) in refusals.counts() {
        let _ = writeln!(text, "sgcl_coordinator_refused_total{{reason=\"{}\"}} {count}", refusal.name());
    }
    text
}
