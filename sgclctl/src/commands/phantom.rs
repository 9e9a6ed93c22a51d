//! `phantom`: slides to try everything on.

use anyhow::Result;
use serde_json::json;
use sgcl_phantom::{Phantom, bcss, hardness::hardness, nucls};

use crate::cli::{PhantomArgs, PhantomLayout};
use crate::exit::Exit;
use crate::output::{Out, percent};
use crate::progress;

/// Side of the patches that hardness is measured on.
const PATCH_PX: u32 = 128;

pub(crate) async fn main(args: PhantomArgs, out: Out) -> Result<Exit> {
    if args.layout == PhantomLayout::Nucls {
        return fields(args, out).await;
    }
    let bar = progress::bar(out, args.slides, "{msg} {wide_bar:.cyan/dim} {pos}/{len} slides");
    bar.set_message("drawing");
    let mut files = Vec::new();
    for slide in 0..args.slides {
        let (folder, name) = (args.out.clone(), format!("phantom-{slide:02}"));
        let drawn = tokio::task::spawn_blocking(move || match args.layout {
            PhantomLayout::Bcss => bcss::write(&folder, args.seed, slide, args.size),
            _ => Phantom::draw(args.seed, slide, args.size)?.write(&folder, &name),
        });
        files.push(drawn.await??);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let colour = if args.hardness {
        Some(tokio::task::spawn_blocking(move || hardness(args.seed, args.slides, args.size, PATCH_PX)).await??)
    } else {
        None
    };
    if out.json() {
        let colour = colour.map(|h| json!({ "accuracy": h.accuracy, "chance": h.chance, "patches": h.patches }));
        out.json_line(&json!({ "slides": files, "classes": sgcl_phantom::CLASSES, "colour_histogram_knn": colour }))?;
        return Ok(Exit::Done);
    }
    for file in &files {
        out.data(file.display())?;
    }
    if let Some(found) = colour {
        out.data(format!(
            "colour alone (kNN over histograms, across slides) finds {} of {} patches' classes; guessing finds {}",
            percent(found.accuracy),
            found.patches,
            percent(found.chance)
        ))?;
    }
    Ok(Exit::Done)
}

/// Fields in NuCLS's layout.
async fn fields(args: PhantomArgs, out: Out) -> Result<Exit> {
    let bar = progress::bar(out, args.slides, "{msg} {wide_bar:.cyan/dim} {pos}/{len} slides");
    bar.set_message("drawing");
    let mut files = Vec::new();
    for slide in 0..args.slides {
        let (folder, PhantomArgs { seed, size, fields, field_px, .. }) = (args.out.clone(), &args);
        let (seed, size, fields, field_px) = (*seed, *size, *fields, *field_px);
        let drawn =
            tokio::task::spawn_blocking(move || nucls::write_slide(&folder, seed, slide, size, fields, field_px));
        files.extend(drawn.await??);
        bar.inc(1);
    }
    nucls::write_folds(&args.out, args.slides)?;
    bar.finish_and_clear();
    if out.json() {
        out.json_line(&json!({ "fields": files }))?;
        return Ok(Exit::Done);
    }
    for file in &files {
        out.data(file.display())?;
    }
    Ok(Exit::Done)
}
