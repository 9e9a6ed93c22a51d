//! One training step: forward and backward of this rank's lanes, gradients over the ring, optimiser, bank.
//!
//! A step is the sum over its lanes of n_lane / n_step × (mean loss of the lane), so its result does not depend on which
//! rank holds which lane. BatchNorm's running statistics start each lane from the step's initial ones and are averaged
//! with the same weights, for the same reason.

use anyhow::{Context, Result, ensure};
use sgcl::bank::{BankRows, Held, Widths};
use sgcl::collective::Collective;
use sgcl::draws::{self, HardRanks};
use sgcl::kmeans::joint_labels;
use sgcl::model::{Model, Outputs};
use sgcl::neighbours::Lattice;
use sgcl::objective::{self, Candidates, HardKey, Local, Negatives, Params, Pool, Queries, StepInputs, StepOutput};
use sgcl::optim::Sgd;
use sgcl_c10d::Reducer;
use tch::{Device, Kind, Tensor};

use super::loader::LaneBatch;

/// Losses of a step, in the order that results list them.
pub(crate) const LOSSES: [&str; 6] = ["intra", "inter", "spatial", "semantic", "inner", "total"];

/// What is trained, and what a step needs besides.
pub(crate) struct Learner {
    pub(crate) model: Model,
    pub(crate) sgd: Sgd,
    /// Bank rows with this epoch's k-means labels.
    pub(crate) held: Held,
    /// (held) the labels of all runs as one.
    pub(crate) clusters: Tensor,
    /// The last step's part in the bank, for a rank that missed its end.
    pub(crate) last: Vec<Update>,
    pub(crate) lattice: Lattice,
    pub(crate) params: Params,
    pub(crate) draws: Draws,
    /// Share of the key encoder that a step keeps, where there is one.
    pub(crate) key_momentum: f64,
    pub(crate) device: Device,
    /// Averages gradients over ranks while backward runs; none in a world of one.
    pub(crate) reducer: Option<Reducer>,
}

/// What one lane of every rank adds to the bank after a step.
pub(crate) struct Update {
    pub(crate) rows: Vec<i64>,
    pub(crate) features: BankRows,
}

/// What a step draws from, beside the epoch and the step.
pub(crate) struct Draws {
    pub(crate) seed: u64,
    pub(crate) hard_ranks: HardRanks,
    pub(crate) candidates: Candidates,
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

impl StepPlan {
    /// Bank rows of the lanes that ranks work on at the same time: each rank's lane number `offset`.
    fn together(&self, offset: usize) -> Vec<Vec<i64>> {
        every(&self.rows, offset, self.lanes_per_rank)
    }
}

fn every(rows: &[Vec<i64>], offset: usize, lanes_per_rank: usize) -> Vec<Vec<i64>> {
    rows.iter().skip(offset).step_by(lanes_per_rank).cloned().collect()
}

/// What a rank was asked for, or any rank: every rank sees it at the same step.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asked {
    /// Commit, then end.
    pub(crate) stop: bool,
    /// Make room for another generation.
    pub(crate) pause: bool,
    /// Commit.
    pub(crate) commit: bool,
}

/// What all ranks know after a step.
pub(crate) struct StepResult {
    /// Means over the step's anchors, in the order of [`LOSSES`].
    pub(crate) losses: [f64; LOSSES.len()],
    /// Length of the step's gradient over all parameters.
    pub(crate) gradient: f64,
    pub(crate) asked: Asked,
}

impl Learner {
    /// Runs one step; `batches` are this rank's lanes in order, `asked` is what this rank was asked for. Where the ring breaks nothing has
    /// changed: weights, statistics and bank are those of the step before.
    pub(crate) fn step(
        &mut self,
        ring: &dyn Collective,
        plan: &StepPlan,
        batches: Vec<LaneBatch>,
        asked: Asked,
    ) -> Result<StepResult> {
        let initial = self.model.backbone.bn_stats();
        let (features, result) = match self.reduce(ring, plan, batches, asked, &initial) {
            Ok(reduced) => reduced,
            Err(error) => {
                self.model.backbone.set_bn_stats(&initial);
                return Err(error);
            }
        };
        // From here on nothing waits for another rank: a step is finished or not begun.
        // torchvision counts passes in training mode: globals and locals, whatever the number of lanes.
        let passes = 1 + u64::from(self.params.local == Local::Corners);
        self.model.backbone.set_batches_tracked(i64::try_from(passes * (plan.total + 1))?);
        self.sgd.step(plan.lr)?;
        if let Some(key) = &self.model.key {
            key.follow(&self.model.parameters(), self.key_momentum);
            key.enqueue(&plan.rows.concat());
        }
        // After all lanes: what a step sees of the bank does not depend on how its lanes are dealt.
        self.last = features
            .into_iter()
            .enumerate()
            .map(|(offset, features)| Update { rows: plan.together(offset).concat(), features })
            .collect();
        self.apply_last()?;
        Ok(result)
    }

