//! Slides are a pure function of their seed, and colour alone does not solve them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use sgcl_phantom::{CLASSES, GLASS, Phantom, PhantomError, hardness::hardness, nucls};

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

#[test]
fn fields_are_cut_out_of_their_slide_and_every_nucleus_is_dark_inside_its_box() {
    let (dir, seed, side, px) = (tempfile::tempdir().unwrap(), seed(), 1024, 128);
    let pictures = nucls::write_slide(dir.path(), seed, 1, side, 4, px).unwrap();
    let slide = Phantom::draw(seed, 1, side).unwrap();
    let mut nuclei = 0;
    for picture in &pictures {
        let name = picture.file_stem().unwrap().to_str().unwrap();
        let part = |key: &str| -> u32 {
            let rest = name.split_once(key).expect(name).1;
            rest.split('_').next().unwrap().parse().expect(name)
        };
        let (left, top) = (part("_left-"), part("_top-"));
        assert_eq!((part("_right-") - left, part("_bottom-") - top), (px, px), "{name}");
        let field = image::open(picture).unwrap().to_rgb8();
        for (x, y, pixel) in field.enumerate_pixels() {
            let at = 3 * ((top + y) * side + left + x) as usize;
            assert_eq!(pixel.0, slide.pixels[at..at + 3], "seed {seed}, {name}, {x}, {y}");
        }
        let mean: u64 = field.pixels().map(|p| u64::from(p.0[0])).sum::<u64>() / u64::from(px * px);
        let table = std::fs::read_to_string(dir.path().join("csv").join(format!("{name}.csv"))).unwrap();
        for line in table.lines().skip(1) {
            let corner: Vec<u32> = line.split(',').skip(5).take(4).map(|text| text.parse().expect(line)).collect();
            let &[x0, y0, x1, y1] = corner.as_slice() else { panic!("{line}") };
            assert!(x0 < x1 && x1 <= px && y0 < y1 && y1 <= px, "seed {seed}, {name}: {line}");
            // Haematoxylin takes red light away.
            let inside = (y0..y1).flat_map(|y| (x0..x1).map(move |x| (x, y)));
            let darkest = inside.map(|(x, y)| u64::from(field.get_pixel(x, y).0[0])).min().unwrap();
            assert!(darkest <= mean, "seed {seed}, {name}: {line}: {darkest}, mean {mean}");
            nuclei += 1;
        }
    }
    assert!(nuclei > 20, "seed {seed}: {nuclei} nuclei");
    assert!(matches!(nucls::write_slide(dir.path(), 0, 0, 256, 1, 512), Err(PhantomError::Field { .. })));
}

#[test]
fn every_slide_is_tested_on_in_one_fold_and_learnt_from_in_the_others() {
    let dir = tempfile::tempdir().unwrap();
    nucls::write_folds(dir.path(), 7).unwrap();
    let slides = |fold: u32, part: &str| -> Vec<String> {
        let file = dir.path().join(format!("train_test_splits/fold_{fold}_{part}.csv"));
        let text = std::fs::read_to_string(file).unwrap();
        assert!(text.starts_with(",slide_name,hospital,type,fold\n"), "{text}");
        text.lines().skip(1).map(|line| line.split(',').nth(1).unwrap().to_owned()).collect()
    };
    let mut tested = Vec::new();
    for fold in 1..=5 {
        let (train, test) = (slides(fold, "train"), slides(fold, "test"));
        assert_eq!(train.len() + test.len(), 7);
        assert!(test.iter().all(|slide| !train.contains(slide)), "fold {fold}");
        tested.extend(test);
    }
    tested.sort();
    tested.dedup();
    assert_eq!(tested.len(), 7);
}
