//! The ring as the method sees it: [`Collective`] over libtorch's process group.

use std::sync::Arc;

use sgcl::collective::{Collective, CollectiveError};
use sgcl_c10d::{Error, ProcessGroup, Reduce};
use tch::Tensor;

/// The ranks of this generation, connected.
pub(crate) struct Ring(pub(crate) Arc<ProcessGroup>);

impl Ring {
    fn failed(&self, operation: &'static str) -> impl Fn(Error) -> CollectiveError {
        let (rank, world) = (self.0.rank(), self.0.world());
        move |error| CollectiveError::Backend { operation, rank, world, reason: error.to_string() }
    }
}

impl Collective for Ring {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn world(&self) -> usize {
        self.0.world()
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, CollectiveError> {
        self.0.all_gather(tensor).map_err(self.failed("all-gather"))
    }

    fn all_gather_uneven(&self, tensor: &Tensor) -> Result<Tensor, CollectiveError> {
        let parts = self.0.all_gather_uneven(tensor).map_err(self.failed("all-gather"))?;
        Ok(Tensor::cat(&parts, 0))
    }

    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<(), CollectiveError> {
        self.0.all_reduce(tensor, Reduce::Sum).map_err(self.failed("all-reduce"))
    }

    fn reduce_scatter(&self, tensor: &Tensor) -> Result<Tensor, CollectiveError> {
        self.0.reduce_scatter(tensor).map_err(self.failed("reduce-scatter"))
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), CollectiveError> {
        self.0.broadcast(tensor, root).map_err(self.failed("broadcast"))
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        self.0.barrier().map_err(self.failed("barrier"))
    }
}
