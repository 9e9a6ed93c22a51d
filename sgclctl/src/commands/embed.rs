//! `embed`: slides are read here, `sgcl-worker embed` computes and writes their features.

mod child;
mod slides;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use sgcl_patchset::ingest::{self, IngestOptions, Scale};
use sgcl_patchset::{PatchSet, Store};
use sgcl_runstore::features::{Layout, Output};

use crate::cli::embed::EmbedArgs;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Out, count, span, warn};
use crate::{progress, table};

use child::Child;

/// Slides left out that fit a screen.
const SHOWN: usize = 20;

pub(crate) async fn main(args: EmbedArgs, out: Out) -> Result<Exit> {
    if args.weights != "random" && !Path::new(&args.weights).is_file() {
        // A run that is not there is told of before slides are opened.
        let Some(bucket) = &args.bucket else {
            return Err(Failure::new(Exit::Usage, format!("{} is neither `random` nor a file", args.weights))
                .hint("for a run of that name add --bucket URL")
                .into());
        };
        super::existing(bucket, &args.weights).await?;
    }
    let to = Store::open(&args.to)?;
    match patch_set(&args.slides) {
        Some(url) => patches(&args, &url, &to, out).await,
        None => slides(args, &to, out).await,
    }
}

/// The one argument that is a patch set: a URL, or a folder with a manifest.
fn patch_set(given: &[String]) -> Option<String> {
    let [one] = given else { return None };
    let is_set = one.contains("://") || Path::new(one).join(sgcl_patchset::manifest::MANIFEST).is_file();
    is_set.then(|| one.clone())
}

/// Embeds a patch set: the worker reads it itself.
async fn patches(args: &EmbedArgs, url: &str, to: &Store, out: Out) -> Result<Exit> {
    let set = PatchSet::open(url).await?;
    let slides = &set.manifest().slides;
    if args.dry_run {
        let rows = slides.iter().map(|slide| (slide.name.clone(), u64::from(slide.patches), slide.mpp));
        return dry(&rows.collect::<Vec<_>>(), &[], out);
    }
    let mut child = Child::start(args, Some(url), &BTreeMap::new(), out)?;
    let mut shown = Shown::new(out, slides.len(), Some(set.manifest().patches));
    while let Some(message) = child.next().await? {
        shown.take(&message)?;
    }
    shown.end(to)
}

/// Has `sgcl-worker` make an embedding that a run's configuration names, by these words: slides, patches and seconds.
pub(super) async fn named(words: &[String], dataset: &str, out: Out) -> Result<Value> {
    let set = PatchSet::open(dataset).await?;
    let mut child = Child::named(words, out)?;
    let mut shown = Shown::new(out, set.manifest().slides.len(), Some(set.manifest().patches));
    while let Some(message) = child.next().await? {
        shown.take(&message)?;
    }
    shown.bar.finish_and_clear();
    let (slides, seconds) = (shown.done, shown.began.elapsed().as_secs_f64());
    if !out.json() {
        out.data(format!("{} patches of {slides} slide(s) in {}", count(shown.embedded), span(seconds)))?;
    }
    Ok(json!({ "slides": slides, "resumed": shown.resumed, "patches": shown.embedded, "seconds": seconds }))
}

