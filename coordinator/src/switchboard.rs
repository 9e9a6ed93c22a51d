//! Runs behind one port: a stream says in its hello which run it belongs to, and is put through to that run's coordinator.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::mpsc;
use tonic::Status;

use crate::streams::Input;

/// Who coordinates which run in this process. Cheap to clone.
#[derive(Clone, Default)]
pub struct Switchboard {
    lines: Arc<RwLock<BTreeMap<String, mpsc::Sender<Input>>>>,
    /// Set where there will never be another run.
    only: Option<String>,
}

impl Switchboard {
    /// For one run: streams of others are refused for good.
    #[must_use]
    pub fn only(run: &str) -> Self {
        Self { only: Some(run.to_owned()), ..Self::default() }
    }

    /// Puts a run's streams through, until what is returned is dropped.
    pub(crate) fn plug(&self, run: &str, inputs: mpsc::Sender<Input>) -> Plug {
        self.lines.write().unwrap_or_else(PoisonError::into_inner).insert(run.to_owned(), inputs.clone());
        Plug { board: self.clone(), run: run.to_owned(), inputs }
    }

    /// Where a run's streams go.
    ///
    /// # Errors
    /// A run that is not coordinated here: for good, or just now.
    pub(crate) fn find(&self, run: &str) -> Result<mpsc::Sender<Input>, Status> {
        match &self.only {
            Some(only) if only != run => {
                Err(Status::permission_denied(format!("this coordinator is run {only}'s, not {run}'s")))
            }
            _ => {
                let lines = self.lines.read().unwrap_or_else(PoisonError::into_inner);
                lines
                    .get(run)
                    .cloned()
                    .ok_or_else(|| Status::unavailable(format!("run {run} is not coordinated here now")))
            }
        }
    }
}

/// A run that is plugged in.
pub(crate) struct Plug {
    board: Switchboard,
    run: String,
    inputs: mpsc::Sender<Input>,
}

impl Drop for Plug {
    fn drop(&mut self) {
        let mut lines = self.board.lines.write().unwrap_or_else(PoisonError::into_inner);
        // The next coordinator of this run may have plugged in already.
        if lines.get(&self.run).is_some_and(|inputs| inputs.same_channel(&self.inputs)) {
            lines.remove(&self.run);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    fn code(board: &Switchboard, run: &str) -> Option<Code> {
        board.find(run).err().map(|status| status.code())
    }

    #[test]
    fn a_run_is_found_while_it_is_plugged_in_and_tried_again_afterwards() {
        let board = Switchboard::default();
        let (inputs, _received) = mpsc::channel(1);
        let plug = board.plug("first", inputs);
        assert_eq!(code(&board, "first"), None);
        let (newer, _received) = mpsc::channel(1);
        let next = board.plug("first", newer);
        drop(plug);
        assert_eq!(code(&board, "first"), None, "the next one is not unplugged with the last");
        drop(next);
        assert_eq!(code(&board, "first"), Some(Code::Unavailable));
    }

    #[test]
    fn where_there_is_one_run_for_good_others_are_refused_for_good() {
        let board = Switchboard::only("first");
        assert_eq!(code(&board, "second"), Some(Code::PermissionDenied));
        assert_eq!(code(&board, "first"), Some(Code::Unavailable));
    }
}
