//! Epochs and steps: cluster ▸ plan ▸ load ▸ step ▸ commit, until the run is trained and exported, or stopped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use jiff::Timestamp;
use rayon::ThreadPool;
use roaring::RoaringBitmap;
use sgcl::augment::ViewParams;
use sgcl::bank::Spread;
use sgcl::collective::Collective;
use sgcl::kmeans::{self, KMeans};
use sgcl::schedule;
use sgcl_patchset::{EpochPlan, PatchSet, ShardReader, Store, Subset};
use sgcl_proto::v1;
use sgcl_runstore::metrics::{MetricsWriter, StepMetrics};
use sgcl_runstore::{Commit, Commits, Ledger, PartKind, PartRef, PartWriter, Spec, commit, export};
use tokio::runtime::Handle;

use super::checkpoint;
use super::loader::{EpochLoad, Loader};
use super::step::{LOSSES, Learner, StepPlan, StepResult};
use super::tensors::to_stored;
use crate::session::Session;

/// Steps between two writes of metrics.
const FLUSH_STEPS: usize = 20;

/// This rank's place in its generation.
pub(crate) struct Place {
    pub(crate) rank: usize,
    pub(crate) world: usize,
    pub(crate) generation: u64,
}

/// Where training stands.
#[derive(Clone, Debug, Default)]
pub(crate) struct Position {
    /// Steps since the run began.
    pub(crate) step: u64,
    epoch: u32,
    /// Steps of this epoch, over all its plans.
    epoch_step: u64,
    /// Steps of the current plan.
    cursor: usize,
    /// Lanes of the current plan; 0 before the first.
    lanes: usize,
    /// Patches the epoch had used when the current plan was made.
    base: RoaringBitmap,
    /// Patches the epoch has used.
    used: RoaringBitmap,
}

impl Position {
    /// Where a commit stands.
    pub(crate) async fn of(run: &Store, commit: &Commit) -> Result<Self> {
        let commits = Commits::new(run);
        let progress = &commit.progress;
        let base = match &progress.plan_base {
            Some(part) => commits.ledger(part).await?,
            None => Ledger::new(),
        };
        Ok(Self {
            step: progress.step,
            epoch: progress.epoch,
            epoch_step: progress.epoch_step,
            cursor: usize::try_from(progress.cursor)?,
            lanes: progress.lanes as usize,
            base: base.bitmap().clone(),
            used: commits.ledger(&progress.ledger).await?.bitmap().clone(),
        })
    }

    /// Begins the next epoch where this one has used all patches.
    fn roll_over(&mut self, all: &RoaringBitmap) -> bool {
        let full = self.used == *all;
        if full {
            *self = Self { step: self.step, epoch: self.epoch + 1, ..Self::default() };
        }
        full
    }

    /// Makes the plan over what is unused where there is none for this number of lanes.
    fn replan(&mut self, lanes: usize) {
        if self.lanes != lanes {
            (self.lanes, self.cursor) = (lanes, 0);
            self.base = self.used.clone();
        }
    }
}

/// A rank with all it needs.
pub(crate) struct Trainer {
    pub(crate) runtime: Handle,
    pub(crate) spec: Spec,
    pub(crate) run: Store,
    pub(crate) set: PatchSet,
    pub(crate) subset: Subset,
    pub(crate) reader: Arc<ShardReader>,
    pub(crate) pool: Arc<ThreadPool>,
    pub(crate) views: ViewParams,
    pub(crate) ring: Box<dyn Collective>,
    pub(crate) learner: Learner,
    pub(crate) metrics: MetricsWriter,
    pub(crate) place: Place,
    pub(crate) position: Position,
    /// Of the bank when the epoch began.
    pub(crate) spread: Option<Spread>,
}

impl Trainer {
    /// Trains to the end. True where it was stopped before, after a commit.
    pub(crate) fn run(mut self, session: &mut Session) -> Result<bool> {
        let all = self.subset.unused();
        let mut fresh = self.position.step == 0 || self.position.roll_over(&all);
        let mut newest = None;
        while self.position.epoch < self.spec.config.epochs {
            // An epoch resumed half-way brought its clusters along.
            if fresh {
                self.cluster(session)?;
            }
            let stopped = self.epoch(session, &all)?;
            let last = self.position.epoch + 1 == self.spec.config.epochs;
            let due = (self.position.epoch + 1).is_multiple_of(self.spec.config.checkpoint.every_epochs);
            if stopped || last || due {
                newest = Some(self.commit(session, last && !stopped)?);
            }
            if stopped {
                return Ok(true);
            }
            fresh = self.position.roll_over(&all);
        }
        if self.place.rank == 0 {
            self.export(session, newest)?;
        }
        // Nobody leaves the ring, or calls the run finished, before the export is durable.
        self.ring.barrier()?;
        Ok(false)
    }

