//! The gRPC contract between coordinator and workers, and what both sides agree on besides.

/// Messages and services of `sgcl.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("sgcl.v1");
}

/// Largest message on either side: a spec is kilobytes, a part list of 10,000 shards a megabyte.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Environment variable of workers: PEM of the authority that signed the coordinator's certificate.
pub const CERTIFICATE_VARIABLE: &str = "SGCL_COORDINATOR_CA";
/// Environment variable of workers: file with the token that opens their streams. Read anew for each.
pub const TOKEN_VARIABLE: &str = "SGCL_TOKEN_FILE";

/// Phase of a rank that waits for the storage to answer. All others wait with it.
pub const WAITING_FOR_STORAGE: &str = "waiting for storage";

/// Exit codes of `sgcl-worker`.
pub mod exit {
    /// Done.
    pub const DONE: u8 = 0;
    /// A bug, or something that trying again may mend.
    pub const INTERNAL: u8 = 70;
    /// Called wrongly; the user's to mend.
    pub const USAGE: u8 = 64;
    /// The data is not what it should be; the user's to mend.
    pub const DATA: u8 = 65;
    /// Storage that is not there, or that these keys do not open; the user's to mend.
    pub const UNAVAILABLE: u8 = 69;
    /// No space left; the user's to mend.
    pub const CANNOT_CREATE: u8 = 73;
    /// The node was told to leave.
    pub const YIELDED: u8 = 75;
    /// The configuration does not fit; the user's to mend.
    pub const CONFIG: u8 = 78;
}
