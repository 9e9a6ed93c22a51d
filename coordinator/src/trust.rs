//! Who may speak for which node. On a cluster the line is TLS, and every stream brings the token that the kubelet gave its pod: signed by
//! the cluster, made out to one run, naming one pod. Runs on one machine have neither; their coordinator listens on the loopback.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use anyhow::Result;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::{Jwk, JwkSet};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::metadata::MetadataMap;

/// Longest token that is looked at; a cluster's have about 1,200 bytes.
const MAX_TOKEN: usize = 8 << 10;
/// Seconds that clocks may differ by.
const LEEWAY_S: u64 = 10;
/// Keys are asked for again, after a token whose key is not known, at most so often.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// Time for them to come.
const ASK: Duration = Duration::from_secs(5);
/// Time for a TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Handshakes under way at once; who comes meanwhile is cut off and tries again.
const HANDSHAKES: usize = 256;
/// What a token may be signed with: public keys alone.
const ALGORITHMS: [Algorithm; 6] =
    [Algorithm::RS256, Algorithm::RS384, Algorithm::RS512, Algorithm::ES256, Algorithm::ES384, Algorithm::EdDSA];

/// The audience that a run's tokens are made out to.
#[must_use]
pub fn audience(namespace: &str, run: &str) -> String {
    format!("sgcl.dev/{namespace}/{run}")
}

/// Where the keys that tokens are signed with come from.
#[async_trait::async_trait]
pub trait KeySource: Send + Sync + 'static {
    /// The keys as they are now.
    async fn keys(&self) -> Result<JwkSet>;
}

/// Why a line or a stream was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// No TLS, or none that succeeded.
    Handshake,
    /// Too many handshakes at once.
    Busy,
    /// No token, or one that is none.
    NoToken,
    /// Signed by nobody that is known here, or not as it was signed.
    Signature,
    /// Its time is over, or has not come.
    Expired,
    /// Made out to another run, or to no run.
    Audience,
    /// Of another account, or of a pod that is not this node.
    Identity,
    /// The cluster's keys cannot be had just now.
    NoKeys,
}

impl Refusal {
    /// In one word, for metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Handshake => "handshake",
            Self::Busy => "busy",
            Self::NoToken => "no_token",
            Self::Signature => "signature",
            Self::Expired => "expired",
            Self::Audience => "audience",
            Self::Identity => "identity",
            Self::NoKeys => "no_keys",
        }
    }

    fn status(self, run: &str) -> Status {
        match self {
            Self::Handshake | Self::Busy => Status::unavailable("no handshake"),
            Self::NoToken => Status::unauthenticated("this coordinator wants a pod's token and got none"),
            Self::Signature => Status::unauthenticated("the token is not signed by this cluster"),
            // The kubelet brings a new one in time.
            Self::Expired => Status::unauthenticated("the token has expired"),
            Self::Audience => Status::permission_denied(format!("the token is not made out to run {run}")),
            Self::Identity => Status::permission_denied("the token is another pod's, not this node's"),
            Self::NoKeys => Status::unavailable("the cluster's keys cannot be read just now"),
        }
    }
}

/// Refusals so far, by reason. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Refusals {
    counts: Arc<Mutex<BTreeMap<Refusal, u64>>>,
}

impl Refusals {
    pub(crate) fn count(&self, refusal: Refusal) {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner).entry(refusal).or_default() += 1;
    }

    /// How often each reason was given.
    #[must_use]
    pub fn counts(&self) -> BTreeMap<Refusal, u64> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// How the streams of workers are let in. Cheap to clone.
#[derive(Clone, Default)]
pub struct Door {
    tls: Option<TlsAcceptor>,
    tokens: Option<Arc<Tokens>>,
    refusals: Refusals,
}

/// What a token must say.
struct Tokens {
    namespace: String,
    issuer: String,
    account: String,
    source: Box<dyn KeySource>,
    keys: RwLock<Vec<Jwk>>,
    /// When the cluster was last asked for them; held while it is asked.
    asked: tokio::sync::Mutex<Option<Instant>>,
}

#[derive(Deserialize)]
struct Claims {
    #[serde(rename = "kubernetes.io")]
    cluster: ClusterClaims,
}

#[derive(Deserialize)]
struct ClusterClaims {
    namespace: String,
    pod: PodClaims,
}

#[derive(Deserialize)]
struct PodClaims {
    name: String,
}

impl Door {
    /// Plain text, for whoever can reach it: runs on one machine.
    #[must_use]
    pub fn open() -> Self {
        Self::default()
    }

    /// TLS with `config`, which must offer `h2`, and a token of the service account `account` of `namespace` for every stream, from
    /// `issuer` and signed with a key of `source`.
    #[must_use]
    pub fn guarded(
        config: rustls::ServerConfig,
        namespace: &str,
        account: &str,
        issuer: String,
        source: impl KeySource,
        refusals: Refusals,
    ) -> Self {
        let tokens = Tokens {
            namespace: namespace.to_owned(),
            issuer,
            account: format!("system:serviceaccount:{namespace}:{account}"),
            source: Box::new(source),
            keys: RwLock::default(),
            asked: tokio::sync::Mutex::default(),
        };
        Self { tls: Some(TlsAcceptor::from(Arc::new(config))), tokens: Some(Arc::new(tokens)), refusals }
    }