    fn cluster(&mut self, session: &Session) -> Result<()> {
        let spread = self.learner.banks.spread(self.ring.as_ref())?;
        if self.position.epoch > 0 && spread.collapsed() && self.place.rank == 0 {
            tracing::warn!(
                deviation = spread.deviation,
                effective_rank = spread.effective_rank,
                epoch = self.position.epoch,
                "features are collapsing: patches become alike; a lower learning rate or larger batches may help"
            );
        }
        self.spread = Some(spread);
        if !self.spec.config.method.has_inter() {
            return Ok(());
        }
        self.tell(session, "k-means", 0, BTreeMap::new(), 0.0);
        let config = &self.spec.config.kmeans;
        let size = KMeans {
            runs: i64::try_from(config.runs)?,
            clusters: i64::try_from(config.clusters)?,
            iterations: i64::try_from(config.iterations)?,
        };
        let (banks, seed, epoch) = (&self.learner.banks, self.spec.config.seed, u64::from(self.position.epoch));
        let labels = kmeans::cluster(banks, size, seed, epoch, self.ring.as_ref())?;
        self.learner.clusters = kmeans::joint_labels(&labels, size.clusters);
        self.learner.labels = labels;
        Ok(())
    }

    /// Trains what is left of the epoch. True where it was stopped before its end.
    fn epoch(&mut self, session: &Session, all: &RoaringBitmap) -> Result<bool> {
        let config = &self.spec.config;
        let accumulate = config.batch.accumulate;
        let lanes = self.place.world * accumulate;
        self.position.replan(lanes);
        let epoch = u64::from(self.position.epoch);
        let unused = all - &self.position.base;
        let (batch, window) = (config.batch.per_rank, config.loader.window_shards);
        let plan = EpochPlan::new(self.set.index(), config.seed, epoch, &unused, lanes, batch, window)?;
        let plan = Arc::new(plan);
        let mine = self.place.rank * accumulate;
        let loader = Loader::start(
            Arc::clone(&self.reader),
            Arc::clone(&self.pool),
            self.views.clone(),
            EpochLoad {
                plan: Arc::clone(&plan),
                lanes: mine..mine + accumulate,
                from_step: self.position.cursor,
                seed: config.seed,
                epoch,
            },
        )?;
        let lr = schedule::cosine(config.base_lr(self.place.world), epoch, u64::from(config.epochs));
        let inter_weight = schedule::rampup(epoch as f64);
        let steps = self.position.epoch_step + (plan.steps() - self.position.cursor) as u64;
        while self.position.cursor < plan.steps() {
            let began = Instant::now();
            let step = StepPlan {
                epoch,
                step: self.position.epoch_step,
                total: self.position.step,
                lr,
                inter_weight,
                rows: self.rows(&plan)?,
                lanes_per_rank: accumulate,
            };
            let batches = (0..accumulate).map(|_| loader.next()).collect::<Result<_>>()?;
            let result = self.learner.step(self.ring.as_ref(), &step, batches, session.stop_requested())?;
            self.position.step += 1;
            self.position.epoch_step += 1;
            self.position.cursor += 1;
            self.position.used = &self.position.base | plan.used_before(self.position.cursor);
            let patches: usize = step.rows.iter().map(Vec::len).sum();
            self.record(session, &result, lr, patches as f64 / began.elapsed().as_secs_f64(), steps)?;
            if result.stop && self.position.cursor < plan.steps() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Bank rows of every lane of the coming step.
    fn rows(&self, plan: &EpochPlan) -> Result<Vec<Vec<i64>>> {
        (0..plan.lanes())
            .map(|lane| {
                let row = |&id| {
                    self.subset.row_of(id).map(i64::from).context("the plan names a patch that is not trained on")
                };
                plan.batch_of(lane, self.position.cursor).iter().map(row).collect()
            })
            .collect()
    }

    /// Metrics to the bucket (rank 0) and a sign of life to the coordinator (every rank).
    fn record(&mut self, session: &Session, result: &StepResult, lr: f64, pace: f64, steps: u64) -> Result<()> {
        let mut values: BTreeMap<String, f64> =
            LOSSES.iter().zip(result.losses).map(|(name, loss)| (format!("loss/{name}"), loss)).collect();
        let method = self.spec.config.method;
        values.retain(|name, _| match name.as_str() {
            "loss/inter" => method.has_inter(),
            "loss/inner" => method.has_local_views(),
            _ => true,
        });
        values.insert("lr".into(), lr);
        if let Some(spread) = self.spread {
            values.insert("bank/deviation".into(), spread.deviation);
            values.insert("bank/effective_rank".into(), spread.effective_rank);
        }
        values.insert("samples_per_second".into(), pace);
        self.tell(session, "training", steps, values.clone(), pace);
        if self.place.rank == 0 {
            self.metrics.push(StepMetrics {
                step: self.position.step,
                generation: self.place.generation,
                epoch: self.position.epoch,
                epoch_step: self.position.epoch_step,
                epoch_steps: steps,
                time: Timestamp::now(),
                values,
            });
            if self.metrics.pending() >= FLUSH_STEPS {
                self.runtime.block_on(self.metrics.flush())?;
            }
        }
        Ok(())
    }

    fn tell(&self, session: &Session, phase: &str, steps: u64, metrics: BTreeMap<String, f64>, pace: f64) {
        session.progress(v1::Progress {
            phase: phase.into(),
            epoch: self.position.epoch,
            epoch_step: self.position.epoch_step,
            epoch_steps: steps,
            step: self.position.step,
            metrics: metrics.into_iter().collect(),
            samples_per_second: pace,
        });
    }

    /// Writes this rank's parts and waits until the coordinator has made a commit of all ranks'. Returns its number.
    fn commit(&mut self, session: &mut Session, done: bool) -> Result<u64> {
        self.tell(session, "checkpoint", self.position.epoch_step, BTreeMap::new(), 0.0);
        let Place { rank, generation, .. } = self.place;
        let parts = self.learner.snapshot(rank, &self.subset)?;
        let writer = PartWriter::new(&self.run, generation, self.position.step);
        let parts = self.runtime.block_on(checkpoint::write(&writer, parts))?;
        let progress_json = if rank == 0 {
            self.runtime.block_on(self.metrics.flush())?;
            serde_json::to_string(&self.runtime.block_on(self.progress(&writer, done))?)?
        } else {
            String::new()
        };
        let parts = parts.iter().map(part).collect::<Result<_>>()?;
        session.commit(v1::PartsWritten { progress_json, step: self.position.step, parts })
    }

    /// What the commit says beside the parts, which the coordinator collects from all ranks.
    async fn progress(&self, writer: &PartWriter, done: bool) -> Result<commit::Progress> {
        let position = &self.position;
        let put = async |name: &str, used: &RoaringBitmap| {
            writer.put(PartKind::Ledger, name, Ledger::from(used.clone()).to_bytes()?).await
        };
        let plan_base =
            if position.base.is_empty() { None } else { Some(put("plan-base.roaring", &position.base).await?) };
        Ok(commit::Progress {
            generation: self.place.generation,
            lease_epoch: 0,
            step: position.step,
            epoch: position.epoch,
            epoch_step: position.epoch_step,
            cursor: position.cursor as u64,
            lanes: u32::try_from(position.lanes)?,
            world: u32::try_from(self.place.world)?,
            plan_base,
            ledger: put("ledger.roaring", &position.used).await?,
            parts: Vec::new(),
            losses: BTreeMap::new(),
            done,
        })
    }

    /// Writes the backbone of the newest commit in every format.
    fn export(&self, session: &Session, newest: Option<u64>) -> Result<()> {
        self.tell(session, "export", self.position.epoch_step, BTreeMap::new(), 0.0);
        let tensors = self.learner.model.backbone.state();
        let tensors = tensors.into_iter().map(|(name, tensor)| to_stored(name, &tensor)).collect::<Result<Vec<_>>>()?;
        self.runtime.block_on(async {
            let commits = Commits::new(&self.run);
            let commit = match newest {
                Some(seq) => commits.read(seq).await?,
                // Resumed after the last commit: only the export was missing.
                None => commits.latest().await?.context("a run without a commit cannot be exported")?,
            };
            let folder = export::write_export(&self.run, &self.spec, &commit, &tensors, Timestamp::now()).await?;
            tracing::info!(folder, "exported");
            Ok(())
        })
    }
}

fn part(part: &PartRef) -> Result<v1::Part> {
    let kind = serde_json::to_value(part.kind)?.as_str().context("a part's kind is a word")?.to_owned();
    Ok(v1::Part { kind, path: part.path.clone(), bytes: part.bytes, crc32c: part.crc32c })
}
