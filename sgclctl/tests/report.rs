//! The report of a run, opened in a browser as a user would.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::{Value, json};
use sgcl_patchset::Store;
use support::browser::Browser;
use support::store::{CLASSES, finished_run};

fn sgclctl(folder: &Path, arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_sgclctl")).current_dir(folder).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn run_in(folder: &Path) {
    let open = |name: &str| Store::open(folder.join(name).to_str().unwrap()).unwrap();
    tokio::runtime::Runtime::new().unwrap().block_on(finished_run(open));
}

fn report(folder: &Path) -> PathBuf {
    let (code, _, err) = sgclctl(folder, &["report", "first", "--bucket", "bucket", "--out", "report.html"]);
    assert_eq!(code, 0, "{err}");
    assert!(!err.contains("left out"), "{err}");
    folder.join("report.html")
}

/// Whatever sticks out of the page or is cut off by its box; what scrolls within itself is not.
const CUT: &str = r#"(() => {
  const scrolls = e => { for (; e; e = e.parentElement) { if (['auto', 'scroll'].includes(getComputedStyle(e).overflowX)) return true; } };
  const name = e => e.tagName + '.' + (e.className.baseVal ?? e.className) + ' ' + e.textContent.slice(0, 40);
  const out = [];
  for (const e of document.body.querySelectorAll('*')) {
    const box = e.getBoundingClientRect();
    if (box.width && (box.right > innerWidth + 0.5 || box.left < -0.5) && !scrolls(e)) out.push('outside: ' + name(e));
    const style = getComputedStyle(e);
    if (style.overflowX === 'hidden' && e.scrollWidth > e.clientWidth + 1 && !e.closest('.frame')) out.push('cut: ' + name(e));
  }
  for (const svg of document.querySelectorAll('svg')) {
    const view = svg.viewBox.baseVal;
    for (const text of svg.querySelectorAll('text')) {
      const box = text.getBBox();
      if (box.x < 0 || box.x + box.width > view.width || box.y + box.height > view.height) out.push('svg: ' + text.textContent);
    }
  }
  return out;
})()"#;

/// Opens a page narrow and wide, in light and in dark: nothing sticks out or is cut off, all pictures show, the console is silent.
/// Returns the colours of the ground.
fn looked_at(browser: &mut Browser, page: &Path, name: &str) -> Vec<Value> {
    let mut grounds = Vec::new();
    for width in [400, 1400] {
        for dark in [false, true] {
            let what = format!("{name}, {width} px, dark {dark}");
            let said = browser.open(page, width, dark);
            assert!(said.is_empty(), "{what}: {said:?}");
            assert_eq!(browser.evaluate("innerWidth"), width, "{what}");
            let scroll = browser.evaluate("document.documentElement.scrollWidth").as_u64().unwrap();
            assert!(scroll <= u64::from(width), "{what}: the page is {scroll} px wide");
            assert_eq!(browser.evaluate(CUT), Value::Array(Vec::new()), "{what}");
            let broken = browser.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length");
            assert_eq!(broken, 0, "{what}: pictures that do not show");
            grounds.push(browser.evaluate("getComputedStyle(document.body).backgroundColor"));
            if let Some(shots) = std::env::var_os("SGCL_SCREENSHOTS") {
                let file = format!("{name}-{width}-{}.png", if dark { "dark" } else { "light" });
                browser.screenshot(&PathBuf::from(shots).join(file));
            }
        }
    }
    grounds
}

#[test]
fn the_report_is_whole_at_400_and_1400_pixels_in_light_and_dark_without_a_console_message() {
    let folder = tempfile::tempdir().unwrap();
    run_in(folder.path());
    let file = report(folder.path());
    let mut browser = Browser::start();
    let grounds = looked_at(&mut browser, &file, "report");
    assert_ne!(grounds[0], grounds[1], "dark looks like light");
    assert_eq!(grounds[0], grounds[2]);
}

