//! Exit codes of `sgclctl`: one list, shown by `--help` and told apart by scripts. The numbers are those of sysexits.h.

use std::fmt::Write as _;
use std::process::ExitCode;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Done = 0,
    /// The run failed, or anything not listed below.
    Failed = 1,
    /// A name, URL or combination of arguments that cannot be.
    Usage = 64,
    /// Input that is missing or damaged.
    Data = 65,
    /// Storage that cannot be used.
    Unavailable = 69,
    /// Output that cannot be written.
    CannotCreate = 73,
    /// Reading or writing failed.
    Io = 74,
    /// Stopped with everything committed.
    Suspended = 75,
    /// A configuration that does not hold together or does not fit.
    Config = 78,
}

/// Codes and what they mean; 2 is clap's own.
const CODES: [(u8, &str); 10] = [
    (Exit::Done as u8, "done"),
    (Exit::Failed as u8, "the run failed, or an error not listed here"),
    (2, "unknown option or missing argument"),
    (Exit::Usage as u8, "a name, URL or combination of arguments that cannot be"),
    (Exit::Data as u8, "input missing or damaged (ingest: slides were skipped, the set holds the rest)"),
    (Exit::Unavailable as u8, "storage unavailable: no such bucket, no credentials, nobody answers"),
    (Exit::CannotCreate as u8, "output cannot be created: it exists already, or the disk is full"),
    (Exit::Io as u8, "reading or writing failed"),
    (Exit::Suspended as u8, "suspended: stopped on request, --resume goes on"),
    (Exit::Config as u8, "the configuration is wrong or does not fit the patch set"),
];

impl Exit {
    /// What a worker's exit code comes to; its codes are ours where both have one.
    pub(crate) fn of_worker(code: i32) -> Self {
        [Self::Usage, Self::Data, Self::Unavailable, Self::CannotCreate, Self::Io, Self::Suspended, Self::Config]
            .into_iter()
            .find(|exit| *exit as i32 == code)
            .unwrap_or(Self::Failed)
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// The list as `--help` shows it.
pub(crate) fn table() -> String {
    CODES.iter().fold("Exit codes:".to_owned(), |mut text, (code, meaning)| {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n  {code:>2}  {meaning}");
        text
    })
}
