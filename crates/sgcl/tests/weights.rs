//! Weights files as others write them.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use common::{oracle, seed, tensors};
use rand::Rng as _;
use sgcl::backbone::{Arch, Backbone};
use sgcl::weights::{self, WeightsError, load_backbone};
use sgcl_draw::{Purpose, rng};
use tch::{Device, Kind, Tensor};

#[test]
fn files_of_torch_and_safetensors_are_read_and_bad_ones_refused() {
    let dir = tempfile::tempdir().unwrap();
    oracle("weights.py", &[dir.path().to_str().unwrap()]);
    let dir = dir.path();
    every_container_and_nesting_gives_the_same_network(dir);
    views_types_and_nesting_are_kept(dir);
    nothing_in_a_file_is_executed(dir);
    what_does_not_fit_is_named(dir);
    broken_files_are_errors_and_never_panic(dir);
}

fn every_container_and_nesting_gives_the_same_network(dir: &Path) {
    let truth = tensors(&dir.join("truth.safetensors"));
    let cases = [
        ("truth.safetensors", "", 0.0),
        ("plain.pth", "", 0.0),
        ("legacy.pth", "", 0.0),
        ("moco.pth", "state_dict.module.encoder_q.", 0.0),
        ("half.pth", "state_dict.backbone.", 1e-3),
    ];
    for (file, prefix, tolerance) in cases {
        let net = Backbone::new(Arch::ResNet18, Device::Cpu);
        let report = load_backbone(&net, &dir.join(file)).unwrap();
        assert_eq!((report.prefix.as_str(), report.matched), (prefix, 120), "{file}");
        assert!(report.missing.is_empty(), "{file}: {:?}", report.missing);
        assert!(report.unexpected.contains(&format!("{prefix}fc.weight")), "{file}: {:?}", report.unexpected);
        for (name, tensor) in net.state() {
            let expected = if name.ends_with("num_batches_tracked") { &Tensor::from(7_i64) } else { &truth[&name] };
            let apart = (tensor.to_kind(Kind::Float) - expected).abs().max().double_value(&[]);
            assert!(apart <= tolerance, "{file}: {name} is {apart} off");
        }
    }
}

fn views_types_and_nesting_are_kept(dir: &Path) {
    for file in ["small.pth", "small_legacy.pth"] {
        let read = weights::read(&dir.join(file)).unwrap();
        let names: Vec<&str> = read.keys().map(String::as_str).collect();
        let expected = [
            "brain",
            "double",
            "empty",
            "long",
            "nested.inner",
            "parameter",
            "part",
            "same",
            "scalar",
            "turned",
            "whole",
        ];
        assert_eq!(names, expected, "{file}");
        let base = Tensor::arange(24, (Kind::Float, Device::Cpu)).view([4, 6]);
        assert_eq!(read["whole"], base, "{file}");
        assert_eq!(read["same"], base, "{file}");
        assert_eq!(read["turned"].contiguous(), base.tr().contiguous(), "{file}");
        assert_eq!(read["part"].contiguous(), base.narrow(0, 1, 2).narrow(1, 2, 3).contiguous(), "{file}");
        assert_eq!(read["parameter"].contiguous(), base.select(1, 0).contiguous(), "{file}");
        assert_eq!(read["nested.inner"], &base + 1, "{file}");
        assert_eq!((read["scalar"].int64_value(&[]), read["empty"].size()), (5, vec![0, 3]), "{file}");
        for (name, kind) in [("double", Kind::Double), ("brain", Kind::BFloat16), ("long", Kind::Int64)] {
            assert_eq!(read[name], base.to_kind(kind), "{file}");
        }
    }
    assert_eq!(weights::read(&dir.join("small.safetensors")).unwrap()["brain"].kind(), Kind::BFloat16);
}

fn nothing_in_a_file_is_executed(dir: &Path) {
    for (file, global) in
        [("evil.pth", "system"), ("evil_legacy.pth", "system"), ("module.pth", "torch.nn.modules.linear.Linear")]
    {
        match weights::read(&dir.join(file)) {
            Err(WeightsError::Unsafe { global: named, .. }) => assert!(named.contains(global), "{file}: {named}"),
            other => panic!("{file}: {other:?}"),
        }
    }
    assert!(!dir.join("executed").exists());
    for file in ["numpy.pth", "script.pth"] {
        let error = weights::read(&dir.join(file)).unwrap_err().to_string();
        assert!(error.contains(file), "{error}");
    }
}

