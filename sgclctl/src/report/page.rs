//! From facts to what the template shows: words, figures and pictures, nothing left to decide.

use askama::Template;
use serde_json::Value;
use sgcl_runstore::RunConfig;
use sgcl_runstore::status::EventKind;

use super::charts::{Chart, Line, number};
use super::data::Facts;
use super::slides::{PatchView, Query, SlideView, class_colour};
use crate::commands::eval::table::figure;
use crate::output::{count, percent, span};

/// The page.
#[derive(Template)]
#[template(path = "report.html")]
pub(crate) struct Page {
    run: String,
    phase: &'static str,
    reason: Option<String>,
    lead: String,
    cards: Vec<Card>,
    charts: Vec<Drawn>,
    legend: Vec<Legend>,
    has_class: bool,
    has_cluster: bool,
    slides: Vec<SlideView>,
    slides_left_out: usize,
    queries: Vec<Shown>,
    searched: String,
    evals: Vec<EvalRow>,
    confusion: Option<Confusion>,
    transfers: Vec<Transfer>,
    events: Vec<EventRow>,
    config: Vec<ConfigRow>,
    missing: Vec<String>,
    footer: String,
}

struct Card {
    name: &'static str,
    value: String,
    note: String,
}

struct Drawn {
    title: &'static str,
    unit: &'static str,
    legend: Vec<(&'static str, &'static str)>,
    svg: String,
}

struct Legend {
    name: String,
    colour: String,
}

struct Shown {
    query: Tile,
    neighbours: Vec<Tile>,
}

struct Tile {
    picture: String,
    caption: String,
    place: String,
    cosine: String,
    /// `same`, `other`, or nothing where there are no labels.
    agreement: &'static str,
}

struct EvalRow {
    name: String,
    random: bool,
    cells: Vec<String>,
    gain: String,
}

/// A figure of something that was trained on the weights.
struct Transfer {
    task: String,
    weights: String,
    random: bool,
    figure: String,
    trials: String,
    data: String,
}

struct Confusion {
    weights: String,
    classes: Vec<String>,
    rows: Vec<(String, Vec<Share>)>,
}

struct Share {
    text: String,
    /// Strength of its ground, in percent; at most 55, so that the page's ink stays readable on it.
    strength: String,
}

struct EventRow {
    time: String,
    what: &'static str,
    detail: String,
}

struct ConfigRow {
    key: String,
    value: String,
    changed: bool,
}

impl Page {
    /// The page of these facts.
    pub(crate) fn new(facts: Facts) -> Self {
        let evals = eval_rows(&facts);
        Self {
            run: facts.spec.run.to_string(),
            phase: facts.status.phase.word(),
            reason: facts.status.reason.clone(),
            lead: lead(&facts),
            cards: cards(&facts),
            charts: charts(&facts),
            legend: facts
                .classes
                .iter()
                .zip(0_u16..)
                .map(|(name, class)| {
                    let [r, g, b] = class_colour(class);
                    Legend { name: name.clone(), colour: format!("rgb({r} {g} {b})") }
                })
                .collect(),
            has_class: facts.slides.iter().any(|slide| slide.by_class.is_some()),
            has_cluster: facts.slides.iter().any(|slide| slide.by_cluster.is_some()),
            slides_left_out: facts.slide_count.saturating_sub(facts.slides.len()),
            queries: facts.queries.iter().map(|query| shown(query, &facts.classes)).collect(),
            searched: facts.searched.map(|s| searched(s, facts.spec.config.objective.radius)).unwrap_or_default(),
            evals,
            confusion: confusion(&facts),
            transfers: transfers(&facts),
            events: event_rows(&facts),
            config: config_rows(&facts.spec.config),
            footer: format!(
                "sgcl {} · made {} · run created {} · data {} ({})",
                env!("CARGO_PKG_VERSION"),
                facts.made.strftime("%Y-%m-%d %H:%M UTC"),
                facts.spec.created.strftime("%Y-%m-%d %H:%M UTC"),
                facts.spec.data,
                facts.spec.data_id.get(..12).unwrap_or(&facts.spec.data_id),
            ),
            slides: facts.slides,
            missing: facts.missing,
        }
    }
}

