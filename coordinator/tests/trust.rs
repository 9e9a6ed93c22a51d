//! Who is let in: over a real socket, with certificates and tokens made as a cluster makes them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rstest::rstest;
use rustls::pki_types::PrivatePkcs8KeyDer;
use serde_json::{Value, json};
use sgcl_coordinator::trust::{Door, KeySource, Refusal, Refusals, audience};
use sgcl_coordinator::{Switchboard, listen};
use sgcl_proto::v1::coordinator_client::CoordinatorClient;
use sgcl_proto::v1::{NodeEvent, NodeHello, RankEvent, RankHello, node_event, rank_event};
use tokio::net::TcpListener;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status};

const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// Signs tokens, as an API server does.
struct Cluster {
    key: KeyPair,
}

impl Cluster {
    fn new() -> Self {
        Self { key: KeyPair::generate().unwrap() }
    }

    fn published(&self) -> JwkSet {
        let point = self.key.public_key_raw();
        assert_eq!((point.len(), point[0]), (65, 4), "an uncompressed point of P-256");
        let [x, y] = [&point[1..33], &point[33..]].map(|half| BASE64.encode(half));
        let key = json!({ "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": "one", "x": x, "y": y });
        serde_json::from_value(json!({ "keys": [key] })).unwrap()
    }

    fn sign(&self, claims: &Value) -> String {
        let header = Header { kid: Some("one".into()), ..Header::new(Algorithm::ES256) };
        jsonwebtoken::encode(&header, claims, &EncodingKey::from_ec_der(&self.key.serialize_der())).unwrap()
    }
}

struct Keys(JwkSet);

#[async_trait::async_trait]
impl KeySource for Keys {
    async fn keys(&self) -> anyhow::Result<JwkSet> {
        Ok(self.0.clone())
    }
}

/// What the kubelet gives the pod of node `first-0-0`.
fn claims() -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    json!({
        "iss": ISSUER,
        "sub": "system:serviceaccount:sgcl:sgcl-worker",
        "aud": [audience("sgcl", "first")],
        "iat": now, "nbf": now, "exp": now + 3600,
        "kubernetes.io": {
            "namespace": "sgcl",
            "pod": { "name": "first-0-0-x7k2p", "uid": "u" },
            "serviceaccount": { "name": "sgcl-worker", "uid": "v" },
        },
    })
}

/// A coordinator that guards its door, and no run behind it.
struct Server {
    port: u16,
    authority: String,
    refusals: Refusals,
    cluster: Cluster,
}

impl Server {
    async fn start() -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let (authority_key, mut params) = (KeyPair::generate().unwrap(), CertificateParams::default());
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let authority = params.self_signed(&authority_key).unwrap().pem();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(["localhost".to_owned()]).unwrap();
        let certificate = certificate.signed_by(&key, &Issuer::new(params, authority_key)).unwrap();
        let mut config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let (cluster, refusals) = (Cluster::new(), Refusals::default());
        let keys = Keys(cluster.published());
        let door = Door::guarded(config, "sgcl", "sgcl-worker", ISSUER.to_owned(), keys, refusals.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(listen(Switchboard::default(), door, listener, std::future::pending()));
        Self { port, authority, refusals, cluster }
    }

    fn tls(&self) -> Endpoint {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.authority));
        Endpoint::from_shared(format!("https://localhost:{}", self.port)).unwrap().tls_config(tls).unwrap()
    }

    /// What a node, and a rank of it, are answered.
    async fn knock(&self, endpoint: Endpoint, run: &str, node: &str, token: Option<String>) -> [Status; 2] {
        let channel = endpoint.connect_lazy();
        let (mut node_client, mut rank_client) =
            (CoordinatorClient::new(channel.clone()), CoordinatorClient::new(channel));
        let (run, node) = (run.to_owned(), node.to_owned());
        let hello = NodeHello { run: run.clone(), node: node.clone(), ..NodeHello::default() };
        let mut joins = Request::new(tokio_stream::iter([NodeEvent { event: Some(node_event::Event::Hello(hello)) }]));
        let hello = RankHello { run, node, ..RankHello::default() };
        let event = RankEvent { generation: 0, event: Some(rank_event::Event::Hello(hello)) };
        let mut ranks = Request::new(tokio_stream::iter([event]));
        if let Some(token) = token {
            let bearer: tonic::metadata::MetadataValue<_> = format!("Bearer {token}").parse().unwrap();
            joins.metadata_mut().insert("authorization", bearer.clone());
            ranks.metadata_mut().insert("authorization", bearer);
        }
        let joined = node_client.join(joins).await.map(drop).unwrap_err();
        let ranked = rank_client.rank(ranks).await.map(drop).unwrap_err();
        [joined, ranked]
    }
}

