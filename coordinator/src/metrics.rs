//! What the coordinator tells Prometheus: `sgcl_telemetry::metrics::catalogue` has the list.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use sgcl_proto::WAITING_FOR_STORAGE;
use sgcl_runstore::metrics::PROBE;
use sgcl_telemetry::metrics::catalogue as of;
use sgcl_telemetry::metrics::{Counter, Exposition, Histogram, Level, Metric, Number};

use crate::kube::report::{Facts, goodput, share};
use crate::trust::Refusals;
use crate::view::RunView;

/// Commits that were written, however many runs there are.
pub(crate) static COMMIT_SECONDS: Histogram = Histogram::new();
/// Commits that were not.
pub(crate) static COMMIT_FAILURES: Counter = Counter::new();
/// Open streams of supervisors.
pub(crate) static NODE_STREAMS: Level = Level::new();
/// Open streams of ranks.
pub(crate) static RANK_STREAMS: Level = Level::new();

/// How the runs of this leader are doing. Cheap to clone.
#[derive(Clone, Default)]
pub struct Measures {
    runs: Arc<Mutex<BTreeMap<String, Measured>>>,
}

#[derive(Default)]
struct Measured {
    /// Who measures it.
    by: u64,
    facts: Facts,
    /// Number of the newest commit, and when this coordinator saw it made.
    commit: Option<(u64, Option<Timestamp>)>,
}

impl Measures {
    /// For whoever conducts `run`; what was measured is forgotten when that is dropped.
    #[must_use]
    pub fn of(&self, run: &str) -> Measure {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Measure { all: self.clone(), run: run.to_owned(), id: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    fn runs(&self) -> MutexGuard<'_, BTreeMap<String, Measured>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expose(&self, out: &mut Exposition) {
        let runs = self.runs();
        let each = |out: &mut Exposition, metric: &Metric, value: fn(&Measured) -> Option<f64>| {
            out.all(metric, runs.iter().map(|(run, measured)| ([run.as_str()], value(measured))));
        };
        let phases = runs.iter().map(|(run, measured)| ([run.clone(), measured.facts.phase.to_string()], true));
        out.all(&of::RUN_PHASE, phases);
        each(out, &of::RUN_NODES_WANTED, |run| run.facts.nodes.number());
        each(out, &of::RUN_NODES, |run| match &run.facts.view {
            Some(view) => view.nodes.number(),
            None => run.facts.started.number(),
        });
        each(out, &of::RUN_RANKS, |run| run.view()?.ranks.number());
        each(out, &of::RUN_GENERATION, |run| run.view()?.generation.number());
        each(out, &of::RUN_EPOCH, |run| run.view()?.epoch.number());
        each(out, &of::RUN_EPOCHS_WANTED, |run| run.facts.epochs.number());
        each(out, &of::RUN_STEP, |run| run.view()?.step.number());
        each(out, &of::RUN_PROGRESS, |run| Some(share(run.view()?, run.facts.epochs?)));
        each(out, &of::RUN_PACE, |run| run.view()?.samples_per_second.number());
        let told = |start: &'static str| {
            runs.iter().flat_map(move |(run, measured)| {
                let values = measured.view().into_iter().flat_map(|view| &view.metrics);
                values.filter_map(move |(name, value)| Some(([run.as_str(), name.strip_prefix(start)?], *value)))
            })
        };
        out.all(&of::RUN_LOSS, told("loss/"));
        out.all(&of::RUN_PROBE, told(PROBE));
        each(out, &of::RUN_LR, |run| run.view()?.metrics.get("lr").copied());
        each(out, &of::RUN_RESTARTS, |run| run.view()?.restarts.number());
        let regroups = runs.iter().flat_map(|(run, measured)| {
            measured.view().into_iter().flat_map(move |view| {
                let count = |failure: bool| view.changes.iter().filter(|change| change.failure == failure).count();
                [([run.as_str(), "true"], count(true)), ([run.as_str(), "false"], count(false))]
            })
        });
        out.all(&of::RUN_REGROUPS, regroups);
        each(out, &of::RUN_REGROUP_SECONDS, |run| {
            Some(run.view()?.changes.iter().map(|change| change.took.as_secs_f64()).sum())
        });
        each(out, &of::RUN_STEPS_LOST, |run| {
            run.view()?.changes.iter().map(|change| change.steps_lost).sum::<u64>().number()
        });
        each(out, &of::RUN_COMMIT, |run| run.commit?.0.number());
        each(out, &of::RUN_COMMIT_TIME, |run| Some(run.commit?.1?.as_millisecond() as f64 / 1e3));
        each(out, &of::RUN_GOODPUT, |run| goodput(run.view()?, run.facts.pace?.0).number());
        each(out, &of::RUN_STORAGE, |run| (run.view()?.phase == WAITING_FOR_STORAGE).number());
    }
}

impl Measured {
    fn view(&self) -> Option<&RunView> {
        self.facts.view.as_ref()
    }
}

/// One run's place among the [`Measures`].
pub struct Measure {
    all: Measures,
    run: String,
    id: u64,
}

