//! `sgclctl eval` as typed.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::detection::DetectionArgs;
use super::segmentation::SegmentationArgs;

const EXAMPLES: &str = "\
Examples:
  sgclctl eval --data patches --bucket runs --weights first random colour-histogram
  sgclctl eval --data labelled --weights weights/backbone.pth --arch resnet50 --protocol linear --recipe eva,seed --page eval.html
  sgclctl eval --data labelled --weights a.pth random --protocol finetune --labels 1%,10%,100% --trials 3

Protocols:
  knn        10 and 20 nearest neighbours by cosine, votes exp(cosine / 0.07)
  linear     a linear classifier on the frozen encoder. --recipe lbfgs: logistic regression on standardised features, to its optimum.
             seed: SGD 0.03, momentum 0.9, 100 epochs, a tenth at 60 and 80, RandomResizedCrop and flip; it encodes every training
             patch anew every epoch, so it costs 100 times what the others cost. eva: AdamW 3e-4, batch 256, 12,500 steps at most,
             ends after 7 epochs without gain on a fifth of the training slides.
  finetune   backbone and classifier, SGD 0.001, weight decay 1e-4, 100 epochs, a tenth at 60 and 80; below 100 % of the labels 20
             epochs, a fifth at 12 and 16. Labels are drawn class by class from the training slides.

Slides are tested on that were not learnt from: those a named run held out (data.holdout_fraction), else a share drawn by --seed.
Intervals are 95 % percentile intervals of 1,000 resamples of the test slides. Features of whole patches are kept by content, in
--cache; the folder may be deleted at any time. The same seed gives the same figures on as many CPU threads; on GPUs trainings may
differ in the last digits. Results are kept with each run named (eval/<weights>.json, of
`finetune` alone <weights>-finetune.json) and appear in its report.";

/// What to do with the encoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Protocol {
    /// Nearest neighbours
    Knn,
    /// A linear classifier on the frozen encoder
    Linear,
    /// Everything trained, with labels
    Finetune,
}

/// How the linear classifier is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Recipe {
    /// Logistic regression to its optimum
    Lbfgs,
    /// SGD on crops, 100 epochs
    Seed,
    /// AdamW, stopped early
    Eva,
}

/// A task with data of its own, or else a labelled patch set.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct EvalCommand {
    #[command(subcommand)]
    pub(crate) task: Option<EvalTask>,
    #[command(flatten)]
    pub(crate) patches: Option<EvalArgs>,
}

#[derive(Subcommand, Debug)]
pub(crate) enum EvalTask {
    /// Boxes around nuclei: Faster R-CNN on the backbone, COCO's average precision, on data in NuCLS's layout
    Detection(Box<DetectionArgs>),
    /// Semantic segmentation on images and masks laid out as BCSS
    Segmentation(Box<SegmentationArgs>),
}

#[derive(Args, Debug)]
pub(crate) struct EvalArgs {
    /// Labelled patch set
    #[arg(long, value_name = "URL")]
    pub(crate) data: String,
    /// What to evaluate: a run's name, a .pth or .safetensors file, or the baselines `random` and `colour-histogram`; may be repeated
    #[arg(long, required = true, num_args = 1.., value_name = "RUN|FILE|BASELINE")]
    pub(crate) weights: Vec<String>,
    /// Folder or S3 URL that holds the runs named
    #[arg(long, env = "SGCL_BUCKET", value_name = "URL")]
    pub(crate) bucket: Option<String>,
    /// Keep the results with this run [default: every run among --weights]
    #[arg(long, value_name = "RUN")]
    pub(crate) save_to: Option<String>,
    /// Architecture of files and of `random` [default: that of the first run named, else resnet18]
    #[arg(long, value_parser = ["resnet18", "resnet34", "resnet50"])]
    pub(crate) arch: Option<String>,
    /// Side that patches are resized to, pixels [default: the run's global view, else 224]
    #[arg(long, value_parser = clap::value_parser!(u32).range(32..=1024))]
    pub(crate) px: Option<u32>,
    /// Share of slides to test on, where no run held any out
    #[arg(long, default_value_t = 0.3, value_name = "SHARE")]
    pub(crate) holdout_fraction: f64,
    /// Seed of all that is drawn: split, resamples, `random`, trainings
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Protocols, separated by commas
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "knn,linear",
        hide_possible_values = true,
        value_name = "knn,linear,finetune"
    )]
    pub(crate) protocol: Vec<Protocol>,
    /// How `linear` is trained, separated by commas
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "lbfgs",
        hide_possible_values = true,
        value_name = "lbfgs,seed,eva"
    )]
    pub(crate) recipe: Vec<Recipe>,
    /// Shares of the training labels that `finetune` learns from, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "100%", value_parser = percentage, value_name = "PERCENT")]
    pub(crate) labels: Vec<String>,
    /// Trainings of each protocol that draws (seed, eva, finetune), each with other draws: mean and standard deviation
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100), value_name = "N")]
    pub(crate) trials: u64,
    /// Epochs of `finetune` and of the recipe `seed`; the rate falls at the same shares of them [default: as published]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000), value_name = "N")]
    pub(crate) epochs: Option<u64>,
    /// Folder that keeps features [default: features in $SGCL_CACHE, $XDG_CACHE_HOME/sgcl or ~/.cache/sgcl]
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: Option<PathBuf>,
    /// Also write a page with confusions, ROC curves and the worst mistakes
    #[arg(long, value_name = "FILE")]
    pub(crate) page: Option<PathBuf>,
}

/// `10%`, above 0 and up to 100.
fn percentage(text: &str) -> Result<String, String> {
    let number: Option<f64> = text.trim().trim_end_matches('%').trim().parse().ok();
    match number {
        Some(percent) if percent > 0.0 && percent <= 100.0 => Ok(format!("{percent}%")),
        _ => Err("a percentage above 0 and up to 100, such as 10%".to_owned()),
    }
}