fn with(change: impl FnOnce(&mut Value)) -> Value {
    let mut claims = claims();
    change(&mut claims);
    claims
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_own_token_opens_its_streams() {
    let server = Server::start().await;
    let token = server.cluster.sign(&claims());
    for status in server.knock(server.tls(), "first", "first-0-0", Some(token)).await {
        // Let in: only, nobody coordinates that run here.
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        assert!(status.message().contains("first is not coordinated here"), "{status}");
    }
    assert!(server.refusals.counts().is_empty(), "{:?}", server.refusals.counts());
}

#[rstest]
#[case::another_run(claims(), "second", "second-0-0", Code::PermissionDenied, Refusal::Audience)]
#[case::another_audience(with(|c| c["aud"] = json!([ISSUER])), "first", "first-0-0", Code::PermissionDenied, Refusal::Audience)]
#[case::no_audience(with(|c| drop(c.as_object_mut().unwrap().remove("aud"))), "first", "first-0-0", Code::PermissionDenied, Refusal::Audience)]
#[case::expired(with(|c| c["exp"] = json!(c["iat"].as_u64().unwrap() - 60)), "first", "first-0-0", Code::Unauthenticated, Refusal::Expired)]
#[case::not_yet(with(|c| c["nbf"] = json!(c["iat"].as_u64().unwrap() + 600)), "first", "first-0-0", Code::Unauthenticated, Refusal::Expired)]
#[case::another_node(claims(), "first", "first-1-0", Code::PermissionDenied, Refusal::Identity)]
#[case::the_start_of_a_name(claims(), "first", "first-0", Code::PermissionDenied, Refusal::Identity)]
#[case::another_account(with(|c| c["sub"] = json!("system:serviceaccount:sgcl:default")), "first", "first-0-0", Code::PermissionDenied, Refusal::Identity)]
#[case::another_namespace(with(|c| c["kubernetes.io"]["namespace"] = json!("other")), "first", "first-0-0", Code::PermissionDenied, Refusal::Identity)]
#[case::no_pod(with(|c| drop(c["kubernetes.io"].as_object_mut().unwrap().remove("pod"))), "first", "first-0-0", Code::PermissionDenied, Refusal::Identity)]
#[case::another_cluster(with(|c| c["iss"] = json!("https://elsewhere")), "first", "first-0-0", Code::Unauthenticated, Refusal::Signature)]
#[tokio::test(flavor = "multi_thread")]
async fn other_tokens_are_refused_and_counted(
    #[case] claims: Value,
    #[case] run: &str,
    #[case] node: &str,
    #[case] code: Code,
    #[case] reason: Refusal,
) {
    let server = Server::start().await;
    let token = server.cluster.sign(&claims);
    for status in server.knock(server.tls(), run, node, Some(token.clone())).await {
        assert_eq!(status.code(), code, "{status}");
        assert!(!status.message().contains(&token), "no token in an answer");
    }
    assert_eq!(server.refusals.counts(), [(reason, 2)].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_token_a_forged_one_and_a_guessed_algorithm_are_refused() {
    let server = Server::start().await;
    let knock = |token| server.knock(server.tls(), "first", "first-0-0", token);
    let forged = Cluster::new().sign(&claims());
    // Signed with what is public, as if it were a shared secret.
    let header = Header { kid: Some("one".into()), ..Header::new(Algorithm::HS256) };
    let public = EncodingKey::from_secret(server.cluster.key.public_key_raw());
    let guessed = jsonwebtoken::encode(&header, &claims(), &public).unwrap();
    let unknown = Header { kid: Some("two".into()), ..Header::new(Algorithm::ES256) };
    let key = EncodingKey::from_ec_der(&server.cluster.key.serialize_der());
    let unknown = jsonwebtoken::encode(&unknown, &claims(), &key).unwrap();
    let long = "x".repeat(9000);
    for token in [None, Some(forged), Some(guessed), Some(unknown), Some("nonsense".into()), Some(long)] {
        for status in knock(token).await {
            assert_eq!(status.code(), Code::Unauthenticated, "{status}");
        }
    }
    assert_eq!(server.refusals.counts(), [(Refusal::NoToken, 6), (Refusal::Signature, 6)].into());
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_text_is_refused_and_another_authoritys_coordinator_is_not_trusted() {
    let server = Server::start().await;
    let token = server.cluster.sign(&claims());
    let plain = Endpoint::from_shared(format!("http://localhost:{}", server.port)).unwrap();
    for status in server.knock(plain, "first", "first-0-0", Some(token.clone())).await {
        assert!(!status.message().contains("coordinated"), "{status}");
    }
    let plain = server.refusals.counts().get(&Refusal::Handshake).copied();
    assert!(plain.is_some_and(|count| count >= 1), "{:?}", server.refusals.counts());

    let other = Server::start().await;
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&other.authority));
    let endpoint = Endpoint::from_shared(format!("https://localhost:{}", server.port)).unwrap();
    for status in server.knock(endpoint.tls_config(tls).unwrap(), "first", "first-0-0", Some(token)).await {
        assert!(!status.message().contains("coordinated"), "{status}");
    }
    assert_eq!(server.refusals.counts().keys().collect::<Vec<_>>(), [&Refusal::Handshake]);
}
