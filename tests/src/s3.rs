//! An S3 server over HTTP, in process, on a free port of 127.0.0.1: s3s over a folder.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// Keys that this server alone accepts.
const ACCESS_KEY: &str = "sgcl-test";
const SECRET_KEY: &str = "sgcl-test-secret";

/// A running server; it ends when dropped.
pub struct S3Server {
    address: SocketAddr,
    // Dropping the runtime ends the accept loop and every connection.
    _runtime: Runtime,
}

impl S3Server {
    /// Serves `folder`; every folder directly in it is a bucket.
    ///
    /// # Errors
    /// When the folder cannot be used or no port can be bound.
    pub fn start(folder: &Path, buckets: &[&str]) -> Result<Self> {
        for bucket in buckets {
            std::fs::create_dir_all(folder.join(bucket)).with_context(|| format!("cannot create bucket {bucket}"))?;
        }
        let files = s3s_fs::FileSystem::new(folder).map_err(|e| anyhow::anyhow!("{e:?}"))?;
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let service = service.build();
        let runtime = Runtime::new()?;
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    // A client that hangs up is its own affair.
                    let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Ok(Self { address, _runtime: runtime })
    }

    /// The variables that the AWS tools, and we, read.
    #[must_use]
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL", format!("http://{}", self.address)),
            ("AWS_REGION", "us-east-1".into()),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.into()),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.into()),
        ]
    }
}
