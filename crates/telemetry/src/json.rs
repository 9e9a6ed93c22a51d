//! An object a line: time, level, target, message, the event's fields, those of the spans around it, and what is true of the whole process.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{PoisonError, RwLock};

use jiff::Timestamp;
use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// Targets of lines that another process of ours wrote.
const RELAYED: [&str; 3] = ["node", "rank", "worker"];

/// What is true of this process, whichever task logs.
static FACTS: RwLock<BTreeMap<&'static str, Value>> = RwLock::new(BTreeMap::new());

/// Says of every line from here on that `key` is `value`: the run, the rank, the generation.
pub fn fact(key: &'static str, value: impl Into<Value>) {
    FACTS.write().unwrap_or_else(PoisonError::into_inner).insert(key, value.into());
}

/// A line as people read it, whichever format it is in.
#[must_use]
pub fn plain(line: &str) -> Cow<'_, str> {
    let Some(object) = ours(line) else { return Cow::Borrowed(line) };
    let word = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
    Cow::Owned(format!("{:>5} {}: {}", word("level"), word("target"), word("message")))
}

/// A line that this format has written.
fn ours(line: &str) -> Option<Map<String, Value>> {
    if !line.starts_with("{\"timestamp\":") {
        return None;
    }
    serde_json::from_str::<Map<String, Value>>(line).ok().filter(|object| object.contains_key("level"))
}

/// The format.
pub(crate) struct Json;

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut to: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let said = event.metadata();
        // It has its own time, level and rank; a line within a line helps nobody.
        if RELAYED.contains(&said.target()) && ours(&fields.message).is_some() {
            return writeln!(to, "{}", fields.message);
        }
        let mut line = Map::new();
        line.insert("timestamp".into(), Timestamp::now().to_string().into());
        line.insert("level".into(), said.level().as_str().into());
        line.insert("target".into(), said.target().into());
        line.insert("message".into(), fields.message.into());
        line.extend(fields.others);
        for span in context.event_scope().into_iter().flatten() {
            let extensions = span.extensions();
            let Some(told) = extensions.get::<FormattedFields<N>>() else { continue };
            // Of the inner span where two say the same, and never over the event's own.
            for (key, value) in serde_json::from_str::<Map<String, Value>>(&told.fields).unwrap_or_default() {
                line.entry(key).or_insert(value);
            }
        }
        for (key, value) in FACTS.read().unwrap_or_else(PoisonError::into_inner).iter() {
            line.entry(*key).or_insert_with(|| value.clone());
        }
        writeln!(to, "{}", Value::Object(line))
    }
}

/// An event's fields.
#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            // A field of a name that the line has already would hide that.
            (name @ ("timestamp" | "level" | "target"), value) => drop(self.others.insert(format!("{name}_"), value)),
            (name, value) => drop(self.others.insert(name.to_owned(), value)),
        }
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use tracing::subscriber::with_default;
    use tracing_subscriber::EnvFilter;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn logged(work: impl FnOnce()) -> Vec<String> {
        let kept = Kept::default();
        let writer = kept.clone();
        let log = crate::log(true, EnvFilter::new("info"), move || writer.clone());
        with_default(tracing_subscriber::registry().with(log), work);
        let text = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_line_says_what_the_event_its_spans_and_the_process_say() {
        fact("node", "first-0-0");
        let lines = logged(|| {
            let _run = tracing::info_span!("run", run = "first", generation = 1, trace_id = "4bf9").entered();
            let _inner = tracing::info_span!("step", generation = 2).entered();
            tracing::info!(rank = 3, level = "odd", "a \"word\"\nand another");
            tracing::debug!("nobody reads this");
        });
        let line: Value = serde_json::from_str(&lines[0]).unwrap();
        let said = |key: &str| line[key].clone();
        assert_eq!((said("run"), said("generation"), said("rank")), ("first".into(), 2.into(), 3.into()));
        assert_eq!((said("trace_id"), said("node")), ("4bf9".into(), "first-0-0".into()));
        assert_eq!((said("level"), said("level_")), ("INFO".into(), "odd".into()));
        assert_eq!(said("message"), "a \"word\"\nand another");
        assert_eq!(lines.len(), 1);
    }

    #[test]
    fn a_line_of_another_process_is_passed_on_as_it_is_and_read_as_text() {
        let theirs = logged(|| tracing::warn!("theirs")).remove(0);
        let passed = logged(|| {
            tracing::info!(target: "rank", "{theirs}");
            tracing::info!(target: "rank", "not JSON");
        });
        assert_eq!(passed[0], theirs);
        assert!(passed[1].contains("\"message\":\"not JSON\""));
        assert_eq!(plain(&theirs), " WARN sgcl_telemetry::json::tests: theirs");
        assert_eq!(plain("error: no bucket"), "error: no bucket");
    }
}
