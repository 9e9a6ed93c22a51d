//! How a run stands, from the bucket alone: events, newest commit, metrics, exports, probe results.

mod events;

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sgcl_patchset::Store;

use crate::export::list_exports;
use crate::follow_up::{self, Embedded};
use crate::metrics::{PROBE, StepMetrics, read_metrics};
use crate::record::MAX_RECORD_BYTES;
use crate::{Commits, RunName, RunStoreError, Spec};

pub use events::{Event, EventKind, Events};

/// Steps that throughput and remaining time are taken from.
const WINDOW: usize = 50;

/// What a run is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Submitted, not started.
    Pending,
    /// Started and not ended. Whether anyone is alive behind it, `updated` tells.
    Running,
    /// Stopped on request or for want of nodes; can be resumed.
    Suspended,
    /// All epochs are trained.
    Finished,
    /// Given up.
    Failed,
    /// Ended for good by its user.
    Cancelled,
}

impl Phase {
    /// The word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Suspended => "suspended",
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// What a run's probe found last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probed {
    /// After this epoch, from 0.
    pub epoch: u32,
    /// Steps finished then.
    pub step: u64,
    /// Figures by name: `accuracy`, `balanced_accuracy`, `macro_f1`, `roc_auc`.
    pub figures: BTreeMap<String, f64>,
}

impl Probed {
    /// What the metrics of a step say of a probe.
    #[must_use]
    pub fn of(step: &StepMetrics) -> Option<Self> {
        let figures: BTreeMap<String, f64> = (step.values.iter())
            .filter_map(|(name, value)| Some((name.strip_prefix(PROBE)?.to_owned(), *value)))
            .collect();
        (!figures.is_empty()).then_some(Self { epoch: step.epoch, step: step.step, figures })
    }
}

/// How a run stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunStatus {
    /// Name.
    pub run: String,
    /// What it is doing.
    pub phase: Phase,
    /// Why, where an event says.
    pub reason: Option<String>,
    /// When it was made.
    pub created: Timestamp,
    /// The newest sign of life.
    pub updated: Timestamp,
    /// URL of the patch set.
    pub data: String,
    /// Current epoch, from 0.
    pub epoch: u32,
    /// Epochs in all.
    pub epochs: u32,
    /// Steps finished.
    pub step: u64,
    /// Share done, 0 to 1.
    pub progress: f64,
    /// Seconds left at the present pace, while running.
    pub eta_s: Option<f64>,
    /// Patches a second over the last steps.
    pub samples_per_second: Option<f64>,
    /// The last step's scalars.
    pub losses: BTreeMap<String, f64>,
    /// The newest probe, where the configuration asks for any.
    #[serde(default)]
    pub probe: Option<Probed>,
    /// Newest commit.
    pub commit: Option<u64>,
    /// Restarts so far.
    pub restarts: u32,
    /// Commits that have an export.
    pub exports: Vec<u64>,
    /// Probe results by name, as written.
    pub evals: BTreeMap<String, Value>,
    /// Features of patch sets with the newest export, by name.
    pub embeddings: BTreeMap<String, Embedded>,
}

impl RunStatus {
    /// Reads it.
    ///
    /// # Errors
    /// No such run, a damaged record, or the storage.
    pub async fn read(run_store: &Store) -> Result<Self, RunStoreError> {
        let spec = Spec::read(run_store).await?;
        let commit = Commits::new(run_store).latest().await?;
        let steps = read_metrics(run_store).await?;
        let events = Events::new(run_store).read().await?;
        let exports = list_exports(run_store).await?;
        let evals = read_evals(run_store).await?;
        let embeddings = match exports.last() {
            Some(&commit) => follow_up::embeddings(run_store, commit).await?,
            None => BTreeMap::new(),
        };
        let (phase, reason) = phase(&events);
        let last = steps.last();
        let committed = commit.as_ref().map(|c| &c.progress);
        let signs = [last.map(|s| s.time), commit.as_ref().map(|c| c.time), events.last().map(|e| e.time)];
        let epochs = spec.config.epochs;
        let progress = if phase == Phase::Finished { 1.0 } else { last.map_or(0.0, |s| s.progress(epochs)) };
        let recent = &steps[steps.len().saturating_sub(WINDOW)..];
        Ok(Self {
            run: spec.run.to_string(),
            phase,
            reason,
            created: spec.created,
            updated: signs.into_iter().flatten().fold(spec.created, Timestamp::max),
            data: spec.data,
            epoch: last.map(|s| s.epoch).or(committed.map(|c| c.epoch)).unwrap_or(0),
            epochs,
            step: last.map(|s| s.step).or(committed.map(|c| c.step)).unwrap_or(0),
            progress,
            eta_s: if phase == Phase::Running { eta(recent, epochs) } else { None },
            samples_per_second: mean(recent, "samples_per_second"),
            losses: last.map(|s| s.values.clone()).or(committed.map(|c| c.losses.clone())).unwrap_or_default(),
            probe: steps.iter().rev().find_map(Probed::of),
            commit: commit.as_ref().map(|c| c.seq),
            restarts: events.iter().map(|e| u32::from(e.kind.is_restart())).sum(),
            exports,
            evals,
            embeddings,
        })
    }
}

