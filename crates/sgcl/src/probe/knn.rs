//! Weighted k-nearest-neighbour classification by cosine, as Wu et al. 2018 (instance discrimination) do it.

use tch::{Kind, Tensor};

use super::{Prediction, ProbeError, Split, labelled, numbers, pick, predict, take};
use crate::projector::l2_normalize;

/// Queries scored at once: bounds the similarity matrix.
const CHUNK: i64 = 1_024;

/// Classifies each test row by its `k` nearest training rows, each voting exp(cosine / temperature); of equal classes the
/// first wins. Probabilities are shares of the votes. Features (n, d) need not be normalised. Rows with a negative label are left out.
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
) -> Result<Prediction, ProbeError> {
    let split = labelled(features, labels, classes, split)?;
    if k == 0 || k > split.train.len() || temperature <= 0.0 {
        let train = split.train.len();
        return Err(ProbeError::Invalid(format!(
            "k is {k} and the temperature {temperature}: k must be 1 to the {train} training patches, the temperature above 0"
        )));
    }
    let train_labels = Tensor::from_slice(&pick(labels, &split.train)).to_device(features.device());
    let probabilities = tch::no_grad(|| {
        let unit = |half: &[usize]| l2_normalize(&take(features, half).to_kind(Kind::Float));
        let (bank, queries) = (unit(&split.train), unit(&split.test));
        let mut probabilities = Vec::with_capacity(split.test.len() * classes);
        for queries in queries.split(CHUNK, 0) {
            let (similar, nearest) = queries.matmul(&bank.tr()).topk(k as i64, 1, true, true);
            // Relative to the nearest: the same winner, no overflow at small temperatures.
            let weight = ((&similar - similar.narrow(1, 0, 1)) / temperature).exp();
            let voted = train_labels.index_select(0, &nearest.flatten(0, -1)).view_as(&nearest);
            let mut votes = Tensor::zeros([queries.size()[0], classes as i64], (Kind::Float, features.device()));
            let _ = votes.scatter_add_(1, &voted, &weight);
            // In float64, so that votes which differ are not rounded to one probability.
            let votes = votes.to_kind(Kind::Double);
            let share = &votes / votes.sum_dim_intlist([1_i64].as_slice(), true, Kind::Double);
            probabilities.extend(numbers(&share)?);
        }
        Ok::<_, ProbeError>(probabilities)
    })?;
    Ok(predict(split.test, labels, probabilities, classes))
}
