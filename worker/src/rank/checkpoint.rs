//! A learner to parts and back. Rank 0 writes weights and optimiser, every rank the bank shards it owns; k-means labels go with
//! the bank rows, since a run resumed in mid-epoch must find its epoch's clusters again.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use sgcl::bank::{BankRows, Widths};
use sgcl_patchset::{Store, Subset};
use sgcl_runstore::checkpoint::read_tensors;
use sgcl_runstore::{Commit, PartKind, PartRef, PartWriter, Tensor as Stored};
use tch::{Kind, Tensor};

use super::step::Learner;
use super::tensors::{from_stored, to_stored};

const BANKS: [&str; 6] = ["global", "backbone", "tl", "tr", "bl", "br"];

impl Learner {
    /// Copies what `rank` writes into host memory. Bank rows are stored under their patch ids: another world, or a run
    /// on more slides, can tell them apart.
    pub(crate) fn snapshot(&self, rank: usize, subset: &Subset) -> Result<Vec<(PartKind, String, Vec<Stored>)>> {
        let mut parts = Vec::new();
        let all = |tensors: Vec<(String, Tensor)>| {
            tensors.into_iter().map(|(name, tensor)| to_stored(name, &tensor)).collect::<Result<Vec<_>>>()
        };
        if rank == 0 {
            parts.push((PartKind::Model, "model".into(), all(self.model.state())?));
            parts.push((PartKind::Optimizer, "optimizer".into(), all(self.sgd.state())?));
        }
        let mine = self.held.banks.owned_rows();
        let BankRows { global, backbone, corners: [tl, tr, bl, br] } = self.held.banks.rows(&mine)?;
        let ids: Vec<i64> = mine
            .iter()
            .map(|&row| subset.id_of(u32::try_from(row)?).map(i64::from).context("a bank row without a patch"))
            .collect::<Result<_>>()?;
        // Owned rows are the first slots, in this order.
        let labels = self.held.labels.narrow(1, 0, self.held.banks.owned());
        let mut bank =
            vec![to_stored("ids", &Tensor::from_slice(&ids))?, to_stored("labels", &labels.tr().contiguous())?];
        for (name, tensor) in BANKS.into_iter().zip([global, backbone, tl, tr, bl, br]) {
            // A method without a bank keeps it at width 0.
            if tensor.size()[1] > 0 {
                bank.push(to_stored(name, &tensor)?);
            }
        }
        parts.push((PartKind::Bank, format!("bank-{rank}"), bank));
        Ok(parts)
    }

    /// Takes everything from a commit, whatever world wrote it. Bank rows go where they are held here.
    pub(crate) async fn restore(&mut self, run: &Store, commit: &Commit, subset: &Subset) -> Result<()> {
        for part in commit.parts(PartKind::Model) {
            let state: BTreeMap<String, Tensor> = read(run, part).await?.into_iter().collect();
            self.model.load_state(&state, true)?;
        }
        for part in commit.parts(PartKind::Optimizer) {
            self.sgd.load_state(read(run, part).await?)?;
        }
        let mut labels = self.held.labels.zeros_like();
        let mut restored = 0;
        for part in commit.parts(PartKind::Bank) {
            let mut tensors: BTreeMap<String, Tensor> = read(run, part).await?.into_iter().collect();
            let mut take = |name: &str| {
                tensors
                    .remove(name)
                    .map(|t| t.to_device(self.device))
                    .with_context(|| format!("{}: no tensor {name}", part.path))
            };
            let ids: Vec<i64> = Vec::try_from(take("ids")?.to_device(tch::Device::Cpu))?;
            let rows: Vec<i64> = ids
                .iter()
                .map(|&id| {
                    let row = u32::try_from(id).ok().and_then(|id| subset.row_of(id));
                    row.map(i64::from).with_context(|| format!("{}: patch {id} is not in this run's data", part.path))
                })
                .collect::<Result<_>>()?;
            let found = take("labels")?;
            ensure!(found.size() == [rows.len() as i64, labels.size()[0]], "{}: labels of another k-means", part.path);
            // Rows that other ranks hold are theirs to take.
            let (at, slots): (Vec<i64>, Vec<i64>) =
                (0_i64..).zip(&rows).filter_map(|(at, &row)| Some((at, self.held.banks.slot(row)?))).unzip();
            let [at, slots] = [at, slots].map(|values| Tensor::from_slice(&values).to_device(self.device));
            let _ = labels.index_copy_(1, &slots, &found.to_kind(Kind::Int64).index_select(0, &at).tr());
            let mut bank = |name: &str, width: i64| {
                if width == 0 {
                    Ok(Tensor::zeros([rows.len() as i64, 0], (Kind::Float, self.device)))
                } else {
                    take(name)
                }
            };
            let Widths { dim, backbone, local } = self.held.banks.widths();
            let bank = BankRows {
                global: bank("global", dim)?,
                backbone: bank("backbone", backbone)?,
                corners: [bank("tl", local)?, bank("tr", local)?, bank("bl", local)?, bank("br", local)?],
            };
            self.held.banks.put(&rows, &bank)?;
            restored += rows.len();
        }
        ensure!(restored == subset.len(), "commit {} holds {restored} of {} bank rows", commit.seq, subset.len());
        self.label(labels);
        self.last.clear();
        Ok(())
    }
}

async fn read(run: &Store, part: &PartRef) -> Result<Vec<(String, Tensor)>> {
    read_tensors(run, part).await?.iter().map(|stored| Ok((stored.name.clone(), from_stored(stored)?))).collect()
}

/// Writes parts in order.
pub(crate) async fn write(writer: &PartWriter, parts: Vec<(PartKind, String, Vec<Stored>)>) -> Result<Vec<PartRef>> {
    let mut written = Vec::with_capacity(parts.len());
    for (kind, name, tensors) in parts {
        written.push(writer.put_tensors(kind, &name, &tensors).await?);
    }
    Ok(written)
}
