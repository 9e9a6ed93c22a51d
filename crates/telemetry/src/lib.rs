//! Logs and traces of every program of sgcl.
//!
//! **Logs** go to standard error: lines for people, or with `SGCL_LOG_FORMAT=json` an object a line with the run, the node, the generation,
//! the rank and the trace it belongs to. `SGCL_LOG` filters them.
//!
//! **Traces** are one a run. A program goes on with the trace that its environment names ([`VARIABLE`], W3C's traceparent) or begins one,
//! and hands it on: to processes it starts in their environment, to those it speaks with in gRPC metadata ([`HEADER`]). Spans leave over
//! OTLP (gRPC) where `OTEL_EXPORTER_OTLP_ENDPOINT` names a collector; otherwise they are not even made. They wait in a queue of bounded
//! length and are dropped where that is full, so that nothing ever waits for a collector.

mod context;
mod export;
mod json;
pub mod metrics;

use std::time::Duration;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tokio::runtime::Handle;
use tracing::{Level, Subscriber};
use tracing_subscriber::filter::{FilterExt as _, Targets, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::JsonFields;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer, fmt};

pub use context::{HEADER, Traceparent, VARIABLE, begin, current, elapsed, follow};
pub use json::{fact, plain};
pub use opentelemetry::Value;

/// Longest wait for the last spans to leave when a program ends.
const LAST_SPANS: Duration = Duration::from_millis(500);
/// Variables that a program which starts others elsewhere hands on to them. None of them is a secret.
pub const HANDED_ON: [&str; 8] = [
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG",
    "OTEL_BSP_SCHEDULE_DELAY",
    "SGCL_TRACE_STEPS",
    "SGCL_LOG",
    "SGCL_LOG_FORMAT",
];

/// A program, to its logs and traces.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Its `service.name`.
    pub name: &'static str,
    /// Its `service.version`.
    pub version: &'static str,
    /// What is logged where `SGCL_LOG` says nothing.
    pub level: &'static str,
    /// Whether its logs are JSON where `SGCL_LOG_FORMAT` says nothing.
    pub json: bool,
}

/// Sends the last spans when it is dropped, which takes at most half a second. Must go before the runtime does.
#[derive(Debug)]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(provider) = &self.provider {
            // A collector that does not answer has been told of already.
            let _ = provider.shutdown_with_timeout(LAST_SPANS);
        }
    }
}

/// Begins to log to `writer`, and to trace where the environment names a collector. What is wrong with its settings is logged, and
/// nothing else comes of it. Once a process.
pub fn init<W>(program: Program, runtime: &Handle, writer: W) -> Telemetry
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_from_env("SGCL_LOG").unwrap_or_else(|_| EnvFilter::new(program.level));
    let wanted = std::env::var("SGCL_LOG_FORMAT").unwrap_or_default();
    let json = match wanted.as_str() {
        "json" => true,
        "text" => false,
        _ => program.json,
    };
    let (provider, trouble) = match export::pipeline(program, runtime) {
        Ok(provider) => (provider, None),
        Err(error) => (None, Some(error)),
    };
    let traces = provider.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("sgcl"))
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            // Ours begin with this word; what libraries trace would make spans of the exports themselves.
            .with_filter(Targets::new().with_target("sgcl", Level::INFO))
    });
    if let Some(provider) = &provider {
        opentelemetry::global::set_tracer_provider(provider.clone());
        context::exporting();
    }
    tracing_subscriber::registry().with(traces).with(log(json, filter, writer)).init();
    if !["", "json", "text"].contains(&wanted.as_str()) {
        tracing::warn!("SGCL_LOG_FORMAT={wanted}: it may be text or json");
    }
    if let Some(error) = trouble {
        tracing::warn!("traces are not exported: {error}");
    }
    Telemetry { provider }
}

fn log<S, W>(json: bool, filter: EnvFilter, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let layer = fmt::layer().with_writer(writer).with_ansi(false);
    if json {
        layer.event_format(json::Json).fmt_fields(JsonFields::new()).with_filter(filter).boxed()
    } else {
        // Spans would stand before every line, and are made for traces alone.
        layer.without_time().with_filter(filter.and(filter_fn(|what| what.is_event()))).boxed()
    }
}
