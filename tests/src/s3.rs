//! An S3 server over HTTP, in process, on a free port of 127.0.0.1: s3s over a folder, with faults where a test wants them.

mod faulty;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::Body;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use sgcl_patchset::Store;
use sgcl_patchset::faults::{FaultPlan, Faults};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use faulty::Faulty;

/// Keys that this server alone accepts.
const ACCESS_KEY: &str = "sgcl-test";
const SECRET_KEY: &str = "sgcl-test-secret";

/// A running server; it ends when dropped.
pub struct S3Server {
    address: SocketAddr,
    faults: Faults,
    // Dropping the runtime ends the accept loop and every connection. None once it is being dropped.
    runtime: Option<Runtime>,
}

impl S3Server {
    /// Serves `folder`; every folder directly in it is a bucket.
    ///
    /// # Errors
    /// When the folder cannot be used or no port can be bound.
    pub fn start(folder: &Path, buckets: &[&str]) -> Result<Self> {
        Self::start_faulty(folder, buckets, FaultPlan::default())
    }

    /// The same with requests that fail by `plan`: answers of 500 and 503, none at all, late ones, connections that close after
    /// the request was carried out, conflicts, bodies that end early, a full disk, outages. What fails can be changed at any time
    /// through [`S3Server::faults`].
    ///
    /// # Errors
    /// As [`S3Server::start`].
    pub fn start_faulty(folder: &Path, buckets: &[&str], plan: FaultPlan) -> Result<Self> {
        for bucket in buckets {
            std::fs::create_dir_all(folder.join(bucket)).with_context(|| format!("cannot create bucket {bucket}"))?;
        }
        let files = s3s_fs::FileSystem::new(folder).map_err(|e| anyhow::anyhow!("{e:?}"))?;
        let mut service = S3ServiceBuilder::new(files);
        service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let faults = Faults::new(plan);
        let faulty = Faulty {
            service: service.build(),
            faults: faults.clone(),
            creating: Arc::default(),
            ended: Arc::default(),
        };
        let runtime = Runtime::new()?;
        // Bound without waiting, so that a test may be async itself.
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let inside = runtime.enter();
        let listener = TcpListener::from_std(listener)?;
        drop(inside);
        runtime.spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let faulty = faulty.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                        faulty.clone().call(request.map(Body::from))
                    });
                    // A client that hangs up is its own affair, and a connection that closes without an answer one of the faults.
                    let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Ok(Self { address, faults, runtime: Some(runtime) })
    }

    /// What fails: `faults().outage(true)`, `faults().next(Op::Create, Fault::Lost)`, `faults().set(plan)`.
    #[must_use]
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// A place on this server, such as `s3://lab/runs`. Programs find it by [`S3Server::environment`].
    ///
    /// # Errors
    /// Not such a URL.
    pub fn store(&self, url: &str) -> Result<Store> {
        let environment = self.environment();
        let value = |name: &str| environment.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
        Ok(Store::open_with_env(url, &value)?)
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

impl Drop for S3Server {
    /// Ends it from within another runtime too, where a runtime cannot be waited for.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
