//! What a classifier said, and how much of it is right.

use super::roc::Ranking;

/// What a classifier says of the test rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    /// Test rows, as they were handed in.
    pub rows: Vec<usize>,
    /// True class of each.
    pub truth: Vec<usize>,
    /// Class it was called: the most probable, of equal ones the first.
    pub predicted: Vec<usize>,
    /// (rows, classes), row-major; each row adds up to 1.
    pub probabilities: Vec<f64>,
    /// Number of classes.
    pub classes: usize,
}

impl Prediction {
    /// From probabilities (rows, classes), row-major.
    ///
    /// # Panics
    /// If lengths do not fit or a true class is not below `classes`: a bug of the caller.
    #[must_use]
    pub fn new(rows: Vec<usize>, truth: Vec<usize>, probabilities: Vec<f64>, classes: usize) -> Self {
        assert_eq!((rows.len(), rows.len() * classes), (truth.len(), probabilities.len()), "columns of equal length");
        assert!(truth.iter().all(|&class| class < classes), "a class beyond the {classes} there are");
        let best = |row: &[f64]| (1..classes).fold(0, |best, class| if row[class] > row[best] { class } else { best });
        let predicted = probabilities.chunks_exact(classes.max(1)).map(best).collect();
        Prediction { rows, truth, predicted, probabilities, classes }
    }

    /// Probability of one class for the test row at `at`.
    #[must_use]
    pub fn probability(&self, at: usize, class: usize) -> f64 {
        self.probabilities[at * self.classes + class]
    }

    /// Compares with the truth. `train` holds the labels learnt from, for the counts alone.
    #[must_use]
    pub fn scores(&self, train: &[i64]) -> Scores {
        let classes = self.classes;
        let mut confusion = Confusion::new(classes);
        for (&truth, &predicted) in self.truth.iter().zip(&self.predicted) {
            confusion.add(truth, predicted, 1);
        }
        let by_class = (0..classes)
            .map(|class| {
                let (hits, test, claimed) = confusion.of(class);
                let train = train.iter().filter(|&&label| label == class as i64).count();
                ClassScore {
                    train,
                    test: test as usize,
                    precision: share(hits, claimed),
                    recall: share(hits, test),
                    f1: share(2 * hits, test + claimed),
                }
            })
            .collect();
        let auc = super::roc::macro_auc(&Ranking::all(self), |_| 1);
        Scores { figures: confusion.figures(auc), classes: by_class, confusion: confusion.rows() }
    }
}

/// The figures of one test that are compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    /// Share of test rows predicted right.
    pub accuracy: f64,
    /// Mean recall of the classes that the test rows have.
    pub balanced_accuracy: f64,
    /// Mean F1 of the classes that the test rows or the predictions have, as scikit-learn's.
    pub macro_f1: f64,
    /// Area under the ROC curve: of two classes that of the second; of more the mean, one against the rest, over the classes that
    /// some test rows have and some lack. `None` without such a class.
    pub roc_auc: Option<f64>,
}

impl Figures {
    /// Their names, in the order of [`Figures::values`].
    pub const NAMES: [&str; 4] = ["accuracy", "balanced_accuracy", "macro_f1", "roc_auc"];

    /// All four; the area may be undefined.
    #[must_use]
    pub fn values(&self) -> [Option<f64>; 4] {
        [Some(self.accuracy), Some(self.balanced_accuracy), Some(self.macro_f1), self.roc_auc]
    }
}

/// One class of a test.
#[derive(Clone, Debug, PartialEq)]
pub struct ClassScore {
    /// Training rows of this class.
    pub train: usize,
    /// Test rows of this class.
    pub test: usize,
    /// Share of its predictions that are right; 0 where it was never predicted.
    pub precision: f64,
    /// Share of its rows that were found; 0 where it has none.
    pub recall: f64,
    /// Harmonic mean of the two.
    pub f1: f64,
}

/// Scores of one test.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    /// What is compared.
    pub figures: Figures,
    /// By class.
    pub classes: Vec<ClassScore>,
    /// [true class][predicted class], test rows.
    pub confusion: Vec<Vec<usize>>,
}

/// Rows by true and predicted class.
#[derive(Clone, Debug)]
pub(super) struct Confusion {
    classes: usize,
    /// [true · classes + predicted]
    cells: Vec<u64>,
}

impl Confusion {
    pub(super) fn new(classes: usize) -> Self {
        Confusion { classes, cells: vec![0; classes * classes] }
    }

    pub(super) fn add(&mut self, truth: usize, predicted: usize, rows: u64) {
        self.cells[truth * self.classes + predicted] += rows;
    }

    /// Adds another one `times` times.
    pub(super) fn add_all(&mut self, other: &Confusion, times: u64) {
        self.cells.iter_mut().zip(&other.cells).for_each(|(to, rows)| *to += times * rows);
    }

    /// Of a class: rows found, rows there are, rows called so.
    fn of(&self, class: usize) -> (u64, u64, u64) {
        let n = self.classes;
        let test = self.cells[class * n..(class + 1) * n].iter().sum();
        let claimed = (0..n).map(|row| self.cells[row * n + class]).sum();
        (self.cells[class * n + class], test, claimed)
    }

    pub(super) fn figures(&self, roc_auc: Option<f64>) -> Figures {
        let (mut right, mut all) = (0, 0);
        let (mut recalls, mut f1s) = (Mean::default(), Mean::default());
        for class in 0..self.classes {
            let (hits, test, claimed) = self.of(class);
            right += hits;
            all += test;
            if test > 0 {
                recalls.add(share(hits, test));
            }
            if test + claimed > 0 {
                f1s.add(share(2 * hits, test + claimed));
            }
        }
        Figures {
            accuracy: share(right, all),
            balanced_accuracy: recalls.value().unwrap_or(0.0),
            macro_f1: f1s.value().unwrap_or(0.0),
            roc_auc,
        }
    }

    fn rows(&self) -> Vec<Vec<usize>> {
        let row = |row: &[u64]| row.iter().map(|&rows| rows as usize).collect();
        self.cells.chunks_exact(self.classes.max(1)).map(row).collect()
    }
}

/// A running mean.
#[derive(Default)]
pub(super) struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    pub(super) fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }

    pub(super) fn value(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
