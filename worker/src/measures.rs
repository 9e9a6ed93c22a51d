//! What a rank counts, and how its supervisor hears of it: a line on standard output each second, where somebody asked for metrics.

use std::io::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sgcl_telemetry::metrics::{BOUNDS, Clock, Counter, Histogram, process};
use tokio::runtime::Handle;
use tokio::time::MissedTickBehavior;

/// What such a line begins with. Anything else on standard output is a library's.
const MARK: &str = "#sgcl-measures ";
/// Time between two lines.
const OFTEN: Duration = Duration::from_secs(1);
/// Longest line that is read: a report has about a kilobyte.
const LONGEST: usize = 16 << 10;

pub(crate) static RANK: AtomicU64 = AtomicU64::new(0);
pub(crate) static GENERATION: AtomicU64 = AtomicU64::new(0);
pub(crate) static PATCHES: Counter = Counter::new();
pub(crate) static STEP: Histogram = Histogram::new();
pub(crate) static LOAD: Clock = Clock::new();
pub(crate) static RENDEZVOUS: Histogram = Histogram::new();
pub(crate) static SNAPSHOT: Histogram = Histogram::new();
pub(crate) static UPLOAD: Histogram = Histogram::new();
pub(crate) static UPLOADED: Counter = Counter::new();

/// Times by length, as [`Histogram::get`] tells them.
pub(crate) type Times = ([u64; BOUNDS.len() + 1], f64);

/// A rank at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) rank: u64,
    pub(crate) generation: u64,
    pub(crate) patches: u64,
    pub(crate) step: Times,
    pub(crate) load: f64,
    pub(crate) rendezvous: Times,
    pub(crate) snapshot: Times,
    pub(crate) upload: Times,
    pub(crate) uploaded: u64,
    pub(crate) memory: Option<u64>,
}

impl Report {
    fn now() -> Self {
        Self {
            rank: RANK.load(Ordering::Relaxed),
            generation: GENERATION.load(Ordering::Relaxed),
            patches: PATCHES.get(),
            step: STEP.get(),
            load: LOAD.seconds(),
            rendezvous: RENDEZVOUS.get(),
            snapshot: SNAPSHOT.get(),
            upload: UPLOAD.get(),
            uploaded: UPLOADED.get(),
            memory: process().memory,
        }
    }

    /// Steps finished.
    pub(crate) fn steps(&self) -> u64 {
        self.step.0.iter().sum()
    }

    /// A line of a rank's standard output, where it is a report.
    pub(crate) fn read(line: &str) -> Option<Self> {
        let text = line.strip_prefix(MARK).filter(|text| text.len() <= LONGEST)?;
        serde_json::from_str(text).ok()
    }

    fn line(&self) -> Option<String> {
        Some(format!("{MARK}{}\n", serde_json::to_string(self).ok()?))
    }
}

/// Reports until the process ends, or nobody reads any more.
pub(crate) fn report(runtime: &Handle) {
    runtime.spawn(async {
        let mut tick = tokio::time::interval(OFTEN);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let Some(line) = Report::now().line() else { return };
            let mut out = std::io::stdout().lock();
            if out.write_all(line.as_bytes()).and_then(|()| out.flush()).is_err() {
                return;
            }
        }
    });
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_as_it_was_written_and_nothing_else_is_one() {
        let mut report = Report { rank: 3, load: 1.25, memory: Some(1), ..Report::default() };
        report.step.0[2] = 7;
        let line = report.line().unwrap();
        assert_eq!(Report::read(line.trim_end()), Some(report));
        assert_eq!(Report::read("NCCL INFO #sgcl-measures {}"), None);
        assert_eq!(Report::read(&format!("{MARK}{{\"rank\":\"x\"}}")), None);
    }
}
