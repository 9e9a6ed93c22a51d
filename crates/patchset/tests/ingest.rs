//! Slides, images and tiles to a patch set.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use image::{Rgb, RgbImage};
use sgcl_patchset::ingest::{IngestError, IngestOptions, IngestReport, Scale, ingest};
use sgcl_patchset::{PatchSet, Store};

/// White glass with a pink square from (64, 64) to (192, 192).
fn slide(path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    RgbImage::from_fn(256, 256, |x, y| {
        if (64..192).contains(&x) && (64..192).contains(&y) { Rgb([200, 90, 150]) } else { Rgb([245, 245, 245]) }
    })
    .save(path)
    .unwrap();
}

fn tile(path: PathBuf, px: u32) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    RgbImage::from_pixel(px, px, Rgb([180, 60, 140])).save(path).unwrap();
}

fn options() -> IngestOptions {
    IngestOptions { patch_px: 32, scale: Scale::Level(0), ..IngestOptions::default() }
}

async fn run(sources: &[PathBuf], to: &Path, options: &IngestOptions) -> Result<IngestReport, IngestError> {
    ingest(sources, &Store::open(to.to_str().unwrap()).unwrap(), options, Arc::new(|_| {})).await
}

#[tokio::test]
async fn an_image_is_tiled_where_there_is_tissue_and_labelled_by_the_map_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("in/a.png");
    slide(&source);
    // Left half of the tissue is class 1, right half class 0.
    image::GrayImage::from_fn(16, 16, |x, _| image::Luma([if x < 8 { 1 } else { 0 }]))
        .save(dir.path().join("in/a.labels.png"))
        .unwrap();
    std::fs::write(dir.path().join("in/a.labels.json"), r#"{"classes":["right","left"],"downsample":16}"#).unwrap();
    let previews = dir.path().join("previews");
    let options = IngestOptions { previews: Some(previews.clone()), ..options() };
    let report = run(&[dir.path().join("in")], &dir.path().join("set"), &options).await.unwrap();

    let slide = &report.slides[0];
    assert_eq!((slide.kept, slide.dropped, slide.labelled), (16, Some(48), Some(16)));
    let set = PatchSet::open(dir.path().join("set").to_str().unwrap()).await.unwrap();
    let classes = &set.manifest().classes;
    for id in 0..16 {
        let row = set.index().row(id).unwrap();
        assert!((2..6).contains(&row.x) && (2..6).contains(&row.y), "{row:?} is where the tissue is");
        let class = &classes[usize::from(row.label.unwrap())];
        assert_eq!(class, if row.x < 4 { "left" } else { "right" });
    }
    let preview = image::open(previews.join("a.jpg")).unwrap().into_rgb8();
    assert_ne!(preview.get_pixel(64, 64), preview.get_pixel(70, 70), "a kept tile is outlined");
}

#[tokio::test]
async fn a_drawn_slide_goes_through_openslide_at_half_its_resolution() {
    let dir = tempfile::tempdir().unwrap();
    let drawn = sgcl_phantom::Phantom::draw(3, 0, 1024).unwrap();
    let slide = drawn.write(dir.path(), "drawn").unwrap();
    let options = IngestOptions { patch_px: 64, scale: Scale::Mpp(1.0), ..IngestOptions::default() };
    let report = run(&[slide], &dir.path().join("set"), &options).await.unwrap();
    let manifest = report.manifest.unwrap();
    assert_eq!((manifest.slides[0].grid, manifest.slides[0].mpp), ([8, 8], Some(1.0)));
    assert!(report.slides[0].kept > 20 && report.slides[0].labelled > Some(0), "{:?}", report.slides[0]);
}

#[tokio::test]
async fn tiles_of_the_folder_layout_keep_their_places_and_classes() {
    let dir = tempfile::tempdir().unwrap();
    for (class, x) in [("normal", 0), ("normal", 1), ("tumour", 2)] {
        tile(dir.path().join(format!("in/{class}/s1/s1_{x}_5_0.png")), 32);
    }
    let report = run(&[dir.path().join("in")], &dir.path().join("set"), &options()).await.unwrap();
    assert_eq!(report.manifest.unwrap().classes, ["normal", "tumour"]);
    let set = PatchSet::open(dir.path().join("set").to_str().unwrap()).await.unwrap();
    let rows: Vec<_> = (0..3).map(|id| set.index().row(id).unwrap()).map(|r| (r.x, r.y, r.label.unwrap())).collect();
    assert_eq!(rows, [(0, 5, 0), (1, 5, 0), (2, 5, 1)]);
    let preview = image::open(dir.path().join("set/previews/s1.jpg")).unwrap().into_rgb8();
    assert_eq!(preview.dimensions(), (192, 64), "the tiles in their places");
    assert!(preview.get_pixel(100, 30).0[1] < 100, "which are the tiles' pixels");
}

