//! Epochs and steps: cluster ▸ plan ▸ load ▸ step ▸ checkpoint, until the run is trained and exported, stopped, or paused for others.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use rayon::ThreadPool;
use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};
use sgcl::augment::ViewParams;
use sgcl::bank::{Held, Layout, Spread};
use sgcl::collective::{Collective, Solo};
use sgcl::kmeans::{self, KMeans};
use sgcl::schedule;
use sgcl_patchset::{EpochPlan, PatchSet, ShardReader, Store, Subset};
use sgcl_proto::v1;
use sgcl_runstore::metrics::StepMetrics;
use sgcl_runstore::{Commit, Commits, Ledger, PartKind, PartRef, PartWriter, Segment, Spec, commit, export};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tracing::{Instrument as _, Span, info_span};

use super::checkpoint;
use super::loader::{EpochLoad, LaneBatch, Loader};
use super::metrics::Metrics;
use super::probe::Probe;
use super::reunite::{bitmap_bytes, bitmap_of};
use super::setup;
use super::step::{Asked, LOSSES, Learner, StepPlan, StepResult};
use super::tensors::to_stored;
use super::wait::{LOOK, Wait};
use crate::measures;
use crate::session::Session;

/// This rank's place in its generation.
#[derive(Default)]
pub(crate) struct Place {
    pub(crate) rank: usize,
    pub(crate) generation: u64,
    /// The node of each rank of the world.
    pub(crate) nodes: Vec<usize>,
}

impl Place {
    pub(crate) fn world(&self) -> usize {
        self.nodes.len()
    }
}

/// Where training stands.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Position {
    /// Steps since the run began.
    pub(crate) step: u64,
    pub(crate) epoch: u32,
    /// Steps of this epoch, over all its plans.
    pub(super) epoch_step: u64,
    /// Steps of the current plan.
    cursor: usize,
    /// Lanes of the current plan; 0 before the first.
    lanes: usize,
    /// Shards that a lane of it mixes.
    window: usize,
    /// Earlier plans of this epoch.
    segments: Vec<Segment>,
    /// Plans of the epochs before.
    history: Vec<Vec<Segment>>,
    /// Patches the epoch had used when the current plan was made.
    #[serde(skip)]
    base: RoaringBitmap,
    /// Patches the epoch has used.
    #[serde(skip)]
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
            window: progress.window as usize,
            segments: progress.segments.clone(),
            history: progress.history.clone(),
            base: base.bitmap().clone(),
            used: commits.ledger(&progress.ledger).await?.bitmap().clone(),
        })
    }

    /// For another rank: the record, what the plan began with, what is used.
    pub(crate) fn to_bytes(&self) -> Result<[Vec<u8>; 3]> {
        Ok([serde_json::to_vec(self)?, bitmap_bytes(&self.base)?, bitmap_bytes(&self.used)?])
    }

    pub(crate) fn from_bytes([record, base, used]: [&[u8]; 3]) -> Result<Self> {
        let record: Self = serde_json::from_slice(record).context("another rank's position is not readable")?;
        Ok(Self { base: bitmap_of(base)?, used: bitmap_of(used)?, ..record })
    }

    /// Whether the epoch has used all patches.
    pub(crate) fn is_over(&self, all: &RoaringBitmap) -> bool {
        self.used == *all
    }

    /// The plan being followed, as far as it was.
    fn segment(&self) -> Result<Segment> {
        Ok(Segment {
            lanes: u32::try_from(self.lanes)?,
            window: u32::try_from(self.window)?,
            steps: self.cursor as u64,
        })
    }

    /// Begins the next epoch.
    fn roll_over(&mut self) -> Result<()> {
        let mut history = std::mem::take(&mut self.history);
        let mut segments = std::mem::take(&mut self.segments);
        segments.push(self.segment()?);
        history.push(segments);
        *self = Self { step: self.step, epoch: self.epoch + 1, history, ..Self::default() };
        Ok(())
    }

    /// Makes the plan over what is unused where there is none like it.
    fn replan(&mut self, lanes: usize, window: usize) -> Result<()> {
        if (self.lanes, self.window) != (lanes, window) {
            if self.cursor > 0 {
                self.segments.push(self.segment()?);
            }
            (self.lanes, self.window, self.cursor) = (lanes, window, 0);
            self.base = self.used.clone();
        }
        Ok(())
    }
}

