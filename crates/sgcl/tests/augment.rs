//! Views against torchvision on PIL images.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::type_complexity)]

mod common;

use std::collections::HashMap;

use common::{oracle, seed, tensors};
use rand::Rng as _;
use sgcl::augment::{
    ColorOp, Crop, JitterDraw, PatchDraw, Renderer, ViewDraw, ViewParams, color, draw::draw_crop, draw_patch,
    render_batch,
};
use sgcl::image::RgbImage;
use sgcl_draw::{Purpose, rng};
use tch::{Kind, Tensor};

const OPS: [ColorOp; 4] = [ColorOp::Brightness, ColorOp::Contrast, ColorOp::Saturation, ColorOp::Hue];

fn bytes(tensor: &Tensor) -> Vec<u8> {
    tensor.flatten(0, -1).try_into().unwrap()
}

fn image(tensor: &Tensor) -> RgbImage {
    let size = tensor.size();
    RgbImage::new(size[1] as u32, size[0] as u32, bytes(tensor)).unwrap()
}

fn noise(side: u32, key: u64) -> RgbImage {
    let mut rng = rng(seed(), Purpose::Report, 0, key);
    RgbImage::new(side, side, (0..3 * side * side).map(|_| rng.random()).collect()).unwrap()
}

#[test]
fn pixels_and_distributions_are_torchvisions() {
    let dir = tempfile::tempdir().unwrap();
    oracle("augment.py", &[dir.path().to_str().unwrap(), &seed().to_string()]);
    every_colour_turns_as_pil_turns_it(dir.path());
    let file = tensors(&dir.path().join("cases.safetensors"));
    let cases: Vec<serde_json::Value> =
        serde_json::from_str(&std::fs::read_to_string(dir.path().join("cases.json")).unwrap()).unwrap();
    for (i, case) in cases.iter().enumerate() {
        fixed_parameters_give_pils_pixels(&file, i, case);
    }
    let mut out = vec![0.0; 3 * 96 * 96];
    Renderer::new().eval_view(&image(&file["eval_image"]), 96, &mut out);
    assert!(levels_apart(&out, &file["eval"]).0 <= 1.01, "eval view");

    for (name, width, height, scale) in
        [("global", 256, 256, (0.2, 1.0)), ("local", 128, 128, (0.2, 0.56)), ("wide", 300, 60, (0.2, 1.0))]
    {
        crops_are_distributed_as(&file[&format!("crops_{name}")], name, width, height, scale);
    }
    jitter_is_distributed_as(&file["factors"], &file["first_op"]);
}

fn every_colour_turns_as_pil_turns_it(dir: &std::path::Path) {
    for (i, turns) in [-0.4, 0.137, 0.4].into_iter().enumerate() {
        let expected = std::fs::read(dir.join(format!("hue{i}.raw"))).unwrap();
        let mut pixels: Vec<u8> = (0_u32..1 << 24).flat_map(|c| [(c >> 16) as u8, (c >> 8) as u8, c as u8]).collect();
        color::hue(&mut pixels, turns);
        let wrong = pixels.chunks_exact(3).zip(expected.chunks_exact(3)).position(|(a, b)| a != b);
        if let Some(c) = wrong {
            panic!("colour {c:#08x} turned by {turns}: {:?}, PIL {:?}", &pixels[3 * c..][..3], &expected[3 * c..][..3]);
        }
    }
}

/// Largest and mean difference in byte levels between normalised views.
fn levels_apart(found: &[f32], expected: &Tensor) -> (f64, f64) {
    let std = Tensor::from_slice(&[0.229_f64, 0.224, 0.225]).view([3, 1, 1]);
    let found = Tensor::from_slice(found).view_as(expected).to_kind(Kind::Double);
    let apart = ((found - expected) * std * 255.0).abs();
    (apart.max().double_value(&[]), apart.mean(Kind::Double).double_value(&[]))
}

