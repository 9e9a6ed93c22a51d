//! Which labelled patches are learnt from and which are tested on: by slide, the same for every encoder.

use anyhow::{Result, ensure};
use sgcl::probe::Split;
use sgcl_patchset::{Labelled, PatchSet};
use sgcl_runstore::Spec;

use super::EvalArgs;

/// The labelled patches of a set, in rows.
pub(super) struct Task {
    pub(super) set: PatchSet,
    /// Patch id of each row, ascending.
    pub(super) ids: Vec<u32>,
    /// Class of each row.
    pub(super) labels: Vec<i64>,
    /// Slide of each row.
    pub(super) slides: Vec<u32>,
    pub(super) split: Split,
}

impl Task {
    /// The slides that the run of `spec` held out are tested on, else a share that is drawn.
    pub(super) fn new(set: PatchSet, spec: Option<&Spec>, args: &EvalArgs) -> Result<Self> {
        let (manifest, index) = (set.manifest(), set.index());
        ensure!(
            index.is_labelled(),
            "{}: no patch has a label; ingest class folders, or slides with label maps beside them",
            args.data
        );
        let test: Vec<u32> = if let Some(spec) = spec.filter(|s| s.config.data.holdout_fraction > 0.0) {
            let names: Vec<&str> = manifest.slides.iter().map(|s| s.name.as_str()).collect();
            let held_out = spec.config.data.split(&names)?.held_out;
            held_out.iter().filter_map(|&slide| u32::try_from(slide).ok()).collect()
        } else {
            sgcl_patchset::split(manifest, index, args.holdout_fraction, args.seed, 0)?.test
        };
        let Labelled { ids, labels, slides, train, test } = Labelled::new(index, &test);
        Ok(Self { ids, labels, slides, split: Split { train, test }, set })
    }

    pub(super) fn classes(&self) -> &[String] {
        &self.set.manifest().classes
    }

    /// Patch ids of some rows.
    pub(super) fn ids_of(&self, rows: &[usize]) -> Vec<u32> {
        rows.iter().map(|&row| self.ids[row]).collect()
    }

    /// How many slides some rows lie on.
    pub(super) fn slides_of(&self, rows: &[usize]) -> usize {
        let slides: std::collections::BTreeSet<u32> = rows.iter().map(|&row| self.slides[row]).collect();
        slides.len()
    }
}