/// How training in a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Trained and exported.
    Finished,
    /// Stopped on request, after a commit.
    Stopped,
    /// Ready for the next generation.
    Paused,
}

/// A checkpoint that is being uploaded while training goes on.
pub(crate) struct Writing {
    step: u64,
    done: bool,
    upload: JoinHandle<Result<()>>,
}

/// Which steps have spans of their own: one in so many, the same on all ranks. `SGCL_TRACE_STEPS`; 0 is none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TracedSteps {
    every: u64,
}

impl TracedSteps {
    const DEFAULT: u64 = 100;

    /// As the environment says.
    pub(crate) fn from_env() -> Self {
        let every = match std::env::var("SGCL_TRACE_STEPS") {
            Ok(text) if !text.is_empty() => text.parse().unwrap_or_else(|_| {
                tracing::warn!("SGCL_TRACE_STEPS={text}: it must be a number; one step in {} is traced", Self::DEFAULT);
                Self::DEFAULT
            }),
            _ => Self::DEFAULT,
        };
        Self { every }
    }

    fn of(self, step: u64) -> Span {
        if self.every > 0 && step.is_multiple_of(self.every) { info_span!("step", step) } else { Span::none() }
    }

    /// A part of a step, where that has a span.
    fn within(self, name: &'static str) -> Span {
        let traced = Span::current().metadata().is_some_and(|span| span.name() == "step");
        if traced { info_span!("part", otel.name = name) } else { Span::none() }
    }
}

/// A rank with all it needs.
pub(crate) struct Trainer {
    pub(crate) runtime: Handle,
    /// Where other nodes' ranks reach this one.
    pub(crate) address: String,
    pub(crate) spec: Spec,
    pub(crate) run: Store,
    pub(crate) set: PatchSet,
    pub(crate) subset: Subset,
    pub(crate) reader: Arc<ShardReader>,
    pub(crate) pool: Arc<ThreadPool>,
    pub(crate) views: ViewParams,
    pub(crate) ring: Box<dyn Collective>,
    pub(crate) layout: Layout,
    pub(crate) learner: Learner,
    pub(crate) metrics: Metrics,
    pub(crate) place: Place,
    pub(crate) position: Position,
    /// Whether this rank holds state that others could go on from.
    pub(crate) standing: bool,
    /// Epoch that the k-means labels are of.
    pub(crate) labelled: Option<u32>,
    /// Bank rows before a move of which this rank does not know whether it ended everywhere.
    pub(crate) before_move: Option<Held>,
    /// Of the bank when the epoch began.
    pub(crate) spread: Option<Spread>,
    pub(crate) probe: Option<Probe>,
    pub(crate) writing: Option<Writing>,
    pub(crate) traced: TracedSteps,
    /// Step and number of the newest commit, and whether all epochs were trained by then.
    pub(crate) committed: Option<(u64, u64, bool)>,
}

impl Trainer {
    /// Steps finished of the state that this rank holds.
    pub(crate) fn step(&self) -> Option<u64> {
        self.standing.then_some(self.position.step)
    }

    /// Lets go of a generation's ring, which frees the peers that still wait in it.
    pub(crate) fn leave(&mut self) {
        // Hooks of the old one go before those of the new one come.
        self.learner.reducer = None;
        self.learner.model.normalise_with(None);
        self.ring = Box::new(Solo);
    }

    /// Trains until the run is over, stopped, or makes room for another generation.
    pub(crate) fn train(&mut self, session: &mut Session) -> Result<End> {
        // What an earlier generation had begun to upload is nobody's any more.
        if let Some(writing) = self.writing.take() {
            writing.upload.abort();
        }
        let all = self.subset.unused();
        let epochs = self.spec.config.epochs;
        loop {
            if self.position.is_over(&all) {
                if self.position.epoch + 1 >= epochs {
                    break;
                }
                // The epoch's checkpoint is on its way meanwhile. Broken off, it begins anew in the next generation.
                let asked = self.score(session)?;
                if asked.stop {
                    self.commit(session)?;
                    return Ok(End::Stopped);
                }
                if asked.pause {
                    return self.make_room(session);
                }
                self.position.roll_over()?;
            }
            // An epoch gone on with in the middle brought its clusters along.
            if self.labelled != Some(self.position.epoch) {
                self.cluster(session)?;
            }
            let asked = self.epoch(session, &all)?;
            if asked.stop {
                self.commit(session)?;
                return Ok(End::Stopped);
            }
            if asked.pause {
                return self.make_room(session);
            }
            let last = self.position.epoch + 1 >= epochs;
            if !last && (self.position.epoch + 1).is_multiple_of(self.spec.config.checkpoint.every_epochs) {
                self.checkpoint(session, false)?;
            }
        }
        self.uploaded(session)?;
        if !self.committed.is_some_and(|(step, _, done)| done && step == self.position.step) {
            self.checkpoint(session, true)?;
            self.uploaded(session)?;
        }
        // Whoever is asked to leave now leaves with the run.
        self.score(session)?;
        if self.place.rank == 0 {
            self.export(session)?;
        }
        // Nobody leaves the ring, or calls the run finished, before the export is durable.
        self.ring.barrier()?;
        Ok(End::Finished)
    }