fn fixed_parameters_give_pils_pixels(
    file: &std::collections::BTreeMap<String, Tensor>,
    i: usize,
    case: &serde_json::Value,
) {
    let number = |key: &str, n: usize| case[key][n].as_f64().unwrap();
    let px = case["px"].as_u64().unwrap() as u32;
    let crop = |n: usize| number("crop", n) as u32;
    let draw = ViewDraw {
        crop: Crop { left: crop(0), top: crop(1), width: crop(2), height: crop(3) },
        grayscale: case["gray"].as_bool().unwrap(),
        jitter: JitterDraw {
            order: [0, 1, 2, 3].map(|n| OPS[number("order", n) as usize]),
            brightness: number("factors", 0),
            contrast: number("factors", 1),
            saturation: number("factors", 2),
            hue: number("factors", 3),
        },
        flip: case["flip"].as_bool().unwrap(),
    };
    let source = image(&file[&format!("image{i}")]);

    // The resize alone: PIL's to a level.
    let mut renderer = Renderer::new();
    let mut resized = bytes(&file[&format!("resized{i}")]);
    let apart = renderer.resized(&source, draw.crop, px).iter().zip(&resized).map(|(a, b)| a.abs_diff(*b)).max();
    assert!(apart <= Some(1), "case {i}: resize is {apart:?} levels off, {case}");

    // Colours alone, from PIL's resized bytes: equal.
    if draw.grayscale {
        color::grayscale(&mut resized);
    }
    color::jitter(&mut resized, &draw.jitter);
    assert!(resized == bytes(&file[&format!("colored{i}")]), "case {i}: colours differ, {case}");

    // All together: what a level in the resize becomes after factors up to 1.4³ and a turned hue.
    let mut out = vec![0.0; 3 * (px * px) as usize];
    renderer.view(&source, &draw, px, &mut out);
    let (_, mean) = levels_apart(&out, &file[&format!("final{i}")]);
    assert!(mean < 0.5, "case {i}: views are {mean} levels apart in the mean, {case}");
}

/// Largest distance between two empirical distribution functions.
fn kolmogorov_smirnov(mut a: Vec<f64>, mut b: Vec<f64>) -> f64 {
    a.sort_by(f64::total_cmp);
    b.sort_by(f64::total_cmp);
    let share = |values: &[f64], x: f64| values.partition_point(|&value| value <= x) as f64 / values.len() as f64;
    a.iter().chain(&b).map(|&x| (share(&a, x) - share(&b, x)).abs()).fold(0.0, f64::max)
}

/// Two samples of n from one law are further apart once in a million.
fn limit(n: usize) -> f64 {
    (-(0.5e-6_f64).ln() / n as f64).sqrt()
}

fn crops_are_distributed_as(expected: &Tensor, name: &str, width: u32, height: u32, scale: (f64, f64)) {
    let expected: Vec<Vec<i64>> = expected.try_into().unwrap();
    let whole = Crop { left: 0, top: 0, width, height };
    let mut stream = rng(seed(), Purpose::Augment, 0, 0);
    let found: Vec<Vec<i64>> = (0..expected.len())
        .map(|_| draw_crop(whole, scale, (0.75, 4.0 / 3.0), &mut stream))
        .map(|crop| [crop.left, crop.top, crop.width, crop.height].map(i64::from).to_vec())
        .collect();
    let measures: [(&str, fn(&[i64]) -> f64); 4] = [
        ("area", |c| (c[2] * c[3]) as f64),
        ("ratio", |c| (c[2] as f64 / c[3] as f64).ln()),
        ("left", |c| c[0] as f64),
        ("top", |c| c[1] as f64),
    ];
    for (what, measure) in measures {
        let [ours, theirs] = [&found, &expected].map(|rows| rows.iter().map(|row| measure(row)).collect::<Vec<_>>());
        let distance = kolmogorov_smirnov(ours, theirs);
        assert!(distance < limit(found.len()), "{name}: {what} is {distance} apart, seed {}", seed());
    }
}

