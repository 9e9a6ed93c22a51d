//! The coordinator on Kubernetes: runs are `SgclRun` objects, nodes are Jobs.
//!
//! | file | what |
//! |---|---|
//! | [`resource`] | the custom resource, and its definition |
//! | [`defaults`] | what a run leaves open: ConfigMap `sgcl-defaults` |
//! | [`plan`] | a run with its defaults: what to train, and what its pods need |
//! | [`prepare`] | its place in the bucket |
//! | [`queue`] | whether the queue that it names is there |
//! | [`job`] | one Job a node slot and attempt |
//! | [`pods`] | what pods say: exit codes, and what keeps them waiting |
//! | [`book`] | which Jobs a run has, and what they mean to its state machine |
//! | [`launcher`] | a [`crate::Launcher`] that makes Jobs |
//! | [`lease`] | one leader of several replicas |
//! | [`controller`] | from objects to running coordinators |
//! | [`conduct`] | one run, from its spec in the bucket to its end |
//! | [`evaluate`] | what comes after a run: the evaluations and embeddings that its configuration names |
//! | [`evaluation`] | one of them: its Job, and what that says |
//! | [`gang`] | which of several waiting runs gives way |
//! | [`trace`] | the trace of a run, which its pods go on with |
//! | [`trust`] | the authority of the TLS certificate, and the keys of pods' tokens |
//! | [`report`] | status, conditions and events |

pub mod book;
pub mod conduct;
pub mod controller;
pub mod defaults;
pub mod evaluate;
pub mod evaluation;
pub mod gang;
pub mod job;
pub mod launcher;
pub mod lease;
pub mod plan;
pub mod pods;
pub mod prepare;
pub mod queue;
pub mod report;
pub mod resource;
pub mod trace;
pub mod trust;

/// Label that names a pod's, or a Job's, run.
pub const RUN_LABEL: &str = "sgcl.dev/run";
/// Label with the place of the run that a node fills.
pub const SLOT_LABEL: &str = "sgcl.dev/slot";
/// Label that counts the Jobs of a slot, from 0.
pub const ATTEMPT_LABEL: &str = "sgcl.dev/attempt";
/// Label of an evaluation's Job and pod that names the run. Theirs alone: what has [`RUN_LABEL`] is a node.
pub const EVALUATES_LABEL: &str = "sgcl.dev/evaluates";
/// Annotation with the traceparent that a run's trace goes on with.
pub const TRACE_ANNOTATION: &str = "sgcl.dev/traceparent";
/// Who made an object, to the API server and to its readers.
pub const MANAGER: &str = "sgcl-coordinator";
/// Name of the Service, and port, that workers find the coordinator by.
pub const SERVICE: &str = "sgcl-coordinator";
/// Port of the gRPC service.
pub const GRPC_PORT: u16 = 7443;
/// Namespace that `deploy/` installs into.
pub const NAMESPACE: &str = "sgcl";