#[test]
fn the_report_shows_curves_slides_neighbours_probes_and_restarts() {
    let folder = tempfile::tempdir().unwrap();
    run_in(folder.path());
    let file = report(folder.path());
    let mut browser = Browser::start();
    browser.open(&file, 1400, false);
    let mut count =
        |selector: &str| browser.evaluate(&format!("document.querySelectorAll('{selector}').length")).as_u64().unwrap();
    assert_eq!(count(".chart svg"), 4);
    assert_eq!(count(".chart polyline"), 8, "four losses, two figures of the probe, throughput, learning rate");
    assert_eq!(count(".slide"), 4);
    assert_eq!(count(".slide .frame > img"), 4, "a slide without a preview is put together from its patches");
    assert_eq!(count(".by-class"), 4);
    assert_eq!(count(".by-cluster"), 3, "the held-out slide has no clusters");
    assert_eq!(count(".slide .tag"), 1);
    assert_eq!(count(".query"), 6);
    assert_eq!(count(".near .tile"), 36);
    assert!(count(".near .tile.same") > 30, "features that know the class find the class");
    assert_eq!(count("#probes thead + tbody > tr"), 2 + CLASSES.len() as u64);
    assert_eq!(count("#events tbody tr"), 4);

    // The tiles appear when asked for, and lie on the picture.
    assert_eq!(browser.evaluate("getComputedStyle(document.querySelector('.by-class')).display"), "none");
    browser.evaluate("document.querySelector('label[for=v-class]').click()");
    assert_eq!(browser.evaluate("getComputedStyle(document.querySelector('.by-class')).display"), "block");
    let text = browser.evaluate("document.body.innerText");
    let text = text.as_str().unwrap();
    for words in ["+23.1 points", "rank 1 of node first-0-0", "random", "lymphocytes", "objective.radius"] {
        assert!(text.contains(words), "{words:?} is not on the page");
    }
}

#[test]
fn the_report_needs_nothing_from_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    run_in(folder.path());
    let html = std::fs::read_to_string(report(folder.path())).unwrap();
    for outside in ["src=\"http", "href=\"http", "url(", "@import", "<script", "src=\"file"] {
        assert!(!html.contains(outside), "{outside}");
    }
}

#[test]
fn a_patch_set_that_is_gone_costs_the_pictures_alone() {
    let folder = tempfile::tempdir().unwrap();
    run_in(folder.path());
    std::fs::rename(folder.path().join("patches"), folder.path().join("moved")).unwrap();
    let (code, _, err) = sgclctl(folder.path(), &["report", "first", "--bucket", "bucket"]);
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("left out: pictures") && err.contains("--data"), "{err}");
    let html = std::fs::read_to_string(folder.path().join("report.html")).unwrap();
    assert!(html.contains("<polyline") && html.contains("Left out of this report"));
    let (code, _, err) = sgclctl(folder.path(), &["report", "first", "--bucket", "bucket", "--data", "moved"]);
    assert!(code == 0 && !err.contains("left out"), "{err}");
}

