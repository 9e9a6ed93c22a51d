//! What a node tells Prometheus, where somebody asked for it: its own state, and what its ranks last reported.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use sgcl_telemetry::metrics::Exposition;
use sgcl_telemetry::metrics::catalogue as of;
use tokio::net::TcpListener;

use crate::measures::{Report, Times};

/// A node at one moment. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct NodeMetrics {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    connected: bool,
    preempting: bool,
    /// Newest report of each rank process that runs, by its place on the node.
    ranks: BTreeMap<u32, Report>,
    running: usize,
    /// Ended rank processes by exit code.
    exits: BTreeMap<i32, u64>,
}

impl NodeMetrics {
    /// The line to the coordinator stands, or does not.
    pub(crate) fn connected(&self, connected: bool) {
        self.state().connected = connected;
    }

    /// The node was told to leave.
    pub(crate) fn preempting(&self) {
        self.state().preempting = true;
    }

    /// So many rank processes run.
    pub(crate) fn running(&self, running: usize) {
        self.state().running = running;
    }

    /// A rank's report.
    pub(crate) fn told(&self, local_rank: u32, report: Report) {
        self.state().ranks.insert(local_rank, report);
    }

    /// A rank process ended.
    pub(crate) fn exited(&self, local_rank: u32, code: i32) {
        let mut state = self.state();
        state.ranks.remove(&local_rank);
        *state.exits.entry(code).or_default() += 1;
    }

    /// Answers on `port`, on all addresses, until the process ends.
    ///
    /// # Errors
    /// The port is taken.
    pub(crate) async fn serve(&self, port: u16, run: &str, node: &str) -> Result<()> {
        let listener = match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
            Ok(listener) => listener,
            Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
                .await
                .with_context(|| format!("metrics: cannot listen on port {port}; --metrics-port names another"))?,
        };
        tracing::info!(port = listener.local_addr().map_or(port, |address| address.port()), "metrics are served");
        let (metrics, run, node) = (self.clone(), run.to_owned(), node.to_owned());
        let answer = move || {
            let text = metrics.exposition(&run, &node);
            async move { ([(CONTENT_TYPE, Exposition::CONTENT_TYPE)], text) }
        };
        let router = Router::new().route("/metrics", get(answer));
        tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "metrics are served no more");
            }
        });
        Ok(())
    }

    fn exposition(&self, run: &str, node: &str) -> String {
        let state = self.state();
        let mut out = Exposition::new(vec![("run", run.to_owned()), ("node", node.to_owned())]);
        out.process();
        out.put(&of::NODE_RANKS, state.running);
        out.all(&of::NODE_EXITS, state.exits.iter().map(|(code, count)| ([code.to_string()], *count)));
        out.put(&of::NODE_CONNECTED, state.connected);
        out.put(&of::NODE_PREEMPTING, state.preempting);
        let ranks: Vec<(String, &Report)> =
            state.ranks.iter().map(|(local_rank, report)| (local_rank.to_string(), report)).collect();
        let each = |value: fn(&Report) -> Option<f64>| {
            ranks.iter().map(move |(rank, report)| ([rank.as_str()], value(report))).collect::<Vec<_>>()
        };
        let times = |value: fn(&Report) -> Times| {
            ranks.iter().map(move |(rank, report)| ([rank.as_str()], value(report))).collect::<Vec<_>>()
        };
        out.all(&of::RANK_RANK, each(|report| Some(report.rank as f64)));
        out.all(&of::RANK_GENERATION, each(|report| Some(report.generation as f64)));
        out.all(&of::RANK_STEPS, each(|report| Some(report.steps() as f64)));
        out.all(&of::RANK_PATCHES, each(|report| Some(report.patches as f64)));
        out.histogram(&of::RANK_STEP_SECONDS, times(|report| report.step));
        out.all(&of::RANK_LOAD_SECONDS, each(|report| Some(report.load)));
        out.histogram(&of::RANK_RENDEZVOUS, times(|report| report.rendezvous));
        out.histogram(&of::RANK_SNAPSHOT, times(|report| report.snapshot));
        out.histogram(&of::RANK_UPLOAD, times(|report| report.upload));
        out.all(&of::RANK_UPLOADED, each(|report| Some(report.uploaded as f64)));
        out.all(&of::RANK_MEMORY, each(|report| report.memory.map(|bytes| bytes as f64)));
        out.text()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn what_is_exposed_is_the_list_and_every_metric_of_it_has_a_sample() {
        let metrics = NodeMetrics::default();
        metrics.connected(true);
        metrics.exited(1, 139);
        metrics.told(0, Report { rank: 2, memory: Some(1), ..Report::default() });
        let text = metrics.exposition("first", "first-0-0");
        let listed: BTreeSet<&str> = of::EVERYWHERE.iter().chain(of::WORKER).map(|metric| metric.name).collect();
        let typed = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
        assert_eq!(typed.collect::<BTreeSet<_>>(), listed);
        for name in listed {
            let own = |line: &str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', '_']));
            assert!(text.lines().any(own), "no sample of {name} in\n{text}");
        }
        let line = "sgcl_rank_rank{run=\"first\",node=\"first-0-0\",local_rank=\"0\"} 2";
        assert!(text.lines().any(|found| found == line), "{text}");
        assert!(text.contains("sgcl_node_rank_exits_total{run=\"first\",node=\"first-0-0\",code=\"139\"} 1\n"));
    }

    #[test]
    fn a_rank_that_has_ended_is_told_no_more() {
        let metrics = NodeMetrics::default();
        metrics.told(0, Report::default());
        metrics.exited(0, 0);
        assert!(!metrics.exposition("first", "first-0-0").contains("local_rank=\"0\""));
    }
}
