//! A patch set and a finished run in folders, written through the libraries, nothing trained.

use std::io::Cursor;

use jiff::{SignedDuration, Timestamp};
use serde_json::json;
use sgcl_patchset::{Opened, PatchSet, PatchSetWriter, SlideInfo, Store, WriterOptions};
use sgcl_runstore::commit::Progress;
use sgcl_runstore::status::write_eval;
use sgcl_runstore::{
    Commit, Commits, Dtype, EventKind, Events, Ledger, MetricsWriter, PartKind, PartWriter, RunConfig, RunName, Spec,
    StepMetrics, Tensor,
};

const PX: u32 = 48;
const GRID: [u32; 2] = [14, 9];
pub const CLASSES: [&str; 4] = ["tumour", "stroma", "lymphocytes", "fat"];

/// Numbers in [0, 1) that look random and never change.
fn noise(a: u32, b: u32, c: u32) -> f32 {
    let mut x = a.wrapping_mul(0x9E37_79B1) ^ b.wrapping_mul(0x85EB_CA77) ^ c.wrapping_mul(0xC2B2_AE3D);
    x = (x ^ (x >> 15)).wrapping_mul(0x2C1B_3C6D);
    x = (x ^ (x >> 12)).wrapping_mul(0x297A_2D39);
    ((x ^ (x >> 15)) >> 8) as f32 / (1 << 24) as f32
}

/// The class of a tile: islands in a ground.
fn class_of(slide: u32, x: u32, y: u32) -> Option<usize> {
    let (fx, fy) = (x as f32 / GRID[0] as f32 - 0.5, y as f32 / GRID[1] as f32 - 0.5);
    if fx * fx + fy * fy > 0.27 {
        return None;
    }
    let wave = (fx * 9.0 + slide as f32).sin() + (fy * 7.0 - slide as f32 * 0.7).cos();
    Some(match wave {
        w if w > 0.9 => 0,
        w if w > 0.0 => 1,
        w if w > -0.8 => 2,
        _ => 3,
    })
}

fn jpeg(image: &image::RgbImage) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Jpeg).unwrap();
    bytes.into_inner()
}

/// Pixels of a tissue: a tint and grains of its own size.
fn pixel(class: usize, slide: u32, x: u32, y: u32) -> image::Rgb<u8> {
    let (tint, grain) = [([150, 70, 150], 5), ([220, 140, 180], 11), ([90, 60, 140], 3), ([240, 225, 235], 17)][class];
    let tone = 0.75 + 0.35 * noise(x / grain, y / grain, slide * 7 + class as u32);
    image::Rgb(tint.map(|t: u8| (f32::from(t) * tone).min(255.0) as u8))
}

/// Four slides of labelled tissue; every other one has a preview.
async fn patch_set(store: Store) -> PatchSet {
    let Opened::Writer(writer) = PatchSetWriter::open(store.clone(), WriterOptions::new(PX, 90, 1)).await.unwrap()
    else {
        panic!("there is a set already");
    };
    let (width, height) = (GRID[0] * PX, GRID[1] * PX);
    for number in 0..4 {
        let mut slide = writer
            .slide(SlideInfo {
                name: format!("slide-{number}-with-a-rather-long-name"),
                source: format!("slide-{number}.svs"),
                fingerprint: "1".into(),
                level: 0,
                mpp: Some(0.5),
                width: u64::from(width) + 20,
                height: u64::from(height) + 30,
                grid: GRID,
                spatial: true,
            })
            .unwrap();
        for y in 0..GRID[1] {
            for x in 0..GRID[0] {
                let Some(class) = class_of(number, x, y) else { continue };
                let image = image::RgbImage::from_fn(PX, PX, |u, v| pixel(class, number, x * PX + u, y * PX + v));
                slide.push(x.cast_signed(), y.cast_signed(), Some(CLASSES[class]), &jpeg(&image)).unwrap();
            }
        }
        if number % 2 == 0 {
            let preview = image::RgbImage::from_fn(width / 2 + 10, height / 2 + 15, |u, v| {
                let class = class_of(number, 2 * u / PX, 2 * v / PX);
                class.map_or(image::Rgb([244, 243, 246]), |class| pixel(class, number, 2 * u, 2 * v))
            });
            slide.preview(jpeg(&preview));
        }
        slide.finish().await.unwrap();
    }
    writer.finish(|_, _| {}).await.unwrap();
    PatchSet::load(store).await.unwrap()
}

fn f32s(name: &str, shape: [usize; 2], values: &[f32]) -> Tensor {
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Tensor { name: name.into(), dtype: Dtype::F32, shape: shape.to_vec(), data: data.into() }
}

fn i64s(name: &str, shape: Vec<usize>, values: &[i64]) -> Tensor {
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Tensor { name: name.into(), dtype: Dtype::I64, shape, data: data.into() }
}

