//! The cluster's side of trust: the authority that signs this coordinator's certificate, kept in one Secret, and the keys that the cluster
//! signs its pods' tokens with.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use jsonwebtoken::jwk::JwkSet;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::PostParams;
use kube::{Api, Client};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer};
use rcgen::{KeyPair, KeyUsagePurpose};
use rustls::pki_types::PrivatePkcs8KeyDer;
use serde::Deserialize;

use super::SERVICE;
use crate::trust::{Door, KeySource, Refusals};

/// The Secret; `deploy/` makes it empty, the first leader fills it.
pub const SECRET: &str = "sgcl-coordinator-tls";
/// The workers' service account.
const ACCOUNT: &str = "sgcl-worker";
const CERTIFICATE: &str = "ca.crt";
const KEY: &str = "ca.key";

/// The authority that workers trust.
pub struct Authority {
    /// Its certificate, PEM: no secret.
    pub certificate: String,
    key: KeyPair,
}

/// The door of the coordinator of a cluster, and the authority's certificate for those who knock.
///
/// # Errors
/// The Secret is missing or damaged, or the API server does not say who signs tokens.
pub async fn door(client: &Client, namespace: &str, refusals: Refusals) -> Result<(Door, String)> {
    let authority = authority(&Api::namespaced(client.clone(), namespace)).await?;
    let config = authority.server(namespace)?;
    let issuer = issuer(client).await?;
    let source = ClusterKeys(client.clone());
    Ok((Door::guarded(config, namespace, ACCOUNT, issuer, source, refusals), authority.certificate))
}

/// Reads the authority, or makes it where there is none yet.
async fn authority(secrets: &Api<Secret>) -> Result<Authority> {
    loop {
        let mut secret = secrets.get_opt(SECRET).await?.with_context(|| {
            format!("the Secret {SECRET} is missing; `kubectl apply -f deploy/` makes it, and it may be empty")
        })?;
        let data = secret.data.take().unwrap_or_default();
        if !data.is_empty() {
            return Authority::read(&data).with_context(|| {
                format!("the Secret {SECRET} does not hold an authority; empty it, and the next leader makes another")
            });
        }
        let authority = Authority::new()?;
        secret.data = Some(authority.data());
        match secrets.replace(SECRET, &PostParams::default(), &secret).await {
            Ok(_) => {
                tracing::info!(secret = SECRET, "made the authority that workers trust");
                return Ok(authority);
            }
            // Somebody else was there first.
            Err(kube::Error::Api(status)) if status.code == 409 => {}
            Err(error) => return Err(error).with_context(|| format!("the Secret {SECRET} was not written")),
        }
    }
}

impl Authority {
    /// A new one. It does not expire: emptying the Secret and restarting the coordinator replaces it, and the nodes of runs under way.
    fn new() -> Result<Self> {
        let key = KeyPair::generate().context("no key was made")?;
        let certificate = Self::parameters().self_signed(&key).context("no certificate was made")?.pem();
        Ok(Self { certificate, key })
    }

    fn read(data: &BTreeMap<String, ByteString>) -> Result<Self> {
        let text = |name: &str| -> Result<&str> {
            let bytes = data.get(name).with_context(|| format!("{name} is missing"))?;
            std::str::from_utf8(&bytes.0).with_context(|| format!("{name} is not text"))
        };
        let (certificate, key) = (text(CERTIFICATE)?.to_owned(), text(KEY)?);
        if !certificate.starts_with("-----BEGIN CERTIFICATE-----") {
            bail!("{CERTIFICATE} is not a certificate");
        }
        Ok(Self { certificate, key: KeyPair::from_pem(key).with_context(|| format!("{KEY} is not a private key"))? })
    }

    fn data(&self) -> BTreeMap<String, ByteString> {
        let entry = |name: &str, text: String| (name.to_owned(), ByteString(text.into_bytes()));
        [entry(CERTIFICATE, self.certificate.clone()), entry(KEY, self.key.serialize_pem())].into()
    }

    fn parameters() -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "sgcl coordinator authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    }

    /// TLS for one leader's term: its key never leaves this process.
    fn server(&self, namespace: &str) -> Result<rustls::ServerConfig> {
        let names =
            ["", &format!(".{namespace}"), &format!(".{namespace}.svc"), &format!(".{namespace}.svc.cluster.local")]
                .map(|end| format!("{SERVICE}{end}"));
        let mut params = CertificateParams::new(names).context("the coordinator's names")?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, SERVICE);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().context("no key was made")?;
        let certificate =
            params.signed_by(&key, &Issuer::new(Self::parameters(), &self.key)).context("no certificate was made")?;
        let private = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        let mut config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], private)
            .context("the coordinator's certificate")?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

/// Keys that the cluster publishes; every service account may read them.
struct ClusterKeys(Client);

#[async_trait::async_trait]
impl KeySource for ClusterKeys {
    async fn keys(&self) -> Result<JwkSet> {
        self.0.request(get("/openid/v1/jwks")?).await.context("/openid/v1/jwks of the API server")
    }
}

/// Who signs the cluster's tokens, as they say it.
async fn issuer(client: &Client) -> Result<String> {
    #[derive(Deserialize)]
    struct Discovery {
        issuer: String,
    }
    let path = "/.well-known/openid-configuration";
    let found: Discovery = client.request(get(path)?).await.with_context(|| format!("{path} of the API server"))?;
    Ok(found.issuer)
}

fn get(path: &str) -> Result<axum::http::Request<Vec<u8>>> {
    Ok(axum::http::Request::get(path).body(Vec::new())?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_is_what_it_was_after_a_round_through_the_secret() {
        let made = Authority::new().unwrap();
        let read = Authority::read(&made.data()).unwrap();
        assert_eq!(read.certificate, made.certificate);
        assert_eq!(read.key.serialize_pem(), made.key.serialize_pem());
    }

    #[test]
    fn a_secret_that_holds_something_else_is_named_by_its_entry() {
        let mut data = Authority::new().unwrap().data();
        data.insert(KEY.into(), ByteString(b"no key".to_vec()));
        assert!(format!("{:#}", Authority::read(&data).err().unwrap()).contains(KEY));
        data.remove(CERTIFICATE);
        assert!(format!("{:#}", Authority::read(&data).err().unwrap()).contains("ca.crt is missing"));
    }
}
