//! A run's trace: whose it is, and what its pods need to go on with it.

use kube::ResourceExt;
use sgcl_telemetry::Traceparent;
use tracing::{Span, info_span};

use super::TRACE_ANNOTATION;
use super::job::HandedOn;
use super::resource::SgclRun;

/// The trace that whoever submitted the run began, else one that every coordinator of this object makes the same.
pub(super) fn trace(run: &SgclRun, uid: &str) -> Option<Traceparent> {
    let told = run.annotations().get(TRACE_ANNOTATION).and_then(|text| text.parse().ok());
    let digits: String = uid.chars().filter(|c| *c != '-').collect();
    told.or_else(|| Traceparent::named(u128::from_str_radix(&digits, 16).ok()?))
}

/// The span that all work on a run is in.
pub(super) fn span(run: &str, trace: Option<Traceparent>) -> Span {
    let span = info_span!("run", run, trace_id = trace.map(|trace| trace.trace_id()));
    if let Some(trace) = &trace {
        sgcl_telemetry::follow(&span, trace);
    }
    span
}

/// What its pods need to trace and log as this coordinator does.
pub(super) fn handed_on(trace: Option<Traceparent>) -> HandedOn {
    let set = |name: &&str| Some(((*name).to_owned(), std::env::var(name).ok().filter(|value| !value.is_empty())?));
    HandedOn { trace, environment: sgcl_telemetry::HANDED_ON.iter().filter_map(set).collect() }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::kube::resource::SgclRunSpec;

    #[test]
    fn a_runs_trace_is_its_submitters_else_named_after_its_object() {
        let uid = "4bf92f35-77b3-4da6-a3ce-929d0e0e4736";
        let mut run = SgclRun::new("first", SgclRunSpec::default());
        let named = trace(&run, uid).unwrap();
        assert_eq!(named.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(trace(&run, uid), Some(named), "as the next leader makes it");
        let told = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        run.annotations_mut().insert(TRACE_ANNOTATION.into(), told.into());
        assert_eq!(trace(&run, uid).unwrap().to_string(), told);
        run.annotations_mut().insert(TRACE_ANNOTATION.into(), "nonsense".into());
        assert_eq!(trace(&run, uid), Some(named));
        assert_eq!(trace(&run, "not a uuid"), None);
    }
}
