//! The page of an evaluation: the table, and for each encoder and protocol confusion, ROC curves and the worst mistakes.

use std::collections::HashMap;

use askama::Template;
use jiff::Timestamp;
use serde_json::Value;
use sgcl_patchset::PatchSet;

use super::pictures;
use super::roc::{self, Curve};
use super::slides::class_colour;
use crate::cli::eval::EvalArgs;
use crate::commands::eval::table::{figure, footer};
use crate::output::count;

/// Sections that are opened when the page is; more would be a long way to scroll.
const OPEN: usize = 4;

/// The page.
#[derive(Template)]
#[template(path = "eval.html")]
pub(crate) struct EvalPage {
    title: String,
    lead: String,
    rows: Vec<Row>,
    sections: Vec<Section>,
    footer: String,
}

struct Row {
    weights: String,
    protocol: String,
    baseline: bool,
    cells: Vec<String>,
}

struct Section {
    title: String,
    open: bool,
    note: String,
    classes: Vec<String>,
    confusion: Vec<(String, Vec<Cell>)>,
    legend: Vec<(String, String, String)>,
    roc: Option<String>,
    mistakes: Vec<Mistake>,
}

pub(super) struct Cell {
    pub(super) text: String,
    pub(super) title: String,
    /// Strength of its ground, in percent; at most 55, so that the page's ink stays readable on it.
    pub(super) strength: String,
}

struct Mistake {
    picture: String,
    called: String,
    truth: String,
    place: String,
}

impl EvalPage {
    /// The page of these results; pictures come from `set`, and those that cannot be read are left out.
    pub(crate) async fn new(args: &EvalArgs, results: &[Value], set: &PatchSet) -> Self {
        let pictures = pictures(results, set).await;
        let pairs = || results.iter().flat_map(|result| list(&result["protocols"]).map(move |found| (result, found)));
        let sections =
            pairs().enumerate().map(|(at, (result, found))| Section::new(result, found, at < OPEN, &pictures));
        Self {
            title: format!("Evaluation on {}", args.data),
            lead: results.first().map(footer).unwrap_or_default(),
            rows: pairs().map(|(result, found)| Row::new(result, found)).collect(),
            sections: sections.collect(),
            footer: format!(
                "sgcl {} · made {} · seed {} · data {}",
                env!("CARGO_PKG_VERSION"),
                Timestamp::now().strftime("%Y-%m-%d %H:%M UTC"),
                args.seed,
                set.manifest().content_id.get(..12).unwrap_or(&set.manifest().content_id),
            ),
        }
    }
}

impl Row {
    fn new(result: &Value, found: &Value) -> Self {
        let weights = word(&result["weights"]);
        let figures = ["accuracy", "balanced_accuracy", "macro_f1", "roc_auc"].map(|name| figure(&found[name]));
        let learnt = found["train_patches"].as_u64().map_or_else(|| "–".to_owned(), count);
        Self {
            baseline: weights == "random" || weights == "colour-histogram",
            weights,
            protocol: word(&found["protocol"]),
            cells: figures.into_iter().chain([learnt]).collect(),
        }
    }
}

impl Section {
    fn new(result: &Value, found: &Value, open: bool, pictures: &HashMap<u32, String>) -> Self {
        let classes: Vec<String> = list(&result["classes"]).map(word).collect();
        let colours: HashMap<&str, String> = classes
            .iter()
            .zip(0_u16..)
            .map(|(name, class)| {
                let [r, g, b] = class_colour(class);
                (name.as_str(), format!("rgb({r} {g} {b})"))
            })
            .collect();
        let curves: Vec<(Curve, f64)> = list(&found["roc"])
            .map(|curve| {
                let name = word(&curve["class"]);
                let pair = |point: &Value| Some((point[0].as_f64()?, point[1].as_f64()?));
                let points = list(&curve["points"]).filter_map(pair).collect();
                let colour = colours.get(name.as_str()).cloned().unwrap_or_default();
                (Curve { name, colour, points }, curve["area"].as_f64().unwrap_or(0.0))
            })
            .collect();
        let trials = found["trials"].as_u64().unwrap_or(1);
        let legend = curves.iter().map(|(c, area)| (c.name.clone(), c.colour.clone(), format!("{area:.3}"))).collect();
        let drawn: Vec<Curve> = curves.into_iter().map(|(curve, _)| curve).collect();
        Self {
            title: format!("{}, {}", word(&result["weights"]), word(&found["protocol"])),
            open,
            note: if trials > 1 {
                format!("The confusion adds up {trials} trials; curves and mistakes are the first trial's.")
            } else {
                String::new()
            },
            confusion: confusion(&classes, &found["confusion"]),
            classes,
            legend,
            roc: (!drawn.is_empty()).then(|| roc::svg(&drawn)),
            mistakes: list(&found["mistakes"]).filter_map(|mistake| Mistake::new(mistake, pictures)).collect(),
        }
    }
}

impl Mistake {
    fn new(mistake: &Value, pictures: &HashMap<u32, String>) -> Option<Self> {
        let percent = |value: &Value| format!("{:.0} %", 100.0 * value.as_f64().unwrap_or(0.0));
        Some(Self {
            picture: pictures.get(&patch(mistake)?)?.clone(),
            called: format!("{} {}", word(&mistake["called"]), percent(&mistake["probability"])),
            truth: format!("{} {}", word(&mistake["true"]), percent(&mistake["probability_of_true"])),
            place: format!(
                "{} ({}, {}), patch {}",
                word(&mistake["slide"]),
                mistake["x"],
                mistake["y"],
                mistake["patch"]
            ),
        })
    }
}

/// Rows are true classes, with the share of their patches that was called each class.
pub(super) fn confusion(classes: &[String], counts: &Value) -> Vec<(String, Vec<Cell>)> {
    let rows = list(counts).map(|row| list(row).map(|n| n.as_f64().unwrap_or(0.0)).collect::<Vec<f64>>());
    classes
        .iter()
        .zip(rows)
        .map(|(class, row)| {
            let sum: f64 = row.iter().sum();
            let share = |n: f64| if sum > 0.0 { n / sum } else { 0.0 };
            let cell = |n: f64| Cell {
                text: if n > 0.0 { format!("{:.0}", 100.0 * share(n)) } else { String::new() },
                title: format!("{n} of {sum}"),
                strength: format!("{:.0}", 55.0 * share(n)),
            };
            (class.clone(), row.into_iter().map(cell).collect())
        })
        .collect()
}

/// Every mistaken patch, read once.
async fn pictures(results: &[Value], set: &PatchSet) -> HashMap<u32, String> {
    let reader = set.reader(None);
    let mut pictures = HashMap::new();
    let found = results.iter().flat_map(|result| list(&result["protocols"]));
    for id in found.flat_map(|found| list(&found["mistakes"])).filter_map(patch) {
        if pictures.contains_key(&id) {
            continue;
        }
        if let Some(picture) = reader.read(id).await.ok().and_then(|bytes| pictures::patch(&bytes)) {
            pictures.insert(id, picture);
        }
    }
    pictures
}

fn patch(mistake: &Value) -> Option<u32> {
    u32::try_from(mistake["patch"].as_u64()?).ok()
}

pub(super) fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

pub(super) fn word(value: &Value) -> String {
    value.as_str().unwrap_or("?").to_owned()
}
