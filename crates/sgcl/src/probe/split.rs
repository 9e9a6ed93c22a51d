//! Which slides are learnt from and which are tested on.

use std::collections::BTreeSet;

use rand::seq::SliceRandom;
use sgcl_draw::{Purpose, rng};

use super::ProbeError;

/// Rows to learn from and rows to test on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// Rows to learn from.
    pub train: Vec<usize>,
    /// Rows to test on.
    pub test: Vec<usize>,
}

/// Splits labelled rows (label ≥ 0) so that no slide is on both sides: `test_share` of the slides, rounded, at least one on
/// either side, drawn for (seed, trial).
///
/// # Errors
/// [`ProbeError::Length`]; [`ProbeError::Slides`] with fewer than two labelled slides; [`ProbeError::Invalid`] for a share
/// outside 0 to 1.
pub fn split_by_slide(
    labels: &[i64],
    slides: &[u32],
    test_share: f64,
    seed: u64,
    trial: u64,
) -> Result<Split, ProbeError> {
    if labels.len() != slides.len() {
        return Err(ProbeError::Length { features: labels.len(), other: slides.len(), what: "slides" });
    }
    if !(0.0..=1.0).contains(&test_share) {
        return Err(ProbeError::Invalid(format!("the share of test slides is {test_share}, it must be 0 to 1")));
    }
    let used: BTreeSet<u32> =
        labels.iter().zip(slides).filter(|(label, _)| **label >= 0).map(|(_, &slide)| slide).collect();
    if used.len() < 2 {
        return Err(ProbeError::Slides { slides: used.len() });
    }
    let mut order: Vec<u32> = used.into_iter().collect();
    order.shuffle(&mut rng(seed, Purpose::Probe, 0, trial));
    let count = ((test_share * order.len() as f64).round() as usize).clamp(1, order.len() - 1);
    let test: BTreeSet<u32> = order[..count].iter().copied().collect();
    let (test, train) = (0..labels.len()).filter(|&row| labels[row] >= 0).partition(|&row| test.contains(&slides[row]));
    Ok(Split { train, test })
}
