//! The coordinator of a run: gathers nodes, deals ranks, makes checkpoints into commits, ends or retries generations.
//!
//! [`machine`] decides and does nothing else; [`server`] does what it decided, [`streams`] speak with nodes and ranks, [`trust`]
//! says which of them may speak.

mod commits;
pub mod kube;
pub mod launcher;
pub mod machine;
pub mod metrics;
mod orders;
mod recorder;
pub mod server;
pub mod streams;
pub mod switchboard;
pub mod trust;
pub mod view;

pub use launcher::{Launcher, ProcessLauncher};
pub use machine::{Change, Outcome};
pub use server::Coordinator;
pub use streams::listen;
pub use switchboard::Switchboard;
pub use trust::Door;
pub use view::RunView;