    /// Brings the bank to the end of the step that [`Learner::last`] belongs to.
    pub(crate) fn apply_last(&mut self) -> Result<()> {
        for update in &self.last {
            self.held.banks.apply(&update.rows, &update.features, self.params.bank_momentum)?;
        }
        Ok(())
    }

    /// Ranks hold the same weights, statistics and momenta, to the bit; every rank asks together. Not to go on is cheaper than a month
    /// of ranks that drift apart unseen.
    pub(crate) fn same_everywhere(&self, ring: &dyn Collective) -> Result<()> {
        let tensors = self.model.state().into_iter().chain(self.sgd.state()).map(|(_, tensor)| tensor.detach());
        let sums: Vec<Tensor> = tensors
            .filter(|tensor| tensor.kind() == Kind::Float)
            .map(|tensor| tensor.view_dtype(Kind::Int).sum(Kind::Int64))
            .collect();
        let all = ring.all_gather(&Tensor::stack(&sums, 0).unsqueeze(0))?;
        let differ = all.ne_tensor(&all.narrow(0, 0, 1)).any_dim(1, false).to_device(Device::Cpu);
        let differ: Vec<bool> = Vec::try_from(differ)?;
        let others: Vec<usize> = (0..differ.len()).filter(|&rank| differ[rank]).collect();
        ensure!(others.is_empty(), "ranks {others:?} hold other weights than rank 0: this state is not committed");
        Ok(())
    }

    /// Makes the features that the model as it is finds for these lanes their bank rows. `rows` are those of every lane of the step,
    /// `batches` this rank's lanes in order.
    pub(crate) fn fill(&mut self, ring: &dyn Collective, rows: &[Vec<i64>], batches: Vec<LaneBatch>) -> Result<()> {
        let initial = self.model.backbone.bn_stats();
        let lanes = batches.len();
        for (offset, batch) in batches.into_iter().enumerate() {
            let Outputs { q, x, ql, keys, .. } = tch::no_grad(|| self.forward(&batch))?;
            // Seen in training mode, by the batch's own statistics; the running ones begin with the first step.
            self.model.backbone.set_bn_stats(&initial);
            let ids = every(rows, offset, lanes);
            let ql = ql.unwrap_or_else(|| self.no_local(&q));
            let queries = Queries { q: &q, x: &x, ql: &ql, keys: keys.as_ref(), ids: &ids };
            let features = objective::gather(&queries, &self.held.banks, ring)?;
            self.held.banks.apply(&ids.concat(), &features, 1.0)?;
        }
        Ok(())
    }

    /// (4b, 0), where a method has no local views.
    fn no_local(&self, q: &Tensor) -> Tensor {
        Tensor::zeros([4 * q.size()[0], 0], (Kind::Float, self.device))
    }

    /// Takes the labels of this epoch.
    pub(crate) fn label(&mut self, labels: Tensor) {
        self.clusters = joint_labels(&labels, self.params.clusters);
        self.held.labels = labels;
    }

    /// Forward and backward of this rank's lanes, gradients and statistics over the ring.
    fn reduce(
        &mut self,
        ring: &dyn Collective,
        plan: &StepPlan,
        batches: Vec<LaneBatch>,
        asked: Asked,
        initial: &Tensor,
    ) -> Result<(Vec<BankRows>, StepResult)> {
        let anchors: usize = plan.rows.iter().map(Vec::len).sum();
        let parameters: Vec<Tensor> = self.model.parameters().into_iter().map(|(_, parameter)| parameter).collect();
        sgcl_c10d::zero_grad(&parameters);
        let mut stats = initial.zeros_like();
        let mut losses = Tensor::zeros([LOSSES.len() as i64], (Kind::Float, self.device));
        let mut features = Vec::new();
        for (offset, batch) in batches.into_iter().enumerate() {
            // Where lanes are accumulated the last one's backward reduces what all of them left in the gradients.
            if let (Some(reducer), true) = (&self.reducer, offset + 1 == plan.lanes_per_rank) {
                reducer.prepare()?;
            }
            let share = batch.patches.len() as f64 / anchors as f64;
            let output = self.forward(&batch)?;
            let loss = self.objective(ring, plan, offset, &output)?;
            if batch.patches.is_empty() {
                // The epoch's tail has nothing for this lane, but the ring waits for its gradients: zeros.
                let nothing: Tensor = parameters.iter().map(|p| p.sum(Kind::Float) * 0.0).sum();
                sgcl_c10d::backward(&(nothing + &loss.total))?;
            } else {
                // The reducer averages over ranks; a lane counts by its anchors.
                sgcl_c10d::backward(&(&loss.total * (share * ring.world() as f64)))?;
                let StepOutput { intra, inter, spatial, semantic, inner, total, .. } = &loss;
                let values = [intra, inter, spatial, semantic, inner, total].map(Tensor::detach);
                losses += Tensor::stack(&values, 0) * share;
                stats += self.model.backbone.bn_stats() * share;
                self.model.backbone.set_bn_stats(initial);
            }
            features.push(loss.features);
        }
        // The same on every rank by now: each adds its part of one number.
        let squares: Vec<Tensor> =
            parameters.iter().map(Tensor::grad).filter(Tensor::defined).map(|g| g.square().sum(Kind::Float)).collect();
        let gradient = tch::no_grad(|| Tensor::stack(&squares, 0).sum(Kind::Float).sqrt() / ring.world() as f64);
        let result = self.share(ring, &stats, &losses, &gradient, asked)?;
        ensure!(
            result.gradient.is_finite(),
            "step {}: the gradient is not finite; nothing was changed. Lower optimizer.lr, or look at the patches",
            plan.total + 1
        );
        Ok((features, result))
    }

