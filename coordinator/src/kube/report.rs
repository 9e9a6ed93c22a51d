//! What a run's object says of it: status by server-side apply, events on transitions.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, MicroTime, ObjectMeta, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Resource, ResourceExt};
use serde_json::json;
use sgcl_runstore::metrics::PROBE;
use tokio::time::Instant;

use super::MANAGER;
use super::resource::{EvaluationKind, EvaluationPhase, EvaluationStatus, Phase, SgclRun, SgclRunStatus};
use crate::machine::Change;
use crate::metrics::Measure;
use crate::view::RunView;

/// Numbers are written no more often than this; transitions at once.
const SELDOM: Duration = Duration::from_secs(3);
/// Events have room for so many characters.
const NOTE_CHARS: usize = 1000;

/// What a status is made from.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The spec's generation.
    pub generation: i64,
    /// What the run is doing.
    pub phase: Phase,
    /// Why.
    pub message: Option<String>,
    /// Nodes wanted.
    pub nodes: u32,
    /// Nodes whose process runs, before any has joined.
    pub started: u32,
    /// Epochs wanted, once the configuration is known.
    pub epochs: Option<u32>,
    /// The coordinator's view, while there is one.
    pub view: Option<RunView>,
    /// The run's part of the bucket.
    pub url: Option<String>,
    /// The leader's term.
    pub lease_epoch: u64,
    /// Evaluations and embeddings of the finished run; none says nothing new of them.
    pub evaluations: Option<Vec<EvaluationStatus>>,
    /// Time since this coordinator began to train, and the share done then.
    pub pace: Option<(Duration, f64)>,
}

/// Share done.
#[must_use]
pub fn share(view: &RunView, epochs: u32) -> f64 {
    let of_epoch = if view.epoch_steps == 0 { 0.0 } else { view.epoch_step as f64 / view.epoch_steps as f64 };
    ((f64::from(view.epoch) + of_epoch) / f64::from(epochs.max(1))).min(1.0)
}

/// Whether a view's steps are of training: a checkpoint or an export counts its own.
#[must_use]
pub fn trains(view: &RunView) -> bool {
    view.phase == "training"
}

/// Share of the time `spent` in training that was not lost to changes of membership.
#[must_use]
pub fn goodput(view: &RunView, spent: Duration) -> f64 {
    let changing: Duration = view.changes.iter().map(|change| change.took).sum();
    (1.0 - changing.as_secs_f64() / spent.as_secs_f64().max(1.0)).clamp(0.0, 1.0)
}

/// The status that tells these facts. What they leave open stays as it was.
#[must_use]
pub fn status(before: &SgclRunStatus, now: Timestamp, facts: &Facts) -> SgclRunStatus {
    let mut status = before.clone();
    status.phase = facts.phase;
    status.message.clone_from(&facts.message);
    status.observed_generation = facts.generation;
    status.lease_epoch = facts.lease_epoch;
    status.url = facts.url.clone().or(status.url);
    status.nodes_ready = match (&facts.view, facts.phase) {
        (_, Phase::Suspended | Phase::Finished | Phase::Cancelled | Phase::Failed) => 0,
        (Some(view), _) => view.nodes,
        (None, _) => facts.started,
    };
    status.nodes = Some(format!("{}/{}", status.nodes_ready, facts.nodes));
    status.eta = None;
    if let (Some(view), Some(epochs)) = (&facts.view, facts.epochs) {
        // A coordinator that has heard nothing yet knows no better than the last one.
        if view.step > 0 && trains(view) {
            let done = share(view, epochs);
            status.step = view.step;
            status.epochs = Some(format!("{}/{epochs}", (view.epoch + 1).min(epochs)));
            status.progress = Some(format!("{:.0}%", done * 100.0));
            if let (Some((spent, from)), Phase::Running) = (facts.pace, facts.phase) {
                let gained = done - from;
                let left = (gained > 0.0).then(|| spent.as_secs_f64() * (1.0 - done) / gained);
                status.eta = left.map(|seconds| short(Duration::from_secs_f64(seconds.min(1e9))));
                status.goodput = Some(format!("{:.0}%", goodput(view, spent) * 100.0));
            }
        }
        if view.samples_per_second > 0.0 {
            status.patches_per_second = Some(format!("{:.0}", view.samples_per_second));
        }
        if let Some(accuracy) = view.metrics.get(&format!("{PROBE}accuracy")) {
            status.probe = Some(format!("{:.1}%", accuracy * 100.0));
        }
        status.restarts = status.restarts.max(view.restarts);
        status.last_commit = view.last_commit.or(status.last_commit);
    }
    if facts.phase == Phase::Finished {
        status.progress = Some("100%".into());
    }
    if let Some(evaluations) = &facts.evaluations {
        status.evaluations.clone_from(evaluations);
    }
    let condition = |kind: &str, holds: bool| {
        let value = if holds { "True" } else { "False" };
        let known = before.conditions.iter().find(|c| c.type_ == kind && c.status == value);
        Condition {
            type_: kind.into(),
            status: value.into(),
            reason: facts.phase.to_string(),
            message: facts.message.clone().unwrap_or_default(),
            last_transition_time: known.map_or(Time(now), |known| known.last_transition_time.clone()),
            observed_generation: Some(facts.generation),
        }
    };
    status.conditions = vec![
        condition("Admitted", matches!(facts.phase, Phase::Running | Phase::Finished)),
        condition("Training", facts.phase == Phase::Running),
        condition("Finished", facts.phase == Phase::Finished),
    ];
    if let Some(least) = status.evaluations.iter().map(|one| one.phase).min_by_key(|phase| urgency(*phase)) {
        status.conditions.push(Condition {
            reason: least.to_string(),
            message: unmade(&status.evaluations).join("; "),
            ..condition("Evaluated", least == EvaluationPhase::Done)
        });
    }
    status
}

