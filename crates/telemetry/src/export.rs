//! Spans on their way to a collector, over OTLP's gRPC.

use std::env;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_otlp::tonic_types::transport::ClientTlsConfig;
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _, WithTonicConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SdkTracerProvider, SpanData, SpanExporter as Exporter};
use tokio::runtime::Handle;

use crate::Program;

/// Longest wait for a collector's answer. Spans queue up meanwhile, 2,048 of them (`OTEL_BSP_MAX_QUEUE_SIZE`); the others are dropped.
const ANSWER: Duration = Duration::from_secs(3);

/// What takes spans, where the environment names a collector.
///
/// # Errors
/// What is wrong with the settings, and the remedy.
pub(crate) fn pipeline(program: Program, runtime: &Handle) -> Result<Option<SdkTracerProvider>, String> {
    let set = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let named = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"].into_iter().find_map(set);
    let Some(endpoint) = named else { return Ok(None) };
    if set("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return Ok(None);
    }
    let protocols = ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"];
    if let Some(protocol) = protocols.into_iter().find_map(set).filter(|protocol| protocol != "grpc") {
        return Err(format!(
            "OTEL_EXPORTER_OTLP_PROTOCOL={protocol}, and spans leave over grpc alone; unset it, and name the collector's gRPC port (4317)"
        ));
    }
    let mut exporter = SpanExporter::builder().with_tonic();
    if set("OTEL_EXPORTER_OTLP_TIMEOUT").is_none() {
        exporter = exporter.with_timeout(ANSWER);
    }
    if endpoint.starts_with("https:") {
        exporter = exporter.with_tls_config(ClientTlsConfig::new().with_enabled_roots());
    }
    // The connection lives on this runtime; it is made at the first export.
    let _inside = runtime.enter();
    let exporter = exporter.build().map_err(|error| format!("{error}; it may be http://collector:4317"))?;
    let resource = Resource::builder()
        .with_service_name(program.name)
        .with_attribute(KeyValue::new("service.namespace", "sgcl"))
        .with_attribute(KeyValue::new("service.version", program.version))
        .with_attribute(KeyValue::new("process.pid", i64::from(std::process::id())))
        .build();
    let exporter = Told { exporter, told: AtomicBool::new(false) };
    Ok(Some(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build()))
}

/// Tells once that a collector does not take spans, and once that it does again.
struct Told {
    exporter: SpanExporter,
    told: AtomicBool,
}

impl fmt::Debug for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.exporter.fmt(f)
    }
}

impl Exporter for Told {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.exporter.export(batch).await;
        let failed = result.is_err();
        if self.told.swap(failed, Ordering::Relaxed) != failed {
            match &result {
                Err(error) => tracing::warn!("the collector does not take spans, they are dropped: {error}"),
                Ok(()) => tracing::info!("the collector takes spans again"),
            }
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}
