//! `run --local`: check, write the spec, coordinate in this process, show progress until the end.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde_json::json;
use sgcl_coordinator::{Change, Coordinator, Outcome, ProcessLauncher, RunView};
use sgcl_patchset::{PatchSet, Store};
use sgcl_runstore::{Commits, FollowUp, Phase, RunConfig, RunName, RunStoreError, Spec, find_named_sets};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::config::trained_patches;
use super::follow_up;
use crate::cli::{ConfigSource, OrderArgs, RunArgs};
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::{Out, count, warn};
use crate::progress::RunProgress;
use crate::worker;
use sgcl_runstore::config::BankDtype;

/// Longest wait for storage that has answered before.
const HICCUP: Duration = Duration::from_secs(60);

/// Longest wait for nodes that were sent home to end.
const GOING_HOME: Duration = Duration::from_secs(2);

/// Going on with a run of a bucket as it is.
impl From<OrderArgs> for RunArgs {
    fn from(args: OrderArgs) -> Self {
        Self {
            local: true,
            nodes: None,
            ranks_per_node: None,
            min_nodes: None,
            data: None,
            bucket: args.bucket,
            name: Some(args.run),
            config: ConfigSource { file: None, set: Vec::new() },
            resume: true,
            dry_run: false,
        }
    }
}

pub(crate) async fn main(args: RunArgs, out: Out) -> Result<Exit> {
    let name =
        RunName::new(args.name.clone().unwrap_or_else(|| Timestamp::now().strftime("run-%Y%m%d-%H%M%S").to_string()))?;
    let bucket = Store::open(&args.bucket.bucket)?;
    let run = name.store(&bucket);
    let stored = Spec::find(&run).await?;
    // It has answered once: from here on, and when the run has ended, a hiccup is waited for.
    let bucket = bucket.patient_for(HICCUP);
    let run = name.store(&bucket);
    let admission = tracing::info_span!("admission", run = %name);
    let spec = wanted(&args, &name, stored.as_ref(), out).instrument(admission).await?;
    match &stored {
        Some(stored) if args.resume => {
            stored.check_resume(&spec, &run)?;
            if Phase::read(&run).await? == Phase::Cancelled {
                return Err(Failure::new(Exit::Data, format!("run {name} was cancelled"))
                    .hint("its commits are kept; another --name starts a run anew")
                    .into());
            }
        }
        Some(_) => {
            return Err(Failure::new(Exit::CannotCreate, format!("{bucket} has a run named {name} already"))
                .hint("--resume goes on with it; another --name starts a run beside it")
                .into());
        }
        None if args.resume => {
            return Err(Failure::new(Exit::Data, format!("there is no run {name} in {bucket} to resume"))
                .hint(format!("`sgclctl list --bucket {bucket}` names those there are"))
                .into());
        }
        // Nothing is there, and a bucket that does not exist says so before anything is started.
        None => drop(run.list("commits").await?),
    }
    let program = worker::find()?;
    if args.dry_run {
        out.note("dry run: everything fits; nothing was written");
        return Ok(Exit::Done);
    }
    if stored.is_none() {
        spec.create(&run).await?;
    }
    let resume = format!("sgclctl resume {name} --bucket {}", quoted(bucket.url()));
    let outcome = train(&spec, &run, &program, out).await.inspect_err(|error| {
        if !matches!(error.downcast_ref(), Some(RunStoreError::Superseded { .. })) {
            warn(format!("what was committed is kept; go on with: {resume}"));
        }
    })?;
    ended(&outcome, &spec, &bucket, &resume, out).await
}