    /// Whether whoever sent `metadata` may speak for `node` of `run`. A stream is asked once, when it is opened.
    pub(crate) async fn admit(&self, metadata: &MetadataMap, run: &str, node: &str) -> Result<(), Status> {
        let Some(tokens) = &self.tokens else { return Ok(()) };
        tokens.check(metadata, run, node).await.map_err(|refusal| {
            tracing::warn!(run, node, reason = refusal.name(), "a stream was refused");
            self.refusals.count(refusal);
            refusal.status(run)
        })
    }

    /// Connections whose handshake succeeded, where there is TLS; else the listener comes back.
    pub(crate) fn connections(
        &self,
        listener: TcpListener,
    ) -> Result<ReceiverStream<std::io::Result<TlsStream<TcpStream>>>, TcpListener> {
        let Some(tls) = self.tls.clone() else { return Err(listener) };
        let (accepted, connections) = mpsc::channel(HANDSHAKES);
        tokio::spawn(accept(listener, tls, self.refusals.clone(), accepted));
        Ok(ReceiverStream::new(connections))
    }
}

/// Shakes hands until nobody takes connections any more. A slow handshake holds nobody up.
async fn accept(
    listener: TcpListener,
    tls: TlsAcceptor,
    refusals: Refusals,
    accepted: mpsc::Sender<std::io::Result<TlsStream<TcpStream>>>,
) {
    let places = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let (stream, peer) = tokio::select! {
            () = accepted.closed() => return,
            next = listener.accept() => match next {
                Ok(next) => next,
                Err(error) => {
                    // Out of files, most likely, which passes.
                    tracing::warn!(%error, "a connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            refusals.count(Refusal::Busy);
            continue;
        };
        let (tls, refusals, accepted) = (tls.clone(), refusals.clone(), accepted.clone());
        tokio::spawn(async move {
            let _place = place;
            let _ = stream.set_nodelay(true);
            let shaken = tokio::time::timeout(HANDSHAKE, tls.accept(stream)).await;
            match shaken.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())) {
                // Where nobody takes it the server ends.
                Ok(stream) => drop(accepted.send(Ok(stream)).await),
                Err(error) => {
                    tracing::warn!(%peer, %error, "a connection was refused: no TLS handshake");
                    refusals.count(Refusal::Handshake);
                }
            }
        });
    }
}

impl Tokens {
    async fn check(&self, metadata: &MetadataMap, run: &str, node: &str) -> Result<(), Refusal> {
        let bearer = metadata.get("authorization").and_then(|value| value.to_str().ok());
        let token = bearer.and_then(|value| value.strip_prefix("Bearer ")).ok_or(Refusal::NoToken)?;
        if token.len() > MAX_TOKEN {
            return Err(Refusal::NoToken);
        }
        let header = jsonwebtoken::decode_header(token).map_err(|_| Refusal::NoToken)?;
        if !ALGORITHMS.contains(&header.alg) {
            return Err(Refusal::Signature);
        }
        let key = self.key(header.kid.as_deref()).await?;
        let key = DecodingKey::from_jwk(&key).map_err(|_| Refusal::Signature)?;
        let mut wanted = Validation::new(header.alg);
        wanted.leeway = LEEWAY_S;
        wanted.validate_nbf = true;
        wanted.set_issuer(&[&self.issuer]);
        wanted.set_audience(&[audience(&self.namespace, run)]);
        wanted.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        wanted.sub = Some(self.account.clone());
        let claims =
            jsonwebtoken::decode::<Claims>(token, &key, &wanted).map_err(|error| refusal(error.kind()))?.claims;
        // A Job's pod has its name, which is the node's, and a random end.
        let end = claims.cluster.pod.name.strip_prefix(node).and_then(|end| end.strip_prefix('-'));
        let is_node = end.is_some_and(|end| !end.is_empty() && !end.contains('-'));
        if is_node && claims.cluster.namespace == self.namespace { Ok(()) } else { Err(Refusal::Identity) }
    }

    /// The key of that name. One that is not known may be new: the cluster is asked, though not for every forgery.
    async fn key(&self, id: Option<&str>) -> Result<Jwk, Refusal> {
        let id = id.ok_or(Refusal::Signature)?;
        let find = || {
            let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
            let found = keys.iter().find(|key| key.common.key_id.as_deref() == Some(id)).cloned();
            found.ok_or(if keys.is_empty() { Refusal::NoKeys } else { Refusal::Signature })
        };
        if let Ok(key) = find() {
            return Ok(key);
        }
        let mut asked = self.asked.lock().await;
        if asked.is_none_or(|at| at.elapsed() >= ASK_AGAIN) {
            *asked = Some(Instant::now());
            match tokio::time::timeout(ASK, self.source.keys()).await {
                Ok(Ok(set)) => *self.keys.write().unwrap_or_else(PoisonError::into_inner) = set.keys,
                Ok(Err(error)) => tracing::warn!("the keys of the cluster's tokens were not read: {error:#}"),
                Err(_) => tracing::warn!("the keys of the cluster's tokens were not read within {} s", ASK.as_secs()),
            }
        }
        find()
    }
}

fn refusal(kind: &ErrorKind) -> Refusal {
    match kind {
        ErrorKind::ExpiredSignature | ErrorKind::ImmatureSignature => Refusal::Expired,
        ErrorKind::InvalidAudience => Refusal::Audience,
        ErrorKind::InvalidSubject => Refusal::Identity,
        ErrorKind::InvalidSignature | ErrorKind::InvalidIssuer | ErrorKind::InvalidAlgorithm => Refusal::Signature,
        // A claim that is missing: not one of these tokens.
        ErrorKind::MissingRequiredClaim(_) => Refusal::Audience,
        ErrorKind::Json(_) => Refusal::Identity,
        _ => Refusal::Signature,
    }
}
