//! Helpers of the end-to-end tests: an S3 server over HTTP, the built programs, a scratch folder for a test.

mod disk;
mod programs;
mod s3;

pub use disk::SmallDisk;
pub use programs::{Programs, Run};
pub use s3::S3Server;
