//! What an operator sees: the list of metrics, and that programs, dashboard, alerts and documents name those and no others.
//!
//! Prometheus itself reads the rules, and a real worker, where `prometheus` and `promtool` are installed (`make test-observability`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stderr)]

mod support;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use sgcl_patchset::Store;
use sgcl_telemetry::metrics::{Kind, catalogue};
use sgcl_tests::Programs;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/observability")
}

fn read(name: &str) -> String {
    std::fs::read_to_string(folder().join(name)).unwrap()
}

/// A file that is made from something else. `SGCL_UPDATE=1` writes it.
fn held(name: &str, wanted: &str) {
    if std::env::var_os("SGCL_UPDATE").is_some() {
        std::fs::write(folder().join(name), wanted).unwrap();
    }
    assert!(
        read(name) == wanted,
        "deploy/observability/{name} is not what it is made from; SGCL_UPDATE=1 cargo test -p sgcl-tests --test observability writes it"
    );
}

/// Names under which Prometheus stores what is in the list.
fn stored() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for metric in catalogue::ALL.into_iter().flat_map(|(_, list)| list) {
        match metric.kind {
            Kind::Histogram => names.extend(["_bucket", "_sum", "_count"].map(|end| format!("{}{end}", metric.name))),
            Kind::Counter | Kind::Gauge => drop(names.insert(metric.name.to_owned())),
        }
    }
    names
}

/// Words of an expression that are metrics of ours.
fn named(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("sgcl_") || word.starts_with("process_")).collect()
}

#[test]
fn the_list_of_metrics_is_written_down_with_type_labels_and_meaning() {
    let mut text = "# Metrics\n\nPrinted from `crates/telemetry/src/metrics/catalogue.rs`. Units are in the names: seconds, bytes, ratios \
                    from 0 to 1; all else counts.\nMetrics of workers have the labels `run` and `node` besides.\n"
        .to_owned();
    for (who, list) in catalogue::ALL {
        writeln!(text, "\n## {who}\n\n| metric | type | labels | meaning |\n|---|---|---|---|").unwrap();
        for metric in list {
            let labels = metric.labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", ");
            writeln!(text, "| `{}` | {} | {labels} | {} |", metric.name, metric.kind.word(), metric.help).unwrap();
        }
    }
    held("METRICS.md", &text);
}

#[test]
fn names_follow_prometheus_conventions() {
    let mut seen = BTreeSet::new();
    for metric in catalogue::ALL.into_iter().flat_map(|(_, list)| list) {
        let name = metric.name;
        assert!(seen.insert(name), "{name} is listed twice");
        assert_eq!(metric.kind == Kind::Counter, name.ends_with("_total"), "{name}");
        assert!(metric.kind != Kind::Histogram || name.ends_with("_seconds"), "{name}");
        assert!(!["_ms", "_millis", "_minutes", "_percent", "_kb", "_mb"].iter().any(|unit| name.ends_with(unit)));
        assert!(metric.help.ends_with('.') && metric.help.len() > 8, "{name}: {}", metric.help);
        assert!(name.starts_with("sgcl_") || catalogue::EVERYWHERE.iter().any(|other| other.name == name), "{name}");
    }
}

