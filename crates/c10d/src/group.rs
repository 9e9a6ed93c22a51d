//! Process groups: collectives between the ranks of one generation.

use std::ffi::CString;
use std::ptr::{NonNull, null, null_mut};
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use crate::error::{Error, c_string, check, millis};
use crate::{Store, ffi};

/// Where Gloo listens for its peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Interface {
    /// An address or host name of this machine that peers can reach: the pod's address; 127.0.0.1 on one machine.
    Address(String),
    /// A network interface by name, as `ip link` lists it.
    Name(String),
}

/// How an all-reduce combines values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduce {
    /// Sum over ranks.
    Sum,
    /// Largest over ranks.
    Max,
    /// Smallest over ranks.
    Min,
}

/// The ranks of one generation, connected.
///
/// Every rank calls the same collectives in the same order with tensors of the same dtype, on the group's device. Tensors of one rank
/// and a world of one are allowed. No collective is differentiated through.
#[derive(Debug)]
pub struct ProcessGroup {
    pointer: NonNull<ffi::SgclGroup>,
    rank: usize,
    world: usize,
    device: Device,
}

// SAFETY: c10d's backends queue work under a lock of their own; `abort` is meant to be called from another thread.
unsafe impl Send for ProcessGroup {}
// SAFETY: as above.
unsafe impl Sync for ProcessGroup {}

impl ProcessGroup {
    /// A group of CPU tensors over TCP. Returns once all `world` ranks are connected.
    ///
    /// `timeout` bounds this call and every later collective.
    ///
    /// # Errors
    /// A rank does not come in time, the store is gone, or the interface does not exist.
    pub fn gloo(
        store: &Store,
        rank: usize,
        world: usize,
        timeout: Duration,
        interface: &Interface,
    ) -> Result<Self, Error> {
        let operation = "form a Gloo group";
        let (rank_c, world_c) = ranks(operation, rank, world)?;
        let (address, name): (Option<CString>, Option<CString>) = match interface {
            Interface::Address(address) => (Some(c_string(operation, address)?), None),
            Interface::Name(name) => (None, Some(c_string(operation, name)?)),
        };
        let pointer_of = |text: &Option<CString>| text.as_ref().map_or(null(), |text| text.as_ptr());
        let mut out = null_mut();
        check(operation, |message| {
            // SAFETY: the store is alive; one of the two names is given; `out` is set on success.
            unsafe {
                ffi::sgcl_group_gloo(
                    store.as_ptr(),
                    rank_c,
                    world_c,
                    millis(timeout),
                    pointer_of(&address),
                    pointer_of(&name),
                    &raw mut out,
                    message,
                )
            }
        })?;
        Self::owned(operation, out, rank, world, Device::Cpu)
    }

    /// A group of tensors on CUDA device `device`. The communicator is made at the first collective.
    ///
    /// A collective returns once it, and with it all that was queued before, has happened on the device.
    ///
    /// # Errors
    /// No such device, or the store is gone.
    #[cfg(feature = "nccl")]
    pub fn nccl(store: &Store, rank: usize, world: usize, timeout: Duration, device: usize) -> Result<Self, Error> {
        let operation = "form an NCCL group";
        let (rank_c, world_c) = ranks(operation, rank, world)?;
        let device_c =
            i32::try_from(device).map_err(|_| Error::refused(operation, format!("device {device} is out of range")))?;
        let mut out = null_mut();
        check(operation, |message| {
            // SAFETY: the store is alive; `out` is set on success.
            unsafe {
                ffi::sgcl_group_nccl(store.as_ptr(), rank_c, world_c, millis(timeout), device_c, &raw mut out, message)
            }
        })?;
        Self::owned(operation, out, rank, world, Device::Cuda(device))
    }

    /// Bounds every later collective by `timeout` instead.
    ///
    /// # Errors
    /// The backend refuses.
    pub fn set_timeout(&self, timeout: Duration) -> Result<(), Error> {
        // SAFETY: the group is alive.
        check("set a timeout", |message| unsafe {
            ffi::sgcl_group_set_timeout(self.as_ptr(), millis(timeout), message)
        })
    }