    /// Hands over what those who leave hold; every rank gets here after the same step.
    fn make_room(&mut self, session: &mut Session) -> Result<End> {
        let pause = session.pause()?;
        tracing::info!(reason = pause.reason, step = self.position.step, "pausing");
        if pause.commit {
            self.commit(session)?;
        }
        self.hand_over(&pause.leaving)?;
        Ok(End::Paused)
    }

    fn cluster(&mut self, session: &Session) -> Result<()> {
        let spread = self.learner.held.banks.spread(self.ring.as_ref())?;
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
            self.labelled = Some(self.position.epoch);
            return Ok(());
        }
        self.tell(session, "k-means", 0, BTreeMap::new(), 0.0);
        let config = &self.spec.config.kmeans;
        let size = KMeans {
            runs: i64::try_from(config.runs)?,
            clusters: i64::try_from(config.clusters)?,
            iterations: i64::try_from(config.iterations)?,
        };
        let (banks, seed, epoch) = (&self.learner.held.banks, self.spec.config.seed, u64::from(self.position.epoch));
        let labels = kmeans::cluster(banks, size, seed, epoch, self.ring.as_ref())?;
        self.learner.label(labels);
        self.labelled = Some(self.position.epoch);
        Ok(())
    }

    /// Trains what is left of the epoch, or until any rank is asked for something else.
    fn epoch(&mut self, session: &mut Session, all: &RoaringBitmap) -> Result<Asked> {
        let Place { rank, generation, .. } = self.place;
        let _span = info_span!("epoch", epoch = self.position.epoch, generation, rank).entered();
        let config = self.spec.config.clone();
        let accumulate = config.batch.accumulate;
        let world = self.place.world();
        let lanes = world * accumulate;
        let window = config.loader.window_shards;
        self.position.replan(lanes, window)?;
        let epoch = u64::from(self.position.epoch);
        let unused = all - &self.position.base;
        let batch = config.batch.per_rank;
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
                device: self.learner.device,
            },
        )?;
        let lr = schedule::cosine(config.base_lr(world), epoch, u64::from(config.epochs));
        let inter_weight = setup::inter_weight(&config, epoch);
        let steps = self.position.epoch_step + (plan.steps() - self.position.cursor) as u64;
        let mut since_commit = Instant::now();
        while self.position.cursor < plan.steps() {
            let began = Instant::now();
            let _span = self.traced.of(self.position.step).entered();
            session.check()?;
            let step = StepPlan {
                epoch,
                step: self.position.epoch_step,
                total: self.position.step,
                lr,
                inter_weight,
                rows: self.rows(&plan, self.position.cursor)?,
                lanes_per_rank: accumulate,
            };
            let mut wait = self.wait(session, self.set.store(), steps);
            let batches: Vec<LaneBatch> = self
                .traced
                .within("load")
                .in_scope(|| (0..accumulate).map(|_| loader.next(|| wait.look())).collect::<Result<_>>())?;
            let planned = (mine..mine + accumulate).map(|lane| plan.batch_of(lane, self.position.cursor));
            measures::LOAD.add(began.elapsed());
            ensure!(batches.iter().map(|b| &b.patches[..]).eq(planned), "the loader read other patches than planned");
            let wishes = session.wishes();
            let (every, seconds) = (config.checkpoint.every_steps, config.checkpoint.every_seconds);
            // One rank's clock decides for all.
            let due = self.place.rank == 0 && seconds > 0 && since_commit.elapsed().as_secs() >= seconds;
            let asked = Asked { stop: wishes.stop, pause: wishes.pause.is_some(), commit: due };
            measures::PATCHES.add(batches.iter().map(|batch| batch.patches.len() as u64).sum());
            let learning = self.traced.within("learn");
            let result = learning.in_scope(|| self.learner.step(self.ring.as_ref(), &step, batches, asked))?;
            measures::STEP.add(began.elapsed());
            self.position.step += 1;
            self.position.epoch_step += 1;
            self.position.cursor += 1;
            self.position.used = &self.position.base | plan.used_before(self.position.cursor);
            let patches: usize = step.rows.iter().map(Vec::len).sum();
            self.record(session, &result, lr, patches as f64 / began.elapsed().as_secs_f64(), steps)?;
            let over = self.position.cursor >= plan.steps();
            if result.asked.pause || result.asked.stop && !over {
                return Ok(result.asked);
            }
            if !over && (result.asked.commit || every > 0 && self.position.step.is_multiple_of(every)) {
                self.checkpoint(session, false)?;
                since_commit = Instant::now();
            }
        }
        Ok(Asked::default())
    }

    /// Bank rows of every lane of a step.
    pub(crate) fn rows(&self, plan: &EpochPlan, step: usize) -> Result<Vec<Vec<i64>>> {
        (0..plan.lanes())
            .map(|lane| {
                let row = |&id| {
                    self.subset.row_of(id).map(i64::from).context("the plan names a patch that is not trained on")
                };
                plan.batch_of(lane, step).iter().map(row).collect()
            })
            .collect()
    }

    /// Metrics to the bucket (rank 0) and a sign of life to the coordinator (every rank).
    fn record(&self, session: &Session, result: &StepResult, lr: f64, pace: f64, steps: u64) -> Result<()> {
        let terms = self.spec.config.method.terms();
        let mut values: BTreeMap<String, f64> = LOSSES
            .iter()
            .zip(result.losses)
            .filter(|(name, _)| **name == "total" || terms.contains(name))
            .map(|(name, loss)| (format!("loss/{name}"), loss))
            .collect();
        values.insert("lr".into(), lr);
        values.insert("gradient/norm".into(), result.gradient);
        if let Some(spread) = self.spread {
            values.insert("bank/deviation".into(), spread.deviation);
            values.insert("bank/effective_rank".into(), spread.effective_rank);
        }
        values.insert("samples_per_second".into(), pace);
        self.tell(session, "training", steps, values.clone(), pace);
        let step = StepMetrics {
            step: self.position.step,
            generation: self.place.generation,
            epoch: self.position.epoch,
            epoch_step: self.position.epoch_step,
            epoch_steps: steps,
            time: Timestamp::now(),
            values,
        };
        self.metrics.push(step, self.place.rank == 0, &mut self.wait(session, &self.run, steps))
    }

    pub(crate) fn tell(&self, session: &Session, phase: &str, steps: u64, metrics: BTreeMap<String, f64>, pace: f64) {
        session.progress(self.progress(phase, steps, metrics, pace));
    }

    /// What is done while `store` is waited for, at the present step of `steps`.
    pub(crate) fn wait<'a>(&self, session: &'a Session, store: &Store, steps: u64) -> Wait<'a> {
        Wait::new(session, store, self.progress("", steps, BTreeMap::new(), 0.0))
    }

    fn progress(&self, phase: &str, steps: u64, metrics: BTreeMap<String, f64>, pace: f64) -> v1::Progress {
        v1::Progress {
            phase: phase.into(),
            epoch: self.position.epoch,
            epoch_step: self.position.epoch_step,
            epoch_steps: steps,
            step: self.position.step,
            metrics: metrics.into_iter().collect(),
            samples_per_second: pace,
        }
    }

    /// Commits and waits for it.
    fn commit(&mut self, session: &mut Session) -> Result<()> {
        self.uploaded(session)?;
        if self.committed.is_none_or(|(step, ..)| step != self.position.step) {
            self.checkpoint(session, false)?;
            self.uploaded(session)?;
        }
        Ok(())
    }

    /// Copies this rank's part of the state to host memory and uploads it while training goes on. The coordinator makes a commit of
    /// all ranks' parts. One is under way at a time.
    fn checkpoint(&mut self, session: &mut Session, done: bool) -> Result<()> {
        self.uploaded(session)?;
        self.tell(session, "checkpoint", self.position.epoch_step, BTreeMap::new(), 0.0);
        let Place { rank, generation, .. } = self.place;
        let step = self.position.step;
        let began = Instant::now();
        let snapshot = info_span!("snapshot", step, generation, rank);
        let parts = snapshot.in_scope(|| {
            self.learner.same_everywhere(self.ring.as_ref())?;
            self.learner.snapshot(rank, &self.subset)
        })?;
        measures::SNAPSHOT.add(began.elapsed());
        let writer = PartWriter::new(&self.run, generation, step);
        let (reporter, position, world) = (session.reporter(), self.position.clone(), self.place.world());
        let metrics = self.metrics.flushed(rank == 0);
        let work = async move {
            let began = Instant::now();
            // Nothing is committed whose metrics are not there.
            metrics.await?;
            let parts = checkpoint::write(&writer, parts).await?;
            let progress_json = if rank == 0 {
                serde_json::to_string(&progress(&writer, &position, generation, world, done).await?)?
            } else {
                String::new()
            };
            measures::UPLOAD.add(began.elapsed());
            measures::UPLOADED.add(parts.iter().map(|part| part.bytes).sum());
            let parts = parts.iter().map(part).collect::<Result<_>>()?;
            reporter.parts_written(v1::PartsWritten { progress_json, step, parts });
            Ok(())
        };
        let upload = self.runtime.spawn(work.instrument(info_span!("upload", step, generation, rank)));
        self.writing = Some(Writing { step, done, upload });
        Ok(())
    }

    /// Waits for the checkpoint under way to be committed.
    fn uploaded(&mut self, session: &mut Session) -> Result<()> {
        let mut wait = self.wait(session, &self.run, self.position.epoch_step);
        let Some(writing) = &mut self.writing else { return Ok(()) };
        let _span = info_span!("commit", step = writing.step).entered();
        while !writing.upload.is_finished() {
            wait.look()?;
            std::thread::sleep(LOOK);
        }
        let (step, done) = (writing.step, writing.done);
        self.runtime.block_on(&mut writing.upload).context("the upload broke off")??;
        let seq = session.committed(step)?;
        self.committed = Some((step, seq, done));
        self.writing = None;
        Ok(())
    }

    /// Writes the backbone of the newest commit in every format.
    fn export(&self, session: &Session) -> Result<()> {
        let _span = info_span!("export", step = self.position.step).entered();
        self.tell(session, "export", self.position.epoch_step, BTreeMap::new(), 0.0);
        let tensors = self.learner.model.backbone.state();
        let tensors = tensors.into_iter().map(|(name, tensor)| to_stored(name, &tensor)).collect::<Result<Vec<_>>>()?;
        self.wait(session, &self.run, self.position.epoch_step).block_on(&self.runtime, async {
            self.metrics.flushed(true).await?;
            let (_, seq, _) = self.committed.context("a run without a commit cannot be exported")?;
            let commit = Commits::new(&self.run).read(seq).await?;
            let folder = export::write_export(&self.run, &self.spec, &commit, &tensors, Timestamp::now()).await?;
            tracing::info!(folder, "exported");
            Ok(())
        })?
    }
}

