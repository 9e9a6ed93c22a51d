//! Metrics for Prometheus: every one of them ([`catalogue`]), how they are counted, and how they are written out.
//!
//! Names follow Prometheus' conventions: what only grows ends in `_total`, and a unit, always a base unit, is part of the name.

pub mod catalogue;

use std::fmt::Write as _;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// What a number does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, and begins at 0 with its process.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by size.
    Histogram,
}

impl Kind {
    /// Prometheus' word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub kind: Kind,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it means.
    pub help: &'static str,
}

/// What only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// At 0.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds to it.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// As it is.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Time that only grows, to the microsecond.
#[derive(Debug, Default)]
pub struct Clock(Counter);

impl Clock {
    /// At 0.
    #[must_use]
    pub const fn new() -> Self {
        Self(Counter::new())
    }

    /// Adds to it.
    pub fn add(&self, more: Duration) {
        self.0.add(u64::try_from(more.as_micros()).unwrap_or(u64::MAX));
    }

    /// As it is, in seconds.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.0.get() as f64 / 1e6
    }
}

/// How many there are now.
#[derive(Debug, Default)]
pub struct Level(AtomicI64);

impl Level {
    /// None.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicI64::new(0))
    }

    /// One more, until what is returned is dropped.
    pub fn one(&'static self) -> One {
        self.0.fetch_add(1, Ordering::Relaxed);
        One(self)
    }

    /// As it is.
    #[must_use]
    pub fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One of a [`Level`].
