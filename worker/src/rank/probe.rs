//! The online probe: every few epochs the encoder is scored by nearest neighbours on a small labelled set.
//!
//! It reads the model in evaluation mode and draws nothing, so a run with it trains what a run without it trains, bit for bit. Ranks share the
//! patches and gather their features. A probe is no state: one that is broken off is made anew or is missing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use jiff::Timestamp;
use sgcl::probe::{self, Figures, Split};
use sgcl_patchset::Store;
use sgcl_runstore::metrics::{PROBE, StepMetrics};
use sgcl_runstore::{NamedSetError, ProbeSet, Spec};
use tch::{Device, Kind, Tensor};
use tokio::runtime::Handle;
use tracing::info_span;

use super::setup;
use super::step::Asked;
use super::train::Trainer;
use super::wait::LOOK;
use crate::eval::protocol::KNN_TEMPERATURE;
use crate::eval::views::{Patches, View};
use crate::session::Session;

/// Batches prepared ahead of the one that is encoded.
const AHEAD: usize = 2;
/// Most patches in one forward pass.
const BATCH: usize = 64;

/// What a probe needs beside the model.
pub(crate) struct Probe {
    set: ProbeSet,
    patches: Patches,
}

impl Probe {
    /// As the run's configuration has it, if it does.
    ///
    /// # Errors
    /// The set is missing or unfit.
    pub(crate) fn open(runtime: &Handle, spec: &Spec) -> Result<Option<Self>> {
        let opened = runtime.block_on(async {
            let open = |url: &str| Store::open(url).map(|store| store.patient());
            let Some(set) = ProbeSet::open(&spec.config, &spec.data_id, open).await? else { return Ok(None) };
            // The reader of a remote set keeps the runtime it is made in.
            let reader = set.set.reader(setup::cache(&set.set, spec));
            Ok::<_, NamedSetError>(Some(Self { set, patches: Patches { reader, px: spec.config.views.global_px } }))
        });
        opened.map_err(|error| match error {
            NamedSetError::Config(error) => error.into(),
            error => error.into(),
        })
    }

    /// (B, 3, px, px) views of some patches, a batch at a time, made on threads of their own. Dropping the receiver ends the work.
    fn views(&self, ids: Vec<u32>, batch: usize, pool: Arc<rayon::ThreadPool>) -> Result<Receiver<Result<Tensor>>> {
        let (sender, views) = bounded(AHEAD);
        let patches = self.patches.clone();
        let side = i64::from(patches.px);
        std::thread::Builder::new()
            .name("probe".into())
            .spawn(move || {
                for ids in ids.chunks(batch) {
                    let values = pool.install(|| patches.values(ids, View::Whole, false));
                    let views =
                        values.and_then(|values| Ok(Tensor::f_from_slice(&values)?.f_view([-1, 3, side, side])?));
                    let failed = views.is_err();
                    if sender.send(views).is_err() || failed {
                        return;
                    }
                }
            })
            .context("cannot start the probe's thread")?;
        Ok(views)
    }

    /// Figures by name of (n, width) features.
    fn figures(&self, features: &Tensor, k: usize) -> Result<[Option<f64>; 4]> {
        let patches = &self.set.patches;
        let split = Split { train: patches.train.clone(), test: patches.test.clone() };
        let classes = self.set.set.manifest().classes.len();
        let found = probe::knn(features, &patches.labels, classes, &split, k, KNN_TEMPERATURE)?;
        Ok(found.scores(&[]).figures.values())
    }
}

/// A rank's part of a probe.
enum Part {
    /// (n, width) features of its patches.
    Features(Tensor),
    /// It was asked for something else.
    Asked(Asked),
    /// A patch could not be read.
    Failed(anyhow::Error),
}

