//! Where text goes: data to standard output, everything else to standard error.

use std::io::{IsTerminal, Write};

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;

use crate::progress::bars;

/// For people or for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Text and tables
    Human,
    /// JSON; one object a line where there is progress
    Json,
}

/// How this call talks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Out {
    pub(crate) format: Option<Format>,
    pub(crate) quiet: bool,
}

impl Out {
    /// Whether results are JSON.
    pub(crate) fn json(self) -> bool {
        self.format == Some(Format::Json)
    }

    /// Whether progress is JSON lines: when asked for, or when nobody sits at a terminal.
    pub(crate) fn json_progress(self) -> bool {
        self.json() || (self.format.is_none() && !std::io::stdout().is_terminal())
    }

    /// A line of data.
    pub(crate) fn data(self, text: impl std::fmt::Display) -> Result<()> {
        bars().suspend(|| writeln!(std::io::stdout().lock(), "{text}"))?;
        Ok(())
    }

    /// A JSON object on a line of its own.
    pub(crate) fn json_line(self, value: &impl Serialize) -> Result<()> {
        self.data(serde_json::to_string(value)?)
    }

    /// A remark; nothing is lost without it.
    pub(crate) fn note(self, text: impl std::fmt::Display) {
        if !self.quiet {
            warn(text);
        }
    }
}

/// A line on standard error, even when quiet.
pub(crate) fn warn(text: impl std::fmt::Display) {
    // Standard error is gone: nobody is left to tell.
    let _ = bars().suspend(|| writeln!(std::io::stderr().lock(), "{text}"));
}

/// `4 min 10 s`.
pub(crate) fn span(seconds: f64) -> String {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let s = seconds.max(0.0).round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {:02} h", s / 86_400, s % 86_400 / 3600),
    }
}

/// `12,345`.
pub(crate) fn count(n: impl TryInto<u64>) -> String {
    indicatif::HumanCount(n.try_into().unwrap_or(u64::MAX)).to_string()
}

/// A share as a percentage with one decimal.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}
