//! A world of threads in one process, for tests and measurements without processes.

use std::sync::{Arc, Barrier, Mutex, PoisonError};

use super::{Collective, CollectiveError};
use tch::{Kind, Tensor};

/// One rank of a world of threads.
#[derive(Clone, Debug)]
pub struct Threads {
    rank: usize,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    slots: Vec<Mutex<Option<Tensor>>>,
    barrier: Barrier,
    /// Bytes that each rank has sent, as ring algorithms would.
    sent: Vec<Mutex<u64>>,
}

impl Threads {
    /// The ranks of a world; give each to a thread of its own.
    #[must_use]
    pub fn world(size: usize) -> Vec<Self> {
        let shared = Arc::new(Shared {
            slots: (0..size).map(|_| Mutex::new(None)).collect(),
            barrier: Barrier::new(size),
            sent: (0..size).map(|_| Mutex::new(0)).collect(),
        });
        (0..size).map(|rank| Self { rank, shared: Arc::clone(&shared) }).collect()
    }

    /// Bytes this rank has sent since the last call, counted as ring algorithms send them: (W − 1)/W of the whole for a gather or a
    /// scatter, twice that for an all-reduce.
    #[must_use]
    pub fn take_sent(&self) -> u64 {
        std::mem::take(&mut *self.shared.sent[self.rank].lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn count(&self, times: u64, whole: usize) {
        let world = self.world() as u64;
        let bytes = times * whole as u64 * (world - 1) / world;
        *self.shared.sent[self.rank].lock().unwrap_or_else(PoisonError::into_inner) += bytes;
    }

    /// Every rank's tensor, in rank order.
    fn exchange(&self, tensor: &Tensor) -> Vec<Tensor> {
        let put = |value| *self.shared.slots[self.rank].lock().unwrap_or_else(PoisonError::into_inner) = value;
        put(Some(tensor.detach().copy()));
        self.shared.barrier.wait();
        let all =
            self.shared.slots.iter().filter_map(|slot| {
                slot.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Tensor::shallow_clone)
            });
        let all: Vec<Tensor> = all.collect();
        self.shared.barrier.wait();
        put(None);
        all
    }
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world(&self) -> usize {
        self.shared.slots.len()
    }

    fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, CollectiveError> {
        self.all_gather_uneven(tensor)
    }

    fn all_gather_uneven(&self, tensor: &Tensor) -> Result<Tensor, CollectiveError> {
        let all = Tensor::cat(&self.exchange(tensor), 0);
        self.count(1, bytes(&all));
        Ok(all)
    }

    fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<(), CollectiveError> {
        let all = self.exchange(tensor);
        let sum = Tensor::stack(&all, 0).sum_dim_intlist([0_i64].as_slice(), false, tensor.kind());
        tch::no_grad(|| tensor.copy_(&sum));
        self.count(2, bytes(tensor));
        Ok(())
    }

    fn reduce_scatter(&self, tensor: &Tensor) -> Result<Tensor, CollectiveError> {
        let (world, rows) = (self.world() as i64, tensor.size()[0]);
        if rows % world != 0 {
            let what = format!("{rows} rows for {world} ranks");
            return Err(CollectiveError::Argument { operation: "reduce-scatter", what });
        }
        let (part, kind) = (rows / world, tensor.kind());
        let all: Vec<Tensor> =
            self.exchange(tensor).iter().map(|one| one.narrow(0, self.rank as i64 * part, part)).collect();
        self.count(1, bytes(tensor));
        Ok(Tensor::stack(&all, 0).sum_dim_intlist([0_i64].as_slice(), false, kind))
    }

    fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), CollectiveError> {
        let all = self.exchange(tensor);
        let Some(from) = all.get(root) else {
            let what = format!("root {root} in a world of {}", self.world());
            return Err(CollectiveError::Argument { operation: "broadcast", what });
        };
        tch::no_grad(|| tensor.copy_(from));
        self.count(1, bytes(from));
        Ok(())
    }

    fn barrier(&self) -> Result<(), CollectiveError> {
        let _ = self.exchange(&Tensor::zeros([1], (Kind::Float, tch::Device::Cpu)));
        Ok(())
    }
}