#[test]
fn dashboard_and_alerts_ask_for_metrics_that_there_are() {
    let known = stored();
    let dashboard: Value = serde_json::from_str(&read("dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let graphs: Vec<&Value> = panels.iter().filter(|panel| panel["type"] != "row").collect();
    assert!(graphs.len() > 15);
    let mut asked = String::new();
    for panel in graphs {
        let text = |key: &str| panel[key].as_str().unwrap_or_default().to_owned();
        assert!(!text("title").is_empty() && !text("description").is_empty(), "{panel}");
        assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{}: no unit", panel["title"]);
        for target in panel["targets"].as_array().unwrap() {
            let expression = target["expr"].as_str().unwrap();
            assert!(!named(expression).is_empty(), "{}: {expression}", panel["title"]);
            writeln!(asked, "{expression}").unwrap();
        }
    }
    let alerts: Value = serde_saphyr::from_str(&read("alerts.yaml")).unwrap();
    let mut rules = 0;
    for rule in alerts["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap()) {
        rules += 1;
        let alert = rule["alert"].as_str().unwrap();
        assert!(["info", "warning", "critical"].contains(&rule["labels"]["severity"].as_str().unwrap()), "{alert}");
        for key in ["summary", "description"] {
            assert!(rule["annotations"][key].as_str().is_some_and(|text| text.len() > 15), "{alert}: no {key}");
        }
        let expression = rule["expr"].as_str().unwrap();
        assert!(!named(expression).is_empty(), "{alert}: {expression}");
        writeln!(asked, "{expression}").unwrap();
    }
    assert!(rules > 10);
    let unknown: Vec<&str> = named(&asked).into_iter().filter(|name| !known.contains(*name)).collect();
    assert!(unknown.is_empty(), "nobody exposes {unknown:?}");
    // What the operator's own file says of series, too.
    let tested = read("alerts_test.yaml");
    let unknown: Vec<&str> = named(&tested).into_iter().filter(|name| !known.contains(*name)).collect();
    assert!(unknown.is_empty(), "nobody exposes {unknown:?}");
}

#[test]
fn the_operators_rules_are_the_same_rules() {
    let alerts = read("alerts.yaml");
    let groups = alerts.split_once("groups:\n").unwrap().1;
    let head = "# Printed from alerts.yaml; change it there.\napiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\n\
                metadata:\n  name: sgcl\n  namespace: sgcl\nspec:\n  groups:\n";
    let indented: String = groups.lines().map(|line| format!("  {line}\n")).collect();
    held("prometheus-rule.yaml", &format!("{head}{indented}"));
    let rule: Value = serde_saphyr::from_str(&read("prometheus-rule.yaml")).unwrap();
    let plain: Value = serde_saphyr::from_str(&alerts).unwrap();
    assert_eq!(rule["spec"]["groups"], plain["groups"]);
}

#[test]
fn monitors_ask_at_ports_that_pods_have() {
    let monitors = read("monitors.yaml");
    let monitors: Vec<Value> = monitors.split("\n---\n").map(|text| serde_saphyr::from_str(text).unwrap()).collect();
    let port = |name: &str| {
        let of = json!({ "app.kubernetes.io/name": name });
        let found = monitors.iter().find(|monitor| monitor["spec"]["selector"]["matchLabels"] == of).unwrap();
        found["spec"]["podMetricsEndpoints"][0]["port"].clone()
    };
    // `metrics` is the name in coordinator/src/kube/job.rs, `http` in the Deployment.
    assert_eq!((port("sgcl-worker"), port("sgcl-coordinator")), (json!("metrics"), json!("http")));
    let base = std::fs::read_to_string(folder().join("../sgcl.yaml")).unwrap();
    assert!(base.contains("- name: http\n              containerPort: 8080"));
    assert!(base.contains("- port: metrics\n          protocol: TCP"), "no network policy lets Prometheus in");
}

/// A program by its variable, or on the path.
fn installed(variable: &str, name: &str) -> Option<PathBuf> {
    let set = std::env::var_os(variable).map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        set.or_else(|| std::env::split_paths(&path).map(|folder| folder.join(name)).find(|path| path.is_file()));
    if found.is_none() {
        eprintln!("skipped: {name} is not installed (`make test-observability` fetches it, {variable} names one)");
    }
    found
}

#[test]
fn prometheus_takes_the_rules_and_each_alert_fires_when_it_should() {
    let Some(promtool) = installed("SGCL_PROMTOOL", "promtool") else { return };
    for words in [["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]] {
        let out = Command::new(&promtool).args(words).current_dir(folder()).output().unwrap();
        assert!(out.status.success(), "{words:?}: {}", String::from_utf8_lossy(&[out.stdout, out.stderr].concat()));
    }
}

/// What a server answers a GET with.
fn get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    head.starts_with("HTTP/1.1 200").then(|| body.to_owned())
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Waits for something that comes in time or not at all.
fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    for _ in 0..600 {
        if let Some(found) = look() {
            return found;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("{what}: nothing within a minute");
}

/// Ends with its value.
struct Child(std::process::Child);

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workers_node_tells_the_listed_metrics_of_its_ranks_while_they_train() {
    let place = tempfile::tempdir().unwrap();
    let data = place.path().join("patches").display().to_string();
    support::patch_set(&Store::open(&data).unwrap(), 2, 7).await;
    tokio::task::spawn_blocking(move || scraped(place.path(), &data)).await.unwrap();
}

fn scraped(place: &Path, data: &str) {
    let port = free_port();
    let programs = Programs::find().unwrap().with(vec![("SGCL_METRICS_PORT", port.to_string())]);
    let bucket = place.join("bucket").display().to_string();
    let sets = ["epochs=2000", "views.global_px=32", "views.local_px=32", "batch.per_rank=8", "device=cpu"];
    let small = [
        "objective.negatives=64",
        "objective.hard=4",
        "objective.nearest=16",
        "kmeans.clusters=4",
        "kmeans.iterations=5",
    ];
    let mut words = vec!["run", "--local", "--ranks-per-node", "2", "--name", "told", "--output", "json"];
    words.extend(["--data", data, "--bucket", &bucket]);
    words.extend(sets.iter().chain(&small).flat_map(|set| ["--set", set]));
    let mut command = programs.sgclctl(&words);
    let _run = Child(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());

    let steps = |text: &str, rank: &str| -> Option<f64> {
        let start = format!("sgcl_rank_steps_total{{run=\"told\",node=\"told-0-0\",local_rank=\"{rank}\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&start)?.parse().ok())
    };
    let text = wait("steps of both ranks", || {
        let text = get(port, "/metrics")?;
        (steps(&text, "0")? > 1.0 && steps(&text, "1")? > 1.0).then_some(text)
    });
    let listed: BTreeSet<&str> =
        catalogue::EVERYWHERE.iter().chain(catalogue::WORKER).map(|metric| metric.name).collect();
    let typed = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    assert_eq!(typed.collect::<BTreeSet<_>>(), listed);
    let all = "{run=\"told\",node=\"told-0-0\"}";
    for line in [format!("sgcl_node_ranks{all} 2"), format!("sgcl_node_coordinator_connected{all} 1")] {
        assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
    }
    assert!(text.contains("sgcl_rank_rendezvous_seconds_count{run=\"told\",node=\"told-0-0\",local_rank=\"1\"} 1\n"));

    let Some(prometheus) = installed("SGCL_PROMETHEUS", "prometheus") else { return };
    let (rules, config, at) = (folder().join("alerts.yaml"), place.join("prometheus.yaml"), free_port());
    let scrape = json!({
        "rule_files": [rules.canonicalize().unwrap()],
        "scrape_configs": [{ "job_name": "sgcl", "scrape_interval": "1s", "honor_labels": true,
            "static_configs": [{ "targets": [format!("127.0.0.1:{port}")] }] }],
    });
    // JSON is YAML.
    std::fs::write(&config, scrape.to_string()).unwrap();
    let mut command = Command::new(prometheus);
    command.arg(format!("--config.file={}", config.display()));
    command.arg(format!("--storage.tsdb.path={}", place.join("tsdb").display()));
    command.arg(format!("--web.listen-address=127.0.0.1:{at}"));
    let _prometheus = Child(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let answer = wait("Prometheus to have asked the worker", || {
        let answer: Value = serde_json::from_str(&get(at, "/api/v1/query?query=sgcl_rank_steps_total")?).ok()?;
        (answer["data"]["result"].as_array()?.len() == 2).then_some(answer)
    });
    assert_eq!(answer["data"]["result"][0]["metric"]["run"], "told", "{answer}");
    let names: Value = serde_json::from_str(&get(at, "/api/v1/label/__name__/values").unwrap()).unwrap();
    let names: BTreeSet<&str> = names["data"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let lost: Vec<&str> =
        listed.into_iter().filter(|name| !names.iter().any(|found| found.starts_with(*name))).collect();
    // Nothing has ended yet.
    assert_eq!(lost, ["sgcl_node_rank_exits_total"]);
}
