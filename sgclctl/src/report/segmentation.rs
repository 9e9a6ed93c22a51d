//! The page of a segmentation: the table, each encoder's confusion, and pictures of the images it knows least of.

use std::path::Path;

use askama::Template;
use jiff::Timestamp;
use serde_json::Value;

use super::evaluation::{Cell, confusion, list, word};
use super::pictures;
use crate::cli::segmentation::SegmentationArgs;
use crate::commands::eval::segmentation::footer;
use crate::commands::eval::table::figure;
use crate::output::percent;

/// Pictures of an encoder.
const PICTURES: usize = 8;
/// Largest picture that is taken in.
const MAX_PICTURE: u64 = 32 << 20;

/// The page.
#[derive(Template)]
#[template(path = "segmentation.html")]
pub(crate) struct SegmentationPage {
    title: String,
    lead: String,
    /// Name and colour.
    classes: Vec<(String, String)>,
    rows: Vec<Row>,
    sections: Vec<Section>,
    footer: String,
}

struct Row {
    weights: String,
    baseline: bool,
    cells: Vec<String>,
}

struct Section {
    title: String,
    confusion: Vec<(String, Vec<Cell>)>,
    pictures: Vec<Picture>,
}

struct Picture {
    uri: String,
    name: String,
    figures: String,
}

impl SegmentationPage {
    /// The page of these results; pictures that cannot be read are left out.
    pub(crate) fn new(args: &SegmentationArgs, results: &[Value]) -> Self {
        let first = results.first().unwrap_or(&Value::Null);
        let classes = list(&first["classes"]).map(word).zip(list(&first["colours"]).map(word)).collect();
        Self {
            title: format!("Segmentation of {}", args.data.display()),
            lead: footer(first),
            classes,
            rows: results.iter().map(Row::new).collect(),
            sections: results.iter().map(Section::new).collect(),
            footer: format!(
                "sgcl {} · made {} · seed {} · {} steps of {} tiles of {} px",
                env!("CARGO_PKG_VERSION"),
                Timestamp::now().strftime("%Y-%m-%d %H:%M UTC"),
                args.seed,
                args.steps,
                args.batch,
                args.tile_px,
            ),
        }
    }
}

impl Row {
    fn new(result: &Value) -> Self {
        let weights = word(&result["weights"]);
        let classes = list(&result["classes"]).filter_map(Value::as_str).map(|class| figure(&result["iou"][class]));
        Self {
            baseline: weights == "random",
            weights,
            cells: [figure(&result["mean_iou"]), figure(&result["accuracy"])].into_iter().chain(classes).collect(),
        }
    }
}

impl Section {
    fn new(result: &Value) -> Self {
        let classes: Vec<String> = list(&result["classes"]).map(word).collect();
        Self {
            title: word(&result["weights"]),
            confusion: confusion(&classes, &result["confusion"]),
            pictures: list(&result["images"]).filter_map(Picture::new).take(PICTURES).collect(),
        }
    }
}

impl Picture {
    fn new(image: &Value) -> Option<Self> {
        let path = Path::new(image["picture"].as_str()?);
        let readable = path.metadata().is_ok_and(|meta| meta.len() <= MAX_PICTURE);
        let bytes = readable.then(|| std::fs::read(path).ok()).flatten()?;
        let share = |name: &str| image[name].as_f64().map_or_else(|| "–".to_owned(), percent);
        Some(Self {
            uri: pictures::triptych(&bytes)?,
            name: word(&image["image"]),
            figures: format!("mean IoU {}, pixels right {}", share("mean_iou"), share("accuracy")),
        })
    }
}
