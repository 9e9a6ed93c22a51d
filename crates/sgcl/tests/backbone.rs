//! The networks against torchvision's.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;

use common::{oracle, relative_error, seed, tensors};
use sgcl::backbone::{Arch, Backbone};
use sgcl::model::{Model, Views};
use sgcl::weights::load_backbone_from;
use tch::{Device, Kind, Tensor};

#[test]
fn outputs_gradients_and_running_statistics_equal_torchvisions() {
    let dir = tempfile::tempdir().unwrap();
    oracle("backbone.py", &[dir.path().to_str().unwrap(), &seed().to_string()]);
    for arch in Arch::ALL {
        let file = tensors(&dir.path().join(format!("{arch}.safetensors")));
        let part = |prefix: &str| -> BTreeMap<String, Tensor> {
            let named = file.iter().filter_map(|(key, tensor)| Some((key.strip_prefix(prefix)?, tensor)));
            named.map(|(key, tensor)| (key.to_owned(), tensor.shallow_clone())).collect()
        };
        let net = Backbone::new(arch, Device::Cpu);
        let report = load_backbone_from(&net, &part("before.")).unwrap();
        assert!(report.missing.is_empty() && report.unexpected.is_empty(), "{arch}: {report:?}");

        let lines = |kind: &str| std::fs::read_to_string(dir.path().join(format!("{arch}.{kind}"))).unwrap();
        let names = |tensors: Vec<(String, Tensor)>| tensors.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(net.state()), lines("keys").lines().collect::<Vec<_>>());
        assert_eq!(names(net.parameters()), lines("params").lines().collect::<Vec<_>>());

        let evaluated = tch::no_grad(|| net.features(&file["x"], false));
        let error = relative_error(&evaluated, &file["eval"]);
        assert!(error < 1e-5, "{arch} eval differs by {error:e}, seed {}", seed());
        let trained = tch::no_grad(|| net.features(&file["x"], true));
        // Batch statistics of few values amplify rounding: as near to float64 as torchvision itself is.
        let (ours, theirs) = (relative_error(&trained, &file["wide"]), relative_error(&file["train"], &file["wide"]));
        assert!(
            ours < (4.0 * theirs).max(1e-5),
            "{arch} train is {ours:e} off, torchvision {theirs:e}, seed {}",
            seed()
        );
        let after = part("after.");
        for (name, tensor) in net.state() {
            let error = relative_error(&tensor, &after[&name]);
            assert!(error < 1e-4, "{arch} {name} after a training pass differs by {error:e}");
        }

        // Gradients in float64: in float32 another order of sums flips a ReLU here and there.
        for (_, mut tensor) in net.parameters().into_iter().chain(net.buffers()) {
            let wide = tensor.to_kind(Kind::Double).detach();
            tensor.set_data(&wide);
        }
        let trained = net.features(&file["x"].to_kind(Kind::Double), true);
        let error = relative_error(&trained, &file["wide"]);
        assert!(error < 1e-9, "{arch} train in float64 differs by {error:e}, seed {}", seed());
        (trained * &file["probe"]).sum(Kind::Double).backward();
        let grads = part("grad.");
        for (name, parameter) in net.parameters() {
            let error = relative_error(&parameter.grad(), &grads[&name]);
            assert!(error < 1e-8, "{arch} gradient of {name} differs by {error:e}, seed {}", seed());
        }
    }
}

#[test]
fn initial_weights_are_kaiming_normal_and_a_pure_function_of_the_seed() {
    let [one, same, other] = [1, 1, 2].map(|seed| {
        let model = Model::new(Arch::ResNet18, 128, Device::Cpu);
        model.init(seed);
        model
    });
    for (((name, a), (_, b)), (_, c)) in one.parameters().iter().zip(same.parameters()).zip(other.parameters()) {
        assert_eq!(a, &b, "{name}");
        let drawn = a.dim() > 1;
        assert_eq!(a != &c, drawn, "{name}");
        if drawn {
            let fan_in: i64 = a.size()[1..].iter().product();
            let expected = (2.0 / fan_in as f64).sqrt();
            let std = a.std(false).double_value(&[]);
            let mean = a.mean(Kind::Float).double_value(&[]);
            let n = a.numel() as f64;
            assert!((std / expected - 1.0).abs() < 5.0 / (2.0 * n).sqrt(), "{name}: std {std}, expected {expected}");
            assert!(mean.abs() < 5.0 * expected / n.sqrt(), "{name}: mean {mean}");
        } else {
            let value =
                if name.contains("bn") | name.contains("downsample") && name.ends_with("weight") { 1.0 } else { 0.0 };
            assert_eq!(a, &Tensor::full(a.size(), value, (Kind::Float, Device::Cpu)), "{name}");
        }
    }
}

