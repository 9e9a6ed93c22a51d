//! Patch sets: what ingest writes, training reads and `sgclctl` shows.

pub mod index;
pub mod lattice;
pub mod manifest;
pub mod store;
pub mod writer;

pub use index::{Index, IndexError};
pub use manifest::{Manifest, ManifestError};
pub use store::{Created, Listed, Store, StoreError};
pub use writer::{Opened, PatchSetWriter, SlideInfo, SlideWriter, WriteError, WriterOptions};