impl Phase {
    /// Of a run, from its events alone.
    ///
    /// # Errors
    /// An event is damaged, or the storage.
    pub async fn read(run_store: &Store) -> Result<Self, RunStoreError> {
        Ok(phase(&Events::new(run_store).read().await?).0)
    }
}

/// The phase after these events.
fn phase(events: &[Event]) -> (Phase, Option<String>) {
    let said = events.iter().rev().find(|e| !e.kind.is_remark());
    match said.map(|e| &e.kind) {
        None | Some(EventKind::SetAside { .. } | EventKind::Ordered { .. }) => (Phase::Pending, None),
        Some(EventKind::Started { .. }) => (Phase::Running, None),
        Some(EventKind::Regrouped { reason, .. }) => (Phase::Running, Some(reason.clone())),
        Some(EventKind::Suspended { reason }) => (Phase::Suspended, Some(reason.clone())),
        Some(EventKind::Failed { message }) => (Phase::Failed, Some(message.clone())),
        Some(EventKind::Cancelled) => (Phase::Cancelled, None),
        Some(EventKind::Finished) => (Phase::Finished, None),
    }
}

/// Seconds left, from the pace of the last steps.
fn eta(recent: &[StepMetrics], epochs: u32) -> Option<f64> {
    let (first, last) = (recent.first()?, recent.last()?);
    let spent: SignedDuration = last.time.duration_since(first.time);
    let gained = last.progress(epochs) - first.progress(epochs);
    (gained > 0.0).then(|| (1.0 - last.progress(epochs)) * spent.as_secs_f64() / gained)
}

#[allow(clippy::cast_precision_loss)]
fn mean(recent: &[StepMetrics], name: &str) -> Option<f64> {
    let values: Vec<f64> = recent.iter().filter_map(|s| s.values.get(name).copied()).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Writes a probe's result as `eval/<name>.json`.
///
/// # Errors
/// The storage.
pub async fn write_eval(run_store: &Store, name: &str, result: &impl Serialize) -> Result<(), RunStoreError> {
    let rel = format!("eval/{name}.json");
    let text = crate::record::to_json(result, &run_store.object(&rel))?;
    Ok(run_store.put(&rel, text).await?)
}

/// Results of evaluations by name, as written.
///
/// # Errors
/// One is damaged, or the storage.
pub async fn read_evals(run_store: &Store) -> Result<BTreeMap<String, Value>, RunStoreError> {
    let mut evals = BTreeMap::new();
    for object in run_store.list("eval").await? {
        let Some(name) = object.rel.strip_prefix("eval/").and_then(|n| n.strip_suffix(".json")) else { continue };
        let bytes = run_store.get(&object.rel, MAX_RECORD_BYTES).await?;
        let value =
            serde_json::from_slice(&bytes).map_err(|e| RunStoreError::damaged(run_store.object(&object.rel), e))?;
        evals.insert(name.to_owned(), value);
    }
    Ok(evals)
}

/// Names of the runs in a bucket.
///
/// # Errors
/// The storage.
pub async fn list_runs(bucket: &Store) -> Result<Vec<RunName>, RunStoreError> {
    let found = bucket.list("runs").await?;
    let names = found.iter().filter_map(|o| o.rel.strip_prefix("runs/")?.strip_suffix("/spec.json"));
    Ok(names.filter_map(|n| RunName::new(n).ok()).collect())
}