/// A worker that has found something already: two encoders under two protocols.
fn evaluation(folder: &Path) -> String {
    use std::os::unix::fs::PermissionsExt as _;

    let figure = |value: f64| json!({ "value": value, "low": value - 0.04, "high": value + 0.03, "resamples": 1000 });
    let protocol = |name: &str, value: f64| {
        let roc = CLASSES.map(|class| {
            json!({ "class": class, "area": value, "points": [[0.0, 0.0], [0.1, value], [0.5, 0.97], [1.0, 1.0]] })
        });
        let mistakes: Vec<Value> = (0..12)
            .map(|patch| {
                json!({ "patch": 20 * patch, "slide": "slide-0-with-a-rather-long-name", "x": patch, "y": 3,
                "true": CLASSES[1], "called": CLASSES[2], "probability": 0.91, "probability_of_true": 0.04 })
            })
            .collect();
        json!({ "protocol": name, "accuracy": figure(value), "balanced_accuracy": figure(value - 0.02),
            "macro_f1": figure(value - 0.03), "roc_auc": figure(value), "trials": 1, "train_patches": 1240, "roc": roc,
            "mistakes": mistakes, "confusion": [[120, 4, 9, 0], [6, 140, 2, 3], [11, 0, 78, 0], [0, 5, 0, 35]] })
    };
    let lines: Vec<String> = [("first-backbone.safetensors", 0.94), ("random", 0.71)]
        .map(|(weights, value)| {
            let result = json!({ "weights": weights, "classes": CLASSES, "train_patches": 1240, "test_patches": 413,
                "train_slides": 3, "test_slides": 2, "bootstrap": { "slides": 2, "resamples": 1000 }, "skipped": [],
                "knn": { "20": value }, "protocols": [protocol("knn-20", value), protocol("linear", value + 0.02)] });
            json!({ "result": result }).to_string()
        })
        .into();
    let worker = folder.join("worker");
    std::fs::write(&worker, format!("#!/bin/sh\ncat <<'E'\n{}\nE\n", lines.join("\n"))).unwrap();
    std::fs::set_permissions(&worker, std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_sgclctl"))
        .current_dir(folder)
        .env("SGCL_WORKER", &worker)
        .args(["eval", "--data", "patches", "--weights", "random", "--page", "eval.html"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_page_of_an_evaluation_is_whole_and_needs_nothing_from_elsewhere() {
    let folder = tempfile::tempdir().unwrap();
    run_in(folder.path());
    let table = evaluation(folder.path());
    for words in ["94.0 % (90.0–97.0)", "kNN-20 +23.0 points", "linear", "ROC-AUC"] {
        assert!(table.contains(words), "{words:?} is not in\n{table}");
    }
    let page = folder.path().join("eval.html");
    let mut browser = Browser::start();
    let grounds = looked_at(&mut browser, &page, "eval");
    assert_ne!(grounds[0], grounds[1], "dark looks like light");
    let mut count =
        |selector: &str| browser.evaluate(&format!("document.querySelectorAll('{selector}').length")).as_u64().unwrap();
    assert_eq!((count("#figures tbody tr"), count("details"), count("details[open]")), (4, 4, 4));
    assert_eq!((count("details svg polyline"), count(".confusion tbody tr")), (16, 16));
    assert_eq!(count(".mistakes img"), 48);
    let html = std::fs::read_to_string(page).unwrap();
    for outside in ["src=\"http", "href=\"http", "url(", "@import", "<script", "src=\"file"] {
        assert!(!html.contains(outside), "{outside}");
    }
}

#[test]
fn a_full_disk_is_named_and_leaves_no_half_written_report() {
    let folder = tempfile::tempdir().unwrap();
    run_in(folder.path());
    let (code, out, err) = sgclctl(folder.path(), &["report", "first", "--bucket", "bucket", "--out", "/dev/full"]);
    assert_eq!(code, 73, "{err}");
    assert!(err.contains("error: ") && err.contains("/dev/full") && err.contains("hint: free some space"), "{err}");
    assert!(out.is_empty());
}

#[test]
fn status_and_list_tell_the_run_from_the_bucket_alone() {
    let folder = tempfile::tempdir().unwrap();
    run_in(folder.path());
    std::fs::remove_dir_all(folder.path().join("patches")).unwrap();
    let (code, out, err) = sgclctl(folder.path(), &["status", "first", "--bucket", "bucket"]);
    assert_eq!(code, 0, "{err}");
    for words in ["finished", "8 of 8 epochs", "restarts   1", "kNN-20 91.4 %"] {
        assert!(out.contains(words), "{words:?} is not in\n{out}");
    }
    let (_, out, _) = sgclctl(folder.path(), &["status", "bucket/runs/first", "--output", "json"]);
    let status: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&status["phase"], &status["commit"]), (&"finished".into(), &1.into()));
    let (code, out, _) = sgclctl(folder.path(), &["list", "--bucket", "bucket"]);
    assert!(code == 0 && out.contains("first") && out.contains("100.0 %"), "{out}");
}
