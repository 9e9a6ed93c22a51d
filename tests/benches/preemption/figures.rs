//! Numbers with their spread, and a log of what was decided when.

use std::fmt::{Debug, Write as _};
use std::fs::File;
use std::io::Write as _;
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use serde_json::{Value, json};
use tracing::field::{Field, Visit};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer, Registry};

/// Median, smallest, largest and count.
#[derive(Clone, Debug, Default)]
pub struct Figure(Vec<f64>);

impl FromIterator<f64> for Figure {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self(values)
    }
}

impl Figure {
    pub fn median(&self) -> Option<f64> {
        let (len, at) = (self.0.len(), self.0.len() / 2);
        match len {
            0 => None,
            _ if len.is_multiple_of(2) => Some((self.0[at - 1] + self.0[at]) / 2.0),
            _ => Some(self.0[at]),
        }
    }

    pub fn largest(&self) -> Option<f64> {
        self.0.last().copied()
    }

    /// Shares as hundredths.
    pub fn percent(&self) -> Self {
        self.0.iter().map(|value| 100.0 * value).collect()
    }

    pub fn json(&self) -> Value {
        json!({ "median": self.median(), "min": self.0.first(), "max": self.0.last(), "count": self.0.len() })
    }

    /// `1.23 (0.98 to 2.01, 4)`.
    pub fn text(&self, digits: usize) -> String {
        match (self.median(), self.0.first(), self.0.last()) {
            (Some(median), Some(least), Some(most)) => {
                format!("{median:.digits$} ({least:.digits$} to {most:.digits$}, {})", self.0.len())
            }
            _ => "–".into(),
        }
    }
}

/// Seconds from one moment to a later one; negative where it is earlier.
pub fn between(from: Timestamp, to: Timestamp) -> f64 {
    to.duration_since(from).as_secs_f64()
}

/// What the coordinator decided, with times, and a file of everything said.
#[derive(Clone, Default)]
pub struct Log {
    decided: Arc<Mutex<Vec<(Timestamp, String)>>>,
    file: Option<Arc<File>>,
}

impl Log {
    /// Listens to all that is traced in this process from now on.
    pub fn install(file: Option<&str>) -> Self {
        let file = file.map(|path| Arc::new(File::create(path).expect("the log file can be made")));
        let log = Self { file, ..Self::default() };
        let wanted = Targets::new()
            .with_target("sgcl_coordinator", tracing::Level::DEBUG)
            .with_target("node", tracing::Level::INFO);
        tracing_subscriber::registry().with(log.clone().with_filter(wanted)).init();
        log
    }

    /// Moments of the decisions whose text begins with `name`, from `since` on.
    pub fn decided(&self, name: &str, since: Timestamp) -> Vec<(Timestamp, String)> {
        let decided = self.decided.lock().unwrap();
        decided.iter().filter(|(at, what)| *at >= since && what.starts_with(name)).cloned().collect()
    }
}

impl Layer<Registry> for Log {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, Registry>) {
        struct Words {
            effect: Option<String>,
            line: String,
        }
        impl Visit for Words {
            fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
                if field.name() == "effect" {
                    self.effect = Some(format!("{value:?}"));
                }
                let _ = write!(self.line, " {}={value:?}", field.name());
            }
        }
        let now = Timestamp::now();
        let mut words = Words { effect: None, line: String::new() };
        event.record(&mut words);
        if let Some(mut file) = self.file.as_deref() {
            let _ = writeln!(file, "{now} {}{}", event.metadata().target(), words.line);
        }
        if let Some(effect) = words.effect {
            self.decided.lock().unwrap().push((now, effect));
        }
    }
}
