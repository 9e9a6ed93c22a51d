//! Arguments of the commands that speak to a cluster.

use std::path::PathBuf;

use clap::Args;

/// Which cluster, and where in it.
#[derive(Args, Debug, Clone, Default)]
pub(crate) struct ClusterArgs {
    /// Namespace of the runs [default: the context's, else sgcl]
    #[arg(short = 'n', long, env = "SGCL_NAMESPACE", value_name = "NAME")]
    pub(crate) namespace: Option<String>,
    /// Context of the kubeconfig [default: the current one]
    #[arg(long, value_name = "NAME")]
    pub(crate) context: Option<String>,
}

const SUBMIT_EXAMPLES: &str = "\
Examples:
  sgclctl submit --nodes 2 --gpus-per-node 4
  sgclctl submit --nodes 8 --gpus-per-node 8 --name big -f configs/sgcl.yaml --set epochs=200 --wait
  sgclctl submit --nodes 2 --eval tumour=s3://lab/labelled --embed atlas=s3://lab/atlas --wait
  sgclctl submit -f run.yaml              (a whole SgclRun)
  sgclctl submit --nodes 2 --dry-run      (prints what would be made; the cluster has checked it)

What is left out is taken from the ConfigMap sgcl-defaults of the namespace.";

#[derive(Args, Debug)]
#[command(after_help = SUBMIT_EXAMPLES)]
pub(crate) struct SubmitArgs {
    /// Nodes wanted [default: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) nodes: Option<u32>,
    /// GPUs, and ranks, on each node [default: 1]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64), value_name = "GPUS")]
    pub(crate) gpus_per_node: Option<u32>,
    /// Fewest nodes that train [default: 1]
    #[arg(long, value_name = "N")]
    pub(crate) min_nodes: Option<u32>,
    /// Name of the run [default: run- and the time]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Patch set to train on
    #[arg(long, value_name = "URL")]
    pub(crate) data: Option<String>,
    /// S3 URL that holds the runs
    #[arg(long, value_name = "URL")]
    pub(crate) bucket: Option<String>,
    /// Image of the workers
    #[arg(long)]
    pub(crate) image: Option<String>,
    /// Kueue's LocalQueue
    #[arg(long)]
    pub(crate) queue: Option<String>,
    /// PriorityClass of the pods
    #[arg(long, value_name = "CLASS")]
    pub(crate) priority: Option<String>,
    /// Failures after which the run fails
    #[arg(long, value_name = "N")]
    pub(crate) max_restarts: Option<u32>,
    /// Configuration (YAML), or a whole SgclRun
    #[arg(short = 'f', long = "file", value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Override one key of the configuration, e.g. epochs=20; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Evaluate the weights on a labelled patch set, by nearest neighbours and a linear classifier; may be repeated
    #[arg(long, value_name = "NAME=URL")]
    pub(crate) eval: Vec<String>,
    /// Compute features of a patch set with the weights, in TRIDENT's layout, beside the run; may be repeated
    #[arg(long, value_name = "NAME=URL")]
    pub(crate) embed: Vec<String>,
    /// Print what would be made, checked by the cluster, and make nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Stay until the run ends and what follows it is made, and tell how it goes
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) follow: bool,
    /// Stay until the run ends and what follows it is made; the exit code says how
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) wait: bool,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sgclctl logs first
  sgclctl logs first -f --node 1
  sgclctl logs first --of tumour     (an evaluation that followed the run)")]
pub(crate) struct LogsArgs {
    /// Name of the run
    pub(crate) run: String,
    /// Go on as more is written
    #[arg(short = 'f', long)]
    pub(crate) follow: bool,
    /// One node alone, from 0
    #[arg(long, value_name = "N")]
    pub(crate) node: Option<u32>,
    /// An evaluation or embedding that follows the run, by its name, instead of the nodes
    #[arg(long, value_name = "NAME", conflicts_with = "node")]
    pub(crate) of: Option<String>,
    /// Last lines of each node
    #[arg(long, default_value_t = 200, value_name = "LINES")]
    pub(crate) tail: i64,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  sgclctl scale first --nodes 3

The run commits, and goes on with that many nodes: no step is lost.")]
pub(crate) struct ScaleArgs {
    /// Name of the run
    pub(crate) run: String,
    /// Nodes wanted
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) nodes: u32,
    /// Fewest nodes that train
    #[arg(long, value_name = "N")]
    pub(crate) min_nodes: Option<u32>,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Example:
  sgclctl delete first

Its nodes commit and go; what the run has in the bucket stays.")]
pub(crate) struct DeleteArgs {
    /// Names of the runs
    #[arg(required = true)]
    pub(crate) runs: Vec<String>,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sgclctl watch                (every run of the namespace, until Ctrl-C)
  sgclctl watch first second   (these, until both have ended)")]
pub(crate) struct WatchArgs {
    /// Names of runs [default: all]
    pub(crate) runs: Vec<String>,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  sgclctl check
  sgclctl check --bucket s3://lab/runs --data s3://lab/patches

Bucket and patch set are tried from this terminal, with its keys; a small object is written into the bucket and deleted again. The exit
code is 69 where something is missing.")]
pub(crate) struct CheckArgs {
    /// Bucket of the runs [default: that of sgcl-defaults]
    #[arg(long, value_name = "URL")]
    pub(crate) bucket: Option<String>,
    /// Patch set [default: that of sgcl-defaults]
    #[arg(long, value_name = "URL")]
    pub(crate) data: Option<String>,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}
