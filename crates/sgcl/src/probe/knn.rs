//! Weighted k-nearest-neighbour classification by cosine, as Wu et al. 2018 (instance discrimination) do it.

use tch::{Kind, Tensor};

use super::{ProbeError, Scores, Split, labelled, pick, rows};
use crate::projector::l2_normalize;

/// Queries scored at once: bounds the similarity matrix.
const CHUNK: i64 = 1_024;

/// Classifies each test row by its `k` nearest training rows, each voting exp(cosine / temperature); of equal classes the
/// first wins. Features (n, d) need not be normalised. Rows with a negative label are left out.
///
/// # Errors
/// [`ProbeError`] where columns, labels or `k` do not fit.
pub fn knn(
    features: &Tensor,
    labels: &[i64],
    classes: usize,
    split: &Split,
    k: usize,
    temperature: f64,
) -> Result<Scores, ProbeError> {
    let split = labelled(features, labels, classes, split)?;
    if k == 0 || k > split.train.len() || temperature <= 0.0 {
        let train = split.train.len();
        return Err(ProbeError::Invalid(format!(
            "k is {k} and the temperature {temperature}: k must be 1 to the {train} training patches, the temperature above 0"
        )));
    }
    let truth = pick(labels, &split.test);
    let train_labels = Tensor::from_slice(&pick(labels, &split.train)).to_device(features.device());
    let predicted = tch::no_grad(|| {
        let unit = |half: &[usize]| l2_normalize(&rows(features, half).to_kind(Kind::Float));
        let (bank, queries) = (unit(&split.train), unit(&split.test));
        let mut predicted = Vec::with_capacity(split.test.len());
        for queries in queries.split(CHUNK, 0) {
            let (similar, nearest) = queries.matmul(&bank.tr()).topk(k as i64, 1, true, true);
            // Relative to the nearest: the same winner, no overflow at small temperatures.
            let weight = ((&similar - similar.narrow(1, 0, 1)) / temperature).exp();
            let voted = train_labels.index_select(0, &nearest.flatten(0, -1)).view_as(&nearest);
            let mut votes = Tensor::zeros([queries.size()[0], classes as i64], (Kind::Float, features.device()));
            let _ = votes.scatter_add_(1, &voted, &weight);
            let winners = votes.argmax(1, false).to_device(tch::Device::Cpu);
            predicted.extend(winners.iter::<i64>().map_err(|error| ProbeError::Invalid(error.to_string()))?);
        }
        Ok(predicted)
    })?;
    Ok(Scores::new(&truth, &predicted, &pick(labels, &split.train), classes))
}
