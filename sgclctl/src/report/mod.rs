//! A run's report: one HTML file that needs nothing beside it.
//!
//! [`data`] gathers what the bucket and the patch set know, [`page`] makes it into what the template shows.

mod bank;
mod charts;
mod data;
mod evaluation;
mod page;
mod pictures;
mod roc;
mod segmentation;
mod slides;

pub(crate) use data::{Facts, Wanted};
pub(crate) use evaluation::EvalPage;
pub(crate) use page::Page;
pub(crate) use segmentation::SegmentationPage;
