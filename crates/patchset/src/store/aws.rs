//! S3 set up as the AWS tools do it: environment, then the profile's files, then what the machine itself offers.

use std::path::PathBuf;
use std::time::Duration;

use ini::{Ini, ParseOption};
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::{BackoffConfig, ClientOptions, RetryConfig};

use super::StoreError;

type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Variables that object_store reads by itself, beyond those handled by name below.
const PASSED_ON: [&str; 14] = [
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_ENDPOINT_URL_STS",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_METADATA_ENDPOINT",
    "AWS_IMDSV1_FALLBACK",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
    "AWS_SKIP_SIGNATURE",
    "AWS_UNSIGNED_PAYLOAD",
    "AWS_REQUEST_PAYER",
    "AWS_CHECKSUM_ALGORITHM",
];

/// A client for `bucket`; `url` is for errors.
pub(super) fn s3(bucket: &str, url: &str, env: Env<'_>) -> Result<AmazonS3, StoreError> {
    let set = |name: &str| env(name).filter(|value| !value.trim().is_empty());
    let profile = Profile::read(url, env)?;

    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(bucket)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_retry(retries());
    for name in PASSED_ON {
        if let Some(value) = set(name) {
            let key: AmazonS3ConfigKey =
                name.to_ascii_lowercase().parse().map_err(|_| other(url, format!("{name} is not understood")))?;
            builder = builder.with_config(key, value);
        }
    }

    let region = set("AWS_REGION").or_else(|| set("AWS_DEFAULT_REGION")).or_else(|| profile.get("region"));
    if let Some(region) = region {
        builder = builder.with_region(region);
    }

    let ignored = set("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS").is_some_and(|v| v.eq_ignore_ascii_case("true"));
    let endpoint = set("AWS_ENDPOINT_URL_S3").or_else(|| set("AWS_ENDPOINT_URL")).or_else(|| profile.endpoint());
    let mut plain_http = false;
    if let Some(endpoint) = endpoint.filter(|_| !ignored) {
        plain_http = endpoint_scheme(&endpoint, url)?;
        builder = builder.with_endpoint(endpoint.trim_end_matches('/'));
    }
    builder = builder.with_client_options(client_options(plain_http));

    let in_environment = set("AWS_ACCESS_KEY_ID").is_some() || set("AWS_SECRET_ACCESS_KEY").is_some();
    let (key, secret, token) = if in_environment {
        (set("AWS_ACCESS_KEY_ID"), set("AWS_SECRET_ACCESS_KEY"), set("AWS_SESSION_TOKEN"))
    } else {
        let token = profile.get("aws_session_token");
        (profile.get("aws_access_key_id"), profile.get("aws_secret_access_key"), token)
    };
    match (key, secret) {
        (Some(key), Some(secret)) => {
            builder = builder.with_access_key_id(key).with_secret_access_key(secret);
            if let Some(token) = token {
                builder = builder.with_token(token);
            }
        }
        (None, None) => builder = profile.other_credentials(builder, url, &set)?,
        _ => return Err(other(url, "only one of access key id and secret access key is set; set both".to_owned())),
    }
    builder.build().map_err(|e| StoreError::classify(url.to_owned(), e))
}

/// Retries that ride out a hiccup, yet name a wrong endpoint within seconds.
fn retries() -> RetryConfig {
    let backoff =
        BackoffConfig { init_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(2), base: 2.0 };
    RetryConfig { backoff, max_retries: 4, retry_timeout: Duration::from_secs(30) }
}

fn client_options(plain_http: bool) -> ClientOptions {
    ClientOptions::new()
        .with_connect_timeout(Duration::from_secs(3))
        .with_read_timeout(Duration::from_secs(60))
        .with_timeout(Duration::from_secs(600))
        .with_allow_http(plain_http)
}

/// Whether the endpoint asks for plain HTTP.
fn endpoint_scheme(endpoint: &str, url: &str) -> Result<bool, StoreError> {
    let parsed = url::Url::parse(endpoint)
        .map_err(|_| other(url, "the endpoint is not a URL; it needs http:// or https:// in front".to_owned()))?;
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return Err(other(url, "the endpoint holds credentials; put them in AWS_ACCESS_KEY_ID instead".to_owned()));
    }
    match parsed.scheme() {
        "http" => Ok(true),
        "https" => Ok(false),
        scheme => Err(other(url, format!("the endpoint's scheme is {scheme:?}; it must be http or https"))),
    }
}

fn other(url: &str, detail: String) -> StoreError {
    StoreError::Other { object: url.to_owned(), detail }
}

/// One profile, from both files; the credentials file wins, as it does in the AWS tools.
struct Profile {
    name: String,
    credentials: Option<ini::Properties>,
    config: Option<ini::Properties>,
    services: Option<ini::Properties>,
}

