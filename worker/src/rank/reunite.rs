//! The beginning of a generation: ranks agree on who holds what of the last one's state, and everyone gets what it lacks from those
//! who have it. Only what nobody holds any more comes from a commit.
//!
//! Every rank follows the same steps, decided from what all of them told: header ▸ position ▸ the last step's bank update ▸ weights
//! ▸ bank shards. A rank that joins holds nothing and needs no special case.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use roaring::RoaringBitmap;
use sgcl::bank::{BankRows, Held, ShardPlan, Widths, lost};
use sgcl::collective::Solo;
use sgcl_proto::v1;
use sgcl_runstore::config::BankStart;
use sgcl_runstore::{Commits, Ledger};
use sgcl_telemetry::fact;
use tch::{Device, Kind, Tensor};
use tracing::info_span;

use super::ring::Ring;
use super::setup;
use super::step::Update;
use super::train::{Place, Position, Trainer};
use crate::measures;
use crate::session::Session;

/// Largest record that a rank takes from another.
const MAX_RECORD_BYTES: i64 = 1 << 30;

/// What a rank tells of itself.
#[derive(Clone, Copy)]
struct Header {
    standing: bool,
    step: u64,
    epoch: u32,
    /// Epoch of its k-means labels.
    labelled: Option<u32>,
}

impl Header {
    fn numbers(self) -> [i64; 4] {
        let labelled = self.labelled.map_or(-1, i64::from);
        [i64::from(self.standing), self.step as i64, i64::from(self.epoch), labelled]
    }

    fn of(numbers: &[i64]) -> Option<Self> {
        let &[standing, step, epoch, labelled] = numbers else { return None };
        Some(Self {
            standing: standing != 0,
            step: u64::try_from(step).ok()?,
            epoch: u32::try_from(epoch).ok()?,
            labelled: u32::try_from(labelled).ok(),
        })
    }
}

/// What an optimiser's step changes.
struct Weights {
    model: BTreeMap<String, Tensor>,
    momenta: Vec<(String, Tensor)>,
}

impl Trainer {
    /// Takes this rank's place in a generation and returns once it holds what it needs there. An error of the ring leaves it with the
    /// state it came with.
    pub(crate) fn join(&mut self, session: &mut Session, assignment: &v1::Assignment) -> Result<()> {
        let nodes: Vec<usize> = assignment.nodes.iter().map(|&node| node as usize).collect();
        self.place = Place { rank: assignment.rank as usize, generation: assignment.generation, nodes };
        let world = self.place.world();
        fact("rank", assignment.rank);
        fact("generation", assignment.generation);
        measures::RANK.store(assignment.rank.into(), Ordering::Relaxed);
        measures::GENERATION.store(assignment.generation, Ordering::Relaxed);
        let _span =
            info_span!("rendezvous", generation = assignment.generation, rank = assignment.rank, world).entered();
        ensure!(self.place.rank < world, "rank {} is not in a world of {world}", self.place.rank);
        self.spec.config.check_against(self.subset.len() as u64, world)?;
        let began = Instant::now();
        self.leave();
        let group = setup::ring(session, &self.place, &self.address, self.learner.device, &self.spec.config)?;
        self.learner.draws = setup::draws(&self.spec.config, &self.learner.params, self.layout.n, world)?;
        self.ring = match &group {
            Some(group) => Box::new(Ring(Arc::clone(group))),
            None => Box::new(Solo),
        };
        let ringed = began.elapsed();
        let from_commit = self.reunite(session)?;
        let reunited = began.elapsed();
        if self.spec.config.backbone.sync_norm {
            self.learner.model.normalise_with(group.clone());
        }
        self.learner.reducer = group.map(|group| setup::reducer(&self.learner.model, &group)).transpose()?;
        session.reunited(self.position.step, from_commit);
        measures::RENDEZVOUS.add(began.elapsed());
        tracing::info!(
            generation = self.place.generation,
            world,
            step = self.position.step,
            ring = ringed.as_secs_f64(),
            state = (reunited - ringed).as_secs_f64(),
            reducer = (began.elapsed() - reunited).as_secs_f64(),
            "joined"
        );
        Ok(())
    }

