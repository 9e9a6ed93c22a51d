//! The report of a run, opened in a browser as a user would.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::Value;
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

#[test]
fn the_report_is_whole_at_400_and_1400_pixels_in_light_and_dark_without_a_console_message() {
    let folder = tempfile::tempdir().unwrap();
    run_in(folder.path());
    let file = report(folder.path());
    let mut browser = Browser::start();
    let mut grounds = Vec::new();
    for width in [400, 1400] {
        for dark in [false, true] {
            let what = format!("{width} px, {}", if dark { "dark" } else { "light" });
            let said = browser.open(&file, width, dark);
            assert!(said.is_empty(), "{what}: the console says {said:?}");
            assert_eq!(browser.evaluate("innerWidth"), width, "{what}");
            let scroll = browser.evaluate("document.documentElement.scrollWidth").as_u64().unwrap();
            assert!(scroll <= u64::from(width), "{what}: the page is {scroll} px wide");
            assert_eq!(browser.evaluate(CUT), Value::Array(Vec::new()), "{what}");
            let broken = browser.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length");
            assert_eq!(broken, 0, "{what}: pictures that do not show");
            grounds.push(browser.evaluate("getComputedStyle(document.body).backgroundColor"));
            if let Some(shots) = std::env::var_os("SGCL_SCREENSHOTS") {
                let name = format!("report-{width}-{}.png", if dark { "dark" } else { "light" });
                browser.screenshot(&PathBuf::from(shots).join(name));
            }
        }
    }
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
    assert_eq!(count(".chart svg"), 3);
    assert_eq!(count(".chart polyline"), 6, "four losses, throughput, learning rate");
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
