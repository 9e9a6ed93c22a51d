//! From any error to what the user sees: `error:` what and where, `hint:` what to do, and an exit code.

use std::error::Error as StdError;
use std::io::ErrorKind;

use sgcl_patchset::ingest::IngestError;
use sgcl_patchset::{IndexError, ManifestError, OpenError, ReadError, StoreError, WriteError};
use sgcl_phantom::PhantomError;
use sgcl_runstore::export::ExportError;
use sgcl_runstore::features::FeaturesError;
use sgcl_runstore::{ConfigError, NamedSetError, RunStoreError};

use crate::exit::Exit;

/// A failure of our own, complete with its remedy.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    exit: Exit,
    message: String,
    hint: Option<String>,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), hint: None }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// An error, ready to be shown.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) exit: Exit,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

/// What to say about `error`, and how to exit.
pub(crate) fn tell(error: &anyhow::Error) -> Told {
    let message = joined(error);
    if let Some(failure) = error.chain().find_map(|cause| cause.downcast_ref::<Failure>()) {
        return Told { exit: failure.exit, message, hint: failure.hint.clone() };
    }
    let Some((exit, hint)) = error.chain().find_map(known) else {
        return Told { exit: Exit::Failed, message, hint: None };
    };
    if let Some(hint) = hint {
        return Told { exit, message, hint: Some(hint.to_owned()) };
    }
    let (message, hint) = split_remedy(&message);
    Told { exit, message, hint }
}

/// The causes from outside in, without those whose text the one before repeats.
fn joined(error: &anyhow::Error) -> String {
    let mut message = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if message.is_empty() {
            message = cause;
        } else if !message.contains(&cause) {
            message = format!("{message}: {cause}");
        }
    }
    message
}

/// Our libraries end a message with its remedy: behind a line `hint:`, or behind the last semicolon of a single line.
fn split_remedy(message: &str) -> (String, Option<String>) {
    let parted = match message.rsplit_once("\nhint: ") {
        Some(parted) => Some(parted),
        None if message.contains('\n') => None,
        None => message.rsplit_once("; "),
    };
    match parted {
        Some((what, remedy)) => (what.trim_end().to_owned(), Some(remedy.trim_start_matches("hint: ").to_owned())),
        None => (message.to_owned(), None),
    }
}