    /// This process's place, from 0.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    #[must_use]
    pub fn world(&self) -> usize {
        self.world
    }

    /// Where tensors of this group live.
    #[must_use]
    pub fn device(&self) -> Device {
        self.device
    }

    /// Combines `tensor` over ranks, in place. Same shape on every rank; contiguous.
    ///
    /// # Errors
    /// A peer is gone or late, or the tensor does not fit.
    pub fn all_reduce(&self, tensor: &mut Tensor, reduce: Reduce) -> Result<(), Error> {
        let operation = "all-reduce";
        self.fits(operation, tensor)?;
        if tensor.numel() == 0 {
            return Ok(());
        }
        let op = match reduce {
            Reduce::Sum => 0,
            Reduce::Max => 1,
            Reduce::Min => 2,
        };
        // SAFETY: group and tensor are alive, the tensor is contiguous and the call waits for the result.
        check(operation, |message| unsafe { ffi::sgcl_all_reduce(self.as_ptr(), ffi::tensor(tensor), op, message) })
    }

    /// Concatenates every rank's `(n, …)` along the first dimension: `(world · n, …)`, in rank order. Same shape on every rank.
    ///
    /// # Errors
    /// A peer is gone or late, or the tensor does not fit (a scalar has no first dimension).
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Tensor, Error> {
        let operation = "all-gather";
        let input = tensor.detach().contiguous();
        self.fits(operation, &input)?;
        let mut shape = input.size();
        *first(operation, &mut shape)? *= self.world as i64;
        let output = Tensor::empty(shape, (input.kind(), self.device));
        if output.numel() > 0 {
            // SAFETY: group and tensors are alive and contiguous, the output is `world` inputs large, and the call waits.
            check(operation, |message| unsafe {
                ffi::sgcl_all_gather(self.as_ptr(), ffi::tensor(&output), ffi::tensor(&input), message)
            })?;
        }
        Ok(output)
    }

    /// Every rank's `(n_rank, …)`, in rank order; `n_rank` may differ and may be 0, the other dimensions may not.
    ///
    /// # Errors
    /// As [`ProcessGroup::all_gather`].
    pub fn all_gather_uneven(&self, tensor: &Tensor) -> Result<Vec<Tensor>, Error> {
        let mut shape = tensor.size();
        let rows = *first("all-gather", &mut shape)?;
        let counts = self.all_gather(&Tensor::from_slice(&[rows]).to_device(self.device))?;
        let counts: Vec<i64> = Vec::try_from(counts.to_device(Device::Cpu))
            .map_err(|error| Error::refused("all-gather", format!("cannot read the row counts: {error}")))?;
        let most = counts.iter().copied().max().unwrap_or(0);
        shape[0] = most;
        let padded = Tensor::zeros(shape, (tensor.kind(), tensor.device()));
        padded.narrow(0, 0, rows).copy_(&tensor.detach());
        let all = self.all_gather(&padded)?;
        Ok(counts.iter().zip(0..).map(|(&count, rank)| all.narrow(0, rank * most, count)).collect())
    }

    /// Sums `(world · n, …)` over ranks and returns this rank's `(n, …)` of it.
    ///
    /// # Errors
    /// A peer is gone or late, or the first dimension is no multiple of the world.
    pub fn reduce_scatter(&self, tensor: &Tensor) -> Result<Tensor, Error> {
        let operation = "reduce-scatter";
        let input = tensor.detach().contiguous();
        self.fits(operation, &input)?;
        let mut shape = input.size();
        let rows = first(operation, &mut shape)?;
        if *rows % self.world as i64 != 0 {
            return Err(Error::refused(operation, format!("{rows} rows cannot be dealt to {} ranks", self.world)));
        }
        *rows /= self.world as i64;
        let output = Tensor::empty(shape, (input.kind(), self.device));
        if output.numel() > 0 {
            // SAFETY: group and tensors are alive and contiguous, the input is `world` outputs large, and the call waits.
            check(operation, |message| unsafe {
                ffi::sgcl_reduce_scatter(self.as_ptr(), ffi::tensor(&output), ffi::tensor(&input), message)
            })?;
        }
        Ok(output)
    }

