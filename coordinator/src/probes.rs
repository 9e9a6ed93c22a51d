//! What the kubelet and Prometheus ask.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use sgcl_coordinator::kube::controller::Runs;
use sgcl_coordinator::metrics::{Measures, exposition};
use sgcl_coordinator::trust::Refusals;
use sgcl_telemetry::metrics::Exposition;
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
pub(crate) async fn serve(listener: TcpListener, state: State, runs: Runs, refusals: Refusals, measures: Measures) {
    let ready = state.clone();
    let answer = move || {
        let ready = ready.inner.ready.load(Ordering::Relaxed);
        async move { if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE } }
    };
    let router = Router::new()
        .route("/healthz", get(|| async { StatusCode::OK }))
        .route("/readyz", get(answer))
        .route("/metrics", get(move || metrics(state.clone(), runs.clone(), refusals.clone(), measures.clone())));
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "probes are answered no more");
    }
}

/// Prometheus' text format.
async fn metrics(state: State, runs: Runs, refusals: Refusals, measures: Measures) -> impl IntoResponse {
    let lease_epoch = state.inner.epoch.load(Ordering::Relaxed);
    let text = exposition(lease_epoch, &runs.by_phase().await, &refusals, &measures);
    ([(CONTENT_TYPE, Exposition::CONTENT_TYPE)], text)
}