/// Whether numbers that were `written` last then wait. What a coordinator has never written does not: its term is news.
fn too_soon(written: Option<Instant>, now: Instant) -> bool {
    written.is_some_and(|written| now < written + SELDOM)
}

/// What to tell first of several evaluations.
fn urgency(phase: EvaluationPhase) -> u8 {
    match phase {
        EvaluationPhase::Running => 0,
        EvaluationPhase::Waiting => 1,
        EvaluationPhase::Failed => 2,
        EvaluationPhase::Done => 3,
    }
}

/// Evaluations that are not made, each with what is known of it.
fn unmade(evaluations: &[EvaluationStatus]) -> Vec<String> {
    let unmade = evaluations.iter().filter(|one| one.phase != EvaluationPhase::Done);
    unmade
        .map(|one| match &one.message {
            Some(message) => format!("{}: {message}", one.name),
            None => format!("{}: {}", one.name, one.phase),
        })
        .collect()
}

/// What has become of evaluations since: whether it is bad, its reason and note, as events have them.
#[must_use]
pub fn evaluated(before: &[EvaluationStatus], now: &[EvaluationStatus]) -> Vec<(bool, &'static str, String)> {
    let told = |one: &&EvaluationStatus| {
        let known = before
            .iter()
            .any(|known| known.name == one.name && known.phase == one.phase && known.figures == one.figures);
        one.phase.is_over() && !known
    };
    now.iter()
        .filter(told)
        .map(|one| {
            let bad = one.phase != EvaluationPhase::Done;
            let reason = match (one.kind, bad) {
                (EvaluationKind::Evaluation, false) => "Evaluated",
                (EvaluationKind::Evaluation, true) => "EvaluationFailed",
                (EvaluationKind::Embedding, false) => "Embedded",
                (EvaluationKind::Embedding, true) => "EmbeddingFailed",
            };
            let said = if bad { &one.message } else { &one.figures };
            (bad, reason, format!("{}: {}", one.name, said.as_deref().unwrap_or_default()))
        })
        .collect()
}

/// 95 s as 1m35s.
fn short(time: Duration) -> String {
    let (hours, minutes, seconds) = (time.as_secs() / 3600, time.as_secs() / 60 % 60, time.as_secs() % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds:02}s"),
        _ => format!("{hours}h{minutes:02}m"),
    }
}

/// A change of membership in a line, as events and `describe` have it.
#[must_use]
pub fn regrouped(change: &Change) -> String {
    let reason = change.reason.lines().next().unwrap_or_default();
    let lost = match change.from_commit {
        Some(seq) => format!("{} steps are trained again from commit {seq}", change.steps_lost),
        None if change.steps_lost > 0 => {
            format!("{} steps are trained again: there was no commit yet", change.steps_lost)
        }
        None => "no step lost".to_owned(),
    };
    format!("{reason}; training on {} rank(s) after {:.1} s, {lost}", change.world, change.took.as_secs_f64())
}

/// Writes one run's status and events.
pub struct Reporter {
    api: Api<SgclRun>,
    events: Api<Event>,
    /// This coordinator's pod.
    me: String,
    reference: ObjectReference,
    name: String,
    last: SgclRunStatus,
    written: Option<Instant>,
    measure: Measure,
}

impl Reporter {
    /// For a run, going on from the status it has.
    #[must_use]
    pub fn new(api: Api<SgclRun>, events: Api<Event>, me: String, run: &SgclRun, measure: Measure) -> Self {
        let last = run.status.clone().unwrap_or_default();
        Self { api, events, me, reference: run.object_ref(&()), name: run.name_any(), last, written: None, measure }
    }

