//! One training step: forward and backward of this rank's lanes, gradients over the ring, optimiser, bank.
//!
//! A step is the sum over its lanes of n_lane / n_step × (mean loss of the lane), so its result does not depend on which
//! rank holds which lane. BatchNorm's running statistics start each lane from the step's initial ones and are averaged
//! with the same weights, for the same reason.

use anyhow::{Context, Result};
use sgcl::bank::{BankRows, Banks};
use sgcl::collective::Collective;
use sgcl::draws::{self, HardRanks};
use sgcl::model::{Model, Outputs};
use sgcl::neighbours::Lattice;
use sgcl::objective::{self, Negatives, Params, StepInputs, StepOutput};
use sgcl::optim::Sgd;
use sgcl_c10d::Reducer;
use tch::{Device, Kind, Tensor};

use super::loader::LaneBatch;

/// Losses of a step, in the order that results list them.
pub(crate) const LOSSES: [&str; 4] = ["intra", "inter", "inner", "total"];

/// What is trained, and what a step needs besides.
pub(crate) struct Learner {
    pub(crate) model: Model,
    pub(crate) sgd: Sgd,
    pub(crate) banks: Banks,
    /// (runs, N) k-means labels of this epoch.
    pub(crate) labels: Tensor,
    /// (N) the labels of all runs as one.
    pub(crate) clusters: Tensor,
    pub(crate) lattice: Lattice,
    pub(crate) params: Params,
    pub(crate) hard_ranks: HardRanks,
    pub(crate) seed: u64,
    pub(crate) device: Device,
    /// Averages gradients over ranks while backward runs; none in a world of one.
    pub(crate) reducer: Option<Reducer>,
}

/// Where a step stands and who is in it.
pub(crate) struct StepPlan {
    pub(crate) epoch: u64,
    /// Step within the epoch, whatever plan it belongs to.
    pub(crate) step: u64,
    /// Step since the run began.
    pub(crate) total: u64,
    pub(crate) lr: f64,
    pub(crate) inter_weight: f64,
    /// Bank rows of every lane of the step, this rank's and the others'.
    pub(crate) rows: Vec<Vec<i64>>,
    /// Lanes a rank holds.
    pub(crate) lanes_per_rank: usize,
}

/// What all ranks know after a step.
pub(crate) struct StepResult {
    /// Means over the step's anchors, in the order of [`LOSSES`].
    pub(crate) losses: [f64; 4],
    /// True where any rank was asked to stop: every rank sees it at the same step.
    pub(crate) stop: bool,
}

impl Learner {
    /// Runs one step; `batches` are this rank's lanes in order, `stop` is this rank's own wish.
    pub(crate) fn step(
        &mut self,
        ring: &dyn Collective,
        plan: &StepPlan,
        batches: Vec<LaneBatch>,
        stop: bool,
    ) -> Result<StepResult> {
        let anchors: usize = plan.rows.iter().map(Vec::len).sum();
        let parameters: Vec<Tensor> = self.model.parameters().into_iter().map(|(_, parameter)| parameter).collect();
        sgcl_c10d::zero_grad(&parameters);
        let initial = self.model.backbone.bn_stats();
        let mut stats = initial.zeros_like();
        let mut losses = Tensor::zeros([4], (Kind::Float, self.device));
        let mut outputs = Vec::new();
        let (first_lane, last) = (ring.rank() * plan.lanes_per_rank, batches.len() - 1);
        for (offset, batch) in batches.into_iter().enumerate() {
            // Where lanes are accumulated the last one's backward reduces what all of them left in the gradients.
            if let (Some(reducer), true) = (&self.reducer, offset == last) {
                reducer.prepare()?;
            }
            if batch.patches.is_empty() {
                // The epoch's tail has nothing for this lane, but the ring waits for its gradients: zeros.
                let nothing: Tensor = parameters.iter().map(|p| p.sum(Kind::Float) * 0.0).sum();
                sgcl_c10d::backward(&nothing)?;
                continue;
            }
            let lane = first_lane + offset;
            let share = batch.patches.len() as f64 / anchors as f64;
            let (output, loss) = self.lane(plan, lane, &batch)?;
            // The reducer averages over ranks; a lane counts by its anchors.
            sgcl_c10d::backward(&(&loss.total * (share * ring.world() as f64)))?;
            let values = Tensor::stack(&[&loss.intra, &loss.inter, &loss.inner, &loss.total].map(Tensor::detach), 0);
            losses += values * share;
            stats += self.model.backbone.bn_stats() * share;
            self.model.backbone.set_bn_stats(&initial);
            outputs.push(output);
        }
        let result = self.share(ring, &stats, &losses, stop)?;
        // torchvision counts passes in training mode: globals and locals, whatever the number of lanes.
        self.model.backbone.set_batches_tracked(i64::try_from(2 * (plan.total + 1))?);
        self.sgd.step(plan.lr);
        self.update_banks(ring, plan, &outputs)?;
        Ok(result)
    }

