//! What the protocols with training compute, against PyTorch's optimisers and torchvision's networks and transforms.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeSet;

use common::{oracle, seed, tensors};
use rand::Rng as _;
use serde_json::{Value, json};
use sgcl::augment::Renderer;
use sgcl::backbone::{Arch, Backbone};
use sgcl::image::RgbImage;
use sgcl::probe::head::Head;
use sgcl::probe::rows::{batches, trial_seed, validation, with_labels};
use sgcl::probe::supervised::{Problem, Recipe, train};
use sgcl::probe::views::{HISTOGRAM, colour_histogram, resize_before_crop, train_crop};
use sgcl::probe::{EvaParams, Prediction, ProbeError, Split, eva};
use sgcl_draw::{Purpose, Rng, rng};
use tch::{Device, Kind, Tensor};

const ROWS: usize = 240;
const WIDTH: i64 = 12;
const CLASSES: usize = 4;
const SIDE: u32 = 150;

fn floats(rng: &mut Rng, count: usize) -> Vec<f32> {
    (0..count).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect()
}

/// Features that tell the classes apart in part.
fn features(rng: &mut Rng, labels: &[i64]) -> Tensor {
    let noise = Tensor::from_slice(&floats(rng, labels.len() * WIDTH as usize)).view([-1, WIDTH]);
    let centres = Tensor::from_slice(&floats(rng, CLASSES * WIDTH as usize)).view([-1, WIDTH]);
    noise + centres.index_select(0, &Tensor::from_slice(labels)) * 0.6
}

fn epochs(rows: &[usize], recipe: &Recipe, seed: u64) -> Vec<Vec<Vec<usize>>> {
    (0..recipe.epochs).map(|epoch| batches(rows, recipe.batch, seed, epoch)).collect()
}

fn as_json(recipe: &Recipe, rows: &[usize]) -> Value {
    json!({ "lr": recipe.lr, "weight_decay": recipe.weight_decay, "milestones": recipe.milestones, "factor": recipe.factor,
        "batches": epochs(rows, recipe, seed()) })
}

fn assert_close(what: &str, found: &Prediction, expected: &Tensor, tolerance: f64) {
    let found = Tensor::from_slice(&found.probabilities).view([-1, CLASSES as i64]);
    let apart = (found - expected.to_kind(Kind::Double)).abs().max().double_value(&[]);
    assert!(apart < tolerance, "{what}: probabilities {apart} apart, seed {}", seed());
}

#[test]
fn training_and_views_are_those_of_torch() {
    let mut rng = rng(seed(), Purpose::Probe, 0, 78);
    let labels: Vec<i64> = (0..ROWS).map(|_| rng.random_range(0..CLASSES as i64)).collect();
    let x = features(&mut rng, &labels);
    let split = Split { train: (0..120).collect(), test: (200..ROWS).collect() };
    let held: Vec<usize> = (120..200).collect();
    let eva_params = EvaParams { lr: 0.02, batch: 32, steps: 300, patience: 3, ..EvaParams::default() };
    let linear = Recipe { batch: 50, ..Recipe::linear().over(10) };
    // BatchNorm over the few values of a smaller batch multiplies the rounding of convolutions from step to step.
    let few = Split { train: (0..120).collect(), test: split.test.clone() };
    let whole = Recipe { batch: 60, ..Recipe::finetune(0.1).over(5) };
    assert_eq!((linear.milestones, whole.milestones), ([6, 8], [3, 4]));
    let images = Tensor::from_slice(&floats(&mut rng, ROWS * 3 * 32 * 32)).view([-1, 3, 32, 32]);
    let net = Backbone::new(Arch::ResNet18, Device::Cpu);
    net.init(seed(), 0);
    let picture: Vec<u8> = (0..3 * SIDE * SIDE).map(|_| rng.random()).collect();

    let mut data = vec![
        ("x".to_owned(), x.shallow_clone()),
        ("labels".to_owned(), Tensor::from_slice(&labels)),
        ("images".to_owned(), images.shallow_clone()),
        ("picture".to_owned(), Tensor::from_slice(&picture).view([i64::from(SIDE), i64::from(SIDE), 3])),
    ];
    data.extend(net.state().into_iter().map(|(name, tensor)| (format!("net.{name}"), tensor.copy())));
    for (name, width) in [("eva", WIDTH), ("linear", WIDTH), ("net_head", 512)] {
        let head = Head::new(width, CLASSES, seed(), Device::Cpu);
        data.push((format!("{name}.weight"), head.weight));
        data.push((format!("{name}.bias"), head.bias));
    }
    let eva_batches: Vec<_> = (0..100).map(|epoch| batches(&split.train, 32, seed(), epoch)).collect();
    let task = json!({
        "classes": CLASSES, "test": split.test,
        "eva": { "lr": eva_params.lr, "steps": eva_params.steps, "patience": eva_params.patience, "validation": held, "batches": eva_batches },
        "linear": as_json(&linear, &split.train),
        "finetune": as_json(&whole, &few.train),
    });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("task.json"), task.to_string()).unwrap();
    let detached: Vec<(String, Tensor)> = data.into_iter().map(|(name, t)| (name, t.detach().contiguous())).collect();
    Tensor::write_safetensors(&detached, dir.path().join("data.safetensors")).unwrap();
    oracle("supervised.py", &[dir.path().to_str().unwrap()]);
    let answers = tensors(&dir.path().join("answers.safetensors"));
    let said: Value = serde_json::from_str(&std::fs::read_to_string(dir.path().join("answers.json")).unwrap()).unwrap();

    let found = eva(&x, &labels, CLASSES, &split, &held, &eva_params, seed()).unwrap();
    assert_close("eva", &found.prediction, &answers["eva"], 1e-4);
    assert_eq!(json!(found.steps), said["eva"]["steps"], "seed {}", seed());
    assert!((found.validation.unwrap() - said["eva"]["validation"].as_f64().unwrap()).abs() < 1e-9);

    let take = |from: &Tensor, rows: &[usize]| {
        let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        Ok::<_, ProbeError>(from.index_select(0, &Tensor::from_slice(&rows)))
    };
    let problem = |split, width| Problem { labels: &labels, classes: CLASSES, split, width, device: Device::Cpu };
    let mut told = Vec::new();
    let found = train(problem(&split, WIDTH), None, &linear, seed(), |_, rows| take(&x, rows), |n| told.push(n));
    assert_close("linear", &found.unwrap(), &answers["linear"], 1e-4);
    assert_eq!(told, (1..=10).collect::<Vec<u64>>());
    let found = train(problem(&few, 512), Some(&net), &whole, seed(), |_, rows| take(&images, rows), |_| ());
    assert_close("finetune", &found.unwrap(), &answers["finetune"], 2e-3);

    let image = RgbImage::new(SIDE, SIDE, picture).unwrap();
    let mut renderer = Renderer::new();
    for (name, resize, px) in [("central", 256, 224), ("small", 73, 64)] {
        assert_eq!(resize_before_crop(px), resize);
        let found = renderer.central(&image, resize, px).to_vec();
        let expected = Vec::<u8>::try_from(answers[name].flatten(0, -1)).unwrap();
        let apart = found.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(found.len() == expected.len() && apart <= Some(1), "{name}: {apart:?} apart");
    }
    let mut histogram = [0.0; HISTOGRAM];
    colour_histogram(image.pixels(), &mut histogram);
    let apart = (Tensor::from_slice(&histogram) - &answers["histogram"]).abs().max().double_value(&[]);
    assert!(apart < 1e-7, "histogram {apart} apart");
}

