//! What a report is made of. Nothing here is fatal but the run itself: what cannot be read is named on the page instead.

use std::collections::BTreeMap;

use anyhow::Result;
use jiff::Timestamp;
use serde_json::Value;
use sgcl_patchset::{PatchSet, Store};
use sgcl_runstore::status::{Event, Events};
use sgcl_runstore::{Commits, RunStatus, Spec, StepMetrics, read_metrics};

use super::bank::Bank;
use super::slides::{self, Query, SlideView};

/// What the caller wants shown.
pub(crate) struct Wanted {
    /// URL of the patch set, where it has moved.
    pub(crate) data: Option<String>,
    /// Slides shown.
    pub(crate) slides: usize,
    /// Query patches of the montage.
    pub(crate) queries: usize,
}

/// Everything a report shows.
pub(crate) struct Facts {
    pub(crate) spec: Spec,
    pub(crate) status: RunStatus,
    pub(crate) steps: Vec<StepMetrics>,
    pub(crate) events: Vec<Event>,
    /// Newest commit: its number, and the ranks that wrote it.
    pub(crate) commit: Option<(u64, u32)>,
    pub(crate) classes: Vec<String>,
    pub(crate) patches: Option<usize>,
    pub(crate) slide_count: usize,
    pub(crate) held_out: usize,
    pub(crate) slides: Vec<SlideView>,
    pub(crate) queries: Vec<Query>,
    /// Bank that the neighbours were searched in, and its rows.
    pub(crate) searched: Option<(&'static str, usize, bool)>,
    /// What could not be read.
    pub(crate) missing: Vec<String>,
    pub(crate) made: Timestamp,
}

impl Facts {
    /// Gathers them; `tell` hears what is being done.
    ///
    /// # Errors
    /// The run's own records cannot be read.
    pub(crate) async fn gather(run: &Store, wanted: &Wanted, tell: impl Fn(&str)) -> Result<Self> {
        tell("reading the run's records");
        let mut facts = Self {
            spec: Spec::read(run).await?,
            status: RunStatus::read(run).await?,
            steps: read_metrics(run).await?,
            events: Events::new(run).read().await?,
            commit: None,
            classes: Vec::new(),
            patches: None,
            slide_count: 0,
            held_out: 0,
            slides: Vec::new(),
            queries: Vec::new(),
            searched: None,
            missing: Vec::new(),
            made: Timestamp::now(),
        };
        tell("reading the bank of the newest commit");
        let bank = facts.bank(run).await;
        let url = wanted.data.clone().unwrap_or_else(|| facts.spec.data.clone());
        match PatchSet::open(&url).await {
            Ok(set) if set.manifest().content_id != facts.spec.data_id => {
                facts
                    .missing
                    .push(format!("pictures: {url} holds other patches than the run was trained on; give --data URL"));
            }
            Ok(set) => facts.pictures(&set, bank.as_ref(), wanted, &tell).await,
            Err(e) => facts.missing.push(format!("pictures: {e}; where the patch set has moved, give --data URL")),
        }
        Ok(facts)
    }

    /// The bank of the newest commit that has one intact.
    async fn bank(&mut self, run: &Store) -> Option<Bank> {
        let commits = Commits::new(run);
        let seqs = match commits.list().await {
            Ok(seqs) => seqs,
            Err(e) => {
                self.missing.push(format!("commits: {e}"));
                return None;
            }
        };
        for &seq in seqs.iter().rev() {
            let read = async {
                let commit = commits.read(seq).await?;
                let bank = Bank::read(run, &commit).await?;
                anyhow::Ok((commit, bank))
            };
            match read.await {
                Ok((commit, bank)) => {
                    self.commit = Some((commit.seq, commit.progress.world));
                    return bank;
                }
                Err(e) => self.missing.push(format!("commit {seq} was passed over: {e:#}")),
            }
        }
        None
    }

    async fn pictures(&mut self, set: &PatchSet, bank: Option<&Bank>, wanted: &Wanted, tell: &impl Fn(&str)) {
        let manifest = set.manifest();
        self.classes.clone_from(&manifest.classes);
        self.patches = Some(set.len());
        self.slide_count = manifest.slides.len();
        let names: Vec<&str> = manifest.slides.iter().map(|slide| slide.name.as_str()).collect();
        let held_out = match self.spec.config.data.split(&names) {
            Ok(split) => split.held_out,
            Err(e) => {
                self.missing.push(format!("the split of slides: {e}"));
                Vec::new()
            }
        };
        self.held_out = held_out.len();
        match slides::views(set, bank, &held_out, wanted.slides, tell).await {
            Ok(views) => self.slides = views,
            Err(e) => self.missing.push(format!("slides: {e:#}")),
        }
        let Some(bank) = bank else { return };
        tell("searching nearest neighbours");
        self.searched = Some((bank.name, bank.ids.len(), bank.partial));
        match slides::montage(set, bank, wanted.queries, self.spec.config.objective.radius).await {
            Ok(queries) => self.queries = queries,
            Err(e) => self.missing.push(format!("neighbours: {e:#}")),
        }
    }

    /// Probes of frozen features, `random` last.
    pub(crate) fn evals(&self) -> Vec<(&str, &Value)> {
        let mut rows = self.all_evals();
        rows.retain(|(_, value)| value["knn"]["20"].is_number() || value["linear"].is_number());
        rows
    }

    /// Results of all kinds, `random` last.
    pub(crate) fn all_evals(&self) -> Vec<(&str, &Value)> {
        let evals: &BTreeMap<String, Value> = &self.status.evals;
        let named = evals.iter().map(|(name, value)| (value["weights"].as_str().unwrap_or(name), value));
        let mut rows: Vec<(&str, &Value)> = named.collect();
        rows.sort_by_key(|(name, _)| *name == "random");
        rows
    }
}
