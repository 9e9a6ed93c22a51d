//! What a segmentation found, as JSON.

use std::path::PathBuf;

use serde_json::{Map, Value, json};
use sgcl::backbone::Backbone;
use sgcl::probe::bootstrap::{Interval, LEVEL, RESAMPLES};
use sgcl::segment::bcss::CLASSES;
use sgcl::segment::{PixelConfusion, SegmentIntervals};
use sgcl::weights::LoadReport;

use super::pictures::COLOURS;
use super::tiles::Tiles;
use super::{Trial, Work};
use crate::eval::{keys_json, result::mean_and_deviation};

/// One encoder's figures: means over trials, their standard deviations, and intervals over slides. The confusion is the trials' sum;
/// `images` are the first trial's, the worst first.
pub(super) fn of(
    name: &str,
    backbone: &Backbone,
    keys: Option<&LoadReport>,
    work: &Work<'_>,
    trials: &[Trial],
    drawn: &[Option<PathBuf>],
) -> Value {
    let slides = slides(work.tested);
    let by_slide: Vec<Vec<PixelConfusion>> = trials.iter().map(|trial| gathered(trial, &slides)).collect();
    let wholes: Vec<PixelConfusion> = trials.iter().map(|trial| sum(trial.images.iter())).collect();
    let intervals = SegmentIntervals::of(&by_slide, work.args.seed, RESAMPLES);
    let all = |of: &dyn Fn(&PixelConfusion) -> Option<f64>| wholes.iter().map(of).collect::<Option<Vec<f64>>>();

    let mut result = Map::new();
    result.insert("task".into(), json!("segmentation"));
    result.insert("weights".into(), json!(name));
    result.insert("arch".into(), json!(backbone.arch().name()));
    result.insert("keys".into(), keys.map_or(Value::Null, keys_json));
    result.insert("classes".into(), json!(CLASSES));
    result.insert("colours".into(), COLOURS.map(|[r, g, b]| format!("#{r:02x}{g:02x}{b:02x}")).to_vec().into());
    for (half, tiles, count) in
        [("train", work.learnt_tiles, work.learnt.len()), ("validation", work.tested, work.tested.labelled().len())]
    {
        result.insert(format!("{half}_images"), json!(tiles.images.len()));
        result.insert(format!("{half}_slides"), json!(slides_of(tiles)));
        result.insert(format!("{half}_tiles"), json!(count));
    }
    result.insert("validation_pixels".into(), json!(wholes.first().map_or(0, PixelConfusion::pixels)));
    result.insert("trials".into(), json!(trials.len()));
    result.insert("mean_iou".into(), figure(all(&PixelConfusion::mean_iou), intervals.mean_iou));
    result.insert("accuracy".into(), figure(all(&PixelConfusion::accuracy), intervals.accuracy));
    let classes = CLASSES.iter().enumerate().map(|(class, name)| {
        let values = all(&|confusion: &PixelConfusion| confusion.iou(class));
        ((*name).to_owned(), figure(values, intervals.iou.get(class).copied().flatten()))
    });
    result.insert("iou".into(), Value::Object(classes.collect()));
    result.insert("confusion".into(), json!(sum(wholes.iter()).rows()));
    result.insert(
        "bootstrap".into(),
        json!({ "unit": "slide", "slides": by_slide.first().map_or(0, Vec::len), "resamples": RESAMPLES, "level": LEVEL,
            "method": "percentile" }),
    );
    result.insert("images".into(), images(work.tested, trials, drawn));
    result.insert("settings".into(), settings(work));
    Value::Object(result)
}

fn settings(work: &Work<'_>) -> Value {
    let (args, recipe, augment) = (work.args, work.args.recipe(), work.args.augment());
    json!({ "optimizer": "sgd", "lr": recipe.lr, "min_lr": recipe.min_lr, "schedule": "poly", "power": recipe.power,
        "momentum": recipe.momentum, "weight_decay": recipe.weight_decay, "steps": recipe.steps, "batch": recipe.batch,
        "dropout": recipe.dropout, "head": "fcn", "output_stride": 8, "tile_px": args.tile_px, "validation": args.validation,
        "augment": { "crop": augment.crop, "flip": augment.flip, "colour": augment.colour } })
}

fn figure(values: Option<Vec<f64>>, interval: Option<Interval>) -> Value {
    let (mean, deviation) = values.as_deref().map(mean_and_deviation).unzip();
    let mut figure = json!({ "value": mean, "low": null, "high": null });
    if let Some(interval) = interval {
        figure["low"] = json!(interval.low);
        figure["high"] = json!(interval.high);
        figure["resamples"] = json!(interval.resamples);
    }
    if values.as_ref().is_some_and(|values| values.len() > 1) {
        figure["std"] = json!(deviation);
        figure["trials"] = json!(values);
    }
    figure
}

/// The first trial's images, the worst first; those without a pixel that counts last.
fn images(tested: &Tiles, trials: &[Trial], drawn: &[Option<PathBuf>]) -> Value {
    let Some(first) = trials.first() else { return Value::Array(Vec::new()) };
    let mut images: Vec<(Option<f64>, Value)> = tested
        .images
        .iter()
        .zip(&first.images)
        .enumerate()
        .map(|(at, (image, confusion))| {
            let picture = drawn.get(at).cloned().flatten();
            let (iou, accuracy) = (confusion.mean_iou(), confusion.accuracy());
            let image = json!({ "image": image.name, "slide": image.slide, "width": image.width, "height": image.height,
                "mean_iou": iou, "accuracy": accuracy, "picture": picture });
            (iou, image)
        })
        .collect();
    images.sort_by(|(a, _), (b, _)| a.unwrap_or(f64::INFINITY).total_cmp(&b.unwrap_or(f64::INFINITY)));
    images.into_iter().map(|(_, image)| image).collect()
}

/// Slide of each image, numbered in the order of their names.
fn slides(tiles: &Tiles) -> Vec<usize> {
    let mut names: Vec<&str> = tiles.images.iter().map(|image| image.slide.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    tiles.images.iter().map(|image| names.partition_point(|&name| name < image.slide.as_str())).collect()
}

fn slides_of(tiles: &Tiles) -> usize {
    slides(tiles).iter().max().map_or(0, |most| most + 1)
}

/// By slide; those without a pixel that counts are left out, for they say nothing.
fn gathered(trial: &Trial, slides: &[usize]) -> Vec<PixelConfusion> {
    let count = slides.iter().max().map_or(0, |most| most + 1);
    let mut gathered = vec![PixelConfusion::new(CLASSES.len()); count];
    for (&slide, confusion) in slides.iter().zip(&trial.images) {
        gathered[slide].add_all(confusion, 1);
    }
    gathered.retain(|confusion| confusion.pixels() > 0);
    gathered
}

fn sum<'a>(parts: impl Iterator<Item = &'a PixelConfusion>) -> PixelConfusion {
    let mut sum = PixelConfusion::new(CLASSES.len());
    parts.for_each(|part| sum.add_all(part, 1));
    sum
}
