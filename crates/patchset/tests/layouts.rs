//! Ingest from the layouts that others publish: CLAM's and TRIDENT's coordinates, Camelyon16's polygons, NCT-CRC's class folders.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::path::PathBuf;
use std::sync::Arc;

use image::{Rgb, RgbImage};
use rstest::rstest;
use sgcl_patchset::ingest::{IngestError, IngestOptions, IngestReport, Scale, ingest};
use sgcl_patchset::{PatchSet, Store};
use support::{layout, text};
use tempfile::TempDir;

/// Side of a patch.
const PX: u32 = 32;

/// A slide of 256 × 256 px whose colour says where one is.
fn slide(folder: &TempDir, name: &str) -> PathBuf {
    let path = folder.path().join(format!("{name}.png"));
    RgbImage::from_fn(256, 256, |x, y| Rgb([x as u8, y as u8, 128])).save(&path).unwrap();
    path
}

fn options() -> IngestOptions {
    IngestOptions { patch_px: PX, scale: Scale::Level(0), ..IngestOptions::default() }
}

async fn run(folder: &TempDir, sources: &[PathBuf], options: &IngestOptions) -> Result<IngestReport, IngestError> {
    let to = folder.path().join("set");
    ingest(sources, &Store::open(text(&to)).unwrap(), options, Arc::new(|_| {})).await
}

/// Column, row and the colour in the middle of every patch.
async fn patches(folder: &TempDir) -> Vec<(i32, i32, [u8; 3])> {
    let set = PatchSet::open(text(&folder.path().join("set"))).await.unwrap();
    let reader = set.reader(None);
    let rows = 0..u32::try_from(set.len()).unwrap();
    rows.map(|id| {
        let (row, image) = (set.index().row(id).unwrap(), reader.decode_blocking(id).unwrap());
        let middle = 3 * (image.width * (image.height / 2) + image.width / 2) as usize;
        (row.x, row.y, [0, 1, 2].map(|channel| image.pixels[middle + channel]))
    })
    .collect()
}

/// Whether a colour is that of a place on the slide, as well as a JPEG keeps it.
fn is_from(colour: [u8; 3], x: u8, y: u8) -> bool {
    colour[0].abs_diff(x) < 8 && colour[1].abs_diff(y) < 8
}

#[tokio::test]
async fn places_of_trident_are_read_at_its_scale_and_laid_on_its_lattice() {
    let folder = tempfile::tempdir().unwrap();
    let slide = slide(&folder, "a");
    let file = folder.path().join("a_patches.h5");
    // 32 px at half the resolution with an overlap of 8: every 48 px of level 0.
    layout(&["trident", text(&file), "32", "64", "8", "[[10, 20], [58, 20], [154, 68]]"]);
    let report = run(&folder, &[slide, file], &options()).await.unwrap();
    assert_eq!((report.slides[0].kept, report.slides[0].dropped), (3, Some(0)));
    let found = patches(&folder).await;
    assert_eq!(found.iter().map(|p| (p.0, p.1)).collect::<Vec<_>>(), [(0, 0), (1, 0), (3, 1)]);
    for ((_, _, colour), (x, y)) in found.iter().zip([(10, 20), (58, 20), (154, 68)]) {
        assert!(is_from(*colour, x + 32, y + 32), "{colour:?} at {x}, {y}");
    }
    let set = PatchSet::open(text(&folder.path().join("set"))).await.unwrap();
    assert_eq!(set.manifest().slides[0].downsample, None, "columns and rows do not say where they are on the slide");
}

#[tokio::test]
async fn places_of_clam_are_taken_and_those_of_two_contours_that_meet_count_once() {
    let folder = tempfile::tempdir().unwrap();
    let slide = slide(&folder, "a");
    std::fs::create_dir(folder.path().join("patches")).unwrap();
    let file = folder.path().join("patches/a.h5");
    layout(&["clam", text(&file), "32", "0", "1", "[[0, 0], [32, 0], [64, 0], [65, 3], [128, 32]]"]);
    let report = run(&folder, &[slide, folder.path().join("patches")], &options()).await.unwrap();
    assert_eq!((report.slides[0].kept, report.slides[0].dropped), (4, Some(1)));
    let found = patches(&folder).await;
    assert_eq!(found.iter().map(|p| (p.0, p.1)).collect::<Vec<_>>(), [(0, 0), (1, 0), (2, 0), (4, 1)]);
    assert!(is_from(found[3].2, 128 + 16, 32 + 16), "{:?}", found[3]);
}

