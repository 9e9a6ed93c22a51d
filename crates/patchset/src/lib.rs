//! Patch sets: what ingest writes, training reads and `sgclctl` shows.

pub mod store;

pub use store::{Created, Listed, Store, StoreError};
