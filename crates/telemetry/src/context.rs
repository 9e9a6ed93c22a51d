//! Which trace this is, handed from process to process as W3C's traceparent (<https://www.w3.org/TR/trace-context/>).

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{Span as _, SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState};
use opentelemetry::trace::{Tracer as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue, Value, global};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::json::fact;

/// gRPC metadata that carries it.
pub const HEADER: &str = "traceparent";
/// Environment variable that carries it.
pub const VARIABLE: &str = "TRACEPARENT";

/// Characters of version 00.
const LENGTH: usize = 55;

/// The span that this process goes on with where no span of its own is under way.
static PROCESS: OnceLock<Traceparent> = OnceLock::new();
/// Whether spans are made at all.
static EXPORTING: AtomicBool = AtomicBool::new(false);

/// A span of a trace, as one process names it to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traceparent {
    trace: TraceId,
    span: SpanId,
    flags: TraceFlags,
}

/// Text that is no traceparent of version 00.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a W3C traceparent (00-<32 hex digits>-<16 hex digits>-<2 hex digits>)")]
pub struct NotTraceparent;

impl Traceparent {
    /// The beginning of a trace that is named after something with 128 bits of its own, such as a UUID: whoever knows that, makes the
    /// same. None where it is zero.
    #[must_use]
    pub fn named(id: u128) -> Option<Self> {
        let low = (id as u64) ^ (id >> 64) as u64;
        Self::of(TraceId::from(id), SpanId::from(low.max(1)), TraceFlags::SAMPLED)
    }

    /// The beginning of a trace like no other.
    #[must_use]
    pub fn drawn() -> Self {
        let (trace, span) = (rand::random::<u128>().max(1), rand::random::<u64>().max(1));
        Self { trace: TraceId::from(trace), span: SpanId::from(span), flags: TraceFlags::SAMPLED }
    }

    /// The trace, 32 hex digits.
    #[must_use]
    pub fn trace_id(&self) -> String {
        self.trace.to_string()
    }

    fn of(trace: TraceId, span: SpanId, flags: TraceFlags) -> Option<Self> {
        (trace != TraceId::INVALID && span != SpanId::INVALID).then_some(Self { trace, span, flags })
    }

    fn of_span(span: &Span) -> Option<Self> {
        if !EXPORTING.load(Ordering::Relaxed) {
            return None;
        }
        let context = span.context();
        let span = context.span();
        let at = span.span_context();
        Self::of(at.trace_id(), at.span_id(), at.trace_flags())
    }

    fn context(&self) -> Context {
        let remote = SpanContext::new(self.trace, self.span, self.flags, true, TraceState::default());
        Context::new().with_remote_span_context(remote)
    }
}

impl fmt::Display for Traceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{}-{}-{:02x}", self.trace, self.span, self.flags & TraceFlags::SAMPLED)
    }
}

impl FromStr for Traceparent {
    type Err = NotTraceparent;

    fn from_str(text: &str) -> Result<Self, NotTraceparent> {
        let digits = |part: &str| part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if text.len() != LENGTH || !text.is_ascii() {
            return Err(NotTraceparent);
        }
        match text.split('-').collect::<Vec<_>>()[..] {
            ["00", trace, span, flags] if [trace.len(), span.len()] == [32, 16] && digits(trace) && digits(span) => {
                let trace = TraceId::from_hex(trace).map_err(|_| NotTraceparent)?;
                let span = SpanId::from_hex(span).map_err(|_| NotTraceparent)?;
                let flags = u8::from_str_radix(flags, 16).map_err(|_| NotTraceparent)?;
                Self::of(trace, span, TraceFlags::new(flags) & TraceFlags::SAMPLED).ok_or(NotTraceparent)
            }
            _ => Err(NotTraceparent),
        }
    }
}

/// Spans are made from here on.
pub(crate) fn exporting() {
    EXPORTING.store(true, Ordering::Relaxed);
}

/// Makes `span`, which nothing was done with yet, the outermost of this process: it goes on with the trace that the environment names, or
/// begins one. Logs name that trace from here on.
pub fn begin(span: &Span) {
    let inherited = std::env::var(VARIABLE).ok().and_then(|text| text.parse().ok());
    if let Some(inherited) = &inherited {
        follow(span, inherited);
    }
    let here = Traceparent::of_span(span).or(inherited).unwrap_or_else(Traceparent::drawn);
    fact("trace_id", here.trace_id());
    // Tests that begin twice keep the first.
    let _ = PROCESS.set(here);
}

/// Makes `span`, which nothing was done with yet, a child of a span elsewhere.
pub fn follow(span: &Span, parent: &Traceparent) {
    if EXPORTING.load(Ordering::Relaxed) {
        // A span that is filtered out has no parent to be set.
        let _ = span.set_parent(parent.context());
    }
}

/// The span under way, else the process's, for whoever is to go on with it. None before [`begin`] where no spans are made.
#[must_use]
pub fn current() -> Option<Traceparent> {
    Traceparent::of_span(&Span::current()).or_else(|| PROCESS.get().copied())
}

/// A span of which nobody knew when it began: it has just ended, after `took`, within the span under way.
pub fn elapsed(name: &'static str, took: Duration, attributes: &[(&'static str, Value)]) {
    if !EXPORTING.load(Ordering::Relaxed) {
        return;
    }
    let now = SystemTime::now();
    let tracer = global::tracer_provider().tracer("sgcl");
    let attributes = attributes.iter().map(|(key, value)| KeyValue::new(*key, value.clone()));
    let began = now.checked_sub(took).unwrap_or(now);
    let span = tracer.span_builder(name).with_start_time(began).with_attributes(attributes);
    span.start_with_context(&tracer, &Span::current().context()).end_with_timestamp(now);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rstest::rstest;

    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_is_read_is_written_the_same() {
        let read: Traceparent = GOOD.parse().unwrap();
        assert_eq!(read.to_string(), GOOD);
        assert_eq!(read.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        let drawn = Traceparent::drawn();
        assert_eq!(drawn.to_string().parse(), Ok(drawn));
    }

    #[rstest]
    #[case::empty("")]
    #[case::zero_trace("00-00000000000000000000000000000000-00f067aa0ba902b7-01")]
    #[case::zero_span("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01")]
    #[case::capitals("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01")]
    #[case::another_version("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")]
    #[case::longer("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x")]
    #[case::signs("00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")]
    #[case::letters_of_more_bytes("00-4bf92f3577b34da6a3ce929d0e0e47é-00f067aa0ba902b7-01")]
    fn what_is_none_is_refused(#[case] text: &str) {
        assert_eq!(text.parse::<Traceparent>(), Err(NotTraceparent));
    }

    #[test]
    fn a_trace_named_after_an_object_is_the_same_for_everyone() {
        let id = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;
        assert_eq!(Traceparent::named(id), Traceparent::named(id));
        assert_eq!(Traceparent::named(id).unwrap().trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(Traceparent::named(0), None);
    }
}
