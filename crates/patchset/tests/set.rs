//! Subsets and splits of a set.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::collections::HashSet;

use proptest::prelude::*;
use sgcl_patchset::{Manifest, NoSuchSlide, OpenError, PatchSet, SplitError, split};
use support::{info, jpeg, memory, open, options, write};

/// A set of one-patch-a-class slides: `slides[i]` lists the classes of slide i.
async fn labelled(slides: &[Vec<u8>]) -> PatchSet {
    let store = memory();
    let writer = open(&store, options()).await;
    for (number, classes) in slides.iter().enumerate() {
        let mut info = info(0);
        info.name = format!("s{number:03}");
        let mut slide = writer.slide(info).unwrap();
        for (x, class) in (0..).zip(classes) {
            slide.push(x, 0, Some(&format!("class {class}")), &jpeg(0, 0, 0)).unwrap();
        }
        slide.finish().await.unwrap();
    }
    writer.finish(|_, _| {}).await.unwrap();
    PatchSet::load(store).await.unwrap()
}

fn block<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

#[tokio::test]
async fn a_subset_keeps_ids_and_numbers_rows_without_gaps() {
    let store = memory();
    write(&store, 4, 3, options()).await;
    let set = PatchSet::load(store).await.unwrap();
    let subset = set.subset(&[3, 1, 3]).unwrap();
    assert_eq!((subset.slides(), subset.len()), (&[1, 3][..], 18));
    let ids: Vec<u32> = (9..18).chain(27..36).collect();
    assert_eq!(subset.rows(), ids);
    assert_eq!(subset.unused().iter().collect::<Vec<_>>(), ids);
    for (row, &id) in (0..).zip(&ids) {
        assert_eq!((subset.row_of(id), subset.id_of(row)), (Some(row), Some(id)));
    }
    assert_eq!([0, 8, 18, 26, 36].map(|id| subset.row_of(id)), [None; 5]);
    assert_eq!(subset.id_of(18), None);
    assert_eq!(set.everything(), set.subset(&[0, 1, 2, 3]).unwrap());
    assert_eq!(set.subset(&[4]), Err(NoSuchSlide { number: 4, slides: 4 }));
}

#[tokio::test]
async fn a_url_without_a_set_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let error = PatchSet::open(dir.path().to_str().unwrap()).await.unwrap_err();
    assert!(matches!(error, OpenError::Manifest(sgcl_patchset::ManifestError::Missing { .. })));
    assert!(error.to_string().contains("patchset.json: no patch set here"), "{error}");
}

#[tokio::test]
async fn one_slide_cannot_be_split() {
    let set = labelled(&[vec![0]]).await;
    assert_eq!(split(set.manifest(), set.index(), 0.5, 1, 0), Err(SplitError::TooFewSlides { slides: 1 }));
}

#[tokio::test]
async fn trials_draw_different_splits() {
    let set = labelled(&vec![vec![0]; 20]).await;
    let splits: HashSet<_> =
        (0..10).map(|trial| split(set.manifest(), set.index(), 0.3, 1, trial).unwrap().test).collect();
    assert!(splits.len() > 5, "{splits:?}");
    assert!(splits.iter().all(|test| test.len() == 6));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_split_parts_the_slides_and_has_every_class_of_single_class_slides_on_both_sides(
        classes in prop::collection::vec(0_u8..4, 2..40), fraction in 0.05_f64..0.95, seed: u64,
    ) {
        let slides: Vec<_> = classes.iter().map(|&c| vec![c]).collect();
        let set = block(labelled(&slides));
        let parts = split(set.manifest(), set.index(), fraction, seed, 0).unwrap();
        let mut all: Vec<_> = parts.train.iter().chain(&parts.test).copied().collect();
        all.sort_unstable();
        prop_assert_eq!(all, (0..u32::try_from(classes.len()).unwrap()).collect::<Vec<_>>());
        prop_assert!(!parts.train.is_empty() && !parts.test.is_empty());
        prop_assert_eq!(&parts, &split(set.manifest(), set.index(), fraction, seed, 0).unwrap());
        let manifest: &Manifest = set.manifest();
        for (class, name) in (0_u16..).zip(&manifest.classes) {
            let on = |side: &[u32]| side.iter().any(|&s| format!("class {}", classes[s as usize]) == *name);
            let both = on(&parts.train) && on(&parts.test);
            prop_assert_eq!(both, !parts.one_sided.contains(&class));
            let shown = classes.iter().filter(|c| format!("class {c}") == *name).count();
            // One slide cannot be on both sides; two sides of one slide each cannot hold every class.
            let room = parts.train.len().min(parts.test.len()) >= manifest.classes.len();
            prop_assert!(both || shown < 2 || !room, "class {} on one side: {:?}", name, parts);
        }
    }

    #[test]
    fn slides_of_many_classes_are_split_with_all_of_them_on_both_sides(
        mixed in prop::collection::vec(prop::collection::vec(0_u8..5, 1..6), 12..30), seed: u64,
    ) {
        // Every class is on many slides beside the drawn ones.
        let mut slides: Vec<Vec<u8>> = (0..10).map(|_| (0..5).collect()).collect();
        slides.extend(mixed);
        let set = block(labelled(&slides));
        let parts = split(set.manifest(), set.index(), 0.3, seed, 0).unwrap();
        prop_assert!(parts.one_sided.is_empty(), "{:?}", parts);
    }
}