impl Measure {
    /// How the run is doing now.
    pub fn note(&self, facts: &Facts) {
        let mut runs = self.all.runs();
        let before = runs.get(&self.run).filter(|measured| measured.by == self.id);
        let known = before.and_then(|measured| measured.commit);
        // The first one that is seen was made at some time before.
        let seen = before.is_some_and(|measured| measured.facts.view.is_some()).then(Timestamp::now);
        let commit = match facts.view.as_ref().and_then(|view| view.last_commit) {
            Some(seq) if known.is_none_or(|(of, _)| of != seq) => Some((seq, seen)),
            _ => known,
        };
        runs.insert(self.run.clone(), Measured { by: self.id, facts: facts.clone(), commit });
    }
}

impl Drop for Measure {
    fn drop(&mut self) {
        let mut runs = self.all.runs();
        // The next object of that name may be measured already.
        if runs.get(&self.run).is_some_and(|measured| measured.by == self.id) {
            runs.remove(&self.run);
        }
    }
}

/// All of it, in Prometheus' text format. `lease_epoch` is 0 while another replica leads.
#[must_use]
pub fn exposition(
    lease_epoch: u64,
    phases: &BTreeMap<String, usize>,
    refusals: &Refusals,
    measures: &Measures,
) -> String {
    let mut out = Exposition::default();
    out.process();
    out.put(&of::LEADER, lease_epoch > 0);
    out.put(&of::LEASE_EPOCH, lease_epoch);
    out.all(&of::REFUSED, refusals.counts().into_iter().map(|(refusal, count)| ([refusal.name()], count)));
    out.all(&of::STREAMS, [(["node"], NODE_STREAMS.get()), (["rank"], RANK_STREAMS.get())]);
    out.histogram(&of::COMMIT_SECONDS, [([""; 0], COMMIT_SECONDS.get())]);
    out.put(&of::COMMIT_FAILURES, COMMIT_FAILURES.get());
    out.all(&of::RUNS, phases.iter().map(|(phase, count)| ([phase.as_str()], *count)));
    measures.expose(&mut out);
    out.text()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::*;
    use crate::kube::resource::Phase;
    use crate::machine::Change;
    use crate::trust::Refusal;

    fn facts(commit: u64) -> Facts {
        let change = Change {
            reason: "rank 1 on first-0-0 ended with code 139".into(),
            failure: true,
            world_before: 4,
            world: 2,
            took: Duration::from_millis(2500),
            step: 90,
            steps_lost: 10,
            from_commit: Some(3),
        };
        let view = RunView {
            phase: "training".into(),
            epoch: 5,
            epoch_step: 10,
            epoch_steps: 20,
            step: 110,
            metrics: [("loss/total", 7.5), ("lr", 0.03), ("probe/accuracy", 0.75)]
                .map(|(name, value)| (name.to_owned(), value))
                .into(),
            last_commit: Some(commit),
            restarts: 1,
            changes: vec![change],
            ..RunView::default()
        };
        let pace = Some((Duration::from_secs(100), 0.0));
        Facts { phase: Phase::Running, nodes: 2, epochs: Some(10), view: Some(view), pace, ..Facts::default() }
    }

    fn told(measures: &Measures) -> String {
        let refusals = Refusals::default();
        refusals.count(Refusal::Audience);
        exposition(3, &[("Running".to_owned(), 1)].into(), &refusals, measures)
    }

    #[test]
    fn what_is_exposed_is_the_list_and_every_metric_of_it_has_a_sample() {
        let measures = Measures::default();
        let run = measures.of("first");
        run.note(&facts(3));
        run.note(&facts(4));
        let text = told(&measures);
        let listed: BTreeSet<&str> = of::EVERYWHERE.iter().chain(of::COORDINATOR).map(|metric| metric.name).collect();
        let typed = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
        assert_eq!(typed.collect::<BTreeSet<_>>(), listed);
        let sampled = |name: &&&str| {
            let own = |line: &str| line.strip_prefix(**name).is_some_and(|rest| rest.starts_with([' ', '{', '_']));
            !text.lines().any(own)
        };
        let silent: Vec<&&str> = listed.iter().filter(sampled).collect();
        assert!(silent.is_empty(), "{silent:?} in\n{text}");
    }

    #[test]
    fn a_run_is_told_in_numbers() {
        let measures = Measures::default();
        let run = measures.of("first");
        run.note(&facts(3));
        let text = told(&measures);
        for line in [
            "sgcl_run_phase{run=\"first\",phase=\"Running\"} 1",
            "sgcl_run_progress_ratio{run=\"first\"} 0.55",
            "sgcl_run_loss{run=\"first\",term=\"total\"} 7.5",
            "sgcl_run_probe_ratio{run=\"first\",figure=\"accuracy\"} 0.75",
            "sgcl_run_regroups_total{run=\"first\",failure=\"true\"} 1",
            "sgcl_run_regroup_seconds_total{run=\"first\"} 2.5",
            "sgcl_run_steps_lost_total{run=\"first\"} 10",
            "sgcl_run_goodput_ratio{run=\"first\"} 0.975",
            "sgcl_coordinator_refused_total{reason=\"audience\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
        assert!(!text.contains("last_commit_timestamp_seconds{"), "nobody knows when commit 3 was made");
    }

    #[test]
    fn a_run_that_is_gone_is_told_no_more_and_the_next_of_its_name_is() {
        let measures = Measures::default();
        let old = measures.of("first");
        old.note(&facts(3));
        let next = measures.of("first");
        next.note(&facts(1));
        drop(old);
        assert!(told(&measures).contains("sgcl_run_last_commit{run=\"first\"} 1"));
        drop(next);
        assert!(!told(&measures).contains("run=\"first\""));
    }
}
