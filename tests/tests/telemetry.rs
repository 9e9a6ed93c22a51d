//! Traces and logs of a run as a collector and a reader of logs see them: real programs, OTLP over gRPC.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use serde_json::Value;
use sgcl_patchset::Store;
use sgcl_tests::{Programs, Run};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// A span, as it was received.
#[derive(Clone, Debug)]
struct Span {
    trace: String,
    id: String,
    parent: String,
    name: String,
    service: String,
    process: String,
    attributes: BTreeMap<String, String>,
    nanoseconds: u64,
}

/// A collector that keeps what it gets.
#[derive(Clone, Default)]
struct Collector {
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Collector {
    /// Listens, and says where.
    async fn start() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let collector = Self::default();
        let service = TraceServiceServer::new(collector.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        (collector, format!("http://{address}"))
    }

    fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap().clone()
    }
}

fn attributes(list: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &any_value::Value| match value {
        any_value::Value::StringValue(text) => text.clone(),
        any_value::Value::IntValue(number) => number.to_string(),
        any_value::Value::BoolValue(truth) => truth.to_string(),
        other => format!("{other:?}"),
    };
    let value = |pair: &KeyValue| pair.value.as_ref().and_then(|value| value.value.as_ref()).map(text);
    list.iter().map(|pair| (pair.key.clone(), value(pair).unwrap_or_default())).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.spans.lock().unwrap();
        for of_process in request.into_inner().resource_spans {
            let resource = attributes(&of_process.resource.unwrap().attributes);
            for span in of_process.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                spans.push(Span {
                    trace: hex(&span.trace_id),
                    id: hex(&span.span_id),
                    parent: hex(&span.parent_span_id),
                    name: span.name,
                    service: resource["service.name"].clone(),
                    process: resource["process.pid"].clone(),
                    attributes: attributes(&span.attributes),
                    nanoseconds: span.end_time_unix_nano - span.start_time_unix_nano,
                });
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

struct Place {
    _folder: tempfile::TempDir,
    bucket: PathBuf,
    data: String,
}

async fn place() -> Place {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("patches").display().to_string();
    support::patch_set(&Store::open(&data).unwrap(), 2, 7).await;
    Place { bucket: folder.path().join("bucket"), data, _folder: folder }
}

/// Trains on `nodes` nodes of one rank, told what the environment says.
async fn train(place: &Place, nodes: &str, epochs: &str, environment: Vec<(&'static str, String)>) -> Run {
    let programs = Programs::find().unwrap().with(environment);
    let bucket = place.bucket.display().to_string();
    let mut words = vec!["run", "--local", "--nodes", nodes, "--name", "traced", "--output", "json"];
    words.extend(["--data", &place.data, "--bucket", &bucket]);
    // Of one key the last value counts.
    words.extend(support::SMALL.iter().chain([&epochs]).flat_map(|set| ["--set", set]));
    let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
    let call = move || programs.call(&words.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    tokio::task::spawn_blocking(call).await.unwrap()
}

/// Sends the first node home once the run has got somewhere.
async fn drain(bucket: &Path) {
    let programs = Programs::find().unwrap();
    let bucket = bucket.display().to_string();
    let step = |programs: &Programs| -> u64 {
        let Ok(told) = programs.call(&["status", "traced", "--bucket", &bucket, "--output", "json"]) else { return 0 };
        serde_json::from_str::<Value>(&told.stdout).ok().and_then(|status| status["step"].as_u64()).unwrap_or(0)
    };
    for look in 0.. {
        if step(&programs) >= 2 {
            break;
        }
        assert!(look < 600, "the run gets nowhere");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let _ = programs.call(&["drain", "traced", "0", "--bucket", &bucket]).unwrap().success();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_tells_a_run_from_the_command_to_the_ranks() {
    let place = place().await;
    let (collector, endpoint) = Collector::start().await;
    let environment = vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint),
        ("OTEL_BSP_SCHEDULE_DELAY", "200".into()),
        ("SGCL_TRACE_STEPS", "5".into()),
        ("SGCL_LOG", "info".into()),
        ("SGCL_LOG_FORMAT", "json".into()),
    ];
    let (run, ()) = tokio::join!(train(&place, "2", "epochs=6", environment), drain(&place.bucket));
    let run = run.success();
    let spans = collector.spans();
    let named = |name: &str| spans.iter().filter(|span| span.name == name).collect::<Vec<_>>();
    let found: BTreeSet<&str> = spans.iter().map(|span| span.name.as_str()).collect();

    let wanted = [
        "sgclctl run",
        "admission",
        "coordinate",
        "lease",
        "node",
        "rank",
        "sgcl.v1.Coordinator/Join",
        "sgcl.v1.Coordinator/Rank",
        "rendezvous",
        "epoch",
        "step",
        "load",
        "learn",
        "snapshot",
        "upload",
        "commit",
        "regroup",
        "export",
    ];
    let missing: Vec<_> = wanted.iter().filter(|name| !found.contains(**name)).collect();
    assert!(missing.is_empty(), "no span of {missing:?}, only {found:?}\n{}", run.stderr);

    // One trace, one beginning.
    let root = named("sgclctl run")[0];
    assert!(spans.iter().all(|span| span.trace == root.trace), "{spans:#?}");
    let by_id: BTreeMap<&str, &Span> = spans.iter().map(|span| (span.id.as_str(), span)).collect();
    // The outermost span of a process that was killed, as on a node that is sent home, is never told.
    let roots: Vec<_> = spans.iter().filter(|span| span.parent.is_empty()).map(|span| span.name.as_str()).collect();
    assert_eq!(roots, ["sgclctl run"]);

    // From process to process: by the environment downwards, by gRPC metadata back up.
    let parent = |span: &Span| by_id[span.parent.as_str()];
    let told = |name: &str| named(name).into_iter().filter(|span| by_id.contains_key(span.parent.as_str()));
    let ranks: BTreeSet<_> = named("rank").iter().map(|span| span.process.clone()).collect();
    assert!(!ranks.is_empty());
    for rank in told("rank").filter(|rank| by_id.contains_key(parent(rank).parent.as_str())) {
        let (node, coordinate) = (parent(rank), parent(parent(rank)));
        assert_eq!((rank.service.as_str(), node.name.as_str()), ("sgcl-worker", "node"));
        assert_eq!((coordinate.name.as_str(), coordinate.service.as_str()), ("coordinate", "sgclctl"));
        assert_eq!(parent(coordinate).id, root.id);
        assert_ne!(rank.process, node.process);
    }
    assert!(told("sgcl.v1.Coordinator/Join").all(|span| parent(span).name == "node"));
    assert!(told("sgcl.v1.Coordinator/Rank").all(|span| parent(span).name == "rank"));
    assert!(named("sgcl.v1.Coordinator/Rank").iter().all(|span| span.process == root.process));

    // Steps are sampled, and their parts lie in them.
    assert!(named("step").iter().all(|span| span.attributes["step"].parse::<u64>().unwrap() % 5 == 0));
    assert!(told("learn").all(|span| parent(span).name == "step"));
    let regroup = named("regroup")[0];
    assert!(regroup.nanoseconds > 0 && regroup.attributes["failure"] == "false", "{regroup:?}");

    // Lines of ranks reach the command's standard error as they are, and lead back to the trace.
    let lines = run.stderr.lines().filter(|line| line.starts_with('{'));
    let lines: Vec<Value> = lines.map(|line| serde_json::from_str(line).expect(line)).collect();
    let joined: Vec<&Value> = lines.iter().filter(|line| line["message"] == "joined").collect();
    assert!(joined.len() >= 2, "{}", run.stderr);
    for line in &lines {
        assert_eq!(line["trace_id"], root.trace.as_str(), "{line}");
    }
    for line in joined {
        assert_eq!(line["run"], "traced", "{line}");
        assert!(line["generation"].as_u64() >= Some(1) && line["rank"].is_u64() && line["node"].is_string(), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_answers_nothing_is_in_nobodys_way() {
    let place = place().await;
    // Takes connections and says nothing, which is worse than a port that is closed.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let environment = vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{}", silent.local_addr().unwrap())),
        ("OTEL_BSP_SCHEDULE_DELAY", "100".into()),
        // More spans than the queue has room for.
        ("OTEL_BSP_MAX_QUEUE_SIZE", "4".into()),
        ("SGCL_TRACE_STEPS", "1".into()),
    ];
    let run = train(&place, "1", "epochs=1", environment).await.success();
    assert!(run.stdout.lines().last().unwrap().contains("finished"), "{}", run.stdout);
}

/// The collector of the OpenTelemetry project reads what was sent, where one is installed (`make test-observability` builds it).
#[tokio::test(flavor = "multi_thread")]
async fn the_opentelemetry_collector_takes_the_spans_of_a_run() {
    let Some(program) = std::env::var_os("SGCL_OTELCOL") else {
        eprintln!("skipped: SGCL_OTELCOL names no OpenTelemetry collector (`make test-observability` builds one)");
        return;
    };
    let place = place().await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = serde_json::json!({
        "receivers": { "otlp": { "protocols": { "grpc": { "endpoint": format!("127.0.0.1:{port}") } } } },
        "exporters": { "debug": { "verbosity": "detailed" } },
        "service": {
            "pipelines": { "traces": { "receivers": ["otlp"], "exporters": ["debug"] } },
            "telemetry": { "metrics": { "level": "none" } },
        },
    });
    let folder = place.bucket.parent().unwrap().to_owned();
    std::fs::write(folder.join("collector.yaml"), config.to_string()).unwrap();
    let (out, log) = (folder.join("collector.log"), std::fs::File::create(folder.join("collector.log")).unwrap());
    let mut collector = tokio::process::Command::new(program)
        .arg(format!("--config={}", folder.join("collector.yaml").display()))
        .stdout(std::process::Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    for _ in 0..100 {
        if std::fs::read_to_string(&out).unwrap().contains("Everything is ready") {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    let environment = vec![("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://127.0.0.1:{port}"))];
    let run = train(&place, "2", "epochs=1", environment).await.success();
    // It writes everything out before it ends.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(collector.id().unwrap().try_into().unwrap()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    collector.wait().await.unwrap();
    let text = std::fs::read_to_string(&out).unwrap();
    let values = |key: &str| -> BTreeSet<&str> {
        let lines = text.lines().filter_map(|line| line.trim().strip_prefix(key)?.trim().strip_prefix(": "));
        lines.map(str::trim).collect()
    };
    assert_eq!(values("Trace ID").len(), 1, "{text}\n{}", run.stderr);
    let names = values("Name");
    for name in ["sgclctl run", "coordinate", "node", "rank", "epoch", "snapshot", "upload", "commit", "export"] {
        assert!(names.contains(name), "no {name} in {names:?}");
    }
    for service in ["sgclctl", "sgcl-worker"] {
        assert!(text.contains(&format!("service.name: Str({service})")), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_cannot_be_are_told_and_change_nothing_else() {
    let place = place().await;
    let environment = vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318".into()),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf".into()),
        ("SGCL_LOG", "warn".into()),
    ];
    let run = train(&place, "1", "epochs=1", environment).await.success();
    assert!(run.stderr.contains("traces are not exported: OTEL_EXPORTER_OTLP_PROTOCOL"), "{}", run.stderr);
}