    /// Forward pass and losses of one lane.
    fn lane(&self, plan: &StepPlan, lane: usize, batch: &LaneBatch) -> Result<(Outputs, StepOutput)> {
        let ids = &plan.rows[lane];
        let output = self.model.forward(&batch.views.to_views(self.device), true);
        let ql = output.ql.as_ref().context("the model gave no local views")?;
        let spatial = ids
            .iter()
            .map(|&id| self.lattice.neighbours(id, self.params.radius).context("a patch outside the lattice"))
            .collect::<Result<Vec<_>>>()?;
        let on_device = |values: &[i64]| Tensor::from_slice(values).to_device(self.device);
        let k = usize::try_from(self.params.negatives)?;
        let (epoch, step, lane) = (plan.epoch, plan.step, lane as u64);
        let negatives = draws::negatives(self.seed, epoch, step, lane, k, self.banks.len());
        let loss = objective::step(
            &StepInputs {
                q: &output.q,
                x: &output.x,
                ql,
                ids,
                spatial: &spatial,
                clusters: &self.clusters,
                hard_ranks: &on_device(&self.hard_ranks.draw(self.seed, epoch, step, lane)),
                negatives: &Negatives::Shared(on_device(&negatives)),
                inter_weight: plan.inter_weight,
            },
            &self.banks,
            &self.params,
        )?;
        Ok((output, loss))
    }

    /// One small all-reduce: BatchNorm's statistics, the losses, and whether anyone was asked to stop.
    fn share(&self, ring: &dyn Collective, stats: &Tensor, losses: &Tensor, stop: bool) -> Result<StepResult> {
        let flag = Tensor::from_slice(&[f32::from(u8::from(stop))]).to_device(self.device);
        let mut shared = Tensor::cat(&[stats, losses, &flag], 0);
        ring.all_reduce_sum(&mut shared)?;
        let width = stats.size()[0];
        self.model.backbone.set_bn_stats(&shared.narrow(0, 0, width));
        let tail: Vec<f32> = Vec::try_from(shared.narrow(0, width, 5).to_device(Device::Cpu))?;
        let losses = [0, 1, 2, 3].map(|at| f64::from(tail[at]));
        Ok(StepResult { losses, stop: tail[4] > 0.0 })
    }

    /// Gathers the step's features and blends them into the bank, on every rank alike.
    fn update_banks(&mut self, ring: &dyn Collective, plan: &StepPlan, outputs: &[Outputs]) -> Result<()> {
        let (dim, wide) = (self.banks.global.size()[1], self.banks.backbone.size()[1]);
        let width = 5 * dim + wide;
        // Lanes differ in length at an epoch's end only, and everybody knows by how much: pad, gather, cut.
        let longest = plan.rows.iter().map(Vec::len).max().unwrap_or(0) as i64;
        let gathered = tch::no_grad(|| -> Result<Tensor> {
            let lanes = plan.lanes_per_rank as i64;
            let mine = Tensor::zeros([lanes, longest, width], (Kind::Float, self.device));
            for (lane, output) in (0..).zip(outputs) {
                let ql = output.ql.as_ref().context("the model gave no local views")?;
                let corners = ql.view([4, -1, dim]).transpose(0, 1).reshape([-1, 4 * dim]);
                let features = Tensor::cat(&[&output.q, &output.x, &corners], 1);
                mine.select(0, lane).narrow(0, 0, features.size()[0]).copy_(&features);
            }
            Ok(ring.all_gather(&mine)?)
        })?;
        let filled: Vec<Tensor> = (0_i64..)
            .zip(&plan.rows)
            .map(|(lane, rows)| gathered.select(0, lane).narrow(0, 0, rows.len() as i64))
            .collect();
        let features = Tensor::cat(&filled, 0);
        let column = |from: i64, width: i64| features.narrow(1, from, width);
        let rows = BankRows {
            global: column(0, dim),
            backbone: column(dim, wide),
            corners: [0, 1, 2, 3].map(|corner| column(dim + wide + corner * dim, dim)),
        };
        let ids: Vec<i64> = plan.rows.iter().flatten().copied().collect();
        self.banks.apply(&ids, &rows, self.params.bank_momentum)?;
        Ok(())
    }
}
