//! Waiting for the storage without being taken for dead.
//!
//! A rank that waits leaves with a generation that breaks off, and as long as a request to the storage is what it waits for, it says
//! so: silence means a hang, and gets it restarted.

use std::time::{Duration, Instant};

use anyhow::Result;
use sgcl_patchset::Store;
use sgcl_proto::{WAITING_FOR_STORAGE, v1};
use tokio::runtime::Handle;

use crate::session::Session;

/// Between two looks at the coordinator's line.
pub(crate) const LOOK: Duration = Duration::from_millis(2);
/// Between two signs of life. The first comes after a wait that is worth a word.
const SIGN: Duration = Duration::from_millis(500);

/// One wait.
pub(crate) struct Wait<'a> {
    session: &'a Session,
    store: Store,
    position: v1::Progress,
    told: Instant,
}

impl<'a> Wait<'a> {
    /// For `store`, at `position`.
    pub(crate) fn new(session: &'a Session, store: &Store, position: v1::Progress) -> Self {
        let position = v1::Progress { phase: WAITING_FOR_STORAGE.into(), ..position };
        Self { session, store: store.clone(), position, told: Instant::now() }
    }

    /// To be called again and again.
    ///
    /// # Errors
    /// The generation was broken off.
    pub(crate) fn look(&mut self) -> Result<()> {
        self.session.check()?;
        if self.told.elapsed() >= SIGN && self.store.is_busy() {
            self.told = Instant::now();
            self.session.progress(self.position.clone());
        }
        Ok(())
    }

    /// Runs `work` to its end.
    ///
    /// # Errors
    /// The generation was broken off before.
    pub(crate) fn block_on<T>(&mut self, runtime: &Handle, work: impl Future<Output = T>) -> Result<T> {
        runtime.block_on(async {
            tokio::pin!(work);
            loop {
                if let Ok(done) = tokio::time::timeout(LOOK, &mut work).await {
                    return Ok(done);
                }
                self.look()?;
            }
        })
    }
}
