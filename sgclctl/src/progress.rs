//! Live progress: a line and a bar on a terminal, JSON lines elsewhere.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use sgcl_coordinator::RunView;

use crate::output::{Out, percent, span, warn};

/// All bars of this process: what prints a line suspends them first.
pub(crate) fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()))
}

/// A bar over a whole job; hidden where nobody would see it.
pub(crate) fn bar(out: Out, length: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    if out.quiet || out.json() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
        return bar;
    }
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("━╸─"));
    }
    bars().add(bar)
}

/// A sign of life while something is waited for; hidden where nobody would see it.
pub(crate) fn spinner(out: Out, message: String) -> ProgressBar {
    let spinner = bar(out, 0, "{spinner} {msg} ({elapsed})");
    spinner.set_message(message);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// How often a run says where it is when there is neither a terminal nor JSON.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// Shows a run while it goes.
pub(crate) struct RunProgress {
    out: Out,
    epochs: u32,
    bar: Option<ProgressBar>,
    /// When and where this session's first step was seen: the pace is measured from there.
    began: Option<(Instant, f64)>,
    shown: Option<(u64, String, Option<u64>)>,
    told: Option<Instant>,
}

impl RunProgress {
    pub(crate) fn new(out: Out, epochs: u32) -> Self {
        let live = !out.json_progress() && !out.quiet && console::user_attended_stderr();
        let bar = live.then(|| bar(out, 1000, "{wide_msg}\n{wide_bar:.cyan/dim} {percent:>3} %"));
        if let Some(bar) = &bar {
            bar.set_message("starting the workers");
            bar.tick();
        }
        Self { out, epochs, bar, began: None, shown: None, told: None }
    }

    /// Shows `view` where it says anything new.
    pub(crate) fn show(&mut self, view: &RunView) -> Result<()> {
        let now = (view.step, view.phase.clone(), view.last_commit);
        if self.shown.as_ref() == Some(&now) {
            return Ok(());
        }
        self.shown = Some(now);
        let done = share(view, self.epochs);
        let eta = self.eta(view, done);
        if self.out.json_progress() {
            return self.out.json_line(&json!({ "progress": {
                "phase": view.phase, "epoch": view.epoch, "epochs": self.epochs,
                "epoch_step": view.epoch_step, "epoch_steps": view.epoch_steps, "step": view.step,
                "metrics": view.metrics, "samples_per_second": view.samples_per_second,
                "done": done, "eta_s": eta, "commit": view.last_commit,
                "generation": view.generation, "nodes": view.nodes, "ranks": view.ranks, "restarts": view.restarts,
            }}));
        }
        let line = line(view, self.epochs, eta);
        if let Some(bar) = &self.bar {
            bar.set_message(line);
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            bar.set_position((1000.0 * done) as u64);
        } else if !self.out.quiet && self.told.is_none_or(|at| at.elapsed() >= PLAIN_EVERY) {
            self.told = Some(Instant::now());
            warn(line);
        }
        Ok(())
    }

    fn eta(&mut self, view: &RunView, done: f64) -> Option<f64> {
        if view.phase != "training" {
            return None;
        }
        let &mut (since, from) = self.began.get_or_insert((Instant::now(), done));
        let gained = done - from;
        (gained > 0.0).then(|| since.elapsed().as_secs_f64() * (1.0 - done) / gained)
    }

    /// Takes the bar away; what was printed stays.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Share of the run that is done.
#[allow(clippy::cast_precision_loss)]
fn share(view: &RunView, epochs: u32) -> f64 {
    let inside = if view.epoch_steps == 0 { 0.0 } else { view.epoch_step as f64 / view.epoch_steps as f64 };
    ((f64::from(view.epoch) + inside.min(1.0)) / f64::from(epochs.max(1))).clamp(0.0, 1.0)
}

/// `epoch 3/10  step 12/45  loss 9.31 (intra 3.1, inter 2.2, inner 4.0)  123 patches/s  4 min left`
fn line(view: &RunView, epochs: u32, eta: Option<f64>) -> String {
    if view.phase.is_empty() {
        return format!("starting: {} node(s) joined", view.nodes);
    }
    let mut words = vec![format!("epoch {}/{epochs}", view.epoch + 1)];
    if view.phase == "training" {
        words.push(format!("step {}/{}", view.epoch_step, view.epoch_steps));
    } else {
        words.push(view.phase.clone());
    }
    let value = |name: &str| view.metrics.get(&format!("loss/{name}")).copied();
    if let Some(total) = value("total") {
        let terms: Vec<String> = ["intra", "inter", "spatial", "semantic", "inner"]
            .iter()
            .filter_map(|n| Some(format!("{n} {:.2}", value(n)?)))
            .collect();
        let terms = if terms.is_empty() { String::new() } else { format!(" ({})", terms.join(", ")) };
        words.push(format!("loss {total:.3}{terms}"));
    }
    if let Some(accuracy) = view.metrics.get("probe/accuracy") {
        words.push(format!("kNN {}", percent(*accuracy)));
    }
    if view.samples_per_second > 0.0 {
        words.push(format!("{:.0} patches/s", view.samples_per_second));
    }
    if let Some(eta) = eta {
        words.push(format!("{} left", span(eta)));
    }
    words.join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_a_run_has_epoch_step_losses_pace_and_time_left() {
        let view = RunView {
            phase: "training".into(),
            epoch: 2,
            epoch_step: 12,
            epoch_steps: 45,
            metrics: [("loss/total".to_owned(), 9.306), ("loss/intra".to_owned(), 3.1)].into(),
            samples_per_second: 123.4,
            ..RunView::default()
        };
        assert_eq!(
            line(&view, 10, Some(250.0)),
            "epoch 3/10  step 12/45  loss 9.306 (intra 3.10)  123 patches/s  4 min 10 s left"
        );
        let mut probed = RunView { phase: "k-means".into(), ..view.clone() };
        probed.metrics.insert("probe/accuracy".into(), 0.8342);
        assert_eq!(line(&probed, 10, None), "epoch 3/10  k-means  loss 9.306 (intra 3.10)  kNN 83.4 %  123 patches/s");
        assert!((share(&view, 10) - (2.0 + 12.0 / 45.0) / 10.0).abs() < 1e-12);
    }
}