/// The spec that the arguments ask for, checked against its patch set.
async fn wanted(args: &RunArgs, name: &RunName, stored: Option<&Spec>, out: Out) -> Result<Spec> {
    let mut config = configuration(args, stored)?;
    let data = match (&args.data, stored) {
        (Some(url), _) => url.clone(),
        (None, Some(stored)) => stored.data.clone(),
        (None, None) => {
            return Err(Failure::new(Exit::Data, format!("there is no run {name} to resume"))
                .hint("check --name and --bucket; a new run needs --data")
                .into());
        }
    };
    let nodes = args.nodes.or(stored.map(|s| s.nodes)).unwrap_or(1);
    let ranks_per_node = args.ranks_per_node.or(stored.map(|s| s.ranks_per_node)).unwrap_or(1);
    let min_nodes = args.min_nodes.or(stored.map(|s| s.min_nodes)).unwrap_or(1);
    if !(1..=nodes).contains(&min_nodes) {
        return Err(Failure::new(Exit::Usage, format!("--min-nodes {min_nodes} of --nodes {nodes}"))
            .hint("ask for at least one node, and for no more than there are")
            .into());
    }
    let world = nodes as usize * ranks_per_node as usize;
    let set = PatchSet::open(&data).await?;
    let patches = trained_patches(&config, &set)?;
    config.check_against(patches as u64, world)?;
    find_named_sets(&mut config, &set.manifest().content_id, Store::open).await?;
    describe(name, &config, &set, patches, world, out);
    let id = set.manifest().content_id.clone();
    let mut spec =
        Spec::new(name.clone(), set.store().url(), id, nodes, ranks_per_node, min_nodes, config, Timestamp::now());
    if let Some(stored) = stored {
        spec.created = stored.created;
        spec.write_id.clone_from(&stored.write_id);
    }
    Ok(spec)
}

/// Defaults or, when resuming without a file, the run's own configuration; then the overrides.
fn configuration(args: &RunArgs, stored: Option<&Spec>) -> Result<RunConfig> {
    match stored.filter(|_| args.resume && args.config.file.is_none()) {
        // JSON is YAML.
        Some(stored) => {
            Ok(RunConfig::from_yaml(&serde_json::to_string(&stored.config)?, "spec.json", &args.config.set)?)
        }
        None => Ok(RunConfig::load(args.config.file.as_deref(), &args.config.set)?),
    }
}

/// What will be trained, in three lines.
fn describe(name: &RunName, config: &RunConfig, set: &PatchSet, patches: usize, world: usize, out: Out) {
    let batch = config.global_batch(world);
    let held_out = set.len() - patches;
    let copies = 1 + usize::from(world > 1 && config.bank.replicas > 0);
    let bytes = if config.bank.dtype == BankDtype::Fp32 { 4 } else { 2 };
    let bank = config.bank_row() * bytes * patches.div_ceil(world) * copies;
    out.note(format!("run {name}: {} for {} epochs", config.backbone.arch.name(), config.epochs));
    out.note(format!(
        "  patches  {} of {} slides{}",
        count(patches),
        set.manifest().slides.len(),
        if held_out == 0 { String::new() } else { format!("; {} more are not trained on", count(held_out)) }
    ));
    out.note(format!(
        "  step     {world} rank(s) × {} = {batch} patches, {} steps an epoch, learning rate {:.4}",
        config.batch.per_rank * config.batch.accumulate,
        count(patches.div_ceil(batch)),
        config.base_lr(world)
    ));
    out.note(format!("  bank     {} a rank", indicatif::HumanBytes(bank as u64)));
}

/// Coordinates the run and shows it; Ctrl-C stops it in good order, a second one at once.
async fn train(spec: &Spec, run: &Store, program: &Path, out: Out) -> Result<Outcome> {
    let listener = TcpListener::bind("127.0.0.1:0").await.context("cannot listen on 127.0.0.1")?;
    let nodes = ProcessLauncher::new(program.to_owned(), spec.run.to_string(), spec.nodes, spec.ranks_per_node);
    let launcher = Arc::new(nodes);
    let (sender, mut view) = watch::channel(RunView::default());
    let (stop, kill) = (CancellationToken::new(), CancellationToken::new());
    let coordinator = Coordinator {
        spec: spec.clone(),
        run: run.clone(),
        launcher: Arc::clone(&launcher),
        view: sender,
        stop: stop.clone(),
        kill: kill.clone(),
    };
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut progress = RunProgress::new(out, spec.config.epochs);
    let mut serving = tokio::spawn(coordinator.serve(listener).in_current_span());
    let mut watching = true;
    let mut changes = 0;
    let outcome = loop {
        tokio::select! {
            outcome = &mut serving => break outcome,
            changed = view.changed(), if watching => {
                // The sender goes when the coordinator ends, which the other branch tells.
                watching = changed.is_ok();
                let now = view.borrow_and_update().clone();
                for change in now.changes.iter().skip(changes) {
                    warn(regrouped(change));
                }
                changes = now.changes.len();
                progress.show(&now)?;
            }
            () = async { tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} } } => {
                if stop.is_cancelled() {
                    kill.cancel();
                } else {
                    warn("committing… press again to quit without");
                    stop.cancel();
                }
            }
        }
    };
    launcher.ended(GOING_HOME).await;
    progress.finish();
    outcome.context("the coordinator broke off")?
}

