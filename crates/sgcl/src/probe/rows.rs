//! Which rows are learnt from, and in what order: all drawn from a seed.

use rand::RngCore as _;
use rand::seq::SliceRandom as _;
use sgcl_draw::{Purpose, rng};

/// Seed of a trial; that of trial 0 is `seed` itself.
#[must_use]
pub fn trial_seed(seed: u64, trial: u64) -> u64 {
    if trial == 0 { seed } else { rng(seed, Purpose::Evaluate, trial, 4).next_u64() }
}

/// The rows of an epoch in random order, in batches of at most `batch` that differ by one row at most: a remainder of two rows
/// would have its own, wild BatchNorm statistics.
#[must_use]
pub fn batches(rows: &[usize], batch: usize, seed: u64, epoch: u64) -> Vec<Vec<usize>> {
    let mut order = rows.to_vec();
    order.shuffle(&mut rng(seed, Purpose::Evaluate, epoch, 0));
    let count = order.len().div_ceil(batch.max(1));
    (0..count).map(|at| order[at * order.len() / count..(at + 1) * order.len() / count].to_vec()).collect()
}

/// A share of the rows, drawn class by class: of each class that has any, its rounded share and one row at least. Ascending.
#[must_use]
pub fn with_labels(rows: &[usize], labels: &[i64], share: f64, seed: u64) -> Vec<usize> {
    let mut rows: Vec<usize> = rows.iter().copied().filter(|&row| labels[row] >= 0).collect();
    rows.shuffle(&mut rng(seed, Purpose::Evaluate, 0, 1));
    rows.sort_by_key(|&row| labels[row]);
    let mut kept: Vec<usize> = rows
        .chunk_by(|&a, &b| labels[a] == labels[b])
        .flat_map(|class| &class[..((class.len() as f64 * share).round() as usize).clamp(1, class.len())])
        .copied()
        .collect();
    kept.sort_unstable();
    kept
}

/// Holds back about a fifth of the rows' slides, one at least, for validation: (rows to learn from, rows to validate on). Slides are
/// drawn within strata of equal main class. Nothing is held back where all rows lie on one slide.
#[must_use]
pub fn validation(rows: &[usize], labels: &[i64], slides: &[u32], seed: u64) -> (Vec<usize>, Vec<usize>) {
    let mut counts = std::collections::BTreeMap::<u32, std::collections::BTreeMap<i64, usize>>::new();
    for &row in rows.iter().filter(|&&row| labels[row] >= 0) {
        *counts.entry(slides[row]).or_default().entry(labels[row]).or_default() += 1;
    }
    let mut order: Vec<u32> = counts.keys().copied().collect();
    order.shuffle(&mut rng(seed, Purpose::Evaluate, 0, 3));
    order.sort_by_key(|slide| counts[slide].iter().max_by_key(|&(_, &rows)| rows).map(|(&class, _)| class));
    let slides_held = if order.len() < 2 { 0 } else { (order.len() / 5).max(1) };
    let held: Vec<u32> = (0..slides_held).map(|at| order[(2 * at + 1) * order.len() / (2 * slides_held)]).collect();
    rows.iter().partition(|&&row| !held.contains(&slides[row]))
}
