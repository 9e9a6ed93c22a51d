//! The labelled patches of a set, and which of them to learn from and to test on.

use std::collections::HashSet;

use crate::index::Index;

/// Labelled patches in rows, without the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labelled {
    /// Patch id of each row, ascending.
    pub ids: Vec<u32>,
    /// Class of each row.
    pub labels: Vec<i64>,
    /// Slide of each row.
    pub slides: Vec<u32>,
    /// Rows to learn from.
    pub train: Vec<usize>,
    /// Rows to test on.
    pub test: Vec<usize>,
}

impl Labelled {
    /// Of a set; the slides in `test` are tested on, by number in the manifest, all others learnt from.
    #[must_use]
    pub fn new(index: &Index, test: &[u32]) -> Self {
        let test: HashSet<u32> = test.iter().copied().collect();
        let mut found = Self::default();
        for (id, &slide) in (0_u32..).zip(index.slides()) {
            let Some(label) = index.label(id) else { continue };
            if test.contains(&slide) { &mut found.test } else { &mut found.train }.push(found.ids.len());
            found.ids.push(id);
            found.labels.push(i64::from(label));
            found.slides.push(slide);
        }
        found
    }
}