    /// What was written last.
    #[must_use]
    pub fn last(&self) -> &SgclRunStatus {
        &self.last
    }

    /// When the numbers may be written again.
    #[must_use]
    pub fn due(&self) -> Instant {
        self.written.map_or_else(Instant::now, |written| written + SELDOM)
    }

    /// Writes what has changed; false where it waits for [`Reporter::due`], or for the API server.
    pub async fn tell(&mut self, facts: &Facts) -> bool {
        self.measure.note(facts);
        let status = status(&self.last, Timestamp::now(), facts);
        if status == self.last && self.written.is_some() {
            return true;
        }
        let moved = (status.phase, &status.message) != (self.last.phase, &self.last.message);
        let news = moved
            || status.observed_generation != self.last.observed_generation
            || status.evaluations != self.last.evaluations;
        if !news && too_soon(self.written, Instant::now()) {
            return false;
        }
        let patch = json!({
            "apiVersion": SgclRun::api_version(&()), "kind": SgclRun::kind(&()),
            "metadata": { "name": self.name }, "status": status,
        });
        self.written = Some(Instant::now());
        match self.api.patch_status(&self.name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&patch)).await {
            Ok(_) => {
                let (phase, message) = (status.phase, status.message.clone());
                let evaluated = evaluated(&self.last.evaluations, &status.evaluations);
                self.last = status;
                if moved {
                    tracing::info!(run = self.name, %phase, message, "transition");
                    let bad = matches!(phase, Phase::Failed | Phase::Waiting) && message.is_some();
                    self.event(bad, &phase.to_string(), message.unwrap_or_else(|| sentence(phase))).await;
                }
                for (bad, reason, note) in evaluated {
                    tracing::info!(run = self.name, reason, note, "evaluation");
                    self.event(bad, reason, note).await;
                }
                true
            }
            Err(kube::Error::Api(gone)) if gone.code == 404 => true,
            Err(error) => {
                tracing::warn!(run = self.name, %error, "the status was not written");
                false
            }
        }
    }

    /// An event on the run.
    pub async fn event(&self, warning: bool, reason: &str, note: String) {
        // Each is an event of its own: kube's Recorder would count all of one reason as one, and keep the first one's note.
        let now = Timestamp::now();
        let metadata = ObjectMeta {
            name: Some(format!("{}.{:x}", self.name, now.as_nanosecond())),
            namespace: self.reference.namespace.clone(),
            ..ObjectMeta::default()
        };
        let event = Event {
            metadata,
            type_: Some(if warning { "Warning" } else { "Normal" }.to_owned()),
            reason: Some(reason.to_owned()),
            action: Some(reason.to_owned()),
            note: Some(note.chars().take(NOTE_CHARS).collect()),
            regarding: Some(self.reference.clone()),
            event_time: Some(MicroTime(now)),
            reporting_controller: Some(format!("sgcl.dev/{MANAGER}")),
            reporting_instance: Some(self.me.clone()),
            ..Event::default()
        };
        if let Err(error) = self.events.create(&PostParams::default(), &event).await {
            tracing::warn!(run = self.name, %error, "an event was not written");
        }
    }
}

