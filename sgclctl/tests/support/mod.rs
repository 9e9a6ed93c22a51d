//! A run store made by hand, and a browser to look at its report with.
#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub)]

pub mod browser;
pub mod store;
