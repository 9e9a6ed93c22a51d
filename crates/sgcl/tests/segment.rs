//! Segmentation against timm, torchvision and PyTorch: dilated maps, and a training from the same weights.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;

use common::{oracle, relative_error, seed, tensors};
use sgcl::backbone::{Arch, Backbone, OutputStride};
use sgcl::probe::ProbeError;
use sgcl::segment::{FcnHead, Recipe, Segmenter, train};
use sgcl::weights::load_backbone_from;
use tch::{Device, Kind, Tensor};

#[test]
fn dilated_maps_equal_timms_and_torchvisions_on_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    oracle("segment.py", &["maps", folder.path().to_str().unwrap(), &seed().to_string()]);
    for arch in Arch::ALL {
        let file = tensors(&folder.path().join(format!("{arch}.safetensors")));
        let named = file.iter().filter_map(|(key, tensor)| Some((key.strip_prefix("w.")?, tensor)));
        let weights: BTreeMap<String, Tensor> =
            named.map(|(key, tensor)| (key.to_owned(), tensor.shallow_clone())).collect();
        for stride in [OutputStride::Eight, OutputStride::Sixteen, OutputStride::ThirtyTwo] {
            let net = Backbone::with_stride(arch, stride, Device::Cpu);
            let report = load_backbone_from(&net, &weights).unwrap();
            assert!(report.missing.is_empty() && report.unexpected.is_empty(), "{arch}: {report:?}");
            let map = tch::no_grad(|| net.feature_map(&file["x"], false));
            let pixels = stride.pixels();
            assert_eq!(map.size()[2..], [(104 + pixels - 1) / pixels, (72 + pixels - 1) / pixels], "{arch} {pixels}");
            let others = ["timm", "torchvision"].map(|other| format!("{other}.{pixels}"));
            let compared: Vec<&String> = others.iter().filter(|other| file.contains_key(*other)).collect();
            assert_eq!(compared.len(), 1 + usize::from(arch == Arch::ResNet50 && pixels < 32));
            for other in compared {
                let error = relative_error(&map, &file[other]);
                assert!(error < 1e-4, "{arch} differs from {other} by {error:e}, seed {}", seed());
            }
        }
    }
}