type Known = (Exit, Option<&'static str>);

const FULL: &str = "free some space, or write to another place";

fn known(cause: &(dyn StdError + 'static)) -> Option<Known> {
    if let Some(e) = cause.downcast_ref::<ConfigError>() {
        return Some(config(e));
    }
    if let Some(e) = cause.downcast_ref::<NamedSetError>() {
        return Some(match e {
            NamedSetError::Config(e) => config(e),
            NamedSetError::Store(e) => store(e),
            _ => (Exit::Config, None),
        });
    }
    if let Some(e) = cause.downcast_ref::<StoreError>() {
        return Some(store(e));
    }
    if let Some(e) = cause.downcast_ref::<RunStoreError>() {
        return Some(run_store(e));
    }
    if let Some(e) = cause.downcast_ref::<ExportError>() {
        return Some(match e {
            ExportError::Run(e) => run_store(e),
            ExportError::Occupied { .. } => (Exit::CannotCreate, None),
            ExportError::Io { source, .. } => io(source.kind()),
            _ => (Exit::Data, None),
        });
    }
    if let Some(e) = cause.downcast_ref::<FeaturesError>() {
        return Some(match e {
            FeaturesError::Settings { .. } => (Exit::CannotCreate, None),
            FeaturesError::Store(e) => store(e),
            FeaturesError::Record(e) => run_store(e),
            _ => (Exit::Failed, None),
        });
    }
    if let Some(e) = cause.downcast_ref::<OpenError>() {
        return Some(match e {
            OpenError::Manifest(ManifestError::Store(e)) | OpenError::Index(IndexError::Store(e)) => store(e),
            OpenError::Store(e) => store(e),
            _ => (Exit::Data, None),
        });
    }
    if let Some(e) = cause.downcast_ref::<ReadError>() {
        return Some(match e {
            ReadError::Store(e) => store(e),
            ReadError::File { source, .. } => io(source.kind()),
            _ => (Exit::Data, None),
        });
    }
    if let Some(e) = cause.downcast_ref::<IngestError>() {
        return Some(match e {
            IngestError::Write(e) => write(e),
            IngestError::Setting(_) | IngestError::Twins { .. } => (Exit::Usage, None),
            IngestError::Io { source, .. } => io(source.kind()),
            IngestError::Crashed { .. } => (Exit::Failed, None),
            _ => (Exit::Data, None),
        });
    }
    if let Some(e) = cause.downcast_ref::<PhantomError>() {
        return Some(match e {
            PhantomError::Io { source, .. } => io(source.kind()),
            PhantomError::Side(_) | PhantomError::Field { .. } | PhantomError::Series(_) => (Exit::Usage, None),
            _ => (Exit::Io, None),
        });
    }
    if let Some(e) = cause.downcast_ref::<WriteError>() {
        return Some(write(e));
    }
    cause.downcast_ref::<std::io::Error>().map(|e| io(e.kind()))
}

fn write(error: &WriteError) -> Known {
    match error {
        WriteError::Store(e) | WriteError::Manifest(ManifestError::Store(e)) => store(e),
        WriteError::Settings { .. } | WriteError::Committed { .. } => (Exit::CannotCreate, None),
        WriteError::Scratch { source, .. } => io(source.kind()),
        _ => (Exit::Data, None),
    }
}

fn store(error: &StoreError) -> Known {
    match error {
        StoreError::BadUrl { .. } => (Exit::Usage, None),
        StoreError::Profile { .. } => (Exit::Config, None),
        StoreError::NotFound { .. } | StoreError::TooLarge { .. } | StoreError::TooShort { .. } => (Exit::Data, None),
        StoreError::NoSpace { .. } => (Exit::CannotCreate, None),
        StoreError::NoBucket { .. }
        | StoreError::NoCredentials { .. }
        | StoreError::Denied { .. }
        | StoreError::Unreachable { .. }
        | StoreError::Unsettled { .. } => (Exit::Unavailable, None),
        StoreError::LocalFile { source, .. } | StoreError::Unreadable { source, .. } => io(source.kind()),
        _ => (Exit::Io, None),
    }
}

fn run_store(error: &RunStoreError) -> Known {
    match error {
        RunStoreError::Store(e) => store(e),
        RunStoreError::RunName { .. } => (Exit::Usage, None),
        RunStoreError::SpecDiffers { .. } => (Exit::Config, Some("--name starts another run beside it")),
        RunStoreError::PastVersion { .. } => (Exit::Config, Some("`sgclctl pull` fetches what it has exported")),
        RunStoreError::Superseded { .. } => (Exit::Failed, Some("watch it with `sgclctl status`; nothing was lost")),
        RunStoreError::Lost { .. } => (Exit::Failed, Some("end one of the two sgclctl that train this run")),
        _ => (Exit::Data, None),
    }
}

fn config(error: &ConfigError) -> Known {
    match error {
        ConfigError::Invalid(_) => (Exit::Config, Some("`sgclctl config schema` lists every key with its range")),
        ConfigError::DoesNotFit { .. } => {
            (Exit::Config, Some("change these with --set key=value, or ingest more slides"))
        }
        _ => (Exit::Config, None),
    }
}

fn io(kind: ErrorKind) -> Known {
    match kind {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => (Exit::CannotCreate, Some(FULL)),
        ErrorKind::AlreadyExists | ErrorKind::ReadOnlyFilesystem => (Exit::CannotCreate, None),
        _ => (Exit::Io, None),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn the_remedy_of_a_library_message_becomes_the_hint() {
        let error = anyhow::Error::from(StoreError::NotFound { object: "s3://b/x".into() });
        let told = tell(&error);
        assert_eq!(told.exit, Exit::Data);
        assert_eq!(told.message, "s3://b/x: not found");
        assert_eq!(told.hint.as_deref(), Some("check the URL"));
    }

    #[test]
    fn a_full_disk_is_named_once_and_says_what_to_do() {
        let full = std::io::Error::from(ErrorKind::StorageFull);
        let error = Err::<(), _>(full).context("report.html").unwrap_err();
        let told = tell(&error);
        assert_eq!((told.exit, told.hint.as_deref()), (Exit::CannotCreate, Some(FULL)));
        assert_eq!(told.message.matches("report.html").count(), 1);
    }

    #[test]
    fn what_nobody_knows_exits_with_one() {
        assert_eq!(tell(&anyhow::anyhow!("odd")).exit, Exit::Failed);
    }
}
