//! How much of a segmentation is right: one confusion matrix over all pixels, and intervals over slides.

use rayon::prelude::*;

use super::IGNORED;
use crate::probe::bootstrap::{Interval, draws, interval, mean};

/// Pixels by true and predicted class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PixelConfusion {
    classes: usize,
    /// [true · classes + predicted]
    cells: Vec<u64>,
}

impl PixelConfusion {
    /// Without pixels.
    #[must_use]
    pub fn new(classes: usize) -> Self {
        PixelConfusion { classes, cells: vec![0; classes * classes] }
    }

    /// Counts pixels; those that are [`IGNORED`] count nowhere.
    ///
    /// # Panics
    /// If a class is not below the number of classes: a bug of the caller.
    pub fn add(&mut self, truth: &[u8], predicted: &[u8]) {
        for (&truth, &predicted) in truth.iter().zip(predicted).filter(|&(&truth, _)| truth != IGNORED) {
            self.cells[usize::from(truth) * self.classes + usize::from(predicted)] += 1;
        }
    }

    /// Adds another one `times` times.
    pub fn add_all(&mut self, other: &PixelConfusion, times: u64) {
        self.cells.iter_mut().zip(&other.cells).for_each(|(to, pixels)| *to += times * pixels);
    }

    /// Intersection over union of a class; `None` where neither truth nor prediction has it.
    #[must_use]
    pub fn iou(&self, class: usize) -> Option<f64> {
        let n = self.classes;
        let both = self.cells[class * n + class];
        let truth: u64 = self.cells[class * n..(class + 1) * n].iter().sum();
        let called: u64 = (0..n).map(|row| self.cells[row * n + class]).sum();
        let either = truth + called - both;
        (either > 0).then(|| both as f64 / either as f64)
    }

    /// Mean intersection over union of the classes that have one; `None` without pixels.
    #[must_use]
    pub fn mean_iou(&self) -> Option<f64> {
        let found: Vec<f64> = (0..self.classes).filter_map(|class| self.iou(class)).collect();
        (!found.is_empty()).then(|| found.iter().sum::<f64>() / found.len() as f64)
    }

    /// Share of pixels that are right; `None` without pixels.
    #[must_use]
    pub fn accuracy(&self) -> Option<f64> {
        let right: u64 = (0..self.classes).map(|class| self.cells[class * self.classes + class]).sum();
        let all = self.pixels();
        (all > 0).then(|| right as f64 / all as f64)
    }

    /// Pixels counted.
    #[must_use]
    pub fn pixels(&self) -> u64 {
        self.cells.iter().sum()
    }

    /// Rows are true classes.
    #[must_use]
    pub fn rows(&self) -> Vec<Vec<u64>> {
        self.cells.chunks_exact(self.classes.max(1)).map(<[u64]>::to_vec).collect()
    }

    /// Mean IoU, accuracy, then the IoU of each class.
    fn figures(&self) -> Vec<Option<f64>> {
        let classes = (0..self.classes).map(|class| self.iou(class));
        [self.mean_iou(), self.accuracy()].into_iter().chain(classes).collect()
    }
}

/// 95 % intervals over slides; `None` where a figure is never defined, and for all with fewer than two slides.
#[derive(Clone, Debug, PartialEq)]
pub struct SegmentIntervals {
    /// Of the mean IoU.
    pub mean_iou: Option<Interval>,
    /// Of the share of pixels that are right.
    pub accuracy: Option<Interval>,
    /// Of each class's IoU.
    pub iou: Vec<Option<Interval>>,
}

impl SegmentIntervals {
    /// `trials` holds for each training the confusion of every slide, the same slides in each. The figure is the mean over trainings,
    /// all of them on the same slides that are drawn.
    #[must_use]
    pub fn of(trials: &[Vec<PixelConfusion>], seed: u64, resamples: u64) -> Self {
        let slides = trials.first().map_or(0, Vec::len);
        let classes = trials.iter().flatten().map(|confusion| confusion.classes).next().unwrap_or(0);
        if slides < 2 {
            return SegmentIntervals { mean_iou: None, accuracy: None, iou: vec![None; classes] };
        }
        let drawn: Vec<Vec<Option<f64>>> = (0..resamples)
            .into_par_iter()
            .map(|resample| {
                let times = draws(seed, resample, slides);
                let figures: Vec<Vec<Option<f64>>> =
                    trials.iter().map(|trial| total(trial, &times).figures()).collect();
                (0..classes + 2).map(|at| mean(figures.iter().map(|values| values[at]))).collect()
            })
            .collect();
        let of = |at: usize| interval(drawn.iter().filter_map(|figures| figures[at]).collect());
        SegmentIntervals { mean_iou: of(0), accuracy: of(1), iou: (0..classes).map(|class| of(class + 2)).collect() }
    }
}

fn total(slides: &[PixelConfusion], times: &[u64]) -> PixelConfusion {
    let mut sum = PixelConfusion::new(slides.first().map_or(0, |first| first.classes));
    for (slide, &times) in slides.iter().zip(times) {
        sum.add_all(slide, times);
    }
    sum
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ignored_pixels_count_nowhere_and_absent_classes_have_no_iou() {
        let mut confusion = PixelConfusion::new(4);
        confusion.add(&[0, 0, 0, 1, 1, 255, 255], &[0, 0, 1, 1, 2, 0, 3]);
        assert_eq!(confusion.pixels(), 5);
        assert_eq!(confusion.iou(0), Some(2.0 / 3.0));
        assert_eq!(confusion.iou(1), Some(1.0 / 3.0));
        assert_eq!(confusion.iou(2), Some(0.0), "called, but never true");
        assert_eq!(confusion.iou(3), None);
        assert!((confusion.mean_iou().unwrap() - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(confusion.accuracy(), Some(0.6));
        assert_eq!(PixelConfusion::new(4).mean_iou(), None);
    }

    #[test]
    fn an_interval_encloses_the_figures_of_the_slides_and_needs_two_of_them() {
        let slide = |right: usize| {
            let mut confusion = PixelConfusion::new(2);
            confusion.add(&[0; 10], &[vec![0; right], vec![1; 10 - right]].concat());
            confusion
        };
        let trial = vec![slide(9), slide(5), slide(7)];
        let found = SegmentIntervals::of(&[trial.clone(), trial.clone()], 1, 500);
        let accuracy = found.accuracy.unwrap();
        assert_eq!((accuracy.low, accuracy.high, accuracy.resamples), (0.5, 0.9, 500));
        assert_eq!(found, SegmentIntervals::of(&[trial.clone(), trial.clone()], 1, 500));
        assert_eq!(SegmentIntervals::of(&[trial[..1].to_vec()], 1, 500).mean_iou, None);
    }
}
