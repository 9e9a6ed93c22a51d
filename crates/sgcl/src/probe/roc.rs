//! ROC curves and the area under them, one class against the rest, ties shared.

use super::score::{Mean, Prediction};

/// Test rows by descending probability of a class.
#[derive(Debug)]
pub(super) struct Ranking {
    /// (row, whether it is of the class, whether the next row is less probable).
    rows: Vec<(usize, bool, bool)>,
}

impl Ranking {
    fn new(prediction: &Prediction, class: usize) -> Self {
        let score = |at: usize| prediction.probability(at, class);
        let mut order: Vec<usize> = (0..prediction.truth.len()).collect();
        order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
        let ends = |at: usize| order.get(at + 1).is_none_or(|&next| score(next) < score(order[at]));
        let rows = order.iter().enumerate().map(|(at, &row)| (row, prediction.truth[row] == class, ends(at))).collect();
        Ranking { rows }
    }

    /// Of every class that counts towards the area: of two the second, else each.
    pub(super) fn all(prediction: &Prediction) -> Vec<Ranking> {
        let first = if prediction.classes == 2 { 1 } else { 0 };
        (first..prediction.classes).map(|class| Ranking::new(prediction, class)).collect()
    }

    /// (false, true) positives after every group of equal probability; `count` says how often a row counts.
    fn steps(&self, count: impl Fn(usize) -> u64) -> Vec<(u64, u64)> {
        let (mut wrong, mut right) = (0, 0);
        let mut steps = vec![(0, 0)];
        for &(row, of_class, ends) in &self.rows {
            *(if of_class { &mut right } else { &mut wrong }) += count(row);
            if ends {
                steps.push((wrong, right));
            }
        }
        steps
    }

    /// Area under the curve; `None` unless some rows are of the class and some are not.
    pub(super) fn auc(&self, count: impl Fn(usize) -> u64) -> Option<f64> {
        let (mut wrong, mut right, mut group_wrong, mut group_right, mut twice) = (0, 0, 0, 0, 0_u128);
        for &(row, of_class, ends) in &self.rows {
            *(if of_class { &mut group_right } else { &mut group_wrong }) += count(row);
            if ends {
                // A trapezium: this group's false positives, at the mean height before and after it.
                twice += u128::from(group_wrong) * u128::from(2 * right + group_right);
                wrong += group_wrong;
                right += group_right;
                (group_wrong, group_right) = (0, 0);
            }
        }
        let whole = u128::from(wrong) * u128::from(right);
        (whole > 0).then(|| twice as f64 / 2.0 / whole as f64)
    }
}

/// Mean area of the rankings that have one.
pub(super) fn macro_auc(rankings: &[Ranking], count: impl Fn(usize) -> u64 + Copy) -> Option<f64> {
    let mut mean = Mean::default();
    rankings.iter().filter_map(|ranking| ranking.auc(count)).for_each(|area| mean.add(area));
    mean.value()
}

/// The curve of a class against the rest.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// (false, true) positive rate, from (0, 0) to (1, 1): a point for every probability that occurs.
    pub points: Vec<(f64, f64)>,
    /// Area under it.
    pub area: f64,
}

impl Curve {
    /// Of one class; `None` unless some test rows are of the class and some are not.
    #[must_use]
    pub fn of(prediction: &Prediction, class: usize) -> Option<Curve> {
        let ranking = Ranking::new(prediction, class);
        let area = ranking.auc(|_| 1)?;
        let steps = ranking.steps(|_| 1);
        let &(wrong, right) = steps.last()?;
        let points = steps.iter().map(|step| (step.0 as f64 / wrong as f64, step.1 as f64 / right as f64)).collect();
        Some(Curve { points, area })
    }

    /// At most `count` of its points (2 or more), evenly over their order, both ends among them.
    #[must_use]
    pub fn thinned(&self, count: usize) -> Vec<(f64, f64)> {
        let last = self.points.len() - 1;
        if last < count {
            return self.points.clone();
        }
        (0..count).map(|at| self.points[at * last / (count - 1)]).collect()
    }
}