    /// The commit that was gone back to, where memory did not hold everything.
    fn reunite(&mut self, session: &mut Session) -> Result<Option<u64>> {
        let headers = self.headers()?;
        let lead = (0..headers.len())
            .filter(|&rank| headers[rank].standing)
            .max_by_key(|&rank| (headers[rank].step, headers[rank].epoch, std::cmp::Reverse(rank)));
        let Some(lead) = lead else { return self.begin(session) };
        let front = headers[lead];
        // One step ends for all or for some; whoever is further behind was left by an earlier generation.
        let current = |header: &Header| header.standing && header.step + 1 >= front.step;
        self.standing &= current(&headers[self.place.rank]);

        let holders = Held::holders(&self.sources(), self.layout, self.ring.as_ref())?;
        let missing = lost(&holders);
        if !missing.is_empty() {
            tracing::warn!(
                shards = missing.len(),
                "no copy of some bank rows is left: going back to the newest commit"
            );
            return self.begin(session);
        }
        let position = self.share_position(lead)?;
        let late = |header: &Header| current(header) && header.step < front.step;
        let updates = if headers.iter().any(late) { self.share_updates(lead)? } else { Vec::new() };
        let behind = |header: &Header| !header.standing || header.step < front.step;
        let weights = if headers.iter().any(behind) { Some(self.share_weights(lead)?) } else { None };
        // Nothing waits for another rank in here: this rank stands where it stood, or where the furthest does.
        if late(&headers[self.place.rank]) {
            self.learner.last = updates;
            self.learner.apply_last()?;
        }
        if let (Some(weights), true) = (weights, behind(&headers[self.place.rank])) {
            self.learner.model.load_state(&weights.model, true)?;
            self.learner.sgd.load_state(weights.momenta)?;
        }
        self.position = position;
        if !self.standing {
            self.labelled = None;
        }
        let labelled = headers.iter().filter(|header| current(header)).all(|h| h.labelled == Some(self.position.epoch));
        self.move_shards(&holders, &self.staying(&[]))?;
        self.standing = true;
        self.label(labelled);
        // Newcomers know of no commit: whether a checkpoint is due all ranks must decide alike.
        self.committed = None;
        Ok(None)
    }

    fn headers(&self) -> Result<Vec<Header>> {
        let mine = Header {
            standing: self.standing,
            step: self.position.step,
            epoch: self.position.epoch,
            labelled: self.labelled,
        };
        let mine = Tensor::from_slice(&mine.numbers()).to_device(self.learner.device).unsqueeze(0);
        let all: Vec<i64> = Vec::try_from(self.ring.all_gather(&mine)?.to_device(Device::Cpu).view([-1]))?;
        all.chunks_exact(4).map(|numbers| Header::of(numbers).context("a rank told nonsense of itself")).collect()
    }

    /// Bank rows that this rank can give: two sets after a move of which nobody knows whether it ended everywhere.
    fn sources(&self) -> Vec<&Held> {
        if self.standing { self.before_move.iter().chain([&self.learner.held]).collect() } else { Vec::new() }
    }

    /// The node of each rank, without those that leave.
    fn staying(&self, leaving: &[u32]) -> Vec<Option<usize>> {
        (0_u32..).zip(&self.place.nodes).map(|(rank, &node)| (!leaving.contains(&rank)).then_some(node)).collect()
    }

    /// Gives each rank its shards under the plan for `nodes`. Broken off, both the old and the new rows are kept.
    fn move_shards(&mut self, holders: &[Vec<usize>], nodes: &[Option<usize>]) -> Result<()> {
        let plan = ShardPlan::settled(holders, nodes, self.spec.config.bank.replicas > 0);
        let moved = Held::moved(&self.sources(), holders, &plan, self.layout, self.ring.as_ref())?;
        let old = std::mem::replace(&mut self.learner.held, moved);
        // The first move's rows are older than any: they go on being the ones to fall back on.
        if self.before_move.is_none() && self.standing {
            self.before_move = Some(old);
        }
        self.standing = true;
        self.ring.barrier()?;
        self.before_move = None;
        Ok(())
    }

    /// Labels came with the rows, or are to be found anew.
    fn label(&mut self, valid: bool) {
        self.labelled = valid.then_some(self.position.epoch);
        let labels = self.learner.held.labels.shallow_clone();
        self.learner.label(labels);
    }

