//! `ingest`: slides, images and tile folders to a patch set.

use std::sync::Arc;

use anyhow::Result;
use serde_json::json;
use sgcl_patchset::Store;
use sgcl_patchset::ingest::{self, IngestOptions, IngestReport, Progress};

use crate::cli::IngestArgs;
use crate::exit::Exit;
use crate::output::{Out, count, warn};
use crate::{progress, table};

/// Skipped sources that fit a screen.
const SHOWN: usize = 20;

pub(crate) async fn main(args: IngestArgs, out: Out) -> Result<Exit> {
    let dest = Store::open(&args.to)?;
    let options = IngestOptions {
        quality: args.quality,
        label_min: args.label_min,
        tumor_min: args.tumor_min,
        seed: args.seed,
        list: args.list,
        previews: args.preview,
        dry_run: args.dry_run,
        ..args.tiling.options()
    };
    let bar = progress::bar(out, 0, "{msg} {wide_bar:.cyan/dim} {pos}/{len} tiles  {eta} left");
    let shown = bar.clone();
    let listener = Arc::new(move |progress: Progress| match progress {
        Progress::Slide { name, number, slides, tiles, of } => {
            shown.set_message(format!("[{}/{slides}] {name}", number + 1));
            shown.set_length(of);
            shown.set_position(tiles);
        }
        Progress::Deal { patches, of } => {
            shown.set_message("dealing patches into shards");
            shown.set_length(of);
            shown.set_position(patches);
        }
    });
    let report = ingest::ingest(&args.slides, &dest, &options, listener).await;
    bar.finish_and_clear();
    let report = report?;
    show(&report, &dest, args.dry_run, out)?;
    Ok(if report.skipped.is_empty() { Exit::Done } else { Exit::Data })
}

fn show(report: &IngestReport, dest: &Store, dry_run: bool, out: Out) -> Result<()> {
    if out.json() {
        let slides: Vec<_> = report
            .slides
            .iter()
            .map(|s| {
                json!({ "name": s.name, "patches": s.kept, "dropped": s.dropped, "labelled": s.labelled, "mpp": s.mpp,
                    "resumed": s.resumed })
            })
            .collect();
        let skipped: Vec<_> =
            report.skipped.iter().map(|s| json!({ "source": s.source, "reason": s.reason })).collect();
        let patches = report.manifest.as_ref().map(|m| m.patches);
        return out.json_line(&json!({ "to": dest.url(), "patches": patches, "slides": slides, "skipped": skipped }));
    }
    let rows = report.slides.iter().map(|slide| {
        let mpp = slide.mpp.map_or_else(|| "?".to_owned(), |mpp| format!("{mpp:.3}"));
        let note = if slide.resumed { "read before" } else { "" };
        let known = |number: Option<u64>| number.map_or_else(|| "?".to_owned(), count);
        [slide.name.clone(), count(slide.kept), known(slide.dropped), known(slide.labelled), mpp, note.to_owned()]
    });
    out.data(table::text(&["slide", "patches", "dropped", "labelled", "µm/px", ""], rows.collect()))?;
    match &report.manifest {
        Some(manifest) => out.data(format!(
            "{} patches of {} slide(s) in {} shard(s): {}",
            count(manifest.patches),
            manifest.slides.len(),
            manifest.shards.len(),
            dest.url()
        ))?,
        None if dry_run => out.data("dry run: no patch set was written")?,
        None => {}
    }
    let label = console::style("skipped:").yellow().bold().for_stderr();
    for skipped in report.skipped.iter().take(SHOWN) {
        warn(format!("{label} {}: {}", skipped.source, skipped.reason));
    }
    if let Some(more @ 1..) = report.skipped.len().checked_sub(SHOWN) {
        warn(format!("{label} and {more} more; --output json names them all"));
    }
    Ok(())
}
