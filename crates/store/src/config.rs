//! [`Object`]: an object's address, its store and the credentials, from the environment.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use limosa_stream::{escaped, without_passwords};
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey};
use object_store::client::ClientConfigKey;
use object_store::path::Path;
use object_store::{BackoffConfig, MultipartId, RetryConfig};

use crate::ObjectError;
use crate::connector::{Connector, Traffic};
use crate::runtime::Runtime;

/// An object for a snapshot. Its `Debug` omits the credentials.
pub struct Object {
    pub(crate) url: String,
    pub(crate) replace: bool,
    pub(crate) client: Arc<Client>,
    config: Vec<(String, String)>,
}

/// The store's client, and what messages name.
pub(crate) struct Client {
    pub(crate) remote: Arc<Remote>,
    pub(crate) bucket: String,
    /// Where the store is, for messages: without a password.
    pub(crate) endpoint: String,
    pub(crate) region: String,
    pub(crate) traffic: Traffic,
    pub(crate) runtime: Runtime,
    unsettled: Mutex<Vec<Unsettled>>,
}

/// An upload whose completion was lost, so that it is not known whether it was published.
#[derive(Debug)]
pub(crate) struct Unsettled {
    pub(crate) id: MultipartId,
    /// The store has confirmed that this client's abort came before any completion.
    pub(crate) is_aborted: bool,
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Object { url, replace, client, config: _ } = self;
        f.debug_struct("Object").field("url", url).field("replace", replace).field("client", client).finish()
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Client { bucket, endpoint, region, .. } = self;
        let mut shown = f.debug_struct("Client");
        shown.field("bucket", bucket).field("endpoint", endpoint).field("region", region);
        shown.finish_non_exhaustive()
    }
}

impl Client {
    pub(crate) fn unsettled(&self) -> MutexGuard<'_, Vec<Unsettled>> {
        self.unsettled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The part that tasks of the runtime share. It does not own the runtime, which a task must not drop.
pub(crate) struct Remote {
    pub(crate) store: AmazonS3,
    pub(crate) path: Path,
}

impl Object {
    /// Whether a name is that of an object rather than a file's.
    pub fn is_url(name: &str) -> bool {
        name.starts_with("s3://")
    }

    /// The object `s3://BUCKET/KEY`, in the store that the environment names. Of the variables of the AWS tools it uses `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION` or `AWS_DEFAULT_REGION`,
    /// `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`, those of web identities and containers, and
    /// `AWS_EC2_METADATA_DISABLED`; of its own, `AWS_ALLOW_HTTP` and `AWS_VIRTUAL_HOSTED_STYLE_REQUEST`. Nothing is
    /// connected yet.
    pub fn from_env(url: &str) -> Result<Object, ObjectError> {
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Object::new(url, variables)
    }

