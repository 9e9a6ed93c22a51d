//! What a classifier got right.

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
    /// Share of test rows predicted right.
    pub accuracy: f64,
    /// Mean recall of the classes that the test rows have.
    pub balanced_accuracy: f64,
    /// Mean F1 of the classes that the test rows or the predictions have, as scikit-learn's.
    pub macro_f1: f64,
    /// By class.
    pub classes: Vec<ClassScore>,
    /// [true class][predicted class], test rows.
    pub confusion: Vec<Vec<usize>>,
}

impl Scores {
    /// Compares predictions with the truth; labels are below `classes`. `train` is for the counts alone.
    ///
    /// # Panics
    /// If a label is not below `classes`: a bug of the caller.
    #[must_use]
    pub fn new(truth: &[i64], predicted: &[i64], train: &[i64], classes: usize) -> Self {
        let mut confusion = vec![vec![0; classes]; classes];
        for (&truth, &predicted) in truth.iter().zip(predicted) {
            confusion[truth as usize][predicted as usize] += 1;
        }
        let share = |part: usize, whole: usize| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let (mut recalls, mut f1s) = (Vec::new(), Vec::new());
        let scores: Vec<ClassScore> = (0..classes)
            .map(|class| {
                let hits = confusion[class][class];
                let test: usize = confusion[class].iter().sum();
                let claimed: usize = confusion.iter().map(|row| row[class]).sum();
                let f1 = share(2 * hits, test + claimed);
                let recall = share(hits, test);
                if test > 0 {
                    recalls.push(recall);
                }
                if test + claimed > 0 {
                    f1s.push(f1);
                }
                let train = train.iter().filter(|&&label| label == class as i64).count();
                ClassScore { train, test, precision: share(hits, claimed), recall, f1 }
            })
            .collect();
        let hits = (0..classes).map(|class| confusion[class][class]).sum();
        Scores {
            accuracy: share(hits, truth.len()),
            balanced_accuracy: mean(&recalls),
            macro_f1: mean(&f1s),
            classes: scores,
            confusion,
        }
    }
}