    /// Overwrites `tensor` with rank `root`'s. Same shape on every rank; contiguous.
    ///
    /// # Errors
    /// A peer is gone or late, `root` is no rank, or the tensor does not fit.
    pub fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), Error> {
        let operation = "broadcast";
        self.fits(operation, tensor)?;
        let (root, _) = ranks(operation, root, self.world)?;
        if tensor.numel() == 0 {
            return Ok(());
        }
        // SAFETY: group and tensor are alive, the tensor is contiguous and the call waits.
        check(operation, |message| unsafe { ffi::sgcl_broadcast(self.as_ptr(), ffi::tensor(tensor), root, message) })
    }

    /// Returns once every rank has called it.
    ///
    /// # Errors
    /// A peer is gone or late.
    pub fn barrier(&self) -> Result<(), Error> {
        // SAFETY: the group is alive.
        check("barrier", |message| unsafe { ffi::sgcl_barrier(self.as_ptr(), message) })
    }

    /// Breaks the group's connections at once, from any thread: whoever waits in a collective, here or on a peer, fails within moments,
    /// and so does every later one.
    ///
    /// # Errors
    /// libtorch could not; the group is of no more use either way.
    pub fn abort(&self) -> Result<(), Error> {
        // SAFETY: the group is alive; c10d allows abort beside a running collective.
        check("abort", |message| unsafe { ffi::sgcl_group_abort(self.as_ptr(), message) })
    }

    /// Leaves in good order, after the last collective. Dropping the group does the same.
    ///
    /// # Errors
    /// Work was still under way and failed.
    pub fn shutdown(self) -> Result<(), Error> {
        // SAFETY: the group is alive.
        check("shutdown", |message| unsafe { ffi::sgcl_group_shutdown(self.as_ptr(), message) })
    }

    pub(crate) fn as_ptr(&self) -> *mut ffi::SgclGroup {
        self.pointer.as_ptr()
    }

    fn owned(
        operation: &'static str,
        pointer: *mut ffi::SgclGroup,
        rank: usize,
        world: usize,
        device: Device,
    ) -> Result<Self, Error> {
        let pointer = NonNull::new(pointer).ok_or_else(|| Error::refused(operation, "the shim returned nothing"))?;
        Ok(Self { pointer, rank, world, device })
    }

    /// Refuses here, on every rank alike, what would otherwise fail or hang in the middle of a collective.
    fn fits(&self, operation: &'static str, tensor: &Tensor) -> Result<(), Error> {
        if tensor.device() != self.device {
            return Err(Error::refused(
                operation,
                format!("the tensor is on {:?}, the group on {:?}", tensor.device(), self.device),
            ));
        }
        if tensor.kind() == Kind::Bool {
            return Err(Error::refused(operation, "bool is not reduced or gathered: use uint8"));
        }
        if !tensor.is_contiguous() {
            return Err(Error::refused(operation, "the tensor is not contiguous"));
        }
        Ok(())
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        // SAFETY: the pointer is ours and is not used again; a reducer keeps its own reference.
        unsafe { ffi::sgcl_group_free(self.as_ptr()) }
    }
}

/// Checks `rank < world` and turns both into libtorch's integers.
fn ranks(operation: &'static str, rank: usize, world: usize) -> Result<(i32, i32), Error> {
    match (i32::try_from(rank), i32::try_from(world)) {
        (Ok(rank_c), Ok(world_c)) if rank < world => Ok((rank_c, world_c)),
        _ => Err(Error::refused(operation, format!("rank {rank} is not in a world of {world}"))),
    }
}

fn first<'a>(operation: &'static str, shape: &'a mut [i64]) -> Result<&'a mut i64, Error> {
    shape.first_mut().ok_or_else(|| Error::refused(operation, "a scalar has no first dimension: view it as (1,)"))
}