    /// The same, with these variables instead of the environment's.
    pub fn new(
        url: &str,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Object, ObjectError> {
        let config: Vec<_> = (variables.into_iter())
            .filter(|(name, value)| name.starts_with("AWS_") && !value.is_empty())
            .collect();
        let client = Arc::new(connect(url, &config, false)?);
        Ok(Object { url: url.into(), replace: false, client, config })
    }

    /// Whether a save replaces an existing object, at the moment when the new one is complete.
    pub fn replacing(self, replace: bool) -> Result<Object, ObjectError> {
        let client = Arc::new(connect(&self.url, &self.config, replace)?);
        Ok(Object { replace, client, ..self })
    }
}

fn connect(url: &str, config: &[(String, String)], replace: bool) -> Result<Client, ObjectError> {
    let wrong = |what: &str| ObjectError::Url { url: url.into(), what: what.into() };
    let rest = url.strip_prefix("s3://").ok_or_else(|| wrong("it is no address of an object"))?;
    let (bucket, key) = rest.split_once('/').ok_or_else(|| wrong("it has no key"))?;
    if bucket.is_empty() || key.is_empty() {
        return Err(wrong("its bucket or its key is empty"));
    }
    let path = Path::parse(key).map_err(|error| wrong(&error.to_string()))?;
    if path.as_ref() != key {
        return Err(wrong("its key begins or ends with a slash"));
    }
    let given = |name: &str| config.iter().find(|given| given.0 == name).map(|given| given.1.as_str());
    check_credentials(url, &given)?;
    let runtime = Runtime::start().map_err(|error| ObjectError::Thread { url: url.into(), error })?;
    let traffic = Traffic::default();
    let mut builder = AmazonS3Builder::new();
    for (name, value) in config {
        if let Ok(key) = name.to_ascii_lowercase().parse::<AmazonS3ConfigKey>() {
            builder = builder.with_config(key, value);
        }
    }
    let region = builder.get_config_value(&AmazonS3ConfigKey::Region).unwrap_or_else(|| "us-east-1".into());
    let endpoint =
        given("AWS_ENDPOINT_URL_S3").or_else(|| given("AWS_ENDPOINT_URL")).or_else(|| given("AWS_ENDPOINT"));
    let endpoint = endpoint.map_or_else(|| format!("https://s3.{region}.amazonaws.com"), str::to_owned);
    // It is in messages and in logs.
    if endpoint
        .split_once("://")
        .is_some_and(|(_, rest)| rest.split('/').next().unwrap_or_default().contains('@'))
    {
        let what = "the address of the store (AWS_ENDPOINT_URL) has a user's name or password in it, which would be \
                    printed; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead";
        return Err(ObjectError::Config { url: url.into(), what: what.into() });
    }
    let is_address = |url: &reqwest::Url| matches!(url.scheme(), "http" | "https") && url.has_host();
    if !endpoint.parse().is_ok_and(|url| is_address(&url)) {
        let what = format!(
            "the store's address {} is invalid; expected https://HOST or https://HOST:PORT in AWS_ENDPOINT_URL",
            escaped(&without_passwords(&endpoint))
        );
        return Err(ObjectError::Config { url: url.into(), what });
    }
    // Credentials may come from another server, which is reached over TLS.
    let encrypted = !endpoint.starts_with("http://") || given("AWS_ACCESS_KEY_ID").is_none();
    // Retries have to end before the caller's own time limit.
    let backoff = BackoffConfig {
        init_backoff: Duration::from_millis(100),
        max_backoff: Duration::from_secs(3),
        base: 2.0,
    };
    let retry = RetryConfig { backoff, max_retries: 5, retry_timeout: Duration::from_secs(20) };
    let builder = builder.with_bucket_name(bucket).with_retry(retry).with_http_connector(Connector {
        traffic: traffic.clone(),
        create_only: !replace,
        encrypted,
    });
    let wrong = |error: &dyn std::fmt::Display| ObjectError::Config {
        url: url.into(),
        what: format!(
            "the store cannot be used as the environment (AWS_*) says: {}",
            escaped(&without_passwords(&error.to_string()))
        ),
    };
    let allow_http = builder.get_config_value(&AmazonS3ConfigKey::Client(ClientConfigKey::AllowHttp));
    if endpoint.starts_with("http://") && allow_http.as_deref() != Some("true") {
        let shown = without_passwords(&endpoint);
        let what = format!(
            "the store at {shown} is reached without encryption; name an https:// address, or set AWS_ALLOW_HTTP=true"
        );
        return Err(ObjectError::Config { url: url.into(), what });
    }
    let store = builder.build().map_err(|error| wrong(&error))?;
    Ok(Client {
        remote: Arc::new(Remote { store, path }),
        bucket: bucket.into(),
        endpoint: without_passwords(&endpoint).into_owned(),
        region,
        traffic,
        runtime,
        unsettled: Mutex::default(),
    })
}

/// Refuses an environment without credentials. The client would ask a cloud's metadata service for them, and on any other
/// machine wait for it in vain.
fn check_credentials<'a>(url: &str, given: &dyn Fn(&str) -> Option<&'a str>) -> Result<(), ObjectError> {
    let refuse = |what: &str| Err(ObjectError::Config { url: url.into(), what: what.into() });
    match (given("AWS_ACCESS_KEY_ID"), given("AWS_SECRET_ACCESS_KEY")) {
        (Some(_), Some(_)) => return Ok(()),
        (Some(_), None) => {
            return refuse("AWS_ACCESS_KEY_ID is set and AWS_SECRET_ACCESS_KEY is not; set both");
        }
        (None, Some(_)) => {
            return refuse("AWS_SECRET_ACCESS_KEY is set and AWS_ACCESS_KEY_ID is not; set both");
        }
        (None, None) => {}
    }
    let disabled = given("AWS_EC2_METADATA_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let others = [
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_SKIP_SIGNATURE",
    ];
    if disabled && !others.iter().any(|name| given(name).is_some()) {
        return refuse("no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(url: &str, variables: &[(&str, &str)]) -> String {
        let variables = variables.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        Object::new(url, variables).unwrap_err().to_string()
    }

    const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "secret")];

