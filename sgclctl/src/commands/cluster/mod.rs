//! The commands that speak to a cluster, with the user's own kubeconfig: who may do what is the cluster's to say.

mod access;
mod check;
mod delete;
mod follow;
mod list;
mod logs;
mod scale;
mod status;
mod submit;
mod watch;
mod wishes;

pub(crate) use check::check;
pub(crate) use delete::delete;
pub(crate) use list::list;
pub(crate) use logs::logs;
pub(crate) use scale::scale;
pub(crate) use status::status;
pub(crate) use submit::submit;
pub(crate) use watch::watch;
pub(crate) use wishes::{cancel, resume, suspend};