fn lead(facts: &Facts) -> String {
    let config = &facts.spec.config;
    let world = facts.commit.map_or(facts.spec.nodes * facts.spec.ranks_per_node, |(_, world)| world);
    let variant = serde_json::to_value(config.variant).unwrap_or_default();
    format!(
        "{} pretrained by {}, variant {}, on {world} rank{}, {} patches a step, seed {}",
        config.backbone.arch.name(),
        config.method.title(),
        variant.as_str().unwrap_or("?"),
        if world == 1 { "" } else { "s" },
        config.global_batch(world as usize),
        config.seed
    )
}

fn cards(facts: &Facts) -> Vec<Card> {
    let status = &facts.status;
    let mut cards = vec![Card {
        name: "Progress",
        value: percent(status.progress).replace(".0 %", " %"),
        note: format!("{} epochs, {} steps", status.epochs, count(status.step)),
    }];
    if let Some(patches) = facts.patches {
        let held = if facts.held_out > 0 { format!(", {} held out", facts.held_out) } else { String::new() };
        cards.push(Card {
            name: "Patches",
            value: count(patches as u64),
            note: format!("{} slides{held}", facts.slide_count),
        });
    }
    let loss = |epoch: u32| {
        let values: Vec<f64> = facts
            .steps
            .iter()
            .filter(|s| s.epoch == epoch)
            .filter_map(|s| s.values.get("loss/total").copied())
            .collect();
        #[allow(clippy::cast_precision_loss)]
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    if let (Some(first), Some(last)) =
        (facts.steps.first().and_then(|s| loss(s.epoch)), facts.steps.last().and_then(|s| loss(s.epoch)))
    {
        cards.push(Card {
            name: "Loss",
            value: format!("{last:.2}"),
            note: format!("mean of the last epoch; first {first:.2}"),
        });
    }
    let knn = |value: &Value| value["knn"]["20"].as_f64();
    let evals = facts.evals();
    let trained =
        evals.iter().filter(|(name, _)| *name != "random").filter_map(|(_, value)| Some((knn(value)?, value)));
    if let Some((best, value)) = trained.max_by(|a, b| a.0.total_cmp(&b.0)) {
        let note = random_beside(&evals, value).and_then(knn).map_or_else(
            || "k nearest neighbours, k = 20".to_owned(),
            |random| format!("random weights {} ({:+.1} points)", percent(random), 100.0 * (best - random)),
        );
        cards.push(Card { name: "kNN accuracy", value: percent(best), note });
    }
    // Pauses between generations are not training.
    let trained: f64 = facts
        .steps
        .windows(2)
        .filter(|pair| pair[0].generation == pair[1].generation)
        .map(|pair| pair[1].time.duration_since(pair[0].time).as_secs_f64())
        .sum();
    if let (true, Some(pace)) = (trained > 0.0, status.samples_per_second) {
        cards.push(Card {
            name: "Pace",
            value: format!("{pace:.0}/s"),
            note: format!("patches at the end; {} of training", span(trained)),
        });
    }
    cards.push(Card {
        name: "Restarts",
        value: status.restarts.to_string(),
        note: facts.commit.map_or_else(|| "no commit yet".to_owned(), |(seq, _)| format!("newest commit {seq}")),
    });
    cards
}

fn charts(facts: &Facts) -> Vec<Drawn> {
    #[allow(clippy::cast_precision_loss)]
    let line = |name: &'static str, key: &str, class: &'static str| Line {
        name,
        class,
        points: facts.steps.iter().filter_map(|s| Some((s.step as f64, *s.values.get(key)?))).collect(),
    };
    #[allow(clippy::cast_precision_loss)]
    let marks: Vec<f64> =
        facts.steps.windows(2).filter(|pair| pair[0].epoch != pair[1].epoch).map(|pair| pair[1].step as f64).collect();
    // Beyond so many they would be a hatching.
    let marks = if marks.len() > 40 { Vec::new() } else { marks };
    let chart = |title, unit, from_zero, lines| Chart { title, unit, from_zero, lines, marks: marks.clone() };
    [
        chart(
            "Loss",
            "mean over the batch",
            true,
            vec![
                line("total", "loss/total", "c1"),
                line("intra", "loss/intra", "c2"),
                line("inter", "loss/inter", "c3"),
                line("inner", "loss/inner", "c4"),
                // Of methods without the two above.
                line("spatial", "loss/spatial", "c3"),
                line("semantic", "loss/semantic", "c4"),
            ],
        ),
        chart(
            "Online probe",
            "k nearest neighbours, share of the test patches",
            false,
            vec![line("accuracy", "probe/accuracy", "c1"), line("balanced accuracy", "probe/balanced_accuracy", "c2")],
        ),
        chart("Throughput", "patches per second, all ranks", true, vec![line("patches/s", "samples_per_second", "c3")]),
        chart("Learning rate", "cosine, per epoch", true, vec![line("learning rate", "lr", "c2")]),
    ]
    .into_iter()
    .filter_map(|chart| {
        let legend =
            chart.lines.iter().filter(|l| chart.lines.len() > 1 && !l.points.is_empty()).map(|l| (l.name, l.class));
        Some(Drawn { title: chart.title, unit: chart.unit, legend: legend.collect(), svg: chart.svg()? })
    })
    .collect()
}

fn searched((bank, rows, partial): (&str, usize, bool), radius: f64) -> String {
    format!(
        "By cosine of {} features among {}{} patches of the newest commit's bank. Patches nearer than {} tiles on the same slide are left out: \
         they were trained to be alike.",
        if bank == "backbone" { "backbone" } else { "projected" },
        if partial { "the first " } else { "all " },
        count(rows as u64),
        number(radius)
    )
}

fn shown(query: &Query, classes: &[String]) -> Shown {
    let name = |class: Option<u16>| class.and_then(|class| classes.get(usize::from(class))).cloned();
    let tile = |patch: &PatchView| Tile {
        picture: patch.picture.clone(),
        caption: name(patch.class).unwrap_or_default(),
        place: format!("{} ({}, {})", patch.slide, patch.x, patch.y),
        cosine: patch.cosine.map(|cosine| format!("{cosine:.2}")).unwrap_or_default(),
        agreement: match (patch.class, query.patch.class) {
            (Some(a), Some(b)) if a == b => "same",
            (Some(_), Some(_)) => "other",
            _ => "",
        },
    };
    Shown { query: tile(&query.patch), neighbours: query.neighbours.iter().map(tile).collect() }
}

/// What random weights are worth on the set that `value` is of.
fn random_beside<'a>(evals: &[(&str, &'a Value)], value: &Value) -> Option<&'a Value> {
    let beside = |(name, other): &&(&str, &Value)| *name == "random" && other["data"] == value["data"];
    evals.iter().find(beside).map(|(_, random)| *random)
}