impl Profile {
    fn read(url: &str, env: Env<'_>) -> Result<Self, StoreError> {
        let asked = env("AWS_PROFILE").or_else(|| env("AWS_DEFAULT_PROFILE")).filter(|name| !name.is_empty());
        let name = asked.clone().unwrap_or_else(|| "default".to_owned());
        let home = env("HOME").map(PathBuf::from).unwrap_or_default();
        let file = |variable: &str, default: &str| {
            env(variable).filter(|v| !v.is_empty()).map_or_else(|| home.join(".aws").join(default), PathBuf::from)
        };
        let load = |path: PathBuf| -> Result<Option<Ini>, StoreError> {
            let text = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(source) => return Err(StoreError::LocalFile { file: path, source }),
            };
            let options = ParseOption {
                enabled_quote: false,
                enabled_escape: false,
                enabled_indented_mutiline_value: true,
                ..ParseOption::default()
            };
            // The parser's own message can quote a line, and lines hold secrets.
            Ini::load_from_str_opt(&text, options).map(Some).map_err(|e| {
                other(url, format!("{} line {}: not an AWS configuration file", path.display(), e.line + 1))
            })
        };
        let credentials = load(file("AWS_SHARED_CREDENTIALS_FILE", "credentials"))?;
        let config = load(file("AWS_CONFIG_FILE", "config"))?;

        let section = |ini: &Option<Ini>, name: &str| ini.as_ref().and_then(|i| i.section(Some(name))).cloned();
        let credentials = section(&credentials, &name);
        let own = section(&config, &format!("profile {name}"));
        let own = own.or_else(|| if name == "default" { section(&config, "default") } else { None });
        if asked.is_some() && credentials.is_none() && own.is_none() {
            return Err(StoreError::Profile {
                object: url.to_owned(),
                profile: name,
                reason: "not in ~/.aws/credentials or ~/.aws/config; check AWS_PROFILE".to_owned(),
            });
        }
        let services = own.as_ref().and_then(|p| p.get("services")).map(|s| format!("services {}", s.trim()));
        let services = services.and_then(|s| section(&config, &s));
        Ok(Self { name, credentials, config: own, services })
    }

    fn get(&self, key: &str) -> Option<String> {
        let found = [&self.credentials, &self.config].into_iter().flatten().find_map(|p| p.get(key))?.trim();
        (!found.is_empty()).then(|| found.to_owned())
    }

    /// `endpoint_url` of the S3 service, then of the profile.
    fn endpoint(&self) -> Option<String> {
        let nested = |block: &str| {
            block.lines().find_map(|line| {
                let (key, value) = line.split_once('=')?;
                (key.trim() == "endpoint_url").then(|| value.trim().to_owned())
            })
        };
        let service = self.services.as_ref().and_then(|p| p.get("s3")).and_then(nested);
        service.or_else(|| self.get("s3").as_deref().and_then(nested)).or_else(|| self.get("endpoint_url"))
    }

    /// Credentials that are not written down: roles by web identity, containers, the machine.
    fn other_credentials(
        &self,
        mut builder: AmazonS3Builder,
        url: &str,
        set: &dyn Fn(&str) -> Option<String>,
    ) -> Result<AmazonS3Builder, StoreError> {
        let token_file = set("AWS_WEB_IDENTITY_TOKEN_FILE");
        let elsewhere = token_file.is_some()
            || set("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI").is_some()
            || set("AWS_CONTAINER_CREDENTIALS_FULL_URI").is_some()
            || set("AWS_SKIP_SIGNATURE").is_some();
        if elsewhere {
            return Ok(builder);
        }
        if let (Some(file), Some(role)) = (self.get("web_identity_token_file"), self.get("role_arn")) {
            builder = builder
                .with_config(AmazonS3ConfigKey::WebIdentityTokenFile, file)
                .with_config(AmazonS3ConfigKey::RoleArn, role);
            return Ok(builder);
        }
        let unusable = ["credential_process", "sso_session", "sso_start_url", "source_profile", "login_session"];
        if let Some(kind) = unusable.into_iter().find(|key| self.get(key).is_some()) {
            return Err(StoreError::Profile {
                object: url.to_owned(),
                profile: self.name.clone(),
                reason: format!(
                    "its credentials come by {kind}, which is not read here; run: eval \"$(aws configure \
                     export-credentials --profile {} --format env)\"",
                    self.name
                ),
            });
        }
        if set("AWS_EC2_METADATA_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true")) {
            return Err(StoreError::NoCredentials { object: url.to_owned() });
        }
        Ok(builder)
    }
}
