//! The probe that scores an encoder while it is trained.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most patches that `probe.max_patches` allows: their features lie in memory together.
const MOST_PATCHES: usize = 100_000;
/// Most neighbours that vote.
const MOST_NEIGHBOURS: usize = 1000;

/// What the encoder is worth while it is trained: nearest neighbours on a small labelled set. It changes nothing of the training, so it may
/// be switched on and off on resume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Probe {
    /// Path or URL of a labelled patch set; none means no probe. Tested on are the slides that `data` holds out where it holds any out, else
    /// those of the set's `split.json`.
    pub dataset: Option<String>,
    /// Epochs between two probes. There is one after the last epoch in any case.
    #[schemars(range(min = 1))]
    pub every_epochs: u32,
    /// Neighbours that vote.
    #[schemars(range(min = 1, max = 1000))]
    pub k: usize,
    /// Most labelled patches: a set with more is refused, since a probe encodes them all.
    #[schemars(range(min = 2, max = 100_000))]
    pub max_patches: usize,
}

impl Default for Probe {
    fn default() -> Self {
        Self { dataset: None, every_epochs: 5, k: 20, max_patches: 5000 }
    }
}

impl Probe {
    /// Whether there is a probe after an epoch, numbered from 0, of `epochs`.
    #[must_use]
    pub fn is_due(&self, epoch: u32, epochs: u32) -> bool {
        self.dataset.is_some() && ((epoch + 1).is_multiple_of(self.every_epochs) || epoch + 1 == epochs)
    }

    /// What is out of range, each by its key.
    pub(super) fn wrong(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        if self.every_epochs < 1 {
            wrong.push("probe.every_epochs must be at least 1".to_owned());
        }
        if !(1..=MOST_NEIGHBOURS).contains(&self.k) {
            wrong.push(format!("probe.k {} is not in 1..={MOST_NEIGHBOURS}", self.k));
        }
        if !(2..=MOST_PATCHES).contains(&self.max_patches) {
            wrong.push(format!("probe.max_patches {} is not in 2..={MOST_PATCHES}", self.max_patches));
        }
        wrong
    }
}
