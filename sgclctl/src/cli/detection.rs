//! `sgclctl eval detection` as typed.

use std::path::PathBuf;

use clap::Args;

const EXAMPLES: &str = "\
Examples:
  sgclctl eval detection --data NuCLS/QC --bucket runs --weights first random
  sgclctl eval detection --data NuCLS/QC --weights weights/backbone.pth random --fold 2 --to detections
  sgclctl phantom --layout nucls --out fields --slides 10
  sgclctl eval detection --data fields --weights random --iterations 200 --crop 128 --scale 2 --regions 64 --trials 1     (a first try)

The folder is NuCLS as published: rgb/, csv/, and train_test_splits/, whose --fold says which slides are tested on; without that folder a
share of the slides is drawn by --seed. Found are the super-classes tumor_any, nonTIL_stromal and sTIL; AMBIGUOUS nuclei and other_nucleus
count neither for nor against (--with-other scores the latter).

The detector is Faster R-CNN (C4) with BatchNorm behind its fifth stage, nothing frozen, as in MoCo's protocol; pictures are enlarged 4 times,
crops, anchors and steps are NuCLS's. AP, AP50 and AP75 are COCO's, by pycocotools, over 300 detections a field. Intervals are 95 %
percentile intervals of resamples of the test slides. The settings as they are want a GPU, which is used where there is one.

It runs in Python (torch, torchvision, pycocotools), in an environment of its own that is made on first use, in the cache folder
($SGCL_CACHE, $XDG_CACHE_HOME/sgcl or ~/.cache/sgcl). Where SGCL_PYTHON names a Python with the same torch, that torch is used;
SGCL_TRANSFER_PYTHON names an interpreter that has everything, and nothing is made. Results are kept with each run named
(eval/<weights>-detection.json).";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DetectionArgs {
    /// Folder in NuCLS's layout
    #[arg(long, value_name = "DIR")]
    pub(crate) data: PathBuf,
    /// What to start the backbone from: a run's name, a .pth or .safetensors file, or the baseline `random`; may be repeated
    #[arg(long, required = true, num_args = 1.., value_name = "RUN|FILE|random")]
    pub(crate) weights: Vec<String>,
    /// Folder or S3 URL that holds the runs named
    #[arg(long, env = "SGCL_BUCKET", value_name = "URL")]
    pub(crate) bucket: Option<String>,
    /// Keep the results with this run [default: every run among --weights]
    #[arg(long, value_name = "RUN")]
    pub(crate) save_to: Option<String>,
    /// Also write truth, detections and results here, in COCO's format
    #[arg(long, value_name = "DIR")]
    pub(crate) to: Option<PathBuf>,
    /// Architecture [default: a file's own; that of the first for `random`, else resnet18]
    #[arg(long, value_parser = ["resnet18", "resnet34", "resnet50"])]
    pub(crate) arch: Option<String>,
    /// Published fold
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub(crate) fold: u32,
    /// Share of slides to test on, where no folds are published
    #[arg(long, default_value_t = 0.3, value_name = "SHARE", value_parser = |text: &str| number(text, 0.01, 0.99))]
    pub(crate) holdout_fraction: f64,
    /// Score other_nucleus as a class
    #[arg(long)]
    pub(crate) with_other: bool,
    /// Trainings, each with draws of its own: mean and standard deviation
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100), value_name = "N")]
    pub(crate) trials: u64,
    /// Seed of all that is drawn: crops, regions, new layers, `random`, resamples
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..1 << 63))]
    pub(crate) seed: u64,
    /// Steps of a training
    #[arg(long, default_value_t = 16_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000), value_name = "N")]
    pub(crate) iterations: u64,
    /// Crops a step
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1024), value_name = "N")]
    pub(crate) batch: u64,
    /// Learning rate; a tenth of it from 3/4, a hundredth from 11/12 of the steps
    #[arg(long, default_value_t = 0.005, value_name = "RATE", value_parser = |text: &str| number(text, 1e-8, 10.0))]
    pub(crate) lr: f64,
    /// Side of a crop, pixels of a field
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(32..=4096), value_name = "PX")]
    pub(crate) crop: u64,
    /// Times that pictures are enlarged: a cell of the backbone has 16 pixels
    #[arg(long, default_value_t = 4.0, value_name = "TIMES", value_parser = |text: &str| number(text, 0.25, 16.0))]
    pub(crate) scale: f64,
    /// Regions of a crop that are learnt from
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(8..=4096), value_name = "N")]
    pub(crate) regions: u64,
    /// Regions of a field that are looked at
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(8..=10_000), value_name = "N")]
    pub(crate) proposals: u64,
    /// Resamples of the test slides, for intervals
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(0..=100_000), value_name = "N")]
    pub(crate) resamples: u64,
}

/// A number within bounds, those included.
fn number(text: &str, low: f64, high: f64) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (low..=high).contains(&value) => Ok(value),
        _ => Err(format!("a number from {low} to {high}")),
    }
}