    /// What the ranks that leave hold alone goes to those who stay, over the ring that still stands.
    pub(crate) fn hand_over(&mut self, leaving: &[u32]) -> Result<()> {
        if leaving.is_empty() || leaving.len() >= self.place.world() {
            return Ok(());
        }
        let holders = Held::holders(&self.sources(), self.layout, self.ring.as_ref())?;
        let goes = |rank: &usize| u32::try_from(*rank).is_ok_and(|rank| leaving.contains(&rank));
        if !holders.iter().any(|held| !held.is_empty() && held.iter().all(goes)) {
            return Ok(());
        }
        self.move_shards(&holders, &self.staying(leaving))?;
        self.label(self.labelled == Some(self.position.epoch));
        Ok(())
    }

    /// From the newest commit, or from the very beginning.
    fn begin(&mut self, session: &mut Session) -> Result<Option<u64>> {
        let mut seq = Tensor::from_slice(&[-1_i64]).to_device(self.learner.device);
        if self.place.rank == 0
            && let Some(newest) = session.newest_commit()?
        {
            seq = Tensor::from_slice(&[i64::try_from(newest)?]).to_device(self.learner.device);
        }
        self.ring.broadcast(&mut seq, 0)?;
        let seq = u64::try_from(i64::try_from(seq)?).ok();
        if let Some(seq) = seq {
            self.empty();
            let mut wait = self.wait(session, &self.run, 0);
            let commit = wait.block_on(&self.runtime, Commits::new(&self.run).read(seq))??;
            let (run, runtime) = (self.run.clone(), self.runtime.clone());
            wait.block_on(&runtime, self.learner.restore(&run, &commit, &self.subset))??;
            self.position = wait.block_on(&runtime, Position::of(&run, &commit))??;
            // An epoch that ended has no more use for its clusters.
            self.labelled = (!self.position.is_over(&self.subset.unused())).then_some(self.position.epoch);
            self.committed = Some((commit.progress.step, seq, commit.progress.done));
            tracing::info!(commit = seq, step = self.position.step, "resumed");
        } else {
            self.fresh()?;
            if self.spec.config.bank.start == BankStart::Features {
                self.fill(session)?;
            }
        }
        self.standing = true;
        Ok(seq)
    }

    /// Lets go of all state and holds random bank rows under a plan for this world.
    fn empty(&mut self) {
        self.standing = false;
        self.before_move = None;
        self.labelled = None;
        let plan = ShardPlan::for_rows(self.layout.n, &self.place.nodes, self.spec.config.bank.replicas > 0);
        self.learner.held = self.layout.random(self.spec.config.seed, plan, self.place.rank);
    }

    /// The state that a run begins with.
    pub(crate) fn fresh(&mut self) -> Result<()> {
        self.empty();
        setup::first_weights(&self.learner.model, &self.spec.config, self.layout.n)?;
        self.learner.sgd.load_state([])?;
        self.learner.last.clear();
        self.label(false);
        self.position = Position::default();
        Ok(())
    }

    fn share_position(&self, lead: usize) -> Result<Position> {
        let mine = if self.place.rank == lead { self.position.to_bytes()? } else { Default::default() };
        let [record, base, used] = mine;
        let record = self.share_bytes(&record, lead)?;
        let base = self.share_bytes(&base, lead)?;
        let used = self.share_bytes(&used, lead)?;
        Position::from_bytes([&record, &base, &used])
    }

    /// The last step's bank updates, for those that have not finished it.
    fn share_updates(&self, lead: usize) -> Result<Vec<Update>> {
        let leads = self.place.rank == lead;
        let lanes = self.share_number(self.learner.last.len() as i64, lead)?;
        let Widths { dim, backbone, local } = self.layout.widths;
        let mut updates = Vec::new();
        for lane in 0..usize::try_from(lanes)? {
            let mine = if leads { self.learner.last.get(lane) } else { None };
            let rows = self.share_number(mine.map_or(0, |update| update.rows.len() as i64), lead)?;
            let ids = mine.map(|update| Tensor::from_slice(&update.rows).to_device(self.learner.device));
            let ids = self.share_tensor(ids, &[rows], Kind::Int64, lead)?;
            let features = |pick: fn(&BankRows) -> &Tensor, width: i64| {
                let mine = mine.map(|update| pick(&update.features).detach().to_kind(Kind::Float));
                self.share_tensor(mine, &[rows, width], Kind::Float, lead)
            };
            let features = BankRows {
                global: features(|rows| &rows.global, dim)?,
                backbone: features(|rows| &rows.backbone, backbone)?,
                corners: [
                    features(|rows| &rows.corners[0], local)?,
                    features(|rows| &rows.corners[1], local)?,
                    features(|rows| &rows.corners[2], local)?,
                    features(|rows| &rows.corners[3], local)?,
                ],
            };
            updates.push(Update { rows: Vec::try_from(ids.to_device(Device::Cpu))?, features });
        }
        Ok(updates)
    }