#[test]
fn a_forward_pass_gives_unit_rows_and_no_gradient_through_x() {
    let model = Model::new(Arch::ResNet18, 128, Device::Cpu);
    model.init(seed());
    let noise = |n: i64, px: i64| Tensor::randn([n, 3, px, px], (Kind::Float, Device::Cpu));
    let out = model.forward(&Views { global: noise(2, 64), local: Some(noise(8, 32)), key: None }, true);
    let ql = out.ql.unwrap();
    assert_eq!((out.q.size(), out.x.size(), ql.size()), (vec![2, 128], vec![2, 512], vec![8, 128]));
    for rows in [&out.q, &out.x, &ql] {
        let norms = rows.norm_scalaropt_dim(2, [1], false);
        assert!(norms.allclose(&Tensor::ones_like(&norms), 1e-5, 1e-5, false));
    }
    assert!(out.q.requires_grad() && ql.requires_grad() && !out.x.requires_grad());
}

#[test]
fn globals_and_locals_pass_batchnorm_apart() {
    let stats = |with_local: bool| {
        let model = Model::new(Arch::ResNet18, 128, Device::Cpu);
        model.init(1);
        let ramp =
            |n: i64, px: i64| Tensor::arange(n * 3 * px * px, (Kind::Float, Device::Cpu)).sin().view([n, 3, px, px]);
        let views = Views { global: ramp(2, 64), local: with_local.then(|| ramp(8, 32) * 3.0), key: None };
        model.forward(&views, true).q.detach()
    };
    assert_eq!(stats(true), stats(false), "the locals change what the globals become");
}

#[test]
fn state_and_statistics_survive_a_round_trip() {
    let source = Model::new(Arch::ResNet18, 128, Device::Cpu);
    source.init(3);
    let x = Tensor::arange(2 * 3 * 64 * 64, (Kind::Float, Device::Cpu)).cos().view([2, 3, 64, 64]);
    let _ = source.backbone.features(&x, true);
    let target = Model::new(Arch::ResNet18, 128, Device::Cpu);
    let state: BTreeMap<String, Tensor> = source.state().into_iter().map(|(name, t)| (name, t.copy())).collect();
    let report = target.load_state(&state, true).unwrap();
    assert_eq!(report.matched, state.len());
    assert_eq!(source.state(), target.state());

    let twice = source.backbone.bn_stats() * 2.0;
    target.backbone.set_bn_stats(&twice);
    assert_eq!(target.backbone.bn_stats(), twice);
    assert_ne!(source.backbone.bn_stats(), twice, "bn_stats is a copy");

    let mut lacking = state;
    lacking.remove("projector.0.weight");
    let error = target.load_state(&lacking, true).unwrap_err().to_string();
    assert!(error.contains("projector.0.weight"), "{error}");
}

#[test]
fn an_unknown_architecture_is_named() {
    assert_eq!("resnet50".parse::<Arch>().unwrap(), Arch::ResNet50);
    assert!("vgg".parse::<Arch>().unwrap_err().to_string().contains("vgg"));
}

#[test]
fn in_bfloat16_features_and_gradients_point_the_same_way_from_weights_of_32_bits() {
    let run = |kind: Kind| {
        let mut model = Model::new(Arch::ResNet18, 128, Device::Cpu);
        model.init(seed());
        model.compute_in(kind);
        let x = Tensor::arange(8 * 3 * 64 * 64, (Kind::Float, Device::Cpu)).sqrt().sin().view([8, 3, 64, 64]);
        let out = model.forward(&Views { global: x, local: None, key: None }, true);
        assert_eq!((out.q.kind(), out.x.kind()), (Kind::Float, Kind::Float));
        (&out.q * out.q.detach().flip([0])).sum(Kind::Float).backward();
        let gradients: Vec<Tensor> = model.parameters().into_iter().map(|(_, p)| p.grad().view([-1])).collect();
        assert!(gradients.iter().all(|gradient| gradient.kind() == Kind::Float));
        assert!(model.state().iter().all(|(_, tensor)| tensor.kind() != Kind::BFloat16));
        (out.x, Tensor::cat(&gradients, 0))
    };
    let ((x, gradient), (narrow_x, narrow)) = (run(Kind::Float), run(Kind::BFloat16));
    assert!(x != narrow_x, "bfloat16 was not used");
    let cosine = |a: &Tensor, b: &Tensor| {
        a.view([-1]).dot(&b.view([-1])).double_value(&[]) / (a.norm() * b.norm()).double_value(&[])
    };
    let (features, gradients) = (cosine(&x, &narrow_x), cosine(&gradient, &narrow));
    assert!(features > 0.999, "features: {features}, SGCL_SEED={}", seed());
    // Eight bits of mantissa through eighteen layers that are normalised over some dozen values.
    assert!(gradients > 0.9, "gradients: {gradients}, SGCL_SEED={}", seed());
}