/// Embeds slides: opened and read on threads of their own, handed to the worker on its standard input.
async fn slides(args: EmbedArgs, to: &Store, out: Out) -> Result<Exit> {
    let options = args.tiling.options();
    let given: Vec<PathBuf> = args.slides.iter().map(PathBuf::from).collect();
    let found = ingest::slides::find(&given, &options)?;
    if args.dry_run {
        let bar = progress::bar(out, found.len() as u64, "opening slides {wide_bar:.cyan/dim} {pos}/{len}");
        let (opened, skipped) = slides::count(found, &options, bar.clone()).await?;
        bar.finish_and_clear();
        return dry(&opened, &skipped, out);
    }
    let mut child = Child::start(&args, None, &settings(&args, &options), out)?;
    let mut shown = Shown::new(out, found.len(), None);
    let Some(ready) = child.ready().await? else {
        return Err(Failure::new(Exit::Failed, "sgcl-worker ended before it began").into());
    };
    shown.began = Instant::now();
    let layouts = Layout::parse(&args.layout).unwrap_or_else(|| vec![Layout::Trident]);
    let output = Output::new(to.clone(), layouts, &ready.encoder, ready.settings);
    let (told, mut news) = tokio::sync::mpsc::unbounded_channel();
    let feeding = slides::feed(found, options, args.jpeg_quality, output, child.stdin()?, told);
    let mut feeding = std::pin::pin!(feeding);
    let mut fed: Option<Result<()>> = None;
    let mut listening = true;
    loop {
        tokio::select! {
            done = &mut feeding, if fed.is_none() => fed = Some(done),
            Some(message) = news.recv() => shown.take(&message)?,
            message = child.next(), if listening => match message? {
                Some(message) => shown.take(&message)?,
                None => listening = false,
            },
            else => break,
        }
    }
    // The worker ended well, so what went wrong went wrong here.
    fed.unwrap_or(Ok(()))?;
    shown.end(to)
}