fn jitter_is_distributed_as(factors: &Tensor, first: &Tensor) {
    let expected: Vec<Vec<f64>> = factors.try_into().unwrap();
    let params = ViewParams::default();
    let found: Vec<ViewDraw> =
        (0..expected.len() as u64).map(|patch| draw_patch(&params, 256, 256, seed(), 0, patch).global).collect();
    let fields: [(&str, fn(&JitterDraw) -> f64); 4] = [
        ("brightness", |j| j.brightness),
        ("contrast", |j| j.contrast),
        ("saturation", |j| j.saturation),
        ("hue", |j| j.hue),
    ];
    for (n, (what, field)) in fields.into_iter().enumerate() {
        let ours: Vec<f64> = found.iter().map(|draw| field(&draw.jitter)).collect();
        let center = if what == "hue" { 0.0 } else { 1.0 };
        assert!(ours.iter().all(|value| (value - center).abs() <= 0.4), "{what} leaves its range");
        let distance = kolmogorov_smirnov(ours, expected.iter().map(|row| row[n]).collect());
        assert!(distance < limit(found.len()), "{what} is {distance} apart, seed {}", seed());
    }
    let first: Vec<i64> = first.try_into().unwrap();
    let n = found.len() as f64;
    for (op, kind) in OPS.iter().enumerate() {
        let ours = found.iter().filter(|draw| draw.jitter.order[0] == *kind).count() as f64 / n;
        let theirs = first.iter().filter(|&&value| value == op as i64).count() as f64 / n;
        assert!(
            (ours - theirs).abs() < 5.0 * (2.0 * 0.1875 / n).sqrt(),
            "{kind:?} comes first {ours}, torchvision {theirs}"
        );
    }
    let mut orders: HashMap<String, usize> = HashMap::new();
    for draw in &found {
        *orders.entry(format!("{:?}", draw.jitter.order)).or_default() += 1;
    }
    assert_eq!(orders.len(), 24);
    for (order, count) in orders {
        assert!((count as f64 / n - 1.0 / 24.0).abs() < 5.0 * (1.0 / 24.0 / n).sqrt(), "{order}: {count}");
    }
    let share = |yes: fn(&ViewDraw) -> bool| found.iter().filter(|draw| yes(draw)).count() as f64 / n;
    assert!((share(|draw| draw.grayscale) - 0.2).abs() < 5.0 * (0.16 / n).sqrt());
    assert!((share(|draw| draw.flip) - 0.5).abs() < 5.0 * (0.25 / n).sqrt());
}

#[test]
fn local_crops_stay_in_their_quadrants() {
    for (width, height) in [(256, 256), (255, 131), (64, 300)] {
        for patch in 0..500 {
            let draw = draw_patch(&ViewParams::default(), width, height, seed(), 1, patch);
            for (corner, view) in draw.local.iter().enumerate() {
                let (w, h) = (width / 2, height / 2);
                let left = if corner % 2 == 0 { 0 } else { width - w };
                let top = if corner < 2 { 0 } else { height - h };
                let crop = view.crop;
                assert!(crop.left >= left && crop.left + crop.width <= left + w, "{corner}: {crop:?}");
                assert!(crop.top >= top && crop.top + crop.height <= top + h, "{corner}: {crop:?}");
            }
        }
    }
}

#[test]
fn views_depend_on_seed_epoch_and_patch_and_on_nothing_else() {
    let params = ViewParams { global_px: 32, local_px: 16, ..ViewParams::default() };
    let patches: Vec<(u64, RgbImage)> = (0..5).map(|id| (id, noise(64, id))).collect();
    let all = render_batch(&params, &patches, 7, 2);
    // Another batch, another thread count, another order: the same views of each patch.
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let (global, local) = (3 * 32 * 32, 3 * 16 * 16);
    for (row, patch) in patches.iter().enumerate() {
        let one = alone.install(|| render_batch(&params, std::slice::from_ref(patch), 7, 2));
        assert_eq!(one.global, all.global[row * global..][..global]);
        for corner in 0..4 {
            assert_eq!(one.local[corner * local..][..local], all.local[(corner * 5 + row) * local..][..local]);
        }
    }
    assert_ne!(all, render_batch(&params, &patches, 7, 3));
    assert_ne!(all, render_batch(&params, &patches, 8, 2));
    let views = all.to_views(tch::Device::Cpu).unwrap();
    assert_eq!((views.global.size(), views.local.unwrap().size()), (vec![5, 3, 32, 32], vec![20, 3, 16, 16]));
}

