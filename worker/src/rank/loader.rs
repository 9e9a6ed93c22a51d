//! Patches to batches, ahead of the step: read ▸ decode ▸ augment ▸ to the device, on threads of their own.
//!
//! A batch is a pure function of (seed, epoch, patch ids): which thread, rank or process prepares it changes nothing.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use rayon::prelude::*;
use sgcl::augment::{ViewParams, render_batch};
use sgcl::image::RgbImage;
use sgcl::model::Views;
use sgcl_patchset::{EpochPlan, ShardReader};
use tch::Device;

/// Batches prepared ahead of the one being trained on.
const AHEAD: usize = 2;
/// Between two looks at what else there is to do than to wait for a batch.
const LOOK: Duration = Duration::from_millis(20);

/// The augmented views of one lane's patches at one step.
pub(crate) struct LaneBatch {
    /// Patch ids, in plan order; empty where the uneven tail of an epoch has nothing for this lane.
    pub(crate) patches: Vec<u32>,
    /// One global and four local views a patch.
    pub(crate) views: Views,
}

/// What a loader needs to know of an epoch.
pub(crate) struct EpochLoad {
    pub(crate) plan: Arc<EpochPlan>,
    pub(crate) lanes: std::ops::Range<usize>,
    /// First step to prepare: above 0 when an epoch is resumed.
    pub(crate) from_step: usize,
    pub(crate) seed: u64,
    pub(crate) epoch: u64,
    /// Where views go.
    pub(crate) device: Device,
}

/// Batches of one epoch, in order: all lanes of a step, then those of the next.
pub(crate) struct Loader {
    batches: Receiver<Result<LaneBatch>>,
}

impl Loader {
    /// Starts preparing batches; dropping the loader ends the work.
    pub(crate) fn start(
        reader: Arc<ShardReader>,
        pool: Arc<rayon::ThreadPool>,
        views: ViewParams,
        load: EpochLoad,
    ) -> Result<Self> {
        let (sender, batches) = bounded(AHEAD);
        std::thread::Builder::new()
            .name("loader".into())
            .spawn(move || {
                for step in load.from_step..load.plan.steps() {
                    for lane in load.lanes.clone() {
                        let patches = load.plan.batch_of(lane, step);
                        let batch = pool.install(|| prepare(&reader, &views, patches, &load));
                        let failed = batch.is_err();
                        // A closed channel means that the epoch was abandoned: nothing is left to prepare.
                        if sender.send(batch).is_err() || failed {
                            return;
                        }
                    }
                }
            })
            .context("cannot start the loader thread")?;
        Ok(Self { batches })
    }

    /// The next lane's batch. While there is none, `waiting` is called again and again.
    ///
    /// # Errors
    /// A patch that cannot be read or decoded, named with its shard; those of `waiting`.
    pub(crate) fn next(&self, mut waiting: impl FnMut() -> Result<()>) -> Result<LaneBatch> {
        loop {
            match self.batches.recv_timeout(LOOK) {
                Ok(batch) => return batch,
                Err(RecvTimeoutError::Timeout) => waiting()?,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(anyhow!("the loader thread ended before the epoch did"));
                }
            }
        }
    }
}

fn prepare(reader: &ShardReader, views: &ViewParams, patches: &[u32], load: &EpochLoad) -> Result<LaneBatch> {
    let images = patches
        .par_iter()
        .map(|&patch| {
            let image = reader.decode_blocking(patch)?;
            Ok((u64::from(patch), RgbImage::new(image.width, image.height, image.pixels)?))
        })
        .collect::<Result<Vec<_>>>()?;
    let views = render_batch(views, &images, load.seed, load.epoch).to_views(load.device)?;
    Ok(LaneBatch { patches: patches.to_vec(), views })
}
