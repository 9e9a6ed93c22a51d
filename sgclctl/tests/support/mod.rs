//! A run store made by hand, and a browser to look at its report with.
// Each test uses a part of it.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, unreachable_pub)]

pub mod browser;
pub mod store;