#[test]
fn a_training_is_pytorchs_step_by_step() {
    const STEPS: u64 = 3;
    const BATCH: usize = 4;
    let folder = tempfile::tempdir().unwrap();
    let backbone = Backbone::with_stride(Arch::ResNet18, OutputStride::Eight, Device::Cpu);
    backbone.init(seed(), 0);
    let segmenter = Segmenter { backbone: &backbone, head: FcnHead::new(512, 5, seed(), Device::Cpu) };
    // In float64: in float32 another order of sums flips a ReLU here and there.
    let state = || {
        let buffers = backbone.buffers().into_iter().chain(segmenter.head.buffers());
        segmenter.parameters().into_iter().chain(buffers)
    };
    for (_, mut tensor) in state() {
        let wide = tensor.to_kind(Kind::Double).detach();
        tensor.set_data(&wide);
    }
    let ramp = Tensor::arange(6 * 3 * 40 * 48, (Kind::Double, Device::Cpu));
    let x = (&ramp * 0.37 + (ramp.shallow_clone() * 0.011).cos() * 3.0).sin().view([6, 3, 40, 48]);
    let y = (Tensor::arange(6 * 40 * 48, (Kind::Int64, Device::Cpu)) / 96)
        .to_kind(Kind::Int64)
        .remainder(6)
        .view([6, 40, 48]);
    let y = y.where_scalarother(&y.less(5), 255);

    let before: Vec<(String, Tensor)> =
        state().map(|(name, tensor)| (format!("w.{name}"), tensor.detach().copy())).collect();
    let losses = RefCell::new(Vec::new());
    let order = RefCell::new(Vec::new());
    let recipe = Recipe { steps: STEPS, batch: BATCH, dropout: 0.0, ..Recipe::default() };
    train::<ProbeError>(
        &segmenter,
        &recipe,
        seed(),
        6,
        |wanted| {
            let rows: Vec<i64> = wanted.iter().map(|wanted| wanted.tile as i64).collect();
            let index = Tensor::from_slice(&rows);
            order.borrow_mut().extend(rows);
            let (x, y) = (x.index_select(0, &index), y.index_select(0, &index));
            // The running statistics are in the way: the loss is looked at on a copy of the forward pass without them.
            let kept: Vec<Tensor> = state().map(|(_, tensor)| tensor.detach().copy()).collect();
            let loss = tch::no_grad(|| sgcl::segment::train::loss(&segmenter.logits(&x, true, None), &y));
            tch::no_grad(|| state().zip(kept).for_each(|((_, mut tensor), kept)| tensor.copy_(&kept)));
            losses.borrow_mut().push(loss.double_value(&[]));
            Ok((x, y))
        },
        |_| {},
    )
    .unwrap();

    let order = Tensor::from_slice(&order.borrow());
    let mut given = before;
    given.extend([("x".to_owned(), x.shallow_clone()), ("y".to_owned(), y), ("order".to_owned(), order)]);
    let given: Vec<(&str, &Tensor)> = given.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    Tensor::write_safetensors(&given, folder.path().join("given.safetensors")).unwrap();
    oracle("segment.py", &["train", folder.path().to_str().unwrap(), &STEPS.to_string(), &BATCH.to_string()]);
    let torch = tensors(&folder.path().join("torch.safetensors"));
    let error = relative_error(&Tensor::from_slice(&losses.borrow()), &torch["losses"]);
    assert!(error < 1e-6, "losses differ by {error:e}: {:?}, seed {}", losses.borrow(), seed());
    for (name, tensor) in state() {
        let error = relative_error(&tensor, &torch[&format!("w.{name}")]);
        assert!(error < 1e-7, "{name} differs by {error:e} after {STEPS} steps, seed {}", seed());
    }
    let logits = tch::no_grad(|| segmenter.logits(&x, false, None));
    let error = relative_error(&logits, &torch["logits"]);
    assert!(error < 1e-6, "logits differ by {error:e}, seed {}", seed());
    let predicted = segmenter.predict(&x).unwrap();
    let expected = Vec::<i64>::try_from(torch["logits"].argmax(1, false).flatten(0, -1)).unwrap();
    let agree = predicted.iter().zip(&expected).filter(|&(&ours, &theirs)| i64::from(ours) == theirs).count();
    assert!(agree as f64 > 0.9999 * expected.len() as f64, "{agree} of {}", expected.len());
}

#[test]
fn a_batch_without_a_pixel_that_counts_teaches_nothing_and_breaks_nothing() {
    let backbone = Backbone::with_stride(Arch::ResNet18, OutputStride::Eight, Device::Cpu);
    backbone.init(1, 0);
    let segmenter = Segmenter { backbone: &backbone, head: FcnHead::new(512, 5, 1, Device::Cpu) };
    let before = segmenter.head.parameters()[0].1.copy();
    let recipe = Recipe { steps: 1, batch: 1, weight_decay: 0.0, ..Recipe::default() };
    let x = Tensor::ones([1, 3, 32, 32], (Kind::Float, Device::Cpu));
    let y = Tensor::full([1, 32, 32], 255, (Kind::Int64, Device::Cpu));
    train::<ProbeError>(&segmenter, &recipe, 1, 1, |_| Ok((x.shallow_clone(), y.shallow_clone())), |_| {}).unwrap();
    assert_eq!(segmenter.head.parameters()[0].1, before);
    assert!(segmenter.predict(&x).is_ok());
    let nothing =
        train::<ProbeError>(&segmenter, &recipe, 1, 0, |_| Ok((x.shallow_clone(), y.shallow_clone())), |_| {});
    assert_eq!(nothing.unwrap_err(), ProbeError::Empty { half: "train" });
}

#[test]
fn a_training_that_diverges_says_so() {
    let backbone = Backbone::with_stride(Arch::ResNet18, OutputStride::Eight, Device::Cpu);
    backbone.init(1, 0);
    let segmenter = Segmenter { backbone: &backbone, head: FcnHead::new(512, 5, 1, Device::Cpu) };
    let recipe = Recipe { steps: 1, batch: 2, ..Recipe::default() };
    let x = Tensor::full([2, 3, 32, 32], f64::NAN, (Kind::Float, Device::Cpu));
    let y = Tensor::zeros([2, 32, 32], (Kind::Int64, Device::Cpu));
    let error = train::<ProbeError>(&segmenter, &recipe, 1, 2, |_| Ok((x.shallow_clone(), y.shallow_clone())), |_| {});
    assert!(error.unwrap_err().to_string().contains("diverged"));
}