#[tokio::test]
async fn pixel_coordinates_in_tile_names_are_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    for x in 0..4 {
        tile(dir.path().join(format!("in/c/s1/s1_{}_0_0.png", x * 256)), 32);
    }
    let dry = IngestOptions { dry_run: true, ..options() };
    let error = run(&[dir.path().join("in")], &dir.path().join("set"), &dry).await.unwrap_err().to_string();
    assert!(error.contains("s1") && error.contains("256"), "a dry run says so too: {error}");
    let error = run(&[dir.path().join("in")], &dir.path().join("set"), &options()).await.unwrap_err().to_string();
    assert!(error.contains("s1") && error.contains("256"), "{error}");
    assert!(!dir.path().join("set/patchset.json").exists());
}

#[tokio::test]
async fn images_of_class_folders_become_mixed_groups_without_neighbours() {
    let dir = tempfile::tempdir().unwrap();
    for (class, number) in [("ADI", 0), ("ADI", 1), ("TUM", 0), ("TUM", 1)] {
        tile(dir.path().join(format!("in/{class}/{class}-{number:04}.tif")), 32);
    }
    let report = run(&[dir.path().join("in")], &dir.path().join("set"), &options()).await.unwrap();
    let manifest = report.manifest.unwrap();
    assert_eq!((manifest.patches, manifest.slides.len()), (4, 1));
    assert_eq!(manifest.classes, ["ADI", "TUM"]);
    let set = PatchSet::open(dir.path().join("set").to_str().unwrap()).await.unwrap();
    let mut xs = set.index().xs().to_vec();
    xs.sort_unstable();
    assert!(xs.windows(2).all(|pair| pair[1] - pair[0] >= 24), "{xs:?}");
}

#[tokio::test]
async fn a_damaged_image_of_a_class_folder_is_named_and_the_others_go_in() {
    let dir = tempfile::tempdir().unwrap();
    for root in ["one", "two"] {
        for number in 0..3 {
            tile(dir.path().join(format!("{root}/ADI/{root}-{number:04}.tif")), 32);
        }
    }
    std::fs::write(dir.path().join("one/ADI/one-0001.tif"), "torn").unwrap();
    let sources = ["one", "two"].map(|root| dir.path().join(root));
    let first = run(&sources, &dir.path().join("set"), &options()).await.unwrap();
    assert_eq!(first.manifest.as_ref().unwrap().patches, 5);
    assert_eq!(first.slides.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["loose-000", "loose-001"]);
    let [skipped] = &first.skipped[..] else { panic!("{:?}", first.skipped) };
    assert!(skipped.source.ends_with("one-0001.tif"), "{skipped:?}");
    let again = run(&sources, &dir.path().join("set"), &options()).await.unwrap();
    assert_eq!(again.skipped.len(), 1, "the same call again says that one is missing: {:?}", again.skipped);
}

#[tokio::test]
async fn a_palette_label_map_is_read_by_its_indices() {
    let dir = tempfile::tempdir().unwrap();
    slide(&dir.path().join("a.png"));
    // Two classes need one bit a pixel; the colours are such that their grey values are other numbers.
    let file = std::fs::File::create(dir.path().join("a.labels.png")).unwrap();
    let mut encoder = png::Encoder::new(file, 16, 16);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_depth(png::BitDepth::One);
    encoder.set_palette(vec![200, 30, 30, 30, 30, 200]);
    // Left half 0, right half 1.
    encoder.write_header().unwrap().write_image_data(&[0x00, 0xff].repeat(16)).unwrap();
    std::fs::write(dir.path().join("a.labels.json"), r#"{"classes":["left","right"],"downsample":16}"#).unwrap();
    let report = run(&[dir.path().join("a.png")], &dir.path().join("set"), &options()).await.unwrap();
    assert_eq!(report.slides[0].labelled, Some(16));
    let set = PatchSet::open(dir.path().join("set").to_str().unwrap()).await.unwrap();
    for id in 0..16 {
        let row = set.index().row(id).unwrap();
        assert_eq!(row.label, Some(u16::from(row.x >= 4)), "{row:?}");
    }
}

#[tokio::test]
async fn a_source_that_changed_after_its_set_was_finished_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("a.png");
    slide(&source);
    run(std::slice::from_ref(&source), &dir.path().join("set"), &options()).await.unwrap();
    RgbImage::from_pixel(512, 512, Rgb([180, 60, 140])).save(&source).unwrap();
    let again = run(&[source], &dir.path().join("set"), &options()).await.unwrap();
    assert!(again.skipped[0].reason.contains("changed since"), "{:?}", again.skipped);
}

