//! The NCCL group, as far as this machine reaches: with a GPU it reduces, without one it says so.
#![cfg(feature = "nccl")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use sgcl_c10d::{ProcessGroup, Reduce, Store};
use tch::{Cuda, Device, Tensor};

#[test]
fn a_group_of_one_gpu_reduces_and_no_gpu_is_an_error_that_says_so() {
    let timeout = Duration::from_secs(60);
    let (store, _) = Store::listen("127.0.0.1", 0, timeout).unwrap();
    let group = ProcessGroup::nccl(&store, 0, 1, timeout, 0);
    if !Cuda::is_available() {
        let error = group.unwrap_err().to_string();
        assert!(error.starts_with("form an NCCL group") && error.contains("GPU"), "{error}");
        return;
    }
    let group = group.unwrap();
    let mut tensor = Tensor::from_slice(&[1_f32, 2.0]).to_device(Device::Cuda(0));
    group.all_reduce(&mut tensor, Reduce::Sum).unwrap();
    group.barrier().unwrap();
    assert_eq!(Vec::<f32>::try_from(tensor.to_device(Device::Cpu)).unwrap(), [1.0, 2.0]);
}
