//! Neighbours of local aggregation: an anchor's nearest rows, parted into those that its clusters hold too and the rest.

use super::batch::Batch;
use super::positives::{Positives, RowLists, labels_of, nearest, unite};
use super::{Context, Found, StepError, StepInputs};
use crate::bank::Bank;

/// The background B of each anchor: C ∩ B as its positives, the rest of B where hard negatives would be. All rows of a sample stand for
/// equally many rows of the bank, which does not change a ratio of their sums: each counts as one.
pub(super) fn find(batch: &Batch, inputs: &StepInputs<'_>, cx: &Context<'_>) -> Result<Found, StepError> {
    let (own, owned) = cx.owned(&batch.ids.unsqueeze(1));
    let labels = labels_of(&own, &owned, inputs, cx)?;
    let scores = cx.pool.scores(Bank::Global, &batch.q, cx);
    let (near, valid) = nearest(&scores, cx.pool.share(cx.params.nearest), cx)?;
    let rows = cx.pool.slots(&near);
    let agree = inputs.clusters.take(&rows).eq_tensor(&labels);
    let close = RowLists { rows: rows.shallow_clone(), valid: valid.logical_and(&agree) };
    let rest = RowLists { rows, valid: valid.logical_and(&agree.logical_not()) };
    let spatial = RowLists::none(batch);
    let (union, weight) = unite(&spatial, &close, cx);
    let weight = weight.gt(0.0).to_kind(weight.kind());
    Ok(Found { positives: Positives { spatial, semantic: close, union, weight }, hard: rest })
}