#[test]
fn a_key_view_is_another_global_one_and_leaves_the_others_as_they_were() {
    let params = ViewParams { global_px: 32, local_px: 16, ..ViewParams::default() };
    let patches: Vec<(u64, RgbImage)> = (0..3).map(|id| (id, noise(64, id))).collect();
    let (without, with) = (
        render_batch(&params, &patches, 7, 2),
        render_batch(&ViewParams { key: true, ..params.clone() }, &patches, 7, 2),
    );
    assert!(without.key.is_empty() && without.to_views(tch::Device::Cpu).unwrap().key.is_none());
    assert_eq!((&with.global, &with.local), (&without.global, &without.local));
    assert_eq!(with.key.len(), with.global.len());
    let side = 3 * 32 * 32;
    for row in 0..3 {
        assert_ne!(with.key[row * side..][..side], with.global[row * side..][..side]);
    }
    assert_eq!(with.to_views(tch::Device::Cpu).unwrap().key.unwrap().size(), [3, 3, 32, 32]);
}

#[test]
fn draws_are_pinned_because_runs_on_disk_depend_on_them() {
    let PatchDraw { global, local, key } = draw_patch(&ViewParams::default(), 256, 256, 1, 2, 3);
    let numbers = [global.crop, local[3].crop].map(|crop| [crop.left, crop.top, crop.width, crop.height]);
    assert_eq!(numbers, [[19, 96, 159, 140], [131, 182, 67, 73]]);
    assert_eq!((global.jitter.hue * 1e6).round(), 140_314.0);
    assert!(key.is_none());
}

#[test]
fn damaged_images_are_errors() {
    let jpeg = {
        let mut out = Vec::new();
        image::codecs::jpeg::JpegEncoder::new(&mut out)
            .encode(noise(64, 1).pixels(), 64, 64, image::ExtendedColorType::Rgb8)
            .unwrap();
        out
    };
    assert_eq!(RgbImage::decode(&jpeg).unwrap().width(), 64);
    let mut rng = rng(seed(), Purpose::Report, 0, 9);
    for bytes in [&b""[..], b"not an image", b"\xff\xd8", &jpeg[..jpeg.len() / 2], &jpeg[..200]] {
        assert!(RgbImage::decode(bytes).is_err(), "{} bytes", bytes.len());
    }
    for _ in 0..200 {
        let mut broken = jpeg.clone();
        let at = rng.random_range(0..broken.len());
        broken[at] = rng.random();
        let _ = RgbImage::decode(&broken);
    }
}

/// `cargo test --release -p sgcl --test augment -- --ignored --nocapture`
#[test]
#[ignore = "a measurement"]
fn microseconds_a_patch() {
    let params = ViewParams::default();
    let image = noise(256, 1);
    let mut renderer = Renderer::new();
    let mut out = vec![0.0; 3 * 224 * 224];
    let rounds = 200;
    let clock = |what: &str, f: &mut dyn FnMut(u64)| {
        let start = std::time::Instant::now();
        (0..rounds).for_each(f);
        println!("{what}: {:.0} µs", start.elapsed().as_secs_f64() * 1e6 / rounds as f64);
    };
    clock("global view", &mut |id| {
        renderer.view(&image, &draw_patch(&params, 256, 256, 1, 0, id).global, 224, &mut out)
    });
    clock("resize to 224", &mut |id| {
        let _ = Renderer::new().resized(&image, draw_patch(&params, 256, 256, 1, 0, id).global.crop, 224);
    });
    let mut pixels: Vec<u8> = image.pixels().to_vec();
    clock("hue 256²", &mut |_| color::hue(&mut pixels, 0.1));
    clock("contrast 256²", &mut |_| color::contrast(&mut pixels, 1.01));
    clock("saturation 256²", &mut |_| color::saturation(&mut pixels, 1.01));
    clock("brightness 256²", &mut |_| color::brightness(&mut pixels, 1.01));
    let patches = vec![(0, image.clone()); 32];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let start = std::time::Instant::now();
    for epoch in 0..5 {
        pool.install(|| render_batch(&params, &patches, 1, epoch));
    }
    println!("patch (5 views): {:.0} µs", start.elapsed().as_secs_f64() * 1e6 / 160.0);
}