#[rstest]
#[case::size(&["trident", "F", "64", "64", "0", "[[0, 0], [64, 0]]"], "its patches are 64 px; call with --patch-px 64")]
#[case::lattice(&["trident", "F", "32", "32", "0", "[[0, 0], [45, 0]]"], "45, 0 is not on the lattice of 32 px")]
#[case::outside(&["trident", "F", "32", "32", "0", "[[0, 0], [320, 0]]"], "320, 0 lies outside the slide of 256×256 px")]
#[case::level(&["clam", "F", "32", "3", "8", "[[0, 0], [32, 0]]"], "patch_level is 3, but the slide has 1 level(s)")]
#[case::bare(&["other", "F"], "`coords` has no attribute patch_size")]
#[tokio::test]
async fn coordinates_that_do_not_fit_are_refused_with_the_file_and_the_reason(
    #[case] arguments: &[&str],
    #[case] says: &str,
) {
    let folder = tempfile::tempdir().unwrap();
    let slide = slide(&folder, "a");
    let file = folder.path().join("a.h5");
    let arguments: Vec<&str> = arguments.iter().map(|word| if *word == "F" { text(&file) } else { word }).collect();
    layout(&arguments);
    let error = run(&folder, &[slide, file.clone()], &options()).await.unwrap_err().to_string();
    assert!(error.contains(text(&file)) && error.contains(says), "{error}");
}

#[tokio::test]
async fn files_without_their_slides_and_slides_without_their_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (slide(&folder, "a"), slide(&folder, "b"));
    let file = folder.path().join("a.h5");
    layout(&["trident", text(&file), "32", "32", "0", "[[0, 0], [32, 0]]"]);
    let report = run(&folder, &[first.clone(), second.clone(), file.clone()], &options()).await.unwrap();
    assert_eq!(report.slides.len(), 1);
    assert!(report.skipped[0].source.ends_with("b.png") && report.skipped[0].reason.contains(".h5"), "{report:?}");
    let error = run(&folder, &[second, file.clone()], &options()).await.unwrap_err().to_string();
    assert!(error.contains("about a slide a, which is not among the sources"), "{error}");
    std::fs::remove_dir_all(folder.path().join("set")).unwrap();
    std::fs::write(folder.path().join("broken.h5"), "no HDF5").unwrap();
    let broken = slide(&folder, "broken");
    let error = run(&folder, &[broken, folder.path().join("broken.h5")], &options()).await.unwrap_err().to_string();
    assert!(error.contains("broken.h5: not an HDF5 file"), "{error}");
}

const TUMOUR: &str = r##"<?xml version="1.0"?>
<ASAP_Annotations>
	<Annotations>
		<Annotation Name="Annotation 0" Type="Polygon" PartOfGroup="_0" Color="#F4FA58">
			<Coordinates>
				<Coordinate Order="0" X="0" Y="0" />
				<Coordinate Order="1" X="128" Y="0" />
				<Coordinate Order="2" X="128" Y="80" />
				<Coordinate Order="3" X="0" Y="80" />
			</Coordinates>
		</Annotation>
		<Annotation Name="Annotation 1" Type="Polygon" PartOfGroup="_2" Color="#64FE2E">
			<Coordinates>
				<Coordinate Order="0" X="32" Y="0" />
				<Coordinate Order="1" X="64" Y="0" />
				<Coordinate Order="2" X="64" Y="30" />
				<Coordinate Order="3" X="32" Y="30" />
			</Coordinates>
		</Annotation>
	</Annotations>
	<AnnotationGroups>
		<Group Name="_0" PartOfGroup="None" Color="#00ff00"><Attributes /></Group>
		<Group Name="_2" PartOfGroup="None" Color="#64fe2e"><Attributes /></Group>
	</AnnotationGroups>
</ASAP_Annotations>
"##;

#[tokio::test]
async fn slides_of_camelyon16_are_labelled_by_their_polygons_less_holes() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tumor_001", "normal_001", "test_001"] {
        slide(&folder, name);
    }
    std::fs::create_dir(folder.path().join("lesion_annotations")).unwrap();
    std::fs::write(folder.path().join("lesion_annotations/tumor_001.xml"), TUMOUR).unwrap();
    let slides = ["tumor_001.png", "normal_001.png", "test_001.png"].map(|name| folder.path().join(name));
    let sources = [&slides[..], &[folder.path().join("lesion_annotations")]].concat();
    let options = IngestOptions { tissue_min: 0.0, ..options() };
    run(&folder, &sources, &options).await.unwrap();

    let set = PatchSet::open(text(&folder.path().join("set"))).await.unwrap();
    let classes = &set.manifest().classes;
    let label = |slide: &str, x: i32, y: i32| {
        let number = set.manifest().slide_number(slide).unwrap() as usize;
        let mut ids = set.manifest().slides[number].ids();
        let id = ids.find(|&id| set.index().row(id).is_some_and(|row| (row.x, row.y) == (x, y))).unwrap();
        set.index().label(id).map(|label| classes[usize::from(label)].as_str())
    };
    // Rows end at 80 px: half of row 2 is covered. The hole leaves a sixteenth of one patch.
    for (x, y, class) in
        [(0, 0, "tumor"), (1, 0, "normal"), (1, 1, "tumor"), (3, 2, "tumor"), (4, 0, "normal"), (0, 3, "normal")]
    {
        assert_eq!(label("tumor_001", x, y), Some(class), "{x}, {y}");
    }
    assert_eq!(label("normal_001", 0, 0), Some("normal"));
    assert_eq!(label("test_001", 0, 0), None, "nothing says what it is");
}