fn eval_rows(facts: &Facts) -> Vec<EvalRow> {
    let evals = facts.evals();
    let knn = |value: &Value| value["knn"]["20"].as_f64();
    let share = |value: &Value| value.as_f64().map_or_else(|| "–".to_owned(), percent);
    evals
        .iter()
        .map(|(name, value)| EvalRow {
            name: match value["evaluation"]["name"].as_str() {
                Some(evaluation) => format!("{name} ({evaluation})"),
                None => (*name).to_owned(),
            },
            random: *name == "random",
            cells: vec![
                share(&value["knn"]["10"]),
                share(&value["knn"]["20"]),
                share(&value["balanced"]["knn"]),
                share(&value["linear"]),
                share(&value["balanced"]["linear"]),
                value["train_patches"].as_u64().map_or_else(|| "–".to_owned(), count),
                value["test_patches"].as_u64().map_or_else(|| "–".to_owned(), count),
            ],
            gain: match (random_beside(&evals, value).and_then(knn), knn(value)) {
                (Some(random), Some(own)) if *name != "random" => format!("{:+.1}", 100.0 * (own - random)),
                _ => String::new(),
            },
        })
        .collect()
}

/// Fine-tuning, segmentation and detection, task by task.
fn transfers(facts: &Facts) -> Vec<Transfer> {
    let mut rows = Vec::new();
    for (weights, value) in facts.all_evals() {
        let mut row = |task: String, found: &Value, trials: &Value| {
            rows.push(Transfer {
                task,
                weights: weights.to_owned(),
                random: weights == "random",
                figure: figure(found),
                trials: trials.as_u64().map_or_else(|| "1".to_owned(), count),
                data: value["data"].as_str().unwrap_or("–").to_owned(),
            });
        };
        if value["mean_iou"].is_object() {
            row("segmentation, mean IoU".to_owned(), &value["mean_iou"], &value["trials"]);
        }
        for found in value["protocols"].as_array().into_iter().flatten() {
            for (key, name) in [("ap", "AP"), ("ap50", "AP50"), ("ap75", "AP75")] {
                if found[key].is_object() {
                    row(format!("detection, {name}"), &found[key], &found["trials"]);
                }
            }
            match found["protocol"].as_str() {
                Some(protocol) if protocol.starts_with("finetune") => {
                    row(format!("{protocol}, accuracy"), &found["accuracy"], &found["trials"]);
                }
                _ => {}
            }
        }
    }
    rows.sort_by(|a, b| (&a.task, &a.data).cmp(&(&b.task, &b.data)));
    rows
}

