//! A drawn pyramid through the installed OpenSlide.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::PathBuf;

use sgcl_openslide::{Level, OpenSlideError, Slide, knows};
use sgcl_phantom::encode_pyramid;

/// A slide of 1000 × 700 pixels of one colour, 0.5 µm each.
fn drawn(folder: &tempfile::TempDir) -> PathBuf {
    let path = folder.path().join("a.tiff");
    std::fs::write(&path, encode_pyramid(&[150, 75, 128].repeat(1000 * 700), 1000, 700, 0.5, 95).unwrap()).unwrap();
    path
}

#[test]
fn a_slide_has_its_levels_properties_and_pixels() {
    let folder = tempfile::tempdir().unwrap();
    let path = drawn(&folder);
    assert!(knows(&path).expect("libopenslide0: run `make setup`"));
    let slide = Slide::open(&path).unwrap();
    assert_eq!(slide.levels().len(), 3);
    assert_eq!(slide.levels()[2], Level { width: 250, height: 175, downsample: 4.0 });
    assert_eq!(slide.property("openslide.mpp-x").as_deref(), Some("0.5"));
    assert_eq!(slide.property("openslide.no-such-thing"), None);
    // The last pixel of the finest level, and one beyond it.
    let argb = slide.read_region(0, [999, 699], 2, 1).unwrap();
    let [alpha, red, green, blue] = argb[0].to_be_bytes();
    assert_eq!(alpha, 255);
    for (got, want) in [red, green, blue].into_iter().zip([150_u8, 75, 128]) {
        assert!(got.abs_diff(want) <= 4, "{:x}", argb[0]);
    }
    assert_eq!(argb[1], 0);
}

#[test]
fn what_is_no_slide_and_what_is_damaged_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("a.svs");
    std::fs::write(&text, "no slide").unwrap();
    assert!(!knows(&text).unwrap());
    assert_eq!(Slide::open(&text).map(drop), Err(OpenSlideError::Unknown));
    assert!(!knows(&folder.path().join("nowhere.svs")).unwrap());
    // Its tiles lie behind the directory: the head is whole and they are not.
    let path = drawn(&folder);
    let slide = Slide::open(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, [&bytes[..8], &vec![0; bytes.len() - 8]].concat()).unwrap();
    let read = slide.read_region(0, [0, 0], 64, 64).and_then(|_| Slide::open(&path).map(drop));
    assert!(matches!(read, Err(OpenSlideError::Failed(_) | OpenSlideError::Unknown)), "{read:?}");
}