    /// Queries of one lane; none where the lane is empty.
    fn forward(&self, batch: &LaneBatch) -> Result<Outputs> {
        if batch.patches.is_empty() && !self.model.normalises_together() {
            let Widths { dim, backbone, .. } = self.held.banks.widths();
            let none = |width| Tensor::zeros([0, width], (Kind::Float, self.device));
            let ql = (self.params.local != Local::None).then(|| none(dim));
            let keys = self.model.key.as_ref().map(|_| none(dim));
            let dense_keys = self.model.dense.as_ref().map(|_| none(dim));
            return Ok(Outputs { q: none(dim), x: none(backbone), ql, dense_keys, keys });
        }
        let outputs = self.model.forward(&batch.views, true);
        self.model.check_ranks()?;
        Ok(outputs)
    }

    /// Losses of this rank's lane, together with the lanes of the other ranks.
    fn objective(&self, ring: &dyn Collective, plan: &StepPlan, offset: usize, output: &Outputs) -> Result<StepOutput> {
        let ids = plan.together(offset);
        let no_local = self.no_local(&output.q);
        let spatial = ids
            .iter()
            .flatten()
            .map(|&row| self.lattice.neighbours(row, self.params.radius).context("a patch outside the lattice"))
            .collect::<Result<Vec<_>>>()?;
        let Draws { seed, hard_ranks, candidates } = &self.draws;
        let (epoch, step) = (plan.epoch, plan.step);
        let k = if self.params.draws() { usize::try_from(self.params.negatives)? } else { 0 };
        // Drawn for the step, whatever its lanes: the law that each query sees is the same.
        let negatives = match &self.model.key {
            Some(key) => key.queue(),
            None => draws::negatives(*seed, epoch, step, 0, k, self.held.banks.len()),
        };
        let ranks = if self.params.ranks() { hard_ranks.draw(*seed, epoch, step, 0) } else { Vec::new() };
        Ok(objective::step(
            &StepInputs {
                q: &output.q,
                x: &output.x,
                ql: output.ql.as_ref().unwrap_or(&no_local),
                dense_keys: output.dense_keys.as_ref(),
                keys: output.keys.as_ref(),
                ids: &ids,
                spatial: &spatial,
                clusters: &self.clusters,
                pool: &Pool::new(*candidates, &self.held.banks, *seed, epoch, step),
                hard_ranks: &Tensor::from_slice(&ranks).to_device(self.device),
                negatives: &Negatives::Shared(negatives),
                key: HardKey::new(*seed, epoch, step),
                inter_weight: plan.inter_weight,
            },
            &self.held.banks,
            &self.params,
            ring,
        )?)
    }

    /// One small all-reduce: BatchNorm's statistics, the losses, the gradient's length, and what anyone was asked for.
    fn share(
        &self,
        ring: &dyn Collective,
        stats: &Tensor,
        losses: &Tensor,
        gradient: &Tensor,
        asked: Asked,
    ) -> Result<StepResult> {
        let flags = [asked.stop, asked.pause, asked.commit].map(|flag| f32::from(u8::from(flag)));
        let flags = Tensor::from_slice(&flags).to_device(self.device);
        let mut shared = Tensor::cat(&[stats, losses, &gradient.view([1]), &flags], 0);
        ring.all_reduce_sum(&mut shared)?;
        let width = stats.size()[0];
        self.model.backbone.set_bn_stats(&shared.narrow(0, 0, width));
        let tail = shared.narrow(0, width, shared.size()[0] - width).to_device(Device::Cpu);
        let tail: Vec<f32> = Vec::try_from(tail)?;
        let losses = std::array::from_fn(|at| f64::from(tail[at]));
        let gradient = f64::from(tail[LOSSES.len()]);
        let [stop, pause, commit] = [1, 2, 3].map(|at| tail[LOSSES.len() + at] > 0.0);
        Ok(StepResult { losses, gradient, asked: Asked { stop, pause, commit } })
    }
}
