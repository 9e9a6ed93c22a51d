//! How sure a figure is: 95 % intervals from slides drawn again.
//!
//! Patches of one slide share stain, scanner and patient, so single patches say too little that is new: what is drawn with
//! replacement are whole test slides, as many as there are. The interval is the percentile interval, from the 2.5th to the 97.5th
//! percentile of the resamples' figures (interpolated linearly, as NumPy does). It speaks of other slides of the same kind, not of
//! another training.

use rand::Rng as _;
use rayon::prelude::*;
use sgcl_draw::{Purpose, rng};

use super::roc::{Ranking, macro_auc};
use super::score::{Confusion, Figures, Mean, Prediction};

/// Resamples that results are reported with.
pub const RESAMPLES: u64 = 1_000;
/// Share of the resamples that an interval encloses.
pub const LEVEL: f64 = 0.95;

/// An interval of a figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// 2.5th percentile.
    pub low: f64,
    /// 97.5th percentile.
    pub high: f64,
    /// Resamples in which the figure is defined: an area needs a class that some rows have and some lack.
    pub resamples: usize,
}

/// How often each of `slides` slides is drawn in a resample.
#[must_use]
pub fn draws(seed: u64, resample: u64, slides: usize) -> Vec<u64> {
    let mut times = vec![0; slides];
    let mut rng = rng(seed, Purpose::Bootstrap, 0, resample);
    for _ in 0..slides {
        times[rng.random_range(0..slides)] += 1;
    }
    times
}

/// Intervals of accuracy, balanced accuracy, macro F1 and area, in the order of [`Figures::NAMES`]. `predictions` are those of
/// several trainings on the same test rows; the figure is then their mean, drawn with the same slides for all. `slides` holds the
/// slide of every row that a prediction may name. `None` for a figure that is never defined, and for all where the test rows lie
/// on one slide: nothing then says how slides differ.
///
/// # Panics
/// If a prediction names a row beyond `slides`: a bug of the caller.
#[must_use]
pub fn intervals(predictions: &[Prediction], slides: &[u32], seed: u64, resamples: u64) -> [Option<Interval>; 4] {
    let Some(first) = predictions.first() else { return [None; 4] };
    let mut names: Vec<u32> = first.rows.iter().map(|&row| slides[row]).collect();
    names.sort_unstable();
    names.dedup();
    if names.len() < 2 {
        return [None; 4];
    }
    let tests: Vec<Test> = predictions.iter().map(|prediction| Test::new(prediction, slides, &names)).collect();
    let drawn: Vec<[Option<f64>; 4]> = (0..resamples)
        .into_par_iter()
        .map(|resample| {
            let times = draws(seed, resample, names.len());
            let figures: Vec<[Option<f64>; 4]> = tests.iter().map(|test| test.figures(&times).values()).collect();
            std::array::from_fn(|at| mean(figures.iter().map(|values| values[at])))
        })
        .collect();
    std::array::from_fn(|at| interval(drawn.iter().filter_map(|figures| figures[at]).collect()))
}

/// A prediction, prepared for being drawn from many times.
struct Test {
    /// By slide.
    confusions: Vec<Confusion>,
    rankings: Vec<Ranking>,
    /// Place of each test row's slide in the list of slides.
    slides: Vec<usize>,
    classes: usize,
}

impl Test {
    fn new(prediction: &Prediction, slides: &[u32], names: &[u32]) -> Self {
        let place = |&row: &usize| names.partition_point(|&name| name < slides[row]);
        let slides: Vec<usize> = prediction.rows.iter().map(place).collect();
        let mut confusions = vec![Confusion::new(prediction.classes); names.len()];
        for (at, &slide) in slides.iter().enumerate() {
            confusions[slide].add(prediction.truth[at], prediction.predicted[at], 1);
        }
        Test { confusions, rankings: Ranking::all(prediction), slides, classes: prediction.classes }
    }

    fn figures(&self, times: &[u64]) -> Figures {
        let mut confusion = Confusion::new(self.classes);
        for (slide, &times) in self.confusions.iter().zip(times) {
            confusion.add_all(slide, times);
        }
        confusion.figures(macro_auc(&self.rankings, |row| times[self.slides[row]]))
    }
}

/// Mean of values that are all there.
pub(crate) fn mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let mut mean = Mean::default();
    for value in values {
        mean.add(value?);
    }
    mean.value()
}

/// The interval of a figure's resamples, in any order; `None` without any.
pub(crate) fn interval(mut values: Vec<f64>) -> Option<Interval> {
    values.sort_by(f64::total_cmp);
    let tail = (1.0 - LEVEL) / 2.0;
    Some(Interval { low: percentile(&values, tail)?, high: percentile(&values, 1.0 - tail)?, resamples: values.len() })
}

/// Percentile of ascending values, interpolated linearly between the two nearest.
fn percentile(values: &[f64], share: f64) -> Option<f64> {
    let at = share * (values.len().checked_sub(1)?) as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    Some(values[low] + (values[high] - values[low]) * (at - low as f64))
}