/// What a slide's features depend on besides the encoder.
fn settings(args: &EmbedArgs, options: &IngestOptions) -> BTreeMap<String, Value> {
    let scale = match options.scale {
        Scale::Mpp(mpp) => ("mpp", json!(mpp)),
        Scale::Level(level) => ("level", json!(level)),
    };
    [
        scale,
        ("patch_px", json!(options.patch_px)),
        ("assume_mpp", json!(options.assume_mpp)),
        ("tissue_min", json!(options.tissue_min)),
        ("jpeg_quality", json!(args.jpeg_quality)),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

/// Name, patches and microns per pixel of slides that would be embedded, and those that could not.
fn dry(slides: &[(String, u64, Option<f64>)], skipped: &[ingest::Skipped], out: Out) -> Result<Exit> {
    let patches: u64 = slides.iter().map(|(_, patches, _)| patches).sum();
    if out.json() {
        let slides: Vec<_> =
            slides.iter().map(|(name, patches, mpp)| json!({ "name": name, "patches": patches, "mpp": mpp })).collect();
        let skipped: Vec<_> = skipped.iter().map(|s| json!({ "source": s.source, "reason": s.reason })).collect();
        out.json_line(&json!({ "dry_run": true, "patches": patches, "slides": slides, "skipped": skipped }))?;
    } else {
        let rows = slides.iter().map(|(name, patches, mpp)| {
            [name.clone(), count(*patches), mpp.map_or_else(|| "?".to_owned(), |mpp| format!("{mpp:.3}"))]
        });
        out.data(table::text(&["slide", "patches", "µm/px"], rows.collect()))?;
        out.data(format!("dry run: {} patches of {} slide(s); nothing was written", count(patches), slides.len()))?;
        tell_skipped(skipped.iter().map(|s| (s.source.as_str(), s.reason.as_str())));
    }
    Ok(if skipped.is_empty() { Exit::Done } else { Exit::Data })
}

fn tell_skipped<'a>(skipped: impl ExactSizeIterator<Item = (&'a str, &'a str)>) {
    let label = console::style("skipped:").yellow().bold().for_stderr();
    let all = skipped.len();
    for (source, reason) in skipped.take(SHOWN) {
        warn(format!("{label} {source}: {reason}"));
    }
    if let Some(more @ 1..) = all.checked_sub(SHOWN) {
        warn(format!("{label} and {more} more; --output json names them all"));
    }
}

/// What the user sees while slides are embedded.
struct Shown {
    out: Out,
    bar: ProgressBar,
    slides: usize,
    /// Patches in all, where known beforehand.
    patches: Option<u64>,
    /// Slides done, and of those the ones that took work.
    done: usize,
    worked: usize,
    embedded: u64,
    resumed: usize,
    skipped: Vec<(String, String)>,
    began: Instant,
}

impl Shown {
    fn new(out: Out, slides: usize, patches: Option<u64>) -> Self {
        let bar = progress::bar(out, 1000, "{wide_msg}\n{wide_bar:.cyan/dim} {percent:>3} %");
        bar.set_message("loading the encoder");
        bar.tick();
        let (done, worked, embedded, resumed) = (0, 0, 0, 0);
        Self { out, bar, slides, patches, done, worked, embedded, resumed, skipped: Vec::new(), began: Instant::now() }
    }

    fn take(&mut self, message: &Value) -> Result<()> {
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        if message.get("ready").is_some() {
            self.began = Instant::now();
        }
        if let Some(progress) = message.get("progress") {
            let (done, of) = (number(&progress["done"]), number(&progress["of"]));
            self.draw(progress["slide"].as_str().unwrap_or_default(), done, of);
        }
        if let Some(slide) = message.get("slide") {
            let name = slide["name"].as_str().unwrap_or_default();
            self.done += 1;
            if slide["resumed"].as_bool() == Some(true) {
                self.resumed += 1;
            } else if let Some(reason) = slide["skipped"].as_str() {
                self.skipped.push((slide["source"].as_str().unwrap_or(name).to_owned(), reason.to_owned()));
            } else {
                self.worked += 1;
                self.embedded += number(&slide["patches"]);
            }
            if self.out.json() {
                self.out.json_line(message)?;
            } else if !self.bar.is_hidden() {
                self.draw(name, 0, 0);
            } else if slide.get("files").is_some() {
                let left = self.left(0.0).map_or_else(String::new, |s| format!(", {} left", span(s)));
                let (at, of) = (self.done, self.slides);
                self.out.note(format!("[{at}/{of}] {name}: {} patches{left}", count(number(&slide["patches"]))));
            }
        }
        Ok(())
    }

    fn draw(&self, name: &str, done: u64, of: u64) {
        let within = if of == 0 { 0.0 } else { done as f64 / of as f64 };
        let mut words = format!("[{}/{}] {name}", (self.done + 1).min(self.slides), self.slides);
        if of > 0 {
            words.push_str(&format!("  {}/{} patches", count(done), count(of)));
        }
        let pace = (self.embedded + done).checked_div(self.began.elapsed().as_secs().max(1)).unwrap_or(0);
        words.push_str(&format!("  {} patches/s", count(pace)));
        if let Some(left) = self.left(within) {
            words.push_str(&format!("  {} left", span(left)));
        }
        self.bar.set_message(words);
        self.bar.set_position((1000.0 * (self.done as f64 + within) / self.slides.max(1) as f64) as u64);
    }

    /// Seconds to the end if slides go on taking what they took so far.
    fn left(&self, within: f64) -> Option<f64> {
        let worked = self.worked as f64 + within;
        let left = (self.slides.saturating_sub(self.done)) as f64 - within;
        (worked > 0.0).then(|| self.began.elapsed().as_secs_f64() * left.max(0.0) / worked)
    }

    fn end(self, to: &Store) -> Result<Exit> {
        self.bar.finish_and_clear();
        let seconds = self.began.elapsed().as_secs_f64();
        let written = self.done - self.resumed - self.skipped.len();
        if self.out.json() {
            let skipped: Vec<_> =
                self.skipped.iter().map(|(source, reason)| json!({ "source": source, "reason": reason })).collect();
            self.out.json_line(&json!({ "result": {
                "to": to.url(), "slides": written, "resumed": self.resumed, "patches": self.embedded, "seconds": seconds,
                "skipped": skipped, "patches_in_set": self.patches,
            }}))?;
        } else {
            let before = match self.resumed {
                0 => String::new(),
                n => format!(", {n} slide(s) were there already"),
            };
            let patches = count(self.embedded);
            self.out.data(format!(
                "{patches} patches of {written} slide(s) in {}{before}: {}",
                span(seconds),
                to.url()
            ))?;
            tell_skipped(self.skipped.iter().map(|(source, reason)| (source.as_str(), reason.as_str())));
        }
        Ok(if self.skipped.is_empty() { Exit::Done } else { Exit::Data })
    }
}