#[tokio::test]
async fn what_cannot_be_read_is_named_and_the_set_holds_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    slide(&dir.path().join("in/good.png"));
    std::fs::write(dir.path().join("in/note.svs"), "not a slide").unwrap();
    let whole = std::fs::read(dir.path().join("in/good.png")).unwrap();
    std::fs::write(dir.path().join("in/torn.png"), &whole[..whole.len() / 2]).unwrap();
    let report = run(&[dir.path().join("in")], &dir.path().join("set"), &options()).await.unwrap();
    let skipped: Vec<_> = report.skipped.iter().map(|s| s.source.rsplit('/').next().unwrap()).collect();
    assert_eq!(skipped, ["note.svs", "torn.png"]);
    assert_eq!(report.manifest.unwrap().slides.len(), 1);
    let again = run(&[dir.path().join("in")], &dir.path().join("set"), &options()).await.unwrap();
    assert_eq!((again.slides.len(), again.skipped.len()), (1, 2), "the same call again says the same");

    let error = run(&[dir.path().join("in/note.svs")], &dir.path().join("none"), &options()).await.unwrap_err();
    assert!(matches!(error, IngestError::Nothing { .. }) && error.to_string().contains("note.svs"), "{error}");
    assert!(!dir.path().join("none/patchset.json").exists());
}

#[tokio::test]
async fn slides_beside_a_folder_of_images_are_not_lost_and_label_maps_are_not_slides() {
    let dir = tempfile::tempdir().unwrap();
    slide(&dir.path().join("in/a.png"));
    image::GrayImage::from_pixel(16, 16, image::Luma([0])).save(dir.path().join("in/a.labels.png")).unwrap();
    std::fs::write(dir.path().join("in/a.labels.json"), r#"{"classes":["tissue"],"downsample":16}"#).unwrap();
    tile(dir.path().join("in/ADI/ADI-0000.tif"), 32);
    let report = run(&[dir.path().join("in")], &dir.path().join("set"), &options()).await.unwrap();
    let names: Vec<_> = report.slides.iter().map(|slide| slide.name.as_str()).collect();
    assert_eq!(names, ["a", "loose-000"]);
    let files: Vec<PathBuf> = ["a.png", "a.labels.png", "a.labels.json"].map(|f| dir.path().join("in").join(f)).into();
    let report = run(&files, &dir.path().join("files"), &options()).await.unwrap();
    assert_eq!((report.slides.len(), report.skipped.len()), (1, 0));
}

#[tokio::test]
async fn a_slide_without_resolution_says_which_options_help() {
    let dir = tempfile::tempdir().unwrap();
    slide(&dir.path().join("a.png"));
    let wanted = IngestOptions { scale: Scale::Mpp(0.5), ..options() };
    let error = run(&[dir.path().join("a.png")], &dir.path().join("set"), &wanted).await.unwrap_err().to_string();
    assert!(error.contains("--level") && error.contains("--assume-mpp"), "{error}");
    let known = IngestOptions { assume_mpp: Some(0.25), ..wanted };
    let report = run(&[dir.path().join("a.png")], &dir.path().join("set"), &known).await.unwrap();
    assert_eq!(report.manifest.unwrap().slides[0].mpp, Some(0.5));
}

#[tokio::test]
async fn the_same_call_again_reads_nothing_and_another_setting_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    slide(&dir.path().join("a.png"));
    let sources = [dir.path().join("a.png")];
    let first = run(&sources, &dir.path().join("set"), &options()).await.unwrap();
    let again = run(&sources, &dir.path().join("set"), &options()).await.unwrap();
    assert!(again.slides[0].resumed && again.manifest == first.manifest);
    let other = IngestOptions { quality: 50, ..options() };
    let error = run(&sources, &dir.path().join("set"), &other).await.unwrap_err().to_string();
    assert!(error.contains("quality"), "{error}");
}

#[tokio::test]
async fn two_slides_of_one_name_are_refused_by_both_paths() {
    let dir = tempfile::tempdir().unwrap();
    for folder in ["x", "y"] {
        slide(&dir.path().join(folder).join("a.png"));
    }
    let sources = [dir.path().join("x/a.png"), dir.path().join("y/a.png")];
    let error = run(&sources, &dir.path().join("set"), &options()).await.unwrap_err().to_string();
    assert!(error.contains("x/a.png") && error.contains("y/a.png"), "{error}");
}
