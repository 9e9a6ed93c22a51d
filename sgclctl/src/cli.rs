//! The command line as typed. Each command's file turns its arguments into what it needs.

pub(crate) mod cluster;
pub(crate) mod detection;
pub(crate) mod embed;
pub(crate) mod eval;
pub(crate) mod segmentation;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use sgcl_patchset::ingest::{IngestOptions, Scale};

use crate::exit;
use crate::output::Format;

/// Pretrain pathology encoders: ingest slides, run, watch, report, evaluate.
///
/// Slides become a patch set, a run trains a backbone on it, and the weights land in the bucket. A bucket or patch set is a folder or an
/// S3 URL (s3://bucket/prefix); endpoint, region and credentials are read as the AWS tools read them.
#[derive(Parser, Debug)]
#[command(version, propagate_version = false, max_term_width = 110, after_help = exit::table())]
pub(crate) struct Cli {
    /// Results and progress for people or for programs [default: human; progress of a run is JSON lines when not on a terminal]
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    pub(crate) output: Option<Format>,
    /// Print results and errors alone
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Turn slides, images or tile folders into a patch set
    Ingest(IngestArgs),
    /// Draw H&E-like slides with labels, to try everything on
    Phantom(PhantomArgs),
    /// Train a backbone on a patch set
    Run(RunArgs),
    /// Train on a cluster: makes an SgclRun
    Submit(cluster::SubmitArgs),
    /// Go on with a run that was suspended: on the cluster, or with --bucket here, also one that broke off (`run --local --resume`)
    #[command(after_help = "\
Examples:
  sgclctl resume first                     (a run on the cluster)
  sgclctl resume first --bucket runs       (on this machine)

Nodes, ranks and configuration are the run's own; `sgclctl run --local --resume` takes others.")]
    Resume(WishArgs),
    /// Let a run that is under way finish its step, commit and end; `resume` goes on with it
    #[command(after_help = WISH_HELP)]
    Suspend(WishArgs),
    /// End a run for good; what it has committed stays
    #[command(after_help = WISH_HELP)]
    Cancel(WishArgs),
    /// Send one node of a run home: it hands over what it holds, and another takes its place
    Drain(DrainArgs),
    /// How a run stands: on the cluster, or with --bucket from the bucket alone
    Status(StatusArgs),
    /// The runs on the cluster, or with --bucket in a bucket
    List(ListArgs),
    /// What a run's nodes say, on the cluster
    Logs(cluster::LogsArgs),
    /// Give a run on the cluster another number of nodes
    Scale(cluster::ScaleArgs),
    /// Runs on the cluster as they go, drawn anew with every change
    Watch(cluster::WatchArgs),
    /// Whether this cluster is ready for a run: installed, permitted, GPUs, bucket; each answer with its remedy
    Check(cluster::CheckArgs),
    /// Delete a run from the cluster; the bucket keeps what it has
    Delete(cluster::DeleteArgs),
    /// A run's life: every membership change with its cause and cost
    Describe(DescribeArgs),
    /// Prove from the bucket alone that a run lost nothing and repeated nothing
    Verify(VerifyArgs),
    /// Fetch a run's weights and verify them
    Pull(PullArgs),
    /// What weights are worth on a labelled patch set: nearest neighbours, linear classifiers, fine-tuning
    Eval(eval::EvalCommand),
    /// Write features of slides for slide-level models, in the layouts of TRIDENT and CLAM
    Embed(embed::EmbedArgs),
    /// Write a run's report: one HTML file with curves, slides, neighbours and probes
    Report(ReportArgs),
    /// Show or check a run configuration
    Config(ConfigArgs),
    /// Print a shell's completion script
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the version
    Version,
}

/// Where the runs are.
#[derive(Args, Debug)]
pub(crate) struct Bucket {
    /// Folder or S3 URL that holds the runs
    #[arg(long, env = "SGCL_BUCKET", value_name = "URL")]
    pub(crate) bucket: String,
}

