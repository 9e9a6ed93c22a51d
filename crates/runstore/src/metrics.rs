//! What a run measured, step by step: JSON lines, and TensorBoard event files of the same.
//!
//! Rank 0 writes in chunks of at most [`CHUNK`] steps: `metrics/<generation>-<first step>.jsonl` and
//! `tensorboard/events.out.tfevents.<time>.<run>.<generation>-<first step>`. The last chunk is written anew, longer, until it is full.

mod tensorboard;

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sgcl_patchset::Store;

use crate::RunStoreError;

/// What the names of a probe's figures begin with.
pub const PROBE: &str = "probe/";
/// Most steps of one chunk.
pub const CHUNK: usize = 1000;
/// Longest chunk read.
const MAX_CHUNK_BYTES: u64 = 64 << 20;

/// One step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Steps finished since the run began.
    pub step: u64,
    /// Membership that made it.
    pub generation: u64,
    /// Epoch, from 0.
    pub epoch: u32,
    /// Steps finished in the epoch.
    pub epoch_step: u64,
    /// Steps the epoch has, as planned now.
    pub epoch_steps: u64,
    /// When it ended.
    pub time: Timestamp,
    /// Scalars by TensorBoard tag: `loss/intra`, `loss/inter`, `loss/inner`, `loss/total`, `lr`, `samples_per_second`…, and
    /// `probe/accuracy` and its like of a step that the encoder was scored after.
    /// A value that is not finite is left out.
    pub values: BTreeMap<String, f64>,
}

impl StepMetrics {
    /// Its scalars, the epoch among them.
    fn scalars(&self) -> impl Iterator<Item = (&str, f64)> {
        let values = self.values.iter().filter(|(_, v)| v.is_finite()).map(|(k, v)| (k.as_str(), *v));
        values.chain([("epoch", f64::from(self.epoch))])
    }

    /// Share of the run that is done.
    #[must_use]
    #[allow(clippy::cast_precision_loss)]
    pub fn progress(&self, epochs: u32) -> f64 {
        let inside = if self.epoch_steps == 0 { 0.0 } else { self.epoch_step as f64 / self.epoch_steps as f64 };
        ((f64::from(self.epoch) + inside) / f64::from(epochs.max(1))).clamp(0.0, 1.0)
    }
}

/// Writes metrics as a run goes.
#[derive(Debug)]
pub struct MetricsWriter {
    run: Store,
    name: String,
    chunk: Vec<StepMetrics>,
    written: usize,
}

impl MetricsWriter {
    /// For the run `name` at `run_store`.
    #[must_use]
    pub fn new(run_store: &Store, name: &str) -> Self {
        Self { run: run_store.clone(), name: name.to_owned(), chunk: Vec::new(), written: 0 }
    }

    /// Takes a step, or further scalars of the one taken last; nothing is written yet.
    pub fn push(&mut self, mut step: StepMetrics) {
        step.values.retain(|_, v| v.is_finite());
        match self.chunk.last_mut() {
            Some(last) if (last.generation, last.step) == (step.generation, step.step) => {
                last.values.append(&mut step.values);
                self.written = self.written.min(self.chunk.len() - 1);
            }
            _ => self.chunk.push(step),
        }
    }

    /// Steps not written yet.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.chunk.len() - self.written
    }

    /// Keeps the newest `steps` alone: for a rank that writes only once the one that does is gone.
    pub fn keep(&mut self, steps: usize) {
        let old = self.chunk.len().saturating_sub(steps);
        self.chunk.drain(..old);
        self.written = self.written.saturating_sub(old);
    }

    /// Writes what is new. Call it every few seconds and at the end.
    ///
    /// # Errors
    /// The storage; the steps are kept for the next call.
    pub async fn flush(&mut self) -> Result<(), RunStoreError> {
        while self.pending() > 0 {
            // A chunk belongs to one generation: readers tell undone steps by it.
            let generation = self.chunk[0].generation;
            let end = self.chunk.iter().take(CHUNK).take_while(|s| s.generation == generation).count();
            self.write(&self.chunk[..end]).await?;
            self.written = end;
            if end == CHUNK || end < self.chunk.len() {
                self.chunk.drain(..end);
                self.written = 0;
            }
        }
        Ok(())
    }

    async fn write(&self, steps: &[StepMetrics]) -> Result<(), RunStoreError> {
        let Some(first) = steps.first() else { return Ok(()) };
        let id = format!("{}-{}", first.generation, first.step);
        let mut lines = Vec::new();
        for step in steps {
            serde_json::to_writer(&mut lines, step).map_err(|e| RunStoreError::damaged("metrics", e))?;
            lines.push(b'\n');
        }
        let events = format!("tensorboard/events.out.tfevents.{:010}.{}.{id}", first.time.as_second(), self.name);
        self.run.put(&events, tensorboard::event_file(steps)).await?;
        self.run.put(&format!("metrics/{id}.jsonl"), lines).await?;
        Ok(())
    }
}

/// All steps of a run in order, without those that a later generation undid.
///
/// # Errors
/// A chunk is damaged, or the storage.
pub async fn read_metrics(run_store: &Store) -> Result<Vec<StepMetrics>, RunStoreError> {
    let mut chunks: Vec<(u64, u64, String)> = Vec::new();
    for object in run_store.list("metrics").await? {
        let id = object.rel.strip_prefix("metrics/").and_then(|n| n.strip_suffix(".jsonl"));
        let Some((generation, step)) = id.and_then(|id| id.split_once('-')) else { continue };
        if let (Ok(generation), Ok(step)) = (generation.parse(), step.parse()) {
            chunks.push((generation, step, object.rel));
        }
    }
    chunks.sort_unstable();
    let mut steps: Vec<StepMetrics> = Vec::new();
    for (_, first, rel) in chunks {
        // A chunk that begins again at or below a step undoes what was beyond it.
        let kept = steps.partition_point(|s| s.step <= first);
        steps.truncate(kept);
        let bytes = run_store.get(&rel, MAX_CHUNK_BYTES).await?;
        for line in bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
            let mut step: StepMetrics =
                serde_json::from_slice(line).map_err(|e| RunStoreError::damaged(run_store.object(&rel), e))?;
            // Trained again, or told more of.
            if let Some(mut before) = steps.pop_if(|before| before.step == step.step) {
                before.values.append(&mut step.values);
                step.values = before.values;
            }
            steps.push(step);
        }
    }
    Ok(steps)
}