fn sentence(phase: Phase) -> String {
    match phase {
        Phase::Pending => "seen",
        Phase::Waiting => "nodes are asked for",
        Phase::Running => "training",
        Phase::Suspended => "suspended after a commit",
        Phase::Finished => "all epochs are trained, weights are exported",
        Phase::Cancelled => "cancelled",
        Phase::Failed => "failed",
    }
    .to_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn running(epoch: u32, epoch_step: u64) -> Facts {
        Facts {
            generation: 2,
            phase: Phase::Running,
            nodes: 4,
            epochs: Some(10),
            view: Some(RunView {
                phase: "training".into(),
                nodes: 3,
                epoch,
                epoch_step,
                epoch_steps: 20,
                step: 50,
                ..RunView::default()
            }),
            pace: Some((Duration::from_secs(90), 0.0)),
            ..Facts::default()
        }
    }

    #[test]
    fn numbers_are_told_as_the_columns_have_them() {
        let status = status(&SgclRunStatus::default(), at(0), &running(2, 10));
        assert_eq!(status.nodes.as_deref(), Some("3/4"));
        assert_eq!(status.epochs.as_deref(), Some("3/10"));
        assert_eq!(status.progress.as_deref(), Some("25%"));
        assert_eq!(status.eta.as_deref(), Some("4m30s"));
        assert_eq!(status.observed_generation, 2);
    }

    #[test]
    fn a_coordinator_that_has_just_begun_takes_nothing_back() {
        let mut facts = running(2, 10);
        facts.view.as_mut().unwrap().metrics.insert("probe/accuracy".into(), 0.8342);
        let before = status(&SgclRunStatus::default(), at(0), &facts);
        assert_eq!(before.probe.as_deref(), Some("83.4%"));
        let fresh = Facts { view: Some(RunView::default()), ..running(0, 0) };
        let after = status(&before, at(9), &fresh);
        assert_eq!((after.step, after.progress, after.probe), (before.step, before.progress, before.probe));
    }

    #[test]
    fn what_a_checkpoint_counts_is_not_taken_for_training() {
        let before = status(&SgclRunStatus::default(), at(0), &running(2, 10));
        let mut draining = running(2, 20);
        draining.view = draining.view.map(|view| RunView { phase: "checkpoint".into(), ..view });
        assert_eq!(status(&before, at(9), &draining).progress, before.progress);
    }

    #[test]
    fn a_condition_keeps_its_time_until_it_turns() {
        let before = status(&SgclRunStatus::default(), at(5), &running(2, 10));
        let same = status(&before, at(9), &running(2, 11));
        let training =
            |status: &SgclRunStatus| status.conditions.iter().find(|c| c.type_ == "Training").cloned().unwrap();
        assert_eq!(training(&same).last_transition_time, Time(at(5)));
        let ended = status(&same, at(20), &Facts { phase: Phase::Finished, ..running(9, 20) });
        assert_eq!((training(&ended).status.as_str(), training(&ended).last_transition_time), ("False", Time(at(20))));
        assert_eq!((ended.nodes_ready, ended.progress.as_deref()), (0, Some("100%")));
    }

    #[test]
    fn a_coordinator_that_takes_over_says_so_at_once_and_then_seldom() {
        let now = Instant::now();
        assert!(!too_soon(None, now));
        assert!(too_soon(Some(now), now + SELDOM / 2));
        assert!(!too_soon(Some(now), now + SELDOM));
    }

    #[test]
    fn evaluations_are_a_condition_and_an_event_each_when_they_end() {
        let one = |name: &str, phase: EvaluationPhase| EvaluationStatus {
            name: name.into(),
            phase,
            ..EvaluationStatus::default()
        };
        let told = |before: &SgclRunStatus, list: &[EvaluationStatus]| {
            status(
                before,
                at(9),
                &Facts { phase: Phase::Finished, evaluations: Some(list.to_vec()), ..Facts::default() },
            )
        };
        let condition = |status: &SgclRunStatus| {
            let found = status.conditions.iter().find(|c| c.type_ == "Evaluated");
            found.map(|c| (c.status.clone(), c.reason.clone(), c.message.clone()))
        };
        let is = |status: &str, reason: &str, message: &str| Some((status.into(), reason.into(), message.into()));
        let none = told(&SgclRunStatus::default(), &[]);
        assert_eq!(condition(&none), None);
        let mut list = [one("grain", EvaluationPhase::Running), one("tumour", EvaluationPhase::Waiting)];
        let begun = told(&none, &list);
        assert_eq!(condition(&begun), is("False", "Running", "grain: Running; tumour: Waiting"));
        assert_eq!(evaluated(&none.evaluations, &begun.evaluations), []);
        list[0] = EvaluationStatus { figures: Some("linear 64.5%".into()), ..one("grain", EvaluationPhase::Done) };
        list[1] = EvaluationStatus { message: Some("torn".into()), ..one("tumour", EvaluationPhase::Failed) };
        let ended = told(&begun, &list);
        assert_eq!(condition(&ended), is("False", "Failed", "tumour: torn"));
        let events = evaluated(&begun.evaluations, &ended.evaluations);
        let wanted =
            [(false, "Evaluated", "grain: linear 64.5%".into()), (true, "EvaluationFailed", "tumour: torn".into())];
        assert_eq!(events, wanted);
        assert_eq!(evaluated(&ended.evaluations, &ended.evaluations), [], "told once");
        let mut atlas = one("atlas", EvaluationPhase::Done);
        (atlas.kind, atlas.figures) = (EvaluationKind::Embedding, Some("features".into()));
        assert_eq!(evaluated(&[], &[atlas]), [(false, "Embedded", "atlas: features".into())]);
        let all = told(&ended, &list[..1]);
        assert_eq!(condition(&all), is("True", "Done", ""));
        let later = status(&all, at(20), &Facts { phase: Phase::Finished, ..Facts::default() });
        assert_eq!(later.evaluations, all.evaluations, "facts that say nothing of them take nothing back");
    }
}