    /// Weights, statistics and momenta of the furthest rank, in one message for each number format.
    fn share_weights(&self, lead: usize) -> Result<Weights> {
        let leads = self.place.rank == lead;
        let model = self.learner.model.state();
        let momenta = self.learner.sgd.state();
        let count = self.share_number(momenta.len() as i64, lead)?;
        let names: Vec<(String, Vec<i64>)> =
            self.learner.model.parameters().into_iter().map(|(name, p)| (name, p.size())).collect();
        ensure!(count == 0 || count as usize == names.len(), "{count} momenta for {} parameters", names.len());
        let mut received = BTreeMap::new();
        for kind in [Kind::Float, Kind::Int64] {
            let of_kind: Vec<&(String, Tensor)> = model.iter().filter(|(_, t)| t.kind() == kind).collect();
            let total: i64 = of_kind.iter().map(|(_, t)| t.numel() as i64).sum();
            let flat: Vec<Tensor> = of_kind.iter().map(|(_, t)| t.detach().reshape([-1])).collect();
            let mine = leads.then(|| Tensor::cat(&flat, 0));
            let all = self.share_tensor(mine, &[total], kind, lead)?;
            let mut at = 0;
            for (name, tensor) in of_kind {
                let length = tensor.numel() as i64;
                received.insert(name.clone(), all.narrow(0, at, length).view(tensor.size().as_slice()));
                at += length;
            }
        }
        ensure!(received.len() == model.len(), "the model holds tensors of a kind that is never shared");
        let mut moved = Vec::new();
        if count > 0 {
            let total: i64 = names.iter().map(|(_, size)| size.iter().product::<i64>()).sum();
            let by_name: BTreeMap<String, Tensor> = momenta.into_iter().collect();
            let flat: Vec<Tensor> =
                names.iter().filter_map(|(name, _)| by_name.get(name)).map(|m| m.reshape([-1])).collect();
            let mine = leads.then(|| Tensor::cat(&flat, 0));
            let all = self.share_tensor(mine, &[total], Kind::Float, lead)?;
            let mut at = 0;
            for (name, size) in names {
                let length: i64 = size.iter().product();
                moved.push((name, all.narrow(0, at, length).view(size.as_slice())));
                at += length;
            }
        }
        Ok(Weights { model: received, momenta: moved })
    }

    fn share_number(&self, mine: i64, lead: usize) -> Result<i64> {
        let mut number = Tensor::from_slice(&[mine]).to_device(self.learner.device);
        self.ring.broadcast(&mut number, lead)?;
        Ok(i64::try_from(number)?)
    }

    fn share_tensor(&self, mine: Option<Tensor>, shape: &[i64], kind: Kind, lead: usize) -> Result<Tensor> {
        let mut tensor = match mine {
            // Counters lie in host memory.
            Some(tensor) => tensor.to_device(self.learner.device).contiguous(),
            None => Tensor::zeros(shape, (kind, self.learner.device)),
        };
        self.ring.broadcast(&mut tensor, lead)?;
        Ok(tensor)
    }

    fn share_bytes(&self, mine: &[u8], lead: usize) -> Result<Vec<u8>> {
        let length = self.share_number(mine.len() as i64, lead)?;
        ensure!((0..=MAX_RECORD_BYTES).contains(&length), "a record of {length} bytes is too long");
        let mine = (self.place.rank == lead).then(|| Tensor::from_slice(mine).to_device(self.learner.device));
        let bytes = self.share_tensor(mine, &[length], Kind::Uint8, lead)?;
        Ok(Vec::try_from(bytes.to_device(Device::Cpu))?)
    }
}

/// A bitmap as bytes, and back.
pub(crate) fn bitmap_bytes(bitmap: &RoaringBitmap) -> Result<Vec<u8>> {
    Ok(Ledger::from(bitmap.clone()).to_bytes()?.to_vec())
}

pub(crate) fn bitmap_of(bytes: &[u8]) -> Result<RoaringBitmap> {
    Ok(Ledger::from_bytes(bytes, "another rank's ledger")?.bitmap().clone())
}
