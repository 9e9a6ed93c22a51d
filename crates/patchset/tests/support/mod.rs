//! Small patch sets for tests.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::sync::Arc;

use object_store::memory::InMemory;
use object_store::path::Path;
use sgcl_patchset::{Manifest, Opened, PatchSetWriter, SlideInfo, Store, WriterOptions};

pub(crate) fn seed() -> u64 {
    std::env::var("SGCL_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}

pub(crate) fn memory() -> Store {
    Store::from_parts(Arc::new(InMemory::new()), Path::from("some/prefix"), "mem://bucket/some/prefix")
}

/// A JPEG of one colour that tells slide and position.
pub(crate) fn jpeg(slide: u8, x: i32, y: i32) -> Vec<u8> {
    let px: u8 = 16;
    let (r, g) = (u8::try_from(x * 10).unwrap(), u8::try_from(y * 10).unwrap());
    let pixels: Vec<u8> =
        std::iter::repeat_n([r, g, slide * 20], usize::from(px) * usize::from(px)).flatten().collect();
    let mut out = Vec::new();
    jpeg_encoder::Encoder::new(&mut out, 95)
        .encode(&pixels, px.into(), px.into(), jpeg_encoder::ColorType::Rgb)
        .unwrap();
    out
}

pub(crate) fn info(slide: u8) -> SlideInfo {
    SlideInfo {
        name: format!("slide {slide}"),
        source: format!("/somewhere/{slide}.svs"),
        fingerprint: "v1".into(),
        level: 0,
        mpp: Some(0.5),
        width: 400,
        height: 400,
        grid: [20, 20],
        spatial: true,
    }
}

pub(crate) fn options() -> WriterOptions {
    let mut options = WriterOptions::new(16, 95, seed());
    options.settings.insert("mpp".into(), 0.5.into());
    options
}

pub(crate) async fn open(store: &Store, options: WriterOptions) -> PatchSetWriter {
    match PatchSetWriter::open(store.clone(), options).await.unwrap() {
        Opened::Writer(writer) => writer,
        Opened::Complete(_) => panic!("the set is there already"),
    }
}

/// Stages a slide of `side` × `side` patches; the class says the half they lie in.
pub(crate) async fn stage(writer: &PatchSetWriter, slide: u8, side: i32) {
    let mut open = writer.slide(info(slide)).unwrap();
    // Not row-major, as threads would finish them.
    for x in (0..side).rev() {
        for y in 0..side {
            let class = if x < side / 2 { "stroma" } else { "tumour" };
            open.push(x, y, Some(class), &jpeg(slide, x, y)).unwrap();
        }
    }
    open.preview(jpeg(slide, 0, 0));
    assert_eq!(open.finish().await.unwrap(), u32::try_from(side * side).unwrap());
}

/// A set of `slides` slides of `side` × `side` patches.
pub(crate) async fn write(store: &Store, slides: u8, side: i32, options: WriterOptions) -> Manifest {
    let writer = open(store, options).await;
    for slide in 0..slides {
        stage(&writer, slide, side).await;
    }
    writer.finish(|_, _| {}).await.unwrap()
}

/// Draws a layout: `tests/oracles/layouts.py` with these arguments.
pub(crate) fn layout(arguments: &[&str]) {
    let python = std::env::var_os("SGCL_PYTHON").expect("SGCL_PYTHON is not set; run `make setup`");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracles/layouts.py");
    let out =
        std::process::Command::new(python).arg(script).args(arguments).env_remove("LD_LIBRARY_PATH").output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// A path as text.
pub(crate) fn text(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}