#[test]
fn labels_are_kept_class_by_class_and_the_same_again() {
    let labels: Vec<i64> = (0..1000).map(|row| if row % 50 == 0 { 2 } else { (row % 3 == 0).into() }).collect();
    let rows: Vec<usize> = (0..1000).filter(|row| row % 7 != 0).collect();
    let count = |rows: &[usize], class| rows.iter().filter(|&&row| labels[row] == class).count();
    for share in [0.01, 0.1, 0.5] {
        let kept = with_labels(&rows, &labels, share, seed());
        for class in 0..3 {
            let expected = ((count(&rows, class) as f64 * share).round() as usize).max(1);
            assert_eq!(count(&kept, class), expected, "class {class} at {share}");
        }
        assert!(kept.is_sorted() && kept.iter().all(|row| rows.contains(row)));
        assert_eq!(kept, with_labels(&rows, &labels, share, seed()));
        assert_ne!(kept, with_labels(&rows, &labels, share, trial_seed(seed(), 1)), "another trial keeps others");
    }
    assert_eq!(with_labels(&rows, &labels, 1.0, seed()), rows);
    assert_eq!(trial_seed(5, 0), 5);
}

#[test]
fn an_epoch_has_every_row_once_in_batches_of_equal_size() {
    let rows: Vec<usize> = (100..231).collect();
    let found = batches(&rows, 32, seed(), 3);
    let sizes: BTreeSet<usize> = found.iter().map(Vec::len).collect();
    assert!(found.len() == 5 && sizes.iter().all(|size| [26, 27].contains(size)), "{sizes:?}");
    let mut all: Vec<usize> = found.concat();
    assert_ne!(all, rows);
    all.sort_unstable();
    assert_eq!(all, rows);
    assert_ne!(found, batches(&rows, 32, seed(), 4));
}

#[test]
fn no_slide_is_learnt_from_and_validated_on() {
    let slides: Vec<u32> = (0..600).map(|row| row / 40).collect();
    let labels: Vec<i64> = slides.iter().map(|slide| i64::from(slide % 3)).collect();
    let rows: Vec<usize> = (0..600).collect();
    let (learnt, held) = validation(&rows, &labels, &slides, seed());
    let of = |rows: &[usize]| rows.iter().map(|&row| slides[row]).collect::<BTreeSet<u32>>();
    assert_eq!((of(&learnt).len(), of(&held).len(), learnt.len() + held.len()), (12, 3, 600));
    assert!(of(&learnt).is_disjoint(&of(&held)));
    assert_eq!(held.iter().map(|&row| labels[row]).collect::<BTreeSet<i64>>().len(), 3, "each class is validated on");
    assert_eq!(validation(&rows[..40], &labels, &slides, seed()).1, Vec::<usize>::new());
}

#[test]
fn crops_lie_inside_and_differ_by_epoch_and_patch() {
    let mut seen = BTreeSet::new();
    let mut flips = 0;
    for epoch in 0..20 {
        for patch in 0..20 {
            let (crop, flip) = train_crop(90, 60, seed(), epoch, patch);
            assert!(crop.left + crop.width <= 90 && crop.top + crop.height <= 60, "{crop:?}");
            seen.insert((crop.left, crop.top, crop.width, crop.height));
            flips += u32::from(flip);
        }
    }
    assert!(seen.len() > 300 && (130..270).contains(&flips), "{} crops, {flips} flips", seen.len());
    assert_eq!(train_crop(90, 60, seed(), 3, 4), train_crop(90, 60, seed(), 3, 4));
}