impl Trainer {
    /// Scores the encoder where that is due, and returns what any rank was asked for meanwhile: then the score is missing.
    ///
    /// # Errors
    /// The ring broke. A set that cannot be read is a warning.
    pub(super) fn score(&self, session: &Session) -> Result<Asked> {
        let config = &self.spec.config;
        let (epoch, generation, rank) = (self.position.epoch, self.place.generation, self.place.rank);
        let Some(probe) = self.probe.as_ref().filter(|_| config.probe.is_due(epoch, config.epochs)) else {
            return Ok(Asked::default());
        };
        let _span = info_span!("probe", epoch, generation, rank).entered();
        let began = Instant::now();
        let part = self.part(probe, session)?;
        let (mut asked, mut failed) = (Asked::default(), false);
        match &part {
            Part::Features(_) => {}
            Part::Asked(wishes) => asked = *wishes,
            Part::Failed(error) => {
                tracing::warn!(epoch, "no probe of this epoch: {error:#}");
                failed = true;
            }
        }
        let mine = [asked.stop, asked.pause, failed].map(|flag| f32::from(u8::from(flag)));
        let mut flags = Tensor::from_slice(&mine).to_device(self.learner.device);
        self.ring.all_reduce_sum(&mut flags)?;
        let flags: Vec<f32> = Vec::try_from(flags.to_device(Device::Cpu))?;
        let asked = Asked { stop: flags[0] > 0.0, pause: flags[1] > 0.0, commit: false };
        let Part::Features(features) = part else { return Ok(asked) };
        if flags.iter().any(|&flag| flag > 0.0) {
            return Ok(asked);
        }
        let features = self.ring.all_gather_uneven(&features)?;
        let Some(figures) = self.figures(probe, &features)? else { return Ok(asked) };
        let values: BTreeMap<String, f64> = (Figures::NAMES.into_iter().zip(figures))
            .filter(|(_, value)| value.is_finite())
            .map(|(name, value)| (format!("{PROBE}{name}"), value))
            .collect();
        let (patches, seconds) = (probe.set.patches.ids.len(), began.elapsed().as_secs_f64());
        tracing::info!(epoch, patches, seconds, accuracy = figures[0], "probe");
        let steps = self.position.epoch_step;
        self.tell(session, "probe", steps, values.clone(), 0.0);
        let told = StepMetrics {
            step: self.position.step,
            generation,
            epoch,
            epoch_step: steps,
            epoch_steps: steps,
            time: Timestamp::now(),
            values,
        };
        self.metrics.push(told, rank == 0, &mut self.wait(session, &self.run, steps))?;
        Ok(asked)
    }

    /// Encodes this rank's share of the patches: ranks in order have them in order.
    fn part(&self, probe: &Probe, session: &Session) -> Result<Part> {
        let ids = &probe.set.patches.ids;
        let (rank, world) = (self.place.rank, self.place.world());
        let mine = ids[ids.len() * rank / world..ids.len() * (rank + 1) / world].to_vec();
        // No more memory than a step takes.
        let batch = self.spec.config.batch.per_rank.min(BATCH);
        let batches = mine.len().div_ceil(batch);
        let steps = self.position.epoch_step;
        let views = probe.views(mine, batch, Arc::clone(&self.pool))?;
        let backbone = &self.learner.model.backbone;
        let mut features = vec![Tensor::zeros([0, backbone.arch().width()], (Kind::Float, self.learner.device))];
        let mut wait = self.wait(session, probe.set.set.store(), steps);
        while features.len() <= batches {
            session.check()?;
            let wishes = session.wishes();
            if wishes.stop || wishes.pause.is_some() {
                return Ok(Part::Asked(Asked { stop: wishes.stop, pause: wishes.pause.is_some(), commit: false }));
            }
            match views.recv_timeout(LOOK) {
                Ok(Ok(views)) => {
                    let views = views.to_device(self.learner.device);
                    features.push(tch::no_grad(|| backbone.features(&views, false)).to_kind(Kind::Float));
                    // A sign of life.
                    self.tell(session, "probe", steps, BTreeMap::new(), 0.0);
                }
                Ok(Err(error)) => return Ok(Part::Failed(error)),
                Err(RecvTimeoutError::Timeout) => wait.look()?,
                Err(RecvTimeoutError::Disconnected) => {
                    return Ok(Part::Failed(anyhow::anyhow!("the probe's thread ended before its patches did")));
                }
            }
        }
        Ok(Part::Features(Tensor::cat(&features, 0)))
    }

    /// What rank 0 makes of everyone's features, told to all; `None` where it cannot be made.
    fn figures(&self, probe: &Probe, features: &Tensor) -> Result<Option<[f64; 4]>> {
        let mut figures = [f64::NAN; 4];
        if self.place.rank == 0 {
            match probe.figures(features, self.spec.config.probe.k) {
                Ok(found) => figures = found.map(|figure| figure.unwrap_or(f64::NAN)),
                Err(error) => tracing::warn!(epoch = self.position.epoch, "no probe of this epoch: {error:#}"),
            }
        }
        let mut told = Tensor::from_slice(&figures).to_device(self.learner.device);
        self.ring.broadcast(&mut told, 0)?;
        let told: Vec<f64> = Vec::try_from(told.to_device(Device::Cpu))?;
        let [accuracy, ..] = told[..] else { return Ok(None) };
        Ok(accuracy.is_finite().then(|| std::array::from_fn(|at| told[at])))
    }
}
