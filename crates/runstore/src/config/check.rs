//! What a configuration must satisfy: in itself, against a patch set, and for its split of slides.

use super::{ConfigError, Data, RunConfig, Variant};

impl RunConfig {
    /// Every value in its range.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with all that is wrong, each by its key.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut wrong = Vec::new();
        let mut need = |ok: bool, text: String| {
            if !ok {
                wrong.push(text);
            }
        };
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let share = |x: f64| (0.0..1.0).contains(&x);
        need(self.epochs >= 1, "epochs must be at least 1".into());
        need(
            (1..=4096).contains(&self.projector.dim),
            format!("projector.dim {} is not in 1..=4096", self.projector.dim),
        );
        need(
            (1..=2).contains(&self.projector.layers),
            format!("projector.layers {} is not 1 or 2", self.projector.layers),
        );
        for (key, px) in [("global_px", self.views.global_px), ("local_px", self.views.local_px)] {
            need((32..=1024).contains(&px), format!("views.{key} {px} is not in 32..=1024"));
        }
        for (key, [low, high]) in [("global_scale", self.views.global_scale), ("local_scale", self.views.local_scale)] {
            need(
                positive(low) && low <= high && high <= 1.0,
                format!("views.{key} [{low}, {high}] must rise and lie in (0, 1]"),
            );
        }
        let (per_rank, accumulate) = (self.batch.per_rank, self.batch.accumulate);
        need((2..=65_536).contains(&per_rank), format!("batch.per_rank {per_rank} is not in 2..=65536"));
        need((1..=65_536).contains(&accumulate), format!("batch.accumulate {accumulate} is not in 1..=65536"));
        let o = &self.optimizer;
        need(positive(o.lr), format!("optimizer.lr {} must be above 0", o.lr));
        need(o.lr_batch >= 1, "optimizer.lr_batch must be at least 1".into());
        need(share(o.momentum), format!("optimizer.momentum {} is not in [0, 1)", o.momentum));
        need(
            o.weight_decay.is_finite() && o.weight_decay >= 0.0,
            format!("optimizer.weight_decay {} is below 0", o.weight_decay),
        );
        need(
            self.variant == Variant::Exact || self.method.has_released(),
            "variant: released repeats SGCL's published code; this method has variant: exact alone".into(),
        );
        need(
            self.projector.layers == 2 || !self.method.has_keys(),
            format!(
                "projector.layers {} is not 2: moco-v2 and densecl have heads of two layers",
                self.projector.layers
            ),
        );
        let j = &self.objective;
        need(
            j.negatives >= 4 && j.negatives.is_multiple_of(4),
            format!(
                "objective.negatives {} is not a positive multiple of 4 (one quarter from each corner bank)",
                j.negatives
            ),
        );
        need(j.hard >= 1, "objective.hard must be at least 1".into());
        need(j.nearest >= 1, "objective.nearest must be at least 1".into());
        need(
            (0.0..=1.0).contains(&j.key_momentum),
            format!("objective.key_momentum {} is not in [0, 1]", j.key_momentum),
        );
        need((0.0..=1.0).contains(&j.dense_share), format!("objective.dense_share {} is not in [0, 1]", j.dense_share));
        need(
            !self.method.has_keys() || self.bank.momentum == 0.0,
            format!("bank.momentum {}: a queue holds keys as they are; set bank.momentum to 0", self.bank.momentum),
        );
        need(positive(j.t_instance), format!("objective.t_instance {} must be above 0", j.t_instance));
        need(positive(j.t_spatial), format!("objective.t_spatial {} must be above 0", j.t_spatial));
        need(
            positive(j.radius) && j.radius <= 64.0,
            format!("objective.radius {} must lie in (0, 64] grid units", j.radius),
        );
        need(
            positive(j.top_fraction) && j.top_fraction <= 1.0,
            format!("objective.top_fraction {} is not in (0, 1]", j.top_fraction),
        );
        need(
            j.hard_beta.iter().all(|b| positive(*b)),
            format!("objective.hard_beta {:?} must be above 0", j.hard_beta),
        );
        need(
            (0.0..=1.0).contains(&self.bank.momentum),
            format!("bank.momentum {} is not in [0, 1]", self.bank.momentum),
        );
        need(self.bank.replicas <= 1, format!("bank.replicas {} is not 0 or 1", self.bank.replicas));
        let k = &self.kmeans;
        need(
            k.runs >= 1 && k.clusters >= 1 && k.iterations >= 1,
            "kmeans.runs, .clusters and .iterations must be at least 1".into(),
        );
        need(self.checkpoint.every_epochs >= 1, "checkpoint.every_epochs must be at least 1".into());
        need(self.checkpoint.keep_last >= 1, "checkpoint.keep_last must be at least 1".into());
        need(self.loader.window_shards >= 1, "loader.window_shards must be at least 1".into());
        need(self.step_timeout_s >= 1, "step_timeout_s must be at least 1".into());
        need(self.startup_timeout_s >= 1, "startup_timeout_s must be at least 1".into());
        need(
            share(self.data.holdout_fraction),
            format!("data.holdout_fraction {} is not in [0, 1)", self.data.holdout_fraction),
        );
        need(
            self.data.slides.as_ref().is_none_or(|s| !s.is_empty()),
            "data.slides is empty; leave it out to use all".into(),
        );
        wrong.extend(self.probe.wrong());
        wrong.extend(super::evaluation::wrong(&self.evaluations));
        wrong.extend(super::embedding::wrong(&self.embeddings, &self.evaluations));
        if wrong.is_empty() { Ok(()) } else { Err(ConfigError::Invalid(wrong)) }
    }

    /// Whether `patches` patches (those trained on) are enough on `ranks` ranks. Nothing is fitted silently: a configuration that
    /// asks too much is refused with the numbers.
    ///
    /// # Errors
    /// [`ConfigError::DoesNotFit`] with all that does not.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn check_against(&self, patches: u64, ranks: usize) -> Result<(), ConfigError> {
        let mut problems = Vec::new();
        let batch = self.global_batch(ranks) as u64;
        let j = &self.objective;
        let ranked = (j.top_fraction * patches as f64) as u64;
        if batch > patches {
            problems.push(format!(
                "a step takes batch.per_rank {} × batch.accumulate {} × {ranks} rank(s) = {batch} patches, the set has {patches}",
                self.batch.per_rank, self.batch.accumulate
            ));
        }
        if self.method.has_keys() && j.negatives as u64 > patches {
            problems.push(format!(
                "objective.negatives {}, the queue, is above the {patches} patches: set it to {} or less",
                j.negatives,
                patches / 4 * 4
            ));
        }
        let (inter, hard) = (self.method.has_inter(), self.method.has_hard());
        if hard && j.hard as u64 > ranked {
            problems.push(format!(
                "objective.hard {} is above objective.top_fraction {} × {patches} = {ranked}: set objective.hard to {ranked} or less",
                j.hard, j.top_fraction
            ));
        }
        if let (Some(rows), true) = (j.sample(patches, ranks), hard) {
            let ranked = (j.top_fraction * rows as f64) as usize;
            if j.hard > ranked {
                problems.push(format!(
                    "objective.hard {} is above objective.top_fraction {} × objective.candidate_rows {rows} = {ranked}: set \
                     objective.candidate_rows higher",
                    j.hard, j.top_fraction
                ));
            }
        }
        if inter && j.nearest as u64 >= patches {
            problems.push(format!(
                "objective.nearest {} is not below the {patches} patches: set it to {} or less",
                j.nearest,
                patches.saturating_sub(1)
            ));
        }
        if inter && self.kmeans.clusters as u64 > patches {
            problems.push(format!("kmeans.clusters {} is above the {patches} patches", self.kmeans.clusters));
        }
        if problems.is_empty() { Ok(()) } else { Err(ConfigError::DoesNotFit { patches, ranks, problems }) }
    }
}

