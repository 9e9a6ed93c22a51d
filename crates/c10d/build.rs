//! Compiles the C++ shim against libtorch's headers.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=shim");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let libtorch = match env::var("LIBTORCH") {
        Ok(path) if Path::new(&path).join("include/torch/csrc/distributed/c10d/reducer.hpp").exists() => {
            PathBuf::from(path)
        }
        Ok(path) => panic!("LIBTORCH={path} holds no libtorch 2.11 with c10d's headers: run `make setup`"),
        Err(_) => panic!("LIBTORCH is not set: run `make setup`, which installs libtorch and tells cargo where it is"),
    };
    let mut shim = cc::Build::new();
    shim.cpp(true)
        .std("c++17")
        .warnings(false)
        .include("shim")
        .include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"))
        .define("USE_DISTRIBUTED", None)
        .define("USE_C10D_GLOO", None)
        .files([
            "shim/store.cpp",
            "shim/group.cpp",
            "shim/reducer.cpp",
            "shim/optim.cpp",
            "shim/norm.cpp",
            "shim/copy.cpp",
        ]);
    if env::var_os("CARGO_FEATURE_NCCL").is_some() {
        shim.define("USE_C10D_NCCL", None).define("USE_CUDA", None).includes(cuda_headers()).include("shim/cuda_math");
    }
    shim.compile("sgcl_c10d");

    let lib = libtorch.join("lib");
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    if env::var_os("CARGO_FEATURE_NCCL").is_some() {
        println!("cargo:rustc-link-lib=torch_cuda");
        println!("cargo:rustc-link-lib=c10_cuda");
    }
    // For this crate's own tests. A binary that uses tch has the same line in its build.rs: cargo passes it to no one else.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}

/// The folders of `SGCL_CUDA_INCLUDE` (colon-separated): nccl.h, the CUDA runtime's headers and CCCL's.
fn cuda_headers() -> Vec<PathBuf> {
    println!("cargo:rerun-if-env-changed=SGCL_CUDA_INCLUDE");
    let folders: Vec<PathBuf> = env::var_os("SGCL_CUDA_INCLUDE").iter().flat_map(env::split_paths).collect();
    for header in ["nccl.h", "cuda_runtime_api.h", "crt/host_defines.h"] {
        assert!(
            folders.iter().any(|folder| folder.join(header).exists()),
            "no folder of SGCL_CUDA_INCLUDE holds {header}: run `scripts/setup --nccl`"
        );
    }
    folders
}
