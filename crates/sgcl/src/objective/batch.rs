//! The queries of all ranks, padded to the longest rank so that every collective has equal parts.

use super::params::Local;
use super::{Context, StepError};
use crate::bank::{Bank, BankRows, Banks, Widths};
use crate::collective::Collective;
use tch::{Kind, Tensor};

/// Random negatives of a step, bank rows; the same on every rank.
#[derive(Debug)]
pub enum Negatives {
    /// (B·K): anchor i owns the i-th run of K, local query r of the 4B (corner-major) the r-th run of K/4. For comparison with
    /// the reference.
    PerAnchor(Vec<i64>),
    /// (K) for all queries of the step; local queries take the first K/4.
    Shared(Vec<i64>),
}

/// What this rank has of a batch; shapes as in [`super::StepInputs`].
#[derive(Clone, Copy, Debug)]
pub struct Queries<'a> {
    /// (b, D) unit rows of this rank's global views.
    pub q: &'a Tensor,
    /// (b, Db) unit rows of the backbone.
    pub x: &'a Tensor,
    /// Unit rows of the local queries, as in [`super::StepInputs`].
    pub ql: &'a Tensor,
    /// (b, D) unit rows that the global bank takes, where these are not `q`.
    pub keys: Option<&'a Tensor>,
    /// Bank rows of every rank's anchors, by rank.
    pub ids: &'a [Vec<i64>],
}

/// Features of all ranks' anchors, in the order of `ids`: what banks take. Every rank calls it together.
///
/// # Errors
/// [`StepError::Ring`].
pub fn gather(queries: &Queries<'_>, banks: &Banks, ring: &dyn Collective) -> Result<BankRows, StepError> {
    let local = if banks.widths().local > 0 { Local::Corners } else { Local::None };
    tch::no_grad(|| Ok(Batch::gather(queries, local, banks, ring)?.features()))
}

/// Anchors of all ranks: B = world × longest, some of them padding.
#[derive(Debug)]
pub(super) struct Batch {
    /// (B) i64 bank rows; −1 where padding.
    pub(super) ids: Tensor,
    /// (B, D).
    pub(super) q: Tensor,
    /// (B, Db).
    pub(super) x: Tensor,
    /// By corner, or position, (B, D); none where a method has none.
    pub(super) ql: Vec<Tensor>,
    /// What they are.
    local: Local,
    /// (B, D), where the global bank takes others than `q`.
    keys: Option<Tensor>,
    /// Places of the real anchors.
    pub(super) real: Vec<i64>,
    /// Anchors of this rank that are real.
    pub(super) mine: i64,
}

impl Batch {
    pub(super) fn gather(
        queries: &Queries<'_>,
        local: Local,
        banks: &Banks,
        ring: &dyn Collective,
    ) -> Result<Self, StepError> {
        let Widths { dim: d, backbone: db, .. } = banks.widths();
        let longest = queries.ids.iter().map(Vec::len).max().unwrap_or(0) as i64;
        let mine = queries.q.size()[0];
        let parts = if local == Local::None { 0 } else { local.parts() };
        // Side by side, an anchor's local queries are one row. A bank of width 0 takes nothing.
        let side = match local {
            Local::None => queries.q.narrow(1, 0, 0),
            _ => queries.ql.view([parts, mine, d]).transpose(0, 1).reshape([mine, parts * d]),
        };
        let x = queries.x.narrow(1, 0, db);
        let mut packed = vec![queries.q, &x, &side];
        packed.extend(queries.keys);
        let packed = Tensor::cat(&packed, 1).to_kind(Kind::Float);
        let packed = ring.all_gather(&packed.constant_pad_nd([0, 0, 0, longest - mine]))?;
        let column = |from, width| packed.narrow(1, from, width).contiguous();
        let mut ids = Vec::new();
        for rank in queries.ids {
            ids.extend_from_slice(rank);
            ids.resize(ids.len() + longest as usize - rank.len(), -1);
        }
        let real = (0_i64..).zip(&ids).filter(|(_, id)| **id >= 0).map(|(place, _)| place).collect();
        Ok(Self {
            ids: Tensor::from_slice(&ids).to_device(banks.device()),
            q: column(0, d),
            x: column(d, db),
            ql: (0..parts).map(|part| column(d + db + part * d, d)).collect(),
            local,
            keys: queries.keys.map(|_| column(d + db + parts * d, d)),
            real,
            mine,
        })
    }

    /// Anchors, padding among them.
    pub(super) fn len(&self) -> i64 {
        self.q.size()[0]
    }

    /// Lists of the real anchors, spread over all places, padded to at least `width`: rows, and which of them count.
    pub(super) fn spread(&self, lists: &[Vec<i64>], width: usize) -> (Tensor, Tensor) {
        let width = lists.iter().map(Vec::len).max().unwrap_or(0).max(width);
        let mut rows = vec![0_i64; self.len() as usize * width];
        let mut valid = vec![false; rows.len()];
        for (&place, list) in self.real.iter().zip(lists) {
            let at = place as usize * width;
            rows[at..][..list.len()].copy_from_slice(list);
            valid[at..][..list.len()].fill(true);
        }
        let shape = [self.len(), width as i64];
        let device = self.q.device();
        (
            Tensor::from_slice(&rows).view(shape).to_device(device),
            Tensor::from_slice(&valid).view(shape).to_device(device),
        )
    }

    /// Rows of real anchors alone.
    pub(super) fn real_rows(&self, all: &Tensor) -> Tensor {
        all.index_select(0, &Tensor::from_slice(&self.real).to_device(all.device()))
    }

    pub(super) fn features(&self) -> BankRows {
        BankRows {
            global: self.real_rows(self.keys.as_ref().unwrap_or(&self.q)),
            backbone: self.real_rows(&self.x),
            corners: [0, 1, 2, 3].map(|corner| match self.local {
                Local::Corners => self.real_rows(&self.ql[corner]),
                Local::None | Local::Dense { .. } => self.real_rows(&self.q.narrow(1, 0, 0)),
            }),
        }
    }

    /// Rows of the anchors themselves, zero where another rank owns them: (B, D).
    pub(super) fn own(&self, bank: Bank, cx: &Context<'_>) -> Tensor {
        let (slots, owned) = cx.owned(&self.ids);
        cx.banks.at(bank, &slots) * owned.unsqueeze(1)
    }
}

impl Context<'_> {
    /// Slots of rows that this rank owns; padding (−1) is nobody's.
    pub(super) fn owned(&self, rows: &Tensor) -> (Tensor, Tensor) {
        let (slots, owned) = self.banks.owned_slots(&rows.clamp_min(0));
        let owned = owned.logical_and(&rows.ge(0));
        (slots * &owned, owned)
    }
}