/// Slides to train on and slides kept for probes, as positions in the list given. Both ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// Trained on.
    pub train: Vec<usize>,
    /// Never trained on.
    pub held_out: Vec<usize>,
}

impl Data {
    /// Splits slides by name. A pure function of names and seed: each slide's place in the order is a hash of its name.
    ///
    /// # Errors
    /// `slides` names one that is not there, or one of the two sides would be empty though `holdout_fraction` is above 0.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn split<S: AsRef<str>>(&self, names: &[S]) -> Result<Split, ConfigError> {
        let chosen: Vec<usize> = match &self.slides {
            None => (0..names.len()).collect(),
            Some(wanted) => {
                if let Some(missing) = wanted.iter().find(|w| !names.iter().any(|n| n.as_ref() == w.as_str())) {
                    let near = super::nearest(missing, names.iter().map(AsRef::as_ref));
                    let hint = near.map(|n| format!("; did you mean {n:?}?")).unwrap_or_default();
                    return Err(ConfigError::Data(format!("the patch set has no slide {missing:?}{hint}")));
                }
                (0..names.len()).filter(|&i| wanted.iter().any(|w| w == names[i].as_ref())).collect()
            }
        };
        if chosen.is_empty() {
            return Err(ConfigError::Data("the patch set has no slides".into()));
        }
        if self.holdout_fraction <= 0.0 {
            return Ok(Split { train: chosen, held_out: Vec::new() });
        }
        let count = ((self.holdout_fraction * chosen.len() as f64).round() as usize).max(1);
        if count >= chosen.len() {
            return Err(ConfigError::Data(format!(
                "holdout_fraction {} of {} slide(s) leaves none to train on; ingest more slides or set data.holdout_fraction=0",
                self.holdout_fraction,
                chosen.len()
            )));
        }
        let mut order = chosen;
        order.sort_by_cached_key(|&i| {
            let mut hash = blake3::Hasher::new();
            hash.update(&self.holdout_seed.to_le_bytes()).update(names[i].as_ref().as_bytes());
            *hash.finalize().as_bytes()
        });
        let mut train = order.split_off(count);
        order.sort_unstable();
        train.sort_unstable();
        Ok(Split { train, held_out: order })
    }
}
