//! The bank's first rows where they are features: one pass over all patches with the model as it begins.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use sgcl_patchset::EpochPlan;

use super::loader::{EpochLoad, LaneBatch, Loader};
use super::train::Trainer;
use crate::session::Session;

impl Trainer {
    /// Replaces every bank row. Views are those of an epoch that is never trained.
    pub(crate) fn fill(&mut self, session: &Session) -> Result<()> {
        let config = self.spec.config.clone();
        let accumulate = config.batch.accumulate;
        let lanes = self.place.world() * accumulate;
        let (seed, epoch) = (config.seed, u64::from(config.epochs));
        let all = self.subset.unused();
        let plan = EpochPlan::new(
            self.set.index(),
            seed,
            epoch,
            &all,
            lanes,
            config.batch.per_rank,
            config.loader.window_shards,
        )?;
        let plan = Arc::new(plan);
        let mine = self.place.rank * accumulate;
        let mine = mine..mine + accumulate;
        let load =
            EpochLoad { plan: Arc::clone(&plan), lanes: mine, from_step: 0, seed, epoch, device: self.learner.device };
        let loader = Loader::start(Arc::clone(&self.reader), Arc::clone(&self.pool), self.views.clone(), load)?;
        for step in 0..plan.steps() {
            session.check()?;
            let rows = self.rows(&plan, step)?;
            let mut wait = self.wait(session, self.set.store(), plan.steps() as u64);
            let batches: Vec<LaneBatch> =
                (0..accumulate).map(|_| loader.next(|| wait.look())).collect::<Result<_>>()?;
            self.learner.fill(self.ring.as_ref(), &rows, batches)?;
            self.tell(session, "filling the bank", plan.steps() as u64, BTreeMap::new(), 0.0);
        }
        Ok(())
    }
}