/// What a commit says beside the parts, which the coordinator collects from all ranks.
async fn progress(
    writer: &PartWriter,
    position: &Position,
    generation: u64,
    world: usize,
    done: bool,
) -> Result<commit::Progress> {
    let put = async |name: &str, used: &RoaringBitmap| {
        writer.put(PartKind::Ledger, name, Ledger::from(used.clone()).to_bytes()?).await
    };
    let plan_base = if position.base.is_empty() { None } else { Some(put("plan-base.roaring", &position.base).await?) };
    Ok(commit::Progress {
        generation,
        lease_epoch: 0,
        step: position.step,
        epoch: position.epoch,
        epoch_step: position.epoch_step,
        cursor: position.cursor as u64,
        lanes: u32::try_from(position.lanes)?,
        window: u32::try_from(position.window)?,
        segments: position.segments.clone(),
        history: position.history.clone(),
        world: u32::try_from(world)?,
        plan_base,
        ledger: put("ledger.roaring", &position.used).await?,
        parts: Vec::new(),
        losses: BTreeMap::new(),
        done,
    })
}

fn part(part: &PartRef) -> Result<v1::Part> {
    let kind = serde_json::to_value(part.kind)?.as_str().context("a part's kind is a word")?.to_owned();
    Ok(v1::Part { kind, path: part.path.clone(), bytes: part.bytes, crc32c: part.crc32c })
}
