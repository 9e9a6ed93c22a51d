//! Patch sets: what ingest writes, training reads and `sgclctl` shows.
//!
//! | step | module |
//! |---|---|
//! | where sets live | [`store`] |
//! | the format on storage | [`manifest`], [`index`] |
//! | from slides, images and tiles | [`ingest`] |
//! | writing one, resumable slide by slide | [`writer`], [`lattice`] |
//! | opening one, or some of its slides | [`set`], [`split`], [`labelled`] |
//! | the order of an epoch | [`plan`] |
//! | reading patches | [`reader`], [`cache`], [`decode`] |

pub mod cache;
pub mod decode;
pub mod index;
pub mod ingest;
pub mod labelled;
pub mod lattice;
pub mod manifest;
pub mod plan;
pub mod reader;
pub mod set;
pub mod split;
pub mod store;
pub mod writer;

pub use cache::CacheOptions;
pub use decode::{DecodeError, Rgb8, decode};
pub use index::{Index, IndexError};
pub use labelled::Labelled;
pub use manifest::{Manifest, ManifestError};
pub use plan::{EpochPlan, PlanError};
pub use reader::{ReadError, ShardReader};
pub use set::{NoSuchSlide, OpenError, PatchSet, Subset};
pub use split::{Split, SplitError, split};
pub use store::{Created, Listed, Store, StoreError, faults};
pub use writer::{Opened, PatchSetWriter, SlideInfo, SlideWriter, WriteError, WriterOptions, object_name};
