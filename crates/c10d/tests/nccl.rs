//! The NCCL group, as far as this machine reaches: with a GPU it reduces, without one it says so.
#![cfg(feature = "nccl")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::time::{Duration, Instant};

use sgcl_c10d::{ProcessGroup, Reduce, Store};
use tch::{Cuda, Device, Tensor};

#[test]
fn a_gpu_reduces_and_is_copied_to_and_no_gpu_is_an_error_that_says_so() {
    let timeout = Duration::from_secs(60);
    let (store, _) = Store::listen("127.0.0.1", 0, timeout).unwrap();
    let group = ProcessGroup::nccl(&store, 0, 1, timeout, 0);
    let host = Tensor::from_slice(&[3_f32, 4.0]);
    let copy = sgcl_c10d::to_device(&host, Device::Cuda(0));
    if !Cuda::is_available() {
        assert!(copy.unwrap_err().to_string().starts_with("copy to a device"));
        let error = group.unwrap_err().to_string();
        assert!(error.starts_with("form an NCCL group") && error.contains("GPU"), "{error}");
        return;
    }
    assert!(copy.unwrap().to_device(Device::Cpu).equal(&host));
    let group = group.unwrap();
    let mut tensor = Tensor::from_slice(&[1_f32, 2.0]).to_device(Device::Cuda(0));
    group.all_reduce(&mut tensor, Reduce::Sum).unwrap();
    group.barrier().unwrap();
    assert_eq!(Vec::<f32>::try_from(tensor.to_device(Device::Cpu)).unwrap(), [1.0, 2.0]);

    let began = Instant::now();
    (0..1000).for_each(|_| group.all_reduce(&mut tensor, Reduce::Sum).unwrap());
    println!("a small all-reduce of one rank takes {:.1} µs, waited for", began.elapsed().as_secs_f64() * 1e3);

    group.abort().unwrap();
    let error = group.all_reduce(&mut tensor, Reduce::Sum).unwrap_err();
    assert!(error.regroup_may_help(), "{error}");
}