#[derive(Debug)]
pub struct One(&'static Level);

impl Drop for One {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Upper bounds of a histogram of times, in seconds.
pub const BOUNDS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Times by length.
#[derive(Debug)]
pub struct Histogram {
    /// How many were within each bound and above the one before; the last is for what is above all.
    counts: [AtomicU64; BOUNDS.len() + 1],
    sum: Clock,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// Of nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self { counts: [const { AtomicU64::new(0) }; BOUNDS.len() + 1], sum: Clock::new() }
    }

    /// Takes one more.
    pub fn add(&self, time: Duration) {
        let at = BOUNDS.iter().position(|bound| time.as_secs_f64() <= *bound).unwrap_or(BOUNDS.len());
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        self.sum.add(time);
    }

    /// As it is: how many in each class, and their sum in seconds.
    #[must_use]
    pub fn get(&self) -> ([u64; BOUNDS.len() + 1], f64) {
        (std::array::from_fn(|at| self.counts[at].load(Ordering::Relaxed)), self.sum.seconds())
    }
}

/// Metrics in Prometheus' text format.
#[derive(Debug, Default)]
pub struct Exposition {
    text: String,
    /// Labels of every sample: names and values.
    common: Vec<(&'static str, String)>,
}

impl Exposition {
    /// `Content-Type` of what it writes.
    pub const CONTENT_TYPE: &'static str = "text/plain; version=0.0.4; charset=utf-8";

    /// With labels that every sample has.
    #[must_use]
    pub fn new(common: Vec<(&'static str, String)>) -> Self {
        Self { text: String::new(), common }
    }

    /// A metric with one sample and no labels of its own.
    pub fn put(&mut self, metric: &Metric, value: impl Number) {
        self.all(metric, [([""; 0], value)]);
    }

    /// A metric's samples: values of its labels in their order, and a number. A number that is none is left out.
    pub fn all<const N: usize, T: AsRef<str>, V: Number>(
        &mut self,
        metric: &Metric,
        samples: impl IntoIterator<Item = ([T; N], V)>,
    ) {
        self.head(metric);
        for (labels, value) in samples {
            debug_assert_eq!(labels.len(), metric.labels.len(), "{}", metric.name);
            if let Some(value) = value.number() {
                let labels: Vec<&str> = labels.iter().map(AsRef::as_ref).collect();
                self.sample(metric.name, metric.labels, &labels, None, value);
            }
        }
    }

    /// A histogram's samples: values of its labels, how many in each class, and their sum.
    pub fn histogram<const N: usize, T: AsRef<str>>(
        &mut self,
        metric: &Metric,
        samples: impl IntoIterator<Item = ([T; N], ([u64; BOUNDS.len() + 1], f64))>,
    ) {
        self.head(metric);
        for (labels, (counts, sum)) in samples {
            let labels: Vec<&str> = labels.iter().map(AsRef::as_ref).collect();
            let mut so_far = 0;
            for (at, count) in counts.iter().enumerate() {
                so_far += count;
                let bound = BOUNDS.get(at).map_or_else(|| "+Inf".to_owned(), f64::to_string);
                let name = format!("{}_bucket", metric.name);
                self.sample(&name, metric.labels, &labels, Some(&bound), so_far as f64);
            }
            self.sample(&format!("{}_sum", metric.name), metric.labels, &labels, None, sum);
            self.sample(&format!("{}_count", metric.name), metric.labels, &labels, None, so_far as f64);
        }
    }

    /// What the system says of this process: memory, processor time, files.
    pub fn process(&mut self) {
        let process = process();
        self.put(&catalogue::PROCESS_MEMORY, process.memory);
        self.put(&catalogue::PROCESS_TIME, process.time);
        self.put(&catalogue::PROCESS_FILES, process.files);
    }

    /// What was written.
    #[must_use]
    pub fn text(self) -> String {
        self.text
    }

    // Writing to a string does not fail.
    fn head(&mut self, metric: &Metric) {
        let help = metric.help.replace('\\', "\\\\").replace('\n', "\\n");
        let _ = writeln!(self.text, "# HELP {} {help}\n# TYPE {} {}", metric.name, metric.name, metric.kind.word());
    }

    fn sample(&mut self, name: &str, labels: &[&'static str], values: &[&str], bound: Option<&str>, number: f64) {
        let common = self.common.iter().map(|(name, value)| (*name, value.as_str()));
        let own = labels.iter().copied().zip(values.iter().copied());
        let pairs = common.chain(own).chain(bound.map(|bound| ("le", bound)));
        let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let pairs: Vec<String> = pairs.map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        let pairs = if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) };
        let _ = writeln!(self.text, "{name}{pairs} {number}");
    }
}

/// What a sample's value is made from.
pub trait Number {
    /// The value, where there is one.
    fn number(self) -> Option<f64>;
}

macro_rules! numbers {
    ($($kind:ty),*) => {
        $(impl Number for $kind {
            fn number(self) -> Option<f64> {
                Some(self as f64)
            }
        })*
    };
}

numbers!(u32, u64, i64, usize, f64);

impl Number for bool {
    fn number(self) -> Option<f64> {
        Some(f64::from(u8::from(self)))
    }
}

impl<T: Number> Number for Option<T> {
    fn number(self) -> Option<f64> {
        self.and_then(T::number)
    }
}

/// What the system says of this process; none of it where there is no /proc.
#[derive(Clone, Copy, Debug, Default)]
pub struct Process {
    /// Resident memory in bytes.
    pub memory: Option<u64>,
    /// Processor time in seconds.
    pub time: Option<f64>,
    /// Open files.
    pub files: Option<u64>,
}

/// Asks the system.
#[must_use]
pub fn process() -> Process {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
    let status = read("status");
    let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
    let kilobytes = line("VmRSS:").and_then(|text| text.strip_suffix(" kB")).and_then(|text| text.parse::<u64>().ok());
    let stat = read("stat");
    // Behind the program's name, which may hold anything: user and system time, in hundredths of a second.
    let ticks = stat.rsplit_once(") ").and_then(|(_, rest)| {
        let fields: Vec<&str> = rest.split(' ').collect();
        Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
    });
    Process {
        memory: kilobytes.map(|kilobytes| kilobytes * 1024),
        time: ticks.map(|ticks| ticks as f64 / 100.0),
        files: std::fs::read_dir("/proc/self/fd").ok().map(|files| files.count() as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUNS: Metric =
        Metric { name: "sgcl_runs", kind: Kind::Gauge, labels: &["phase"], help: "Runs\nby \\ phase." };
    const STEP: Metric = Metric { name: "sgcl_step_seconds", kind: Kind::Histogram, labels: &[], help: "Steps." };

    #[test]
    fn what_stands_in_a_label_or_a_help_cannot_break_a_line() {
        let mut out = Exposition::new(vec![("run", "a\"b\\c\nd".into())]);
        out.all(&RUNS, [(["Running"], Some(2_u64)), (["Failed"], None)]);
        let text = "# HELP sgcl_runs Runs\\nby \\\\ phase.\n# TYPE sgcl_runs gauge\n\
                    sgcl_runs{run=\"a\\\"b\\\\c\\nd\",phase=\"Running\"} 2\n";
        assert_eq!(out.text(), text);
    }

    #[test]
    fn a_histograms_classes_hold_all_that_is_smaller() {
        let histogram = Histogram::new();
        [0.005, 0.2, 1e4].into_iter().for_each(|seconds| histogram.add(Duration::from_secs_f64(seconds)));
        let mut out = Exposition::default();
        out.histogram(&STEP, [([""; 0], histogram.get())]);
        let text = out.text();
        for line in [
            "sgcl_step_seconds_bucket{le=\"0.005\"} 1\n",
            "sgcl_step_seconds_bucket{le=\"0.25\"} 2\n",
            "sgcl_step_seconds_bucket{le=\"300\"} 2\n",
            "sgcl_step_seconds_bucket{le=\"+Inf\"} 3\n",
            "sgcl_step_seconds_count 3\n",
            "sgcl_step_seconds_sum 10000.205\n",
        ] {
            assert!(text.contains(line), "{line}in\n{text}");
        }
    }

    #[test]
    fn the_system_says_something_of_this_process() {
        let process = process();
        assert!(process.memory > Some(100_000) && process.files > Some(2), "{process:?}");
        assert!(process.time.is_some());
    }
}
