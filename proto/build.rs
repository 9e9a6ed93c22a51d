//! Compiles the contract without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=sgcl/v1/coordinator.proto");
    let files = protox::compile(["sgcl/v1/coordinator.proto"], ["."])?;
    tonic_prost_build::configure().compile_fds(files)?;
    Ok(())
}
