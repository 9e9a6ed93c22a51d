//! `sgclctl eval segmentation` as typed.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

const EXAMPLES: &str = "\
Examples:
  sgclctl eval segmentation --data BCSS --bucket runs --weights first random --page segmentation.html
  sgclctl eval segmentation --data BCSS --weights backbone.pth random --arch resnet50 --trials 1 --save predicted
  sgclctl phantom --layout bcss --out drawn --slides 9 --size 512     (data to try it on, then --tile-px 128 --steps 200 --batch 4)

Data: a folder with rgbs_colorNormalized/ (or rgbs_colorCorrected/, rgbs/, images/) and masks/, PNGs of the same names in both, called by
their TCGA barcode. Codes of the masks become classes as SGCL publishes them: 0 is ignored; 1, 19 and 20 are tumour; 2 stroma; 3, 10, 11
and 14 inflammatory; 4 necrosis; all others one class. Slides of the institutes OL, LL, E2, EW, GM and S3 are validated on.

Network: the backbone dilated to an output stride of 8, all of it trained, under a fully convolutional head (two 3×3 convolutions, a third
over their output beside the map, 1×1; logits brought to full size bilinearly). Cross-entropy; SGD 0.01, momentum 0.9, weight decay
5e-4, rate to the power 0.9 of the steps left down to 1e-4, 20,000 steps of 16 tiles: mmsegmentation's FCN without its auxiliary
head. Tiles are cut without overlap. While learning they are scaled by 0.5 to 2 and cut again (crop), mirrored (flip) and recoloured
(colour).

Figures are of one confusion matrix over all pixels of all validation images: mean IoU and each class's IoU, means and standard
deviations over trials, 95 % percentile intervals of 1,000 resamples of the validation slides. The same seed gives the same figures on
as many CPU threads; on GPUs trainings may differ in the last digits.";

/// What is done to tiles while learning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Augment {
    /// Scaled by 0.5 to 2 and cut
    Crop,
    /// Mirrored
    Flip,
    /// Brightness, contrast, saturation, hue
    Colour,
    /// Nothing
    None,
}

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct SegmentationArgs {
    /// Folder with images and masks, as BCSS is published
    #[arg(long, value_name = "DIR")]
    pub(crate) data: PathBuf,
    /// What to evaluate: a run's name, a .pth or .safetensors file, or the baseline `random`; may be repeated
    #[arg(long, required = true, num_args = 1.., value_name = "RUN|FILE|random")]
    pub(crate) weights: Vec<String>,
    /// Folder or S3 URL that holds the runs named
    #[arg(long, env = "SGCL_BUCKET", value_name = "URL")]
    pub(crate) bucket: Option<String>,
    /// Architecture of files and of `random` [default: that of the first run named, else resnet18]
    #[arg(long, value_parser = ["resnet18", "resnet34", "resnet50"])]
    pub(crate) arch: Option<String>,
    /// Institutes, by the second part of the barcode, whose slides are validated on; separated by commas
    #[arg(long, value_delimiter = ',', default_value = "OL,LL,E2,EW,GM,S3", value_name = "CODES")]
    pub(crate) validation: Vec<String>,
    /// Side of a tile, pixels
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(32..=2048), value_name = "PX")]
    pub(crate) tile_px: u32,
    /// Trainings, each with other draws: mean and standard deviation
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100), value_name = "N")]
    pub(crate) trials: u64,
    /// Steps of a training
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000), value_name = "N")]
    pub(crate) steps: u64,
    /// Tiles a step
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024), value_name = "N")]
    pub(crate) batch: u32,
    /// Learning rate at first
    #[arg(long, default_value_t = 0.01, value_parser = rate, value_name = "RATE")]
    pub(crate) lr: f64,
    /// What is done to tiles while learning, separated by commas; `none` for nothing
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "crop,flip,colour",
        hide_possible_values = true,
        value_name = "crop,flip,colour"
    )]
    pub(crate) augment: Vec<Augment>,
    /// Seed of all that is drawn: `random`, heads, order, views, resamples
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Write there what is predicted: <encoder>/trial-<n>/<image>.png holds each pixel's class, <encoder>/pictures/<image>.png image, truth
    /// and prediction side by side
    #[arg(long, value_name = "DIR")]
    pub(crate) save: Option<PathBuf>,
    /// Folder for the tiles while this runs, 4 bytes a pixel [default: the system's for temporary files]
    #[arg(long, value_name = "DIR")]
    pub(crate) scratch: Option<PathBuf>,
    /// Also write a page with figures, confusions and the pictures of the worst images
    #[arg(long, value_name = "FILE")]
    pub(crate) page: Option<PathBuf>,
}

/// Above 0 and up to 10.
fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate <= 10.0 => Ok(rate),
        _ => Err("a rate above 0 and up to 10, such as 0.01".to_owned()),
    }
}