    #[test]
    fn what_is_no_object_is_refused_with_what_is_wrong() {
        for url in
            ["s3://bucket", "s3://bucket/", "s3:///key", "s3://bucket//key", "s3://bucket/key/", "http://x/y"]
        {
            let why = refused(url, &KEYS);
            assert!(why.contains(url) && why.contains("expected s3://BUCKET/KEY"), "{why}");
        }
    }

    #[test]
    fn what_the_environment_lacks_is_named() {
        let why = refused("s3://b/k", &[("AWS_EC2_METADATA_DISABLED", "true")]);
        assert!(why.contains("s3://b/k: no credentials: set AWS_ACCESS_KEY_ID"), "{why}");
        let why = refused("s3://b/k", &KEYS[..1]);
        assert!(why.contains("AWS_SECRET_ACCESS_KEY is not; set both"), "{why}");
        let plain = [KEYS[0], KEYS[1], ("AWS_ENDPOINT_URL", "http://127.0.0.1:1")];
        let why = refused("s3://b/k", &plain);
        assert!(why.contains("http://127.0.0.1:1 is reached without encryption"), "{why}");
        let secret = [KEYS[0], KEYS[1], ("AWS_ENDPOINT_URL", "https://user:password@127.0.0.1:1/x")];
        let why = refused("s3://b/k", &secret);
        assert!(why.contains("AWS_ENDPOINT_URL") && !why.contains("password@"), "{why}");
    }

    #[test]
    fn passwords_and_keys_are_in_no_message_and_an_address_that_is_none_is_refused_at_once() {
        let endpoint = |url: &'static str| [KEYS[0], KEYS[1], ("AWS_ENDPOINT_URL", url)];
        for wrong in ["https://user:hun/ter2@store", "https://hunter2:x/@[::1", "hunter2", "ftp://hunter2/"] {
            let why = refused("s3://b/k", &endpoint(wrong));
            assert!(why.contains("expected https://HOST") && !why.contains("ter2@"), "{why}");
        }
        let variables = endpoint("https://store").map(|(name, value)| (name.to_string(), value.to_string()));
        let said = format!("{:?}", Object::new("s3://b/k", variables).unwrap().replacing(true).unwrap());
        assert!(said.contains("https://store") && !said.contains("secret"), "{said}");
    }

    #[test]
    fn a_whole_environment_is_taken() {
        let variables = KEYS.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        let object = Object::new("s3://bucket/some/key", variables).unwrap().replacing(true).unwrap();
        assert_eq!(object.client.endpoint, "https://s3.us-east-1.amazonaws.com");
        assert_eq!(
            (object.client.bucket.as_str(), object.client.remote.path.as_ref()),
            ("bucket", "some/key")
        );
    }
}
