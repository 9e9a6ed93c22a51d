//! `report`: gathers a run's facts and writes one HTML file, whole or not at all.

use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use askama::Template as _;
use serde_json::json;

use crate::cli::ReportArgs;
use crate::exit::Exit;
use crate::output::{Out, warn};
use crate::progress;
use crate::report::{Facts, Page, Wanted};

pub(crate) async fn main(args: ReportArgs, out: Out) -> Result<Exit> {
    let (run, _) = super::existing(&args.bucket.bucket, &args.run).await?;
    let bar = progress::bar(out, 0, "{spinner} {wide_msg}");
    let wanted = Wanted { data: args.data, slides: args.slides, queries: args.queries };
    let facts = Facts::gather(&run, &wanted, |what| {
        bar.set_message(what.to_owned());
        bar.tick();
    })
    .await;
    bar.finish_and_clear();
    let facts = facts?;
    for missing in &facts.missing {
        warn(format!("left out: {missing}"));
    }
    let missing = facts.missing.clone();
    let html = Page::new(facts).render()?;
    write(&args.out, html.as_bytes()).with_context(|| args.out.display().to_string())?;
    if out.json() {
        out.json_line(&json!({ "report": args.out, "bytes": html.len(), "left_out": missing }))?;
    } else {
        out.data(args.out.display())?;
    }
    Ok(Exit::Done)
}

/// Beside the target, then renamed over it; a target that is no plain file (a pipe, a device) is written as it is.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if path.exists() && !path.is_file() {
        std::fs::OpenOptions::new().write(true).open(path)?.write_all(bytes)?;
        return Ok(());
    }
    let mut name = path.file_name().context("is not a file name")?.to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = path.with_file_name(name);
    let written = std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, path));
    if written.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(&part);
    }
    Ok(written?)
}
