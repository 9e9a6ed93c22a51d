//! One file a command.

pub(crate) mod cluster;
pub(crate) mod config;
pub(crate) mod describe;
pub(crate) mod embed;
pub(crate) mod eval;
mod follow_up;
pub(crate) mod ingest;
pub(crate) mod list;
pub(crate) mod order;
pub(crate) mod phantom;
pub(crate) mod pull;
pub(crate) mod report;
pub(crate) mod run;
pub(crate) mod status;
pub(crate) mod verify;

use anyhow::Result;
use sgcl_patchset::Store;
use sgcl_runstore::{Order, RunName, Spec, list_runs};

use crate::cli::{Cli, Command};
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::Out;

/// What a trace begins with: the commands that set a run going. The others are over in a moment and have none.
pub(crate) fn span(command: &Command) -> tracing::Span {
    match command {
        Command::Run(_) => tracing::info_span!("sgclctl run"),
        Command::Resume(_) => tracing::info_span!("sgclctl resume"),
        Command::Submit(_) => tracing::info_span!("sgclctl submit"),
        _ => tracing::Span::none(),
    }
}

/// Carries a command out.
pub(crate) async fn dispatch(cli: Cli) -> Result<Exit> {
    let out = Out { format: cli.output, quiet: cli.quiet };
    match cli.command {
        Command::Ingest(args) => ingest::main(args, out).await,
        Command::Phantom(args) => phantom::main(args, out).await,
        Command::Run(args) => run::main(args, out).await,
        Command::Resume(args) => match args.in_bucket() {
            Some(order) => run::main(order.into(), out).await,
            None => cluster::resume(&args.cluster, &args.run, out).await,
        },
        Command::Suspend(args) => match args.in_bucket() {
            Some(order) => order::main(order, Order::Suspend, out).await,
            None => cluster::suspend(&args.cluster, &args.run, out).await,
        },
        Command::Cancel(args) => match args.in_bucket() {
            Some(order) => order::main(order, Order::Cancel, out).await,
            None => cluster::cancel(&args.cluster, &args.run, out).await,
        },
        Command::Drain(args) => order::main(args.order, Order::Drain { node: args.node }, out).await,
        Command::Status(args) => status::main(args, out).await,
        Command::List(args) => list::main(args, out).await,
        Command::Submit(args) => cluster::submit(args, out).await,
        Command::Logs(args) => cluster::logs(args, out).await,
        Command::Scale(args) => cluster::scale(args, out).await,
        Command::Delete(args) => cluster::delete(args, out).await,
        Command::Watch(args) => cluster::watch(args, out).await,
        Command::Check(args) => cluster::check(args, out).await,
        Command::Describe(args) => describe::main(args, out).await,
        Command::Verify(args) => verify::main(args, out).await,
        Command::Pull(args) => pull::main(args, out).await,
        Command::Eval(command) => eval::main(command, out).await,
        Command::Embed(args) => embed::main(args, out).await,
        Command::Report(args) => report::main(args, out).await,
        Command::Config(args) => config::main(args, out).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut <Cli as clap::CommandFactory>::command(), "sgclctl", &mut script);
            out.data(String::from_utf8_lossy(&script).trim_end())?;
            Ok(Exit::Done)
        }
        Command::Version => {
            let version = env!("CARGO_PKG_VERSION");
            if out.json() {
                out.json_line(
                    &serde_json::json!({ "version": version, "patch_set_format": sgcl_patchset::manifest::VERSION,
                    "run_format": sgcl_runstore::FORMAT_VERSION }),
                )?;
            } else {
                out.data(format!("sgclctl {version}"))?;
            }
            Ok(Exit::Done)
        }
    }
}

/// An existing run of a bucket.
///
/// # Errors
/// The name cannot be one, there is no such run, or the storage.
async fn existing(bucket: &str, run: &str) -> Result<(Store, Spec)> {
    let name = RunName::new(run)?;
    let bucket = Store::open(bucket)?;
    let store = name.store(&bucket);
    if let Some(spec) = Spec::find(&store).await? {
        return Ok((store, spec));
    }
    // Lists the bucket: one that does not exist says so here.
    let runs = list_runs(&bucket).await?;
    let known = runs.iter().map(RunName::as_str);
    let hint = match sgcl_runstore::config::nearest(run, known) {
        Some(near) => format!("did you mean {near:?}? `sgclctl list --bucket {bucket}` names all"),
        None if runs.is_empty() => "the bucket holds no run at all; check --bucket".to_owned(),
        None => format!("`sgclctl list --bucket {bucket}` names those there are"),
    };
    Err(Failure::new(Exit::Data, format!("there is no run {run} in {bucket}")).hint(hint).into())
}