fn what_does_not_fit_is_named(dir: &Path) {
    let net = Backbone::new(Arch::ResNet18, Device::Cpu);
    net.init(1, 0);
    let before: Vec<Tensor> = net.state().into_iter().map(|(_, tensor)| tensor.copy()).collect();
    let message = |file: &str| load_backbone(&net, &dir.join(file)).unwrap_err().to_string();
    let error = message("none.pth");
    assert!(error.contains("conv1.weight") && error.contains("head.weight"), "{error}");
    let error = message("resnet50.pth");
    assert!(error.contains("layer1.0.conv1.weight") && error.contains("[64, 64, 1, 1]"), "{error}");
    let error = message("absent.pth");
    assert!(error.contains("absent.pth"), "{error}");
    let after: Vec<Tensor> = net.state().into_iter().map(|(_, tensor)| tensor).collect();
    assert_eq!(before, after, "an error changed the network");

    let report = load_backbone(&Backbone::new(Arch::ResNet34, Device::Cpu), &dir.join("plain.pth"));
    assert!(matches!(report, Err(WeightsError::Shape { .. })) || !report.unwrap().missing.is_empty());
    // ResNet-34's first blocks are ResNet-18's: the rest is unexpected, not lost silently.
    let report = load_backbone(&net, &dir.join("resnet34.pth")).unwrap();
    assert!(report.unexpected.iter().any(|key| key == "layer3.5.conv1.weight"), "{:?}", report.unexpected);
}

fn broken_files_are_errors_and_never_panic(dir: &Path) {
    let path = dir.join("broken");
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        weights::read(&path)
    };
    for bytes in [
        &b""[..],
        b"x",
        b"PK\x03\x04",
        b"<html>404 not found</html>",
        b"\xff\xff\xff\xff\xff\xff\xff\x7f{",
        &[0x80; 64],
    ] {
        let error = read(bytes).unwrap_err().to_string();
        assert!(error.contains("broken"), "{error}");
    }
    let mut rng = rng(seed(), Purpose::Report, 0, 0);
    for file in ["small.pth", "small_legacy.pth", "small.safetensors"] {
        let good = std::fs::read(dir.join(file)).unwrap();
        for length in (0..good.len()).step_by(61) {
            assert!(read(&good[..length]).is_err(), "{file} cut to {length} of {} bytes reads", good.len());
        }
        for _ in 0..1_500 {
            let mut bytes = good.clone();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..bytes.len());
                bytes[at] = rng.random();
            }
            let _ = read(&bytes);
        }
    }
}

/// A zip as torch writes it, around a pickle of one's own.
fn zipped(pickle: &[u8]) -> Result<BTreeMap<String, Tensor>, WeightsError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut zip = zip::ZipWriter::new(std::fs::File::create(file.path()).unwrap());
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    zip.start_file("archive/data.pkl", stored).unwrap();
    zip.write_all(pickle).unwrap();
    zip.finish().unwrap();
    weights::read(file.path())
}

#[test]
fn hostile_pickles_cost_neither_stack_nor_memory() {
    // Lists in lists, two million deep.
    let deep: Vec<u8> = [vec![b']'; 2_000_000], vec![b'a'; 1_999_999], vec![b'.']].concat();
    assert!(zipped(&deep).unwrap().is_empty());
    // A dictionary that holds itself.
    assert!(zipped(b"}q\x00X\x01\x00\x00\x00ah\x00s.").unwrap().is_empty());
    // Dictionaries whose hundred entries are the same next dictionary: 100^6 paths.
    let mut wide = Vec::new();
    for level in 0..8_u8 {
        wide.extend([b'}', b'q', level, b'(']);
        for key in 0..100_u8 {
            wide.extend([b"X\x02\x00\x00\x00".as_slice(), format!("{key:02}").as_bytes()].concat());
            wide.extend(if level == 0 { [b'K', 0] } else { [b'h', level - 1] });
        }
        wide.push(b'u');
    }
    wide.push(b'.');
    assert!(zipped(&wide).unwrap_err().to_string().contains("entries"));
    for (name, pickle) in [
        ("ends early", &b"X\xff\xff\xff\xffabc"[..]),
        ("ends early", b"("),
        ("stack", b"."),
        ("mark", b"t."),
        ("memo", b"h\x07."),
        ("opcode", b"\x82\x01."),
        ("call", b"K\x01)R."),
    ] {
        let error = zipped(pickle).unwrap_err();
        assert!(matches!(error, WeightsError::Damaged { .. }), "{name}: {error}");
    }
}