/// A run named `first` in the store `bucket`, trained on the patch set in the store `patches`.
pub async fn finished_run(open: impl Fn(&str) -> Store) {
    let set = patch_set(open("patches")).await;
    let words = [
        "epochs=8",
        "batch.per_rank=16",
        "data.holdout_fraction=0.25",
        "objective.hard=16",
        "objective.nearest=32",
        "objective.negatives=256",
        "kmeans.clusters=12",
    ];
    let config = RunConfig::from_yaml("", "(test)", &words.map(str::to_owned)).unwrap();
    let name = RunName::new("first").unwrap();
    let run = name.store(&open("bucket"));
    let start: Timestamp = "2026-03-01T09:00:00Z".parse().unwrap();
    let id = set.manifest().content_id.clone();
    let spec = Spec::new(name, set.store().url(), id, 1, 2, 1, config, start);
    spec.create(&run).await.unwrap();

    let at = |seconds: i64| start + SignedDuration::from_secs(seconds);
    let mut metrics = MetricsWriter::new(&run, "first");
    for step in 0..320_u32 {
        let t = f64::from(step) / 320.0;
        let jitter = |c| f64::from(noise(step, c, 1)) - 0.5;
        let (intra, inter, inner) = (
            4.6 * (-1.4 * t).exp() + 0.5 * jitter(1),
            2.2 * (-0.9 * t).exp() + 0.3 * jitter(2),
            3.4 * (-1.1 * t).exp() + 0.4 * jitter(3),
        );
        let mut values = vec![
            ("loss/total", intra + inter + inner),
            ("loss/intra", intra),
            ("loss/inter", inter),
            ("loss/inner", inner),
            ("lr", 0.00375 * (1.0 + (std::f64::consts::PI * f64::from(step / 40) / 8.0).cos()) / 2.0),
            ("samples_per_second", 118.0 + 22.0 * jitter(4)),
        ];
        if step % 80 == 79 {
            values.extend([("probe/accuracy", 0.7 + 0.2 * t), ("probe/balanced_accuracy", 0.66 + 0.2 * t)]);
        }
        metrics.push(StepMetrics {
            step: u64::from(step) + 1,
            generation: if step < 130 { 1 } else { 2 },
            epoch: step / 40,
            epoch_step: u64::from(step % 40) + 1,
            epoch_steps: 40,
            time: at(i64::from(step) * 2 + if step < 130 { 0 } else { 600 }),
            values: values.into_iter().map(|(k, v)| (k.to_owned(), v)).collect(),
        });
    }
    metrics.flush().await.unwrap();

    let events = Events::new(&run);
    let lost = "rank 1 of node first-0-0 ended with code 137:\nerror: a line that the rank wrote before it went, with enough words to be wider than a narrow screen";
    for (seconds, kind) in [
        (0, EventKind::Started { world: 2, from_commit: None }),
        (260, regrouped(lost)),
        (860, EventKind::Started { world: 2, from_commit: Some(1) }),
        (1240, EventKind::Finished),
    ] {
        events.append(kind, at(seconds)).await.unwrap();
    }

    commit(&run, &set, at(1240)).await;
    for (weights, knn, linear) in [("first", 0.914, 0.941), ("random", 0.683, 0.742)] {
        let result = json!({
            "weights": weights, "arch": "resnet18", "px": 224, "train_patches": 1240, "test_patches": 413,
            "knn": { "10": knn - 0.006, "20": knn }, "linear": linear, "balanced": { "knn": knn - 0.03, "linear": linear - 0.02 },
            "classes": CLASSES, "confusion": [[120, 4, 9, 0], [6, 140, 2, 3], [11, 0, 78, 0], [0, 5, 0, 35]],
        });
        write_eval(&run, weights, &result).await.unwrap();
    }
}

/// A commit whose bank knows the classes of all trained patches.
async fn commit(run: &Store, set: &PatchSet, now: Timestamp) {
    const WIDTH: usize = 16;
    let parts = PartWriter::new(run, 2, 320);
    let ids: Vec<u32> = set.subset(&[0, 1, 2]).unwrap().rows();
    let mut features = Vec::new();
    let mut clusters = Vec::new();
    for &id in &ids {
        let class = usize::from(set.index().label(id).unwrap());
        features.extend((0..WIDTH).map(|d| noise(id, d as u32, 9) + if d % 4 == class { 1.0 } else { 0.0 }));
        clusters.extend([class as i64 * 3 + i64::from(id % 3), 0]);
    }
    let at: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
    let tensors = [
        i64s("ids", vec![ids.len()], &at),
        i64s("labels", vec![ids.len(), 2], &clusters),
        f32s("backbone", [ids.len(), WIDTH], &features),
    ];
    let bank = parts.put_tensors(PartKind::Bank, "bank-0", &tensors).await.unwrap();
    let ledger = parts.put(PartKind::Ledger, "ledger.roaring", Ledger::new().to_bytes().unwrap()).await.unwrap();
    let progress = Progress {
        generation: 2,
        lease_epoch: 0,
        step: 320,
        epoch: 7,
        epoch_step: 40,
        cursor: 40,
        lanes: 2,
        window: 4,
        segments: Vec::new(),
        history: Vec::new(),
        world: 2,
        plan_base: None,
        ledger,
        parts: vec![bank],
        losses: [("loss/total".to_owned(), 3.1)].into(),
        done: true,
    };
    Commits::new(run).append(&Commit::after(None, progress, now)).await.unwrap();
}

fn regrouped(reason: &str) -> EventKind {
    EventKind::Regrouped {
        reason: reason.into(),
        failure: true,
        world_before: 2,
        world: 2,
        seconds: 1.5,
        steps_lost: 0,
        from_commit: None,
    }
}
