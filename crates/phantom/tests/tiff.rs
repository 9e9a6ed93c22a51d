//! The pyramids are held against OpenSlide's own tools.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use sgcl_phantom::{TiffError, encode_pyramid};
use std::process::Command;

fn gradient(width: u32, height: u32) -> Vec<u8> {
    (0..height).flat_map(|y| (0..width).flat_map(move |x| [(x / 4) as u8, (y / 4) as u8, 128])).collect()
}

#[test]
fn openslide_opens_the_pyramid_with_levels_mpp_and_pixels() {
    let dir = tempfile::tempdir().unwrap();
    let (slide, region) = (dir.path().join("a.tiff"), dir.path().join("r.png"));
    std::fs::write(&slide, encode_pyramid(&gradient(1000, 700), 1000, 700, 0.5, 95).unwrap()).unwrap();
    let shown =
        Command::new("openslide-show-properties").arg(&slide).output().expect("openslide-tools: run `make setup`");
    let text = String::from_utf8_lossy(&shown.stdout);
    for wanted in [
        "openslide.level-count: '3'",
        "openslide.mpp-x: '0.5'",
        "openslide.level[2].width: '250'",
        "openslide.level[0].height: '700'",
    ] {
        assert!(text.contains(wanted), "no {wanted} in {text}{}", String::from_utf8_lossy(&shown.stderr));
    }
    let written = Command::new("openslide-write-png")
        .arg(&slide)
        .args(["400", "200", "0", "300", "300"])
        .arg(&region)
        .status()
        .unwrap();
    assert!(written.success());
    let pixel = *image::open(&region).unwrap().to_rgb8().get_pixel(200, 100);
    for (got, want) in pixel.0.iter().zip([150u8, 75, 128]) {
        assert!(got.abs_diff(want) <= 4, "{pixel:?}");
    }
}

#[test]
fn the_same_pixels_give_the_same_bytes() {
    let rgb = gradient(600, 300);
    assert_eq!(encode_pyramid(&rgb, 600, 300, 0.5, 90).unwrap(), encode_pyramid(&rgb, 600, 300, 0.5, 90).unwrap());
}

#[test]
fn a_buffer_of_the_wrong_length_is_refused() {
    assert!(matches!(encode_pyramid(&[0; 10], 4, 4, 0.5, 90), Err(TiffError::Size { .. })));
}