/// A membership change in a line.
fn regrouped(change: &Change) -> String {
    let reason = change.reason.lines().next().unwrap_or_default();
    let lost = match change.from_commit {
        Some(seq) => format!("{} steps are trained again from commit {seq}", change.steps_lost),
        None => format!("{} steps lost", change.steps_lost),
    };
    let (seconds, world) = (change.took.as_secs_f64(), change.world);
    format!("{reason}; training on {world} rank(s) after {seconds:.1} s, {lost}")
}

/// Says how it ended and what can be done next.
async fn ended(outcome: &Outcome, spec: &Spec, bucket: &Store, resume: &str, out: Out) -> Result<Exit> {
    let run = spec.run.store(bucket);
    let commit = Commits::new(&run).latest().await?.map(|commit| commit.seq);
    let kept = commit.map_or_else(|| "nothing was committed yet".to_owned(), |seq| format!("commit {seq} is kept"));
    let json = |outcome: &str, reason: Option<&str>| {
        out.json_line(&json!({ "ended": { "run": spec.run, "outcome": outcome, "reason": reason, "commit": commit, "url": run.url() } }))
    };
    match outcome {
        Outcome::Finished => {
            let exports = sgcl_runstore::export::list_exports(&run).await?;
            let followed = follow_ups(spec, bucket, resume, out).await;
            if out.json_progress() {
                json("finished", None)?;
            }
            let (name, at) = (&spec.run, quoted(bucket.url()));
            let weights = exports.last().map(|seq| run.object(&format!("exports/{seq:08}")));
            out.note(format!("finished; weights: {}", weights.as_deref().unwrap_or("none were exported")));
            out.note(format!("  sgclctl pull {name} weights --bucket {at}"));
            out.note(format!("  sgclctl report {name} --bucket {at} --out report.html"));
            out.note(format!(
                "  sgclctl eval --data {} --bucket {at} --weights {name} --weights random",
                quoted(&spec.data)
            ));
            followed.map(|()| Exit::Done)
        }
        Outcome::Suspended { reason } => {
            if out.json_progress() {
                json("suspended", Some(reason))?;
            }
            warn(format!("suspended: {reason}; {kept}\ngo on with: {resume}"));
            Ok(Exit::Suspended)
        }
        Outcome::Cancelled => {
            if out.json_progress() {
                json("cancelled", None)?;
            }
            warn(format!("cancelled; {kept}"));
            Ok(Exit::Failed)
        }
        Outcome::Failed { message, code } => {
            if out.json_progress() {
                json("failed", Some(message))?;
            }
            let failure = Failure::new(Exit::of_worker(*code), format!("run {} failed: {message}", spec.run));
            Err(failure.hint(format!("mend that ({kept}), then go on with: {resume}")).into())
        }
    }
}

/// What the configuration has made of the weights; Ctrl-C leaves what is not made for another time.
async fn follow_ups(spec: &Spec, bucket: &Store, resume: &str, out: Out) -> Result<()> {
    if FollowUp::all(&spec.config).is_empty() {
        return Ok(());
    }
    // Signals that were asked for once end nobody by themselves any more.
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        made = follow_up::make(spec, bucket, resume, out) => made,
        () = async { tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} } } => {
            let message = format!("run {} is finished and exported, but not all that follows is made", spec.run);
            Err(Failure::new(Exit::Suspended, message).hint(format!("make the others with: {resume}")).into())
        }
    }
}

/// As a shell takes it.
fn quoted(word: &str) -> String {
    let word = word.strip_prefix("file://").unwrap_or(word);
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:+=@%,".contains(c);
    if word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}
