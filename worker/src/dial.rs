//! How nodes and ranks reach the coordinator: over TLS where its URL is https, with the token that the kubelet keeps fresh.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sgcl_proto::v1::coordinator_client::CoordinatorClient;
use sgcl_proto::{CERTIFICATE_VARIABLE, MAX_MESSAGE_BYTES, TOKEN_VARIABLE};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};

/// Silence after which a connection counts as broken: twice this.
const HEARTBEAT: Duration = Duration::from_millis(1500);
/// Time for a connection to be made. Short: a coordinator that is new waits a few seconds for those that train, and the address of its
/// predecessor may swallow what is sent to it.
const CONNECT: Duration = Duration::from_secs(2);
/// Time between two tries to reach a coordinator.
pub(crate) const AGAIN: Duration = Duration::from_millis(250);
/// Longest time without one.
pub(crate) const GIVE_UP: Duration = Duration::from_secs(600);

/// A connection that is made at the first call and notices when the other side falls silent.
pub(crate) struct Dial {
    channel: Channel,
    caller: Caller,
}

impl Dial {
    /// To the coordinator at a URL, as part of the span under way. Certificate and token are looked for in the environment.
    ///
    /// # Errors
    /// Not a URL; https without the certificate that it is trusted by.
    pub(crate) fn new(coordinator: &str) -> Result<Self> {
        let mut endpoint =
            Endpoint::from_shared(coordinator.to_owned()).with_context(|| format!("{coordinator}: not a URL"))?;
        if coordinator.starts_with("https:") {
            let Ok(certificate) = std::env::var(CERTIFICATE_VARIABLE) else {
                bail!(
                    "{coordinator} is reached over TLS: {CERTIFICATE_VARIABLE} must hold the PEM certificate that it is trusted by"
                );
            };
            // No other authority: whoever signs for the web does not sign for this.
            let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(certificate));
            endpoint = endpoint.tls_config(tls).with_context(|| format!("{CERTIFICATE_VARIABLE} is no certificate"))?;
        }
        let channel = endpoint
            .connect_timeout(CONNECT)
            .http2_keep_alive_interval(HEARTBEAT)
            .keep_alive_timeout(HEARTBEAT)
            .keep_alive_while_idle(true)
            .connect_lazy();
        let file = std::env::var_os(TOKEN_VARIABLE).map(PathBuf::from);
        let trace = sgcl_telemetry::current().and_then(|here| here.to_string().parse().ok());
        Ok(Self { channel, caller: Caller { file, trace } })
    }

    /// For one stream.
    pub(crate) fn client(&self) -> CoordinatorClient<InterceptedService<Channel, Caller>> {
        CoordinatorClient::with_interceptor(self.channel.clone(), self.caller.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }
}

/// Says who calls. The token is read anew for each stream: the kubelet replaces it.
#[derive(Clone)]
pub(crate) struct Caller {
    file: Option<PathBuf>,
    trace: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Caller {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(file) = &self.file {
            let token = std::fs::read_to_string(file)
                .map_err(|error| Status::unavailable(format!("the token in {}: {error}", file.display())))?;
            let mut value: MetadataValue<_> = format!("Bearer {}", token.trim())
                .parse()
                .map_err(|_| Status::unavailable(format!("{} does not hold a token", file.display())))?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        if let Some(trace) = &self.trace {
            request.metadata_mut().insert(sgcl_telemetry::HEADER, trace.clone());
        }
        Ok(request)
    }
}
