//! Slides, opened and read patch by patch for the worker.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Write};

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use sgcl_patchset::ingest::slides::{SlidePatches, SlideSource};
use sgcl_patchset::ingest::{IngestOptions, Skipped};
use sgcl_runstore::features::wire::{self, SlideHeader};
use sgcl_runstore::features::{Geometry, Output};
use tokio::runtime::Handle;
use tokio::sync::mpsc::UnboundedSender;

/// Patches read at once, on all cores; bounds the memory.
const CHUNK: usize = 128;

/// A slide's name, patches and microns per pixel.
pub(super) type Counted = (String, u64, Option<f64>);

/// Opens all slides and counts their patches.
pub(super) async fn count(
    slides: Vec<SlideSource>,
    options: &IngestOptions,
    bar: ProgressBar,
) -> Result<(Vec<Counted>, Vec<Skipped>)> {
    let options = options.clone();
    let counting = tokio::task::spawn_blocking(move || {
        let (mut opened, mut skipped) = (Vec::new(), Vec::new());
        for slide in slides {
            let name = slide.name().to_owned();
            match slide.open(&options) {
                Ok(patches) => opened.push((name, patches.len() as u64, patches.mpp())),
                Err(reason) => skipped.push(reason),
            }
            bar.inc(1);
        }
        (opened, skipped)
    });
    counting.await.context("opening slides ended abnormally")
}

/// Hands every slide to the worker but those that are complete; tells of these and of those that cannot be read. Ends early, without an
/// error, where the worker is gone: it has said why.
pub(super) async fn feed(
    slides: Vec<SlideSource>,
    options: IngestOptions,
    jpeg: Option<u8>,
    output: Output,
    worker: File,
    told: UnboundedSender<Value>,
) -> Result<()> {
    let runtime = Handle::current();
    let feeding = tokio::task::spawn_blocking(move || {
        let mut worker = BufWriter::with_capacity(1 << 20, worker);
        for slide in slides {
            let (name, fingerprint) = (slide.name().to_owned(), slide.fingerprint().to_owned());
            let source = slide.source().to_owned();
            let tell = |message: Value| {
                // Nobody shows it any more.
                let _ = told.send(json!({ "slide": message }));
            };
            if let Some(record) = runtime.block_on(output.complete(&name, &fingerprint))? {
                tell(json!({ "name": name, "patches": record.patches, "resumed": true }));
                continue;
            }
            let given = slide.open(&options).map(|patches| (header(&name, &fingerprint, &patches, &options), patches));
            let handed = match given {
                Ok((header, patches)) => hand_on(&header, &patches, jpeg, &mut worker),
                Err(skipped) => Ok(Err(skipped)),
            };
            match handed {
                Ok(Ok(())) => {}
                Ok(Err(skipped)) => tell(json!({ "name": name, "source": source, "skipped": skipped.reason })),
                Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
                Err(error) => return Err(anyhow::Error::from(error).context(format!("handing {name} to sgcl-worker"))),
            }
        }
        match worker.flush() {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
            _ => Ok(()),
        }
    });
    feeding.await.context("reading slides ended abnormally")?
}

fn header(name: &str, fingerprint: &str, patches: &SlidePatches, options: &IngestOptions) -> SlideHeader {
    SlideHeader {
        name: name.to_owned(),
        fingerprint: fingerprint.to_owned(),
        geometry: Geometry {
            patch_px: options.patch_px,
            mpp: patches.mpp(),
            downsample: Some(patches.downsample()),
            level0: Some(patches.level0()),
            overlap: patches.overlap(),
            spatial: true,
        },
        coords: patches.coords(),
    }
}

/// Hands a slide on patch by patch; the reason where it cannot be read to its end, and the worker forgets it.
fn hand_on(
    header: &SlideHeader,
    patches: &SlidePatches,
    jpeg: Option<u8>,
    worker: &mut impl Write,
) -> std::io::Result<Result<(), Skipped>> {
    wire::write_header(worker, header)?;
    let numbers: Vec<usize> = (0..patches.len()).collect();
    for chunk in numbers.chunks(CHUNK) {
        match patches.read_all(chunk, jpeg) {
            Ok(read) => {
                for patch in read {
                    wire::write_patch(worker, &patch.pixels)?;
                }
            }
            Err(skipped) => {
                wire::write_abandon(worker)?;
                return Ok(Err(skipped));
            }
        }
    }
    Ok(Ok(()))
}