/// How slides are cut into patches.
#[derive(Args, Debug)]
pub(crate) struct Tiling {
    /// Side of a patch in pixels
    #[arg(long, default_value_t = 256)]
    pub(crate) patch_px: u32,
    /// Microns per pixel to tile at [default: 0.5]
    #[arg(long, conflicts_with = "level")]
    pub(crate) mpp: Option<f64>,
    /// Pyramid level to tile as it is
    #[arg(long)]
    pub(crate) level: Option<u32>,
    /// Microns per pixel of slides that do not say
    #[arg(long, value_name = "MPP")]
    pub(crate) assume_mpp: Option<f64>,
    /// Share of a tile that tissue must cover
    #[arg(long, default_value_t = 0.5, value_name = "SHARE")]
    pub(crate) tissue_min: f64,
}

impl Tiling {
    /// With everything else as it is by default.
    pub(crate) fn options(&self) -> IngestOptions {
        IngestOptions {
            patch_px: self.patch_px,
            scale: self.level.map_or(Scale::Mpp(self.mpp.unwrap_or(0.5)), Scale::Level),
            assume_mpp: self.assume_mpp,
            tissue_min: self.tissue_min,
            ..IngestOptions::default()
        }
    }
}

const INGEST_EXAMPLES: &str = "\
Examples:
  sgclctl ingest slides/*.svs --to patches --preview previews
  sgclctl ingest slides --to s3://lab/patches --mpp 0.25 --patch-px 512
  sgclctl ingest old.svs --to patches --level 0                 (a slide that does not say its resolution)
  sgclctl ingest NCT-CRC-HE-100K --to patches --patch-px 224    (class folders of images)
  sgclctl ingest tumor normal lesion_annotations --to patches   (Camelyon16: slides, and polygons of ASAP)
  sgclctl ingest slides 20x_256px_0px_overlap/patches --to patches    (places of TRIDENT's or CLAM's .h5 instead of tissue detection)
  sgclctl ingest shards/*.tar --to patches                      (WebDataset; or *.parquet as on Hugging Face)
  sgclctl ingest tiles --list train.txt --to patches            (the tiles that a list names, with labels where it has them)

Folders may hold slides, tiles as <class>/<slide>/<slide>_<x>_<y>_<level>.png, or images as <class>/<image>. Label maps beside a slide
(<slide>.labels.png and .json) label its patches. The same call again goes on after an interruption.";

#[derive(Args, Debug)]
#[command(after_help = INGEST_EXAMPLES)]
pub(crate) struct IngestArgs {
    /// Slides, images or folders
    #[arg(required = true)]
    pub(crate) slides: Vec<PathBuf>,
    /// Patch set to write: a folder or S3 URL
    #[arg(long, value_name = "URL")]
    pub(crate) to: String,
    #[command(flatten)]
    pub(crate) tiling: Tiling,
    /// JPEG quality of the patches, 1 to 100
    #[arg(long, default_value_t = 90)]
    pub(crate) quality: u8,
    /// Share of a tile that its class must cover
    #[arg(long, default_value_t = 0.6, value_name = "SHARE")]
    pub(crate) label_min: f64,
    /// Share of a tile that annotated tumour must cover (Camelyon16's .xml)
    #[arg(long, default_value_t = 0.5, value_name = "SHARE")]
    pub(crate) tumor_min: f64,
    /// List of the tiles to take, a line each: a path below the one folder given, and perhaps a label (a whole number)
    #[arg(long, value_name = "FILE")]
    pub(crate) list: Option<PathBuf>,
    /// Folder for pictures of the slides with kept and dropped tiles drawn on them
    #[arg(long, value_name = "DIR")]
    pub(crate) preview: Option<PathBuf>,
    /// Seed of the order of slides and patches
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Read, count and draw previews; write no patch set
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// What `phantom` writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PhantomLayout {
    /// Whole slides with label maps
    Slides,
    /// Pictures of --size pixels and masks, as BCSS is published: a third of them of the institutes that are validated on
    Bcss,
    /// Fields with boxed nuclei, as NuCLS is published
    Nucls,
}

#[derive(Args, Debug)]
pub(crate) struct PhantomArgs {
    /// Folder to write to
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Slides to draw
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub(crate) slides: u64,
    /// Side of a slide in pixels
    #[arg(long, default_value_t = 4096)]
    pub(crate) size: u32,
    /// Seed: the same one draws the same slides
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// What to write of them
    #[arg(long, value_enum, default_value_t = PhantomLayout::Slides)]
    pub(crate) layout: PhantomLayout,
    /// Fields of a slide (nucls)
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub(crate) fields: u64,
    /// Side of a field in pixels (nucls)
    #[arg(long, default_value_t = 300, value_name = "PX")]
    pub(crate) field_px: u32,
    /// Measure how much of the classes colour alone gives away
    #[arg(long, conflicts_with = "layout")]
    pub(crate) hardness: bool,
}

const RUN_EXAMPLES: &str = "\
Examples:
  sgclctl run --local --ranks-per-node 2 --data patches --bucket runs --name first -f configs/demo.yaml
  sgclctl run --local --data s3://lab/patches --bucket s3://lab/runs --name big --set epochs=200 --set batch.per_rank=64
  sgclctl run --local --data patches --bucket runs --name first --dry-run    (checks everything, trains nothing)
  sgclctl run --local --bucket runs --name first --resume                    (goes on where it was)

Ctrl-C finishes the step, commits and ends with code 75; a second Ctrl-C ends at once, without a commit.";

#[derive(Args, Debug)]
#[command(after_help = RUN_EXAMPLES)]
pub(crate) struct RunArgs {
    /// Train on this machine: a node is a process
    #[arg(long, required = true)]
    pub(crate) local: bool,
    /// Nodes [default: 1; the run's own with --resume]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) nodes: Option<u32>,
    /// Ranks on each node, one device each [default: 1; the run's own with --resume]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64), value_name = "RANKS")]
    pub(crate) ranks_per_node: Option<u32>,
    /// Fewest nodes that go on training when others are lost [default: 1]
    #[arg(long, value_name = "N")]
    pub(crate) min_nodes: Option<u32>,
    /// Patch set to train on (optional with --resume)
    #[arg(long, value_name = "URL", required_unless_present = "resume")]
    pub(crate) data: Option<String>,
    #[command(flatten)]
    pub(crate) bucket: Bucket,
    /// Name of the run [default: run- and the time; needed with --resume]
    #[arg(long)]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) config: ConfigSource,
    /// Go on with the run of this name from its newest commit
    #[arg(long, requires = "name")]
    pub(crate) resume: bool,
    /// Check configuration, patch set and bucket, say what would be trained, and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
}

const WISH_HELP: &str = "\
Examples:
  sgclctl suspend first                    (a run on the cluster)
  sgclctl suspend first --bucket runs      (any other)

With --bucket it works from any machine that may write there: the run's coordinator looks for orders, wherever it is. It ends once the run
has ended, with 69 where nobody answers. On a cluster it changes the SgclRun and ends at once; `sgclctl watch` shows what follows.";

/// A run, and where it is.
#[derive(Args, Debug)]
pub(crate) struct WishArgs {
    /// Name of the run
    pub(crate) run: String,
    /// Folder or S3 URL that holds the run, where it is not the cluster's [default: the cluster is asked]
    #[arg(long, env = "SGCL_BUCKET", value_name = "URL")]
    pub(crate) bucket: Option<String>,
    #[command(flatten)]
    pub(crate) cluster: cluster::ClusterArgs,
}

impl WishArgs {
    /// The run's place in a bucket, where one is named.
    pub(crate) fn in_bucket(&self) -> Option<OrderArgs> {
        let bucket = Bucket { bucket: self.bucket.clone()? };
        Some(OrderArgs { run: self.run.clone(), bucket })
    }
}

/// A run of a bucket.
#[derive(Args, Debug)]
pub(crate) struct OrderArgs {
    /// Name of the run
    pub(crate) run: String,
    #[command(flatten)]
    pub(crate) bucket: Bucket,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sgclctl drain first 1 --bucket runs              (the node in slot 1)
  sgclctl drain first first-1-0 --bucket runs      (by its name, as `describe` gives it)

No step is lost. Ends once the coordinator has taken the order; `describe` shows what followed.")]
pub(crate) struct DrainArgs {
    #[command(flatten)]
    pub(crate) order: OrderArgs,
    /// The node: its name, or its slot
    pub(crate) node: String,
}

/// Defaults, then the file, then each override.
#[derive(Args, Debug)]
pub(crate) struct ConfigSource {
    /// Configuration file (YAML) [default: the published setting]
    #[arg(short = 'f', long = "file", value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Override one key, e.g. epochs=20 or optimizer.lr=0.03; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

const STATUS_EXAMPLES: &str = "\
Examples:
  sgclctl status first
  sgclctl status first --bucket runs
  sgclctl status s3://lab/runs/runs/first
  sgclctl status first --bucket runs --output json";

#[derive(Args, Debug)]
#[command(after_help = STATUS_EXAMPLES)]
pub(crate) struct StatusArgs {
    /// Name of the run (with --bucket), or its own URL: <bucket>/runs/<name>
    #[arg(value_name = "RUN|URL")]
    pub(crate) run: String,
    /// Folder or S3 URL that holds the runs [default: the cluster is asked]
    #[arg(long, env = "SGCL_BUCKET", value_name = "URL")]
    pub(crate) bucket: Option<String>,
    #[command(flatten)]
    pub(crate) cluster: cluster::ClusterArgs,
}

#[derive(Args, Debug)]
pub(crate) struct ListArgs {
    /// Folder or S3 URL that holds the runs [default: the cluster is asked]
    #[arg(long, env = "SGCL_BUCKET", value_name = "URL")]
    pub(crate) bucket: Option<String>,
    #[command(flatten)]
    pub(crate) cluster: cluster::ClusterArgs,
}

const PULL_EXAMPLES: &str = "\
Examples:
  sgclctl pull first weights --bucket runs
  python -c 'import torch; torch.load(\"weights/backbone.pth\")'";

#[derive(Args, Debug)]
#[command(after_help = PULL_EXAMPLES)]
pub(crate) struct PullArgs {
    /// Name of the run
    pub(crate) run: String,
    /// Folder to write; must not exist, or be empty
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) bucket: Bucket,
    /// Commit whose export to fetch [default: the newest]
    #[arg(long)]
    pub(crate) commit: Option<u64>,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  sgclctl describe first --bucket runs

Says what every membership change was caused by, how long it took until training went on, and how many steps had to be trained
again; goodput is the share of the time that was not spent on changes.")]
pub(crate) struct DescribeArgs {
    /// Name of the run
    pub(crate) run: String,
    #[command(flatten)]
    pub(crate) bucket: Bucket,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  sgclctl verify first --bucket runs

Reads every commit and every part of it, follows the plans of every epoch again, and compares with the ledgers: each patch exactly
once an epoch, commits in one chain, nothing missing or damaged. Ends with 65 where anything is wrong, naming it.")]
pub(crate) struct VerifyArgs {
    /// Name of the run
    pub(crate) run: String,
    #[command(flatten)]
    pub(crate) bucket: Bucket,
    /// The run's patch set, where it was moved [default: as the run has it]
    #[arg(long, value_name = "URL")]
    pub(crate) data: Option<String>,
}

const REPORT_EXAMPLES: &str = "\
Examples:
  sgclctl report first --bucket runs
  sgclctl report first --bucket s3://lab/runs --data /mnt/patches --out first.html";

#[derive(Args, Debug)]
#[command(after_help = REPORT_EXAMPLES)]
pub(crate) struct ReportArgs {
    /// Name of the run
    pub(crate) run: String,
    #[command(flatten)]
    pub(crate) bucket: Bucket,
    /// File to write
    #[arg(long, default_value = "report.html", value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// Patch set, where it has moved since the run [default: the one the run was made with]
    #[arg(long, value_name = "URL")]
    pub(crate) data: Option<String>,
    /// Slides to show
    #[arg(long, default_value_t = 12)]
    pub(crate) slides: usize,
    /// Query patches of the neighbour montage
    #[arg(long, default_value_t = 6)]
    pub(crate) queries: usize,
}

const CONFIG_EXAMPLES: &str = "\
Examples:
  sgclctl config show -f configs/demo.yaml --set epochs=20
  sgclctl config check -f my.yaml --data patches --ranks 4
  sgclctl config schema > schema.json";

#[derive(Args, Debug)]
#[command(after_help = CONFIG_EXAMPLES)]
pub(crate) struct ConfigArgs {
    #[command(subcommand)]
    pub(crate) command: ConfigCommand,
}

#[derive(Subcommand, Debug)]
pub(crate) enum ConfigCommand {
    /// Print the configuration in full: defaults, file and overrides
    Show(ConfigSource),
    /// Check a configuration, against a patch set too where one is named
    Check {
        #[command(flatten)]
        source: ConfigSource,
        /// Patch set that it must fit
        #[arg(long, value_name = "URL")]
        data: Option<String>,
        /// Ranks that share a step
        #[arg(long, default_value_t = 1)]
        ranks: u32,
    },
    /// Print the JSON schema of configuration files
    Schema,
}
