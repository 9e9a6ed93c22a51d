//! All that is durable about a run: its configuration and spec, checkpoint parts, commits, the ledger, metrics, exports and events.
//! No torch: tensors are names, dtypes, shapes and bytes.
//!
//! | object below `runs/<run>/` | module |
//! |---|---|
//! | `spec.json` | [`spec`] |
//! | `checkpoints/<generation>-<step>/<part>` | [`checkpoint`], [`ledger`] |
//! | `commits/<seq>.json` | [`commit`] |
//! | `metrics/…jsonl`, `tensorboard/…` | [`metrics`] |
//! | `exports/<seq>/…` | [`export`] |
//! | `events/<seq>.json` | [`status`] |
//! | `eval/<name>.json` | [`evals`], [`status`] |
//! | `embeddings/<commit>/<name>.json`, `features/<commit>/<name>/…` | [`follow_up`], [`features`] |
//! | `leases/<epoch>.json` | [`lease`] |
//! | `orders/<seq>.json` | [`orders`] |
//!
//! What a run's configuration names beside its data is found by [`probe`].
//!
//! What an encoder computes for others, features of slides in the layouts of TRIDENT and CLAM, is [`features`].

pub mod checkpoint;
pub mod commit;
pub mod config;
mod error;
pub mod evals;
pub mod export;
pub mod features;
pub mod follow_up;
pub mod lease;
pub mod ledger;
pub mod metrics;
pub mod orders;
pub mod probe;
mod record;
pub mod spec;
pub mod status;
pub mod verify;

pub use checkpoint::{Dtype, PartKind, PartRef, PartWriter, Tensor};
pub use commit::{Commit, Commits, Intact, Progress, Segment};
pub use config::{ConfigError, RunConfig};
pub use error::RunStoreError;
pub use follow_up::FollowUp;
pub use lease::Lease;
pub use ledger::Ledger;
pub use metrics::{MetricsWriter, StepMetrics, read_metrics};
pub use orders::{Order, Orders};
pub use probe::{NamedSetError, ProbeSet, find_named_sets};
pub use record::{FORMAT_VERSION, new_write_id};
pub use spec::{RunName, Spec};
pub use status::{EventKind, Events, Phase, RunStatus, list_runs};
