//! What a commit's bank says about each patch: its features, and the k-means clusters it fell into.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use sgcl_patchset::Store;
use sgcl_runstore::checkpoint::read_tensors;
use sgcl_runstore::{Commit, Dtype, PartKind, Tensor};

/// Rows read at most: what one report can search in seconds and hold in memory.
const MAX_ROWS: usize = 200_000;

/// Rows of a bank, L2-normalised, and their clusters.
pub(crate) struct Bank {
    /// Patch id of each row.
    pub(crate) ids: Vec<u32>,
    /// Which bank the features are of: `backbone` or `global`.
    pub(crate) name: &'static str,
    width: usize,
    /// Unit vectors, `ids.len()` × `width`.
    rows: Vec<f32>,
    /// Cluster of each patch in the first clustering.
    pub(crate) clusters: HashMap<u32, i64>,
    /// Whether parts were left out.
    pub(crate) partial: bool,
}

impl Bank {
    /// Reads the bank parts of `commit`, up to [`MAX_ROWS`] rows. `None` where it has none.
    ///
    /// # Errors
    /// A part is missing, damaged or not a bank.
    pub(crate) async fn read(run: &Store, commit: &Commit) -> Result<Option<Self>> {
        let mut bank: Option<Self> = None;
        for part in commit.parts(PartKind::Bank) {
            if bank.as_ref().is_some_and(|bank| bank.ids.len() >= MAX_ROWS) {
                bank.iter_mut().for_each(|bank| bank.partial = true);
                break;
            }
            let tensors = read_tensors(run, part).await?;
            let find = |name: &str| tensors.iter().find(|tensor| tensor.name == name);
            let features = ["backbone", "global"].into_iter().find_map(|name| Some((name, find(name)?)));
            let (Some(ids), Some((name, features))) = (find("ids"), features) else { continue };
            ensure!(
                features.dtype == Dtype::F32 && features.shape.len() == 2,
                "{}: {name} is not a table of f32",
                part.path
            );
            let (count, width) = (features.shape[0], features.shape[1]);
            let ids: Vec<u32> = integers(ids)?.into_iter().map(u32::try_from).collect::<Result<_, _>>()?;
            ensure!(ids.len() == count, "{}: {} ids for {count} rows", part.path, ids.len());
            let bank = bank.get_or_insert_with(|| Self {
                ids: Vec::new(),
                name,
                width,
                rows: Vec::new(),
                clusters: HashMap::new(),
                partial: false,
            });
            ensure!(bank.width == width, "{}: rows of width {width}, not {}", part.path, bank.width);
            bank.rows.extend(features.data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
            if let Some(labels) = find("labels").filter(|labels| labels.shape.first() == Some(&count)) {
                let runs: usize = labels.shape[1..].iter().product();
                let labels = integers(labels)?;
                bank.clusters.extend(ids.iter().copied().zip(labels.iter().copied().step_by(runs.max(1))));
            }
            bank.ids.extend(ids);
        }
        for row in bank.iter_mut().flat_map(|bank| bank.rows.chunks_exact_mut(bank.width.max(1))) {
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
            row.iter_mut().for_each(|x| *x /= norm);
        }
        Ok(bank)
    }

    /// The `count` patches whose features are nearest to those of row `query`, with their cosines; those that `skip` names are passed over.
    pub(crate) fn nearest(&self, query: usize, count: usize, skip: impl Fn(u32) -> bool) -> Vec<(u32, f32)> {
        let row = |at: usize| &self.rows[at * self.width..(at + 1) * self.width];
        let from = row(query);
        let mut scored: Vec<(u32, f32)> = (0..self.ids.len())
            .filter(|&at| at != query && !skip(self.ids[at]))
            .map(|at| (self.ids[at], row(at).iter().zip(from).map(|(a, b)| a * b).sum()))
            .collect();
        scored.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        scored.truncate(count);
        scored
    }
}

fn integers(tensor: &Tensor) -> Result<Vec<i64>> {
    ensure!(tensor.dtype == Dtype::I64, "tensor {} is not I64", tensor.name);
    Ok(tensor
        .data
        .chunks_exact(8)
        .map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
        .collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn nearest_rows_come_by_falling_cosine_without_the_query_and_the_skipped() {
        let bank = Bank {
            ids: vec![10, 11, 12, 13],
            name: "global",
            width: 2,
            rows: vec![1.0, 0.0, 0.8, 0.6, 0.0, 1.0, 0.6, 0.8],
            clusters: HashMap::new(),
            partial: false,
        };
        let found: Vec<u32> = bank.nearest(0, 5, |id| id == 12).into_iter().map(|(id, _)| id).collect();
        assert_eq!(found, [11, 13]);
    }
}
