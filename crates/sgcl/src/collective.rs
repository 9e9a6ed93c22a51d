//! What the method needs of the other ranks. The worker implements it over c10d; [`Solo`] is a world of one.

mod threads;

pub use threads::Threads;

use tch::Tensor;

/// A collective operation failed.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// The backend reported a failure: a lost peer, a time-out, an aborted group.
    #[error("{operation} among {world} ranks failed on rank {rank}: {reason}; the ranks must form a new generation")]
    Backend {
        /// Which operation.
        operation: &'static str,
        /// This rank.
        rank: usize,
        /// Ranks of the group.
        world: usize,
        /// The backend's own text.
        reason: String,
    },
    /// A tensor or root that the operation cannot take.
    #[error(
        "{operation} was given {what}; every rank must call it with agreeing shapes and a root below the world size"
    )]
    Argument {
        /// Which operation.
        operation: &'static str,
        /// What was wrong.
        what: String,
    },
}

/// Operations every rank of a generation calls together, in the same order.
pub trait Collective: Send {
    /// This rank, 0 ≤ rank < world.
    fn rank(&self) -> usize;
    /// Ranks of the group, at least 1.
    fn world(&self) -> usize;
    /// Tensors of equal shape, concatenated on dim 0 in rank order: (n, …) to (world·n, …).
    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, CollectiveError>;
    /// Like [`Collective::all_gather`] where dim 0 may differ between ranks (0 is allowed).
    fn all_gather_uneven(&self, tensor: &Tensor) -> Result<Tensor, CollectiveError>;
    /// Sum over ranks, in place.
    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<(), CollectiveError>;
    /// Sum over ranks; this rank keeps its equal part of dim 0: (world·n, …) to (n, …).
    fn reduce_scatter(&self, tensor: &Tensor) -> Result<Tensor, CollectiveError>;
    /// Overwrites `tensor` on every rank with the root's.
    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), CollectiveError>;
    /// Returns once every rank has called it.
    fn barrier(&self) -> Result<(), CollectiveError>;
}

/// A world of one rank.
#[derive(Clone, Copy, Debug, Default)]
pub struct Solo;

impl Collective for Solo {
    fn rank(&self) -> usize {
        0
    }
    fn world(&self) -> usize {
        1
    }
    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, CollectiveError> {
        Ok(tensor.copy())
    }
    fn all_gather_uneven(&self, tensor: &Tensor) -> Result<Tensor, CollectiveError> {
        Ok(tensor.copy())
    }
    fn all_reduce_sum(&self, _tensor: &mut Tensor) -> Result<(), CollectiveError> {
        Ok(())
    }
    fn reduce_scatter(&self, tensor: &Tensor) -> Result<Tensor, CollectiveError> {
        Ok(tensor.copy())
    }
    fn broadcast(&self, _tensor: &mut Tensor, root: usize) -> Result<(), CollectiveError> {
        if root == 0 {
            return Ok(());
        }
        Err(CollectiveError::Argument { operation: "broadcast", what: format!("root {root} in a world of 1") })
    }
    fn barrier(&self) -> Result<(), CollectiveError> {
        Ok(())
    }
}
