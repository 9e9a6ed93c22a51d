//! What can go wrong with what is durable about a run.

use sgcl_patchset::StoreError;

/// A durable object that cannot be read, or a write that must not happen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunStoreError {
    /// The storage.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Not what was written: wrong length or checksum, or not of the format.
    #[error("{object}: damaged: {reason}")]
    Damaged {
        /// Full name of the object.
        object: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Written by a newer sgcl.
    #[error("{object}: format version {version}, this sgcl reads up to {ours}; use the sgcl that wrote it")]
    FutureVersion {
        /// Full name of the object.
        object: String,
        /// Its version.
        version: u32,
        /// Newest version known here.
        ours: u32,
    },
    /// Of a run whose epochs are dealt otherwise.
    #[error(
        "{run}: the run was begun by an earlier sgcl (format {version}, this one's is {ours}), which deals epochs otherwise: resume or verify \
         it with that one, or begin a new run. Its weights can be pulled"
    )]
    PastVersion {
        /// The run.
        run: String,
        /// Its version.
        version: u32,
        /// Version that is written here.
        ours: u32,
    },
    /// Another writer made this commit first: this one must stop.
    #[error(
        "commit {seq} was already made by another writer (generation {generation}, write id {winner}); this one stops"
    )]
    Lost {
        /// Number of the commit.
        seq: u64,
        /// Generation of the winner.
        generation: u64,
        /// Write id of the winner.
        winner: String,
    },
    /// Somebody else coordinates the run by now: this coordinator must stop.
    #[error("{run}: {by} coordinates it now (lease {newest}, this one's was {epoch}); this coordinator stops")]
    Superseded {
        /// The run's URL.
        run: String,
        /// The stale lease.
        epoch: u64,
        /// The newest lease.
        newest: u64,
        /// Who holds that.
        by: String,
    },
    /// A commit that does not follow the one before it.
    #[error("{object}: does not follow commit {expected}: {reason}")]
    BrokenChain {
        /// Full name of the commit.
        object: String,
        /// Number of the parent.
        expected: u64,
        /// What is wrong.
        reason: String,
    },
    /// There are commits, and none can be used.
    #[error("no commit of {run} is intact:\n  {}", skipped.join("\n  "))]
    NoneIntact {
        /// The run's URL.
        run: String,
        /// Each commit with its damage.
        skipped: Vec<String>,
    },
    /// The run exists with another specification.
    #[error("{object}: the run was made with another specification:\n  {}\nresume it as it was, or choose another run name", differences.join("\n  "))]
    SpecDiffers {
        /// Full name of the spec.
        object: String,
        /// Each difference, by key.
        differences: Vec<String>,
    },
    /// A name that cannot be one.
    #[error("{name:?} is not a run name: 1 to 50 of a-z, 0-9 and '-', starting with a letter, not ending with '-'")]
    RunName {
        /// The name.
        name: String,
    },
    /// More than the format allows.
    #[error("{what}: {found}, the limit is {limit}")]
    Limit {
        /// What is too much.
        what: String,
        /// How much there is.
        found: u64,
        /// How much there may be.
        limit: u64,
    },
}

impl RunStoreError {
    pub(crate) fn damaged(object: impl Into<String>, reason: impl std::fmt::Display) -> Self {
        Self::Damaged { object: object.into(), reason: reason.to_string() }
    }

    /// Whether the object itself is bad or gone, so that an older one may serve; false where the storage cannot be used now.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Store(e) => {
                matches!(e, StoreError::NotFound { .. } | StoreError::TooLarge { .. } | StoreError::TooShort { .. })
            }
            Self::Damaged { .. } | Self::FutureVersion { .. } | Self::BrokenChain { .. } | Self::Limit { .. } => true,
            _ => false,
        }
    }
}
