//! Slides are a pure function of their seed, and colour alone does not solve them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use sgcl_phantom::{CLASSES, GLASS, Phantom, PhantomError, hardness::hardness};

/// Seed of the draws: `SGCL_SEED`, 0 when unset.
fn seed() -> u64 {
    std::env::var("SGCL_SEED").map_or(0, |text| text.parse().expect("SGCL_SEED is a number"))
}

#[test]
fn the_same_seed_writes_the_same_bytes_and_another_seed_or_slide_others() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, seed, slide| {
        Phantom::draw(seed, slide, 700).unwrap().write(dir.path(), name).unwrap();
        ["tif", "labels.png", "labels.json"]
            .map(|kind| std::fs::read(dir.path().join(format!("{name}.{kind}"))).unwrap())
    };
    let seed = seed();
    let first = write("first", seed, 0);
    assert!(first == write("again", seed, 0), "seed {seed}");
    for (name, other) in [("seed", write("seed", seed + 1, 0)), ("slide", write("slide", seed, 1))] {
        assert!(first[0] != other[0] && first[1] != other[1], "another {name} draws the same; seed {seed}");
    }
}

#[test]
fn labels_are_classes_or_glass_and_glass_is_blank() {
    let seed = seed();
    let phantom = Phantom::draw(seed, 0, 1024).unwrap();
    let raster = phantom.raster_side();
    assert_eq!(phantom.labels.len(), (raster * raster) as usize);
    assert!(phantom.labels.iter().all(|&label| label == GLASS || usize::from(label) < CLASSES.len()), "seed {seed}");
    // The corner is outside every outline: its pixels are the scanner's white.
    assert_eq!(phantom.labels[0], GLASS);
    assert!(phantom.pixels[..3].iter().all(|&value| value >= 222), "seed {seed}: {:?}", &phantom.pixels[..3]);
}

#[test]
fn colour_histograms_do_not_solve_the_slides() {
    let seed = seed();
    let found = hardness(seed, 4, 2048, 128).unwrap();
    assert!(found.patches > 300, "seed {seed}: {found:?}");
    assert!(found.accuracy > 1.0 / CLASSES.len() as f64, "a histogram knows something; seed {seed}: {found:?}");
    assert!(found.accuracy < 0.6, "seed {seed}: {found:?}");
}

#[test]
fn hardness_of_a_single_slide_is_refused() {
    // Votes come from other slides; with none, a figure would mean nothing.
    assert!(matches!(hardness(0, 1, 512, 128), Err(PhantomError::Series(1))));
}

#[test]
fn a_side_that_is_not_drawn_is_refused() {
    assert!(matches!(Phantom::draw(0, 0, 100), Err(PhantomError::Side(100))));
}
