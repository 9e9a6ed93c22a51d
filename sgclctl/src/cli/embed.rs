//! Arguments of `embed`.

use clap::Args;

use super::Tiling;

const EXAMPLES: &str = "\
Examples:
  sgclctl embed slides/*.svs --weights first --bucket runs --to features
  sgclctl embed slides --weights weights/backbone.pth --to s3://lab/features --layout both
  sgclctl embed patches --weights first --bucket runs --to features          (a patch set: no slides needed)
  sgclctl embed slides --weights random --to features --dry-run              (slides and patches, nothing computed)

TRIDENT's layout is features_<encoder>/<slide>.h5, CLAM's h5_files/<slide>.h5 and pt_files/<slide>.pt: features (n, d) float32, coords
(n, 2) int64 in pixels of level 0. Slides are cut as `ingest` cuts them. The same call again goes on after an interruption: a slide
whose files are whole is not read again.";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct EmbedArgs {
    /// Slides, images or folders of them; or one patch set (a folder or URL)
    #[arg(required = true, value_name = "SLIDES|PATCHSET")]
    pub(crate) slides: Vec<String>,
    /// The encoder: a run's name, a .pth or .safetensors file, or `random`
    #[arg(long, value_name = "RUN|FILE|random")]
    pub(crate) weights: String,
    /// Where features go: a folder or S3 URL
    #[arg(long, value_name = "URL")]
    pub(crate) to: String,
    /// Folder or S3 URL that holds the run
    #[arg(long, env = "SGCL_BUCKET", value_name = "URL")]
    pub(crate) bucket: Option<String>,
    /// Whose layout
    #[arg(long, value_parser = ["trident", "clam", "both"], default_value = "trident")]
    pub(crate) layout: String,
    /// Name of the encoder in TRIDENT's layout [default: the run's or the file's]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Architecture of a file and of `random` [default: what the file fits; of `random` resnet18]
    #[arg(long, value_parser = ["resnet18", "resnet34", "resnet50"])]
    pub(crate) arch: Option<String>,
    /// Side that patches are resized to, pixels [default: the run's global view, else 224]
    #[arg(long, value_parser = clap::value_parser!(u32).range(32..=1024))]
    pub(crate) px: Option<u32>,
    #[command(flatten)]
    pub(crate) tiling: Tiling,
    /// Compress patches as `ingest` does before they are embedded: features are then those of the patch set's patches [default: as read]
    #[arg(long, value_name = "QUALITY", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) jpeg_quality: Option<u8>,
    /// Patches in one forward pass [default: 64; on a GPU 256]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) batch: Option<u32>,
    /// Where to compute
    #[arg(long, value_parser = ["auto", "cpu", "cuda"], default_value = "auto")]
    pub(crate) device: String,
    /// Seed of `random`
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Open the slides and count their patches; load no encoder and write nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}