#[tokio::test]
async fn the_share_of_tumour_that_makes_a_label_is_an_option_and_broken_annotations_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let slide = slide(&folder, "tumor_001");
    let file = folder.path().join("tumor_001.xml");
    std::fs::write(&file, TUMOUR).unwrap();
    let options = IngestOptions { tissue_min: 0.0, tumor_min: 0.51, ..options() };
    run(&folder, &[slide.clone(), file.clone()], &options).await.unwrap();
    let set = PatchSet::open(text(&folder.path().join("set"))).await.unwrap();
    let tumours = |set: &PatchSet| {
        let class = set.manifest().classes.iter().position(|class| class == "tumor").unwrap();
        (0..64).filter(|&id| set.index().label(id) == u16::try_from(class).ok()).count()
    };
    assert_eq!(tumours(&set), 7, "two rows of four less the hole");

    std::fs::write(&file, &TUMOUR[..TUMOUR.len() / 2]).unwrap();
    std::fs::remove_dir_all(folder.path().join("set")).unwrap();
    let error = run(&folder, &[slide, file], &options).await.unwrap_err().to_string();
    assert!(error.contains("tumor_001.xml") && error.contains("breaks off"), "{error}");
}

#[tokio::test]
async fn nct_crc_goes_in_by_its_class_folders_and_every_labelled_set_has_its_split() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("CRC-VAL-HE-7K");
    let classes = ["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"];
    for class in classes {
        std::fs::create_dir_all(root.join(class)).unwrap();
    }
    layout(&["tiles", text(&root), "1"]);
    let options = IngestOptions { patch_px: 224, ..options() };
    let report = run(&folder, &[root], &options).await.unwrap();
    let manifest = report.manifest.unwrap();
    assert_eq!((manifest.patches, manifest.classes.clone()), (27, classes.map(str::to_owned).to_vec()));
    assert!(report.skipped.is_empty(), "{:?}", report.skipped);
    assert!(!manifest.slides[0].spatial, "they have no places");
    assert!(!folder.path().join("set/split.json").exists(), "one slide cannot be split");
}

#[tokio::test]
async fn the_split_is_by_slide_and_the_one_that_evaluation_draws() {
    let folder = tempfile::tempdir().unwrap();
    let mut sources = Vec::new();
    for number in 0..6 {
        sources.push(slide(&folder, &format!("tumor_{number}")));
        let file = folder.path().join(format!("tumor_{number}.xml"));
        std::fs::write(&file, TUMOUR).unwrap();
        sources.push(file);
    }
    let options = IngestOptions { tissue_min: 0.0, seed: 4, ..options() };
    run(&folder, &sources, &options).await.unwrap();
    let path = folder.path().join("set/split.json");
    let found: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let set = PatchSet::open(text(&folder.path().join("set"))).await.unwrap();
    let split = sgcl_patchset::split(set.manifest(), set.index(), 0.3, 4, 0).unwrap();
    let names = |side: &[u32]| -> Vec<String> {
        side.iter().map(|&number| set.manifest().slides[number as usize].name.clone()).collect()
    };
    assert_eq!(found["train"], serde_json::json!(names(&split.train)));
    assert_eq!(found["test"], serde_json::json!(names(&split.test)));
    assert_eq!((split.train.len(), split.test.len()), (4, 2));
    assert_eq!((&found["seed"], &found["data"]), (&4.into(), &set.manifest().content_id.clone().into()));
    let stored = async || sgcl_patchset::split::stored(set.store(), set.manifest(), set.index()).await;
    assert_eq!(stored().await.unwrap(), Some(split));

    // What is not this set's split is refused, and says why.
    let test = found["test"].as_array().unwrap();
    for (key, value, why) in [
        ("data", "another".into(), "other patches (another)"),
        ("version", 2.into(), "format version 2"),
        ("train", found["test"].clone(), "twice"),
        ("train", serde_json::json!([]), "does not name slide"),
        ("test", serde_json::json!([test[0], test[1], "tumor_9"]), "no slide \"tumor_9\""),
        ("train", 3.into(), "invalid type"),
    ] {
        let mut changed = found.clone();
        changed[key] = value;
        std::fs::write(&path, changed.to_string()).unwrap();
        let error = stored().await.unwrap_err().to_string();
        assert!(error.contains("split.json: ") && error.contains(why), "{why:?} is not in {error}");
    }

    // Lost, it comes back the same with the same call.
    std::fs::remove_file(&path).unwrap();
    assert_eq!(stored().await.unwrap(), None);
    run(&folder, &sources, &options).await.unwrap();
    assert_eq!(serde_json::from_slice::<serde_json::Value>(&std::fs::read(&path).unwrap()).unwrap(), found);
}