/// The linear probe's confusion of the best trained weights: rows are true classes, shares of their patches.
fn confusion(facts: &Facts) -> Option<Confusion> {
    let evals = facts.evals();
    let trained = evals.iter().filter(|(name, _)| *name != "random");
    let (weights, eval) = trained.max_by(|a, b| {
        let linear = |value: &Value| value["linear"].as_f64().unwrap_or(0.0);
        linear(a.1).total_cmp(&linear(b.1))
    })?;
    let classes: Vec<String> =
        eval["classes"].as_array()?.iter().map(|class| class.as_str().unwrap_or("?").to_owned()).collect();
    let rows: Vec<Vec<f64>> = eval["confusion"]
        .as_array()?
        .iter()
        .map(|row| row.as_array().map(|row| row.iter().map(|n| n.as_f64().unwrap_or(0.0)).collect()))
        .collect::<Option<_>>()?;
    if rows.len() != classes.len() || rows.iter().any(|row| row.len() != classes.len()) {
        return None;
    }
    let shares = |row: Vec<f64>| {
        let sum = row.iter().sum::<f64>();
        let share = |n: f64| if sum > 0.0 { n / sum } else { 0.0 };
        row.into_iter()
            .map(|n| Share {
                text: if n > 0.0 { format!("{:.0}", 100.0 * share(n)) } else { String::new() },
                strength: format!("{:.0}", 55.0 * share(n)),
            })
            .collect()
    };
    let rows = classes.iter().cloned().zip(rows.into_iter().map(shares)).collect();
    Some(Confusion { weights: (*weights).to_owned(), classes, rows })
}

fn event_rows(facts: &Facts) -> Vec<EventRow> {
    facts
        .events
        .iter()
        .map(|event| {
            let (what, detail) = match &event.kind {
                EventKind::Started { world, from_commit } => (
                    "started",
                    from_commit.map_or_else(
                        || format!("on {world} ranks"),
                        |seq| format!("on {world} ranks, from commit {seq}"),
                    ),
                ),
                EventKind::Regrouped { reason, world_before, world, seconds, steps_lost, .. } => (
                    "regrouped",
                    format!("{reason}\n{world_before} to {world} ranks in {seconds:.1} s, {steps_lost} steps lost"),
                ),
                EventKind::SetAside { seq, reason } => ("set aside", format!("commit {seq}: {reason}")),
                EventKind::Ordered { what, refused, .. } => (
                    "ordered",
                    refused.as_ref().map_or_else(|| what.to_string(), |why| format!("{what}, refused: {why}")),
                ),
                EventKind::Suspended { reason } => ("suspended", reason.clone()),
                EventKind::Failed { message } => ("failed", message.clone()),
                EventKind::Cancelled => ("cancelled", String::new()),
                EventKind::Finished => ("finished", String::new()),
            };
            EventRow { time: event.time.strftime("%Y-%m-%d %H:%M:%S").to_string(), what, detail }
        })
        .collect()
}

/// Every key with its value; those that differ from the published setting are marked.
fn config_rows(config: &RunConfig) -> Vec<ConfigRow> {
    fn flatten(name: &str, value: &Value, default: &Value, rows: &mut Vec<ConfigRow>) {
        match value {
            Value::Object(fields) => {
                for (key, value) in fields {
                    let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                    flatten(&name, value, &default[key], rows);
                }
            }
            Value::Null => {
                rows.push(ConfigRow { key: name.to_owned(), value: "none".into(), changed: value != default })
            }
            other => {
                let text = other.as_str().map_or_else(|| other.to_string(), str::to_owned);
                rows.push(ConfigRow { key: name.to_owned(), value: text, changed: value != default });
            }
        }
    }
    let tree = |config: &RunConfig| serde_json::to_value(config).unwrap_or_default();
    let mut rows = Vec::new();
    flatten("", &tree(config), &tree(&RunConfig::default()), &mut rows);
    rows
}
