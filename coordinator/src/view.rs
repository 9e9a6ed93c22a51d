//! What a watcher sees of a run while it goes.

use std::collections::BTreeMap;

use crate::machine::Change;

/// A run at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunView {
    /// starting, k-means, training, checkpoint, probe, export, draining.
    pub phase: String,
    /// Membership.
    pub generation: u64,
    /// Nodes that have joined.
    pub nodes: u32,
    /// Ranks of the generation.
    pub ranks: u32,
    /// Epoch, from 0.
    pub epoch: u32,
    /// Steps finished in the epoch, and how many it has.
    pub epoch_step: u64,
    /// Steps of the epoch.
    pub epoch_steps: u64,
    /// Steps since the run began.
    pub step: u64,
    /// The newest value of each metric: losses, learning rate, what a probe found.
    pub metrics: BTreeMap<String, f64>,
    /// Patches a second, all ranks.
    pub samples_per_second: f64,
    /// Newest commit.
    pub last_commit: Option<u64>,
    /// Failures survived so far.
    pub restarts: u32,
    /// Membership changes so far, in order.
    pub changes: Vec<Change>,
    /// The last thing worth telling.
    pub message: Option<String>,
}
