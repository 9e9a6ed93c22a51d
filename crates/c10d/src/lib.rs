//! libtorch's own distributed training from Rust: rendezvous store, process groups (Gloo, NCCL), DDP's gradient reducer; and what else
//! tch does not bind: fused optimisers, BatchNorm over ranks, copies that nobody waits for.
//!
//! ```no_run
//! # use sgcl_c10d::*; use std::time::Duration; use tch::{Device, Kind, Tensor};
//! # fn main() -> Result<(), Error> {
//! let timeout = Duration::from_secs(60);
//! let (store, port) = Store::listen("127.0.0.1", 0, timeout)?; // rank 0; the others: Store::connect
//! let generation = store.prefix("generation-1")?;
//! let group = ProcessGroup::gloo(&generation, 0, 1, timeout, &Interface::Address("127.0.0.1".into()))?;
//! let weight = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
//! let reducer = Reducer::new(std::slice::from_ref(&weight), &group, Buckets::default())?;
//! zero_grad(std::slice::from_ref(&weight));
//! reducer.prepare()?;
//! backward(&weight.sum(Kind::Float))?; // weight.grad() is now the mean over ranks
//! # Ok(()) }
//! ```
//!
//! A rank that gets an [`Error`] from a collective drops its [`Reducer`] and its [`ProcessGroup`] at once: closing the connections is
//! what tells the ranks that wait for this one. A new group then stands on the same store under another prefix.
//!
//! This crate holds the workspace's only `unsafe`: calls into the C++ shim of `shim/`, which lets no exception out.

mod copy;
mod error;
mod ffi;
mod group;
pub mod norm;
pub mod optim;
mod reducer;
mod store;

pub use copy::to_device;
pub use error::Error;
pub use group::{Interface, ProcessGroup, Reduce};
pub use reducer::{Buckets, Reducer, backward, zero_grad};
pub use store::Store;
