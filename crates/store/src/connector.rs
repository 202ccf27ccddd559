//! HTTP for the store's client. It counts the bytes that are sent and received, gives up a connection without progress,
//! bounds responses, and makes the request that publishes an object conditional on there being none yet.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use object_store::ClientOptions;
use object_store::client::{
    ClientConfigKey, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody,
    HttpResponse, HttpResponseBody, HttpService,
};
use reqwest::Method;
use reqwest::header::{HeaderMap, HeaderValue, IF_NONE_MATCH, RANGE};
use rustls_platform_verifier::BuilderVerifierExt;

/// How long connecting may take.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// How long no byte may move while a request is sent or its answer read.
const IDLE_MAX: Duration = Duration::from_secs(15);
/// How long the store may take to assemble an object from its parts.
const COMPLETE_MAX: Duration = Duration::from_secs(300);
/// The most bytes that are read of an answer which is not a range of an object: an error, or a short document.
const DOCUMENT_BYTES_MAX: u64 = 64 << 10;

/// Bytes that have moved, in both directions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Traffic(Arc<AtomicU64>);

impl Traffic {
    pub(crate) fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Makes clients.
#[derive(Debug)]
pub(crate) struct Connector {
    pub(crate) traffic: Traffic,
    /// Whether an existing object must not be overwritten.
    pub(crate) create_only: bool,
    /// Whether TLS is used, which needs the system's certificates.
    pub(crate) encrypted: bool,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| object_store::Error::Generic {
            store: "HTTP",
            source: error,
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| failed(error.into()))?;
        let tls = match self.encrypted {
            true => tls.with_platform_verifier().map_err(|error| failed(error.into()))?,
            false => tls.with_root_certificates(rustls::RootCertStore::empty()),
        };
        let tls = tls.with_no_client_auth();
        let allow_http = options.get_config_value(&ClientConfigKey::AllowHttp).as_deref() == Some("true");
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .https_only(!allow_http)
            .http1_only()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_MAX)
            .user_agent(concat!("limosa/", env!("CARGO_PKG_VERSION")));
        let client = client.build().map_err(|error| failed(error.into()))?;
        let service = Service { client, traffic: self.traffic.clone(), create_only: self.create_only };
        Ok(HttpClient::new(service))
    }
}

#[derive(Debug)]
struct Service {
    client: reqwest::Client,
    traffic: Traffic,
    create_only: bool,
}

/// No byte moved within the time limit.
#[derive(Debug, thiserror::Error)]
#[error("the store gave no answer within {0:?}")]
struct Idle(Duration);

#[async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (mut parts, body) = request.into_parts();
        let range = range_bytes(&parts.headers);
        // Only CompleteMultipartUpload is a POST with an upload id.
        let completes = parts.method == Method::POST
            && parts
                .uri
                .query()
                .is_some_and(|query| query.split('&').any(|part| part.starts_with("uploadId=")));
        if completes && self.create_only {
            // The signature does not have to cover it.
            parts.headers.insert(IF_NONE_MATCH, HeaderValue::from_static("*"));
        }
        let url = parts.uri.to_string().parse().map_err(|error| broken(HttpErrorKind::Unknown, error))?;
        let mut request = reqwest::Request::new(parts.method, url);
        *request.headers_mut() = parts.headers;
        let sent = Traffic::default();
        // Its `is_empty` says the opposite of a payload in pieces (object_store 0.14.2).
        if body.content_length() > 0 {
            let counted = Counted { body, own: sent.clone(), all: self.traffic.clone() };
            *request.body_mut() = Some(reqwest::Body::wrap(counted));
        }
        let mut answer = std::pin::pin!(self.client.execute(request));
        let patience = if completes { COMPLETE_MAX } else { IDLE_MAX };
        let mut before = 0;
        let answer: http::Response<reqwest::Body> = loop {
            match tokio::time::timeout(patience, &mut answer).await {
                Ok(answer) => break answer.map_err(failed)?.into(),
                Err(_) if sent.bytes() != before => before = sent.bytes(),
                Err(_) => return Err(broken(HttpErrorKind::Timeout, Idle(patience))),
            }
        };
        let (parts, body) = answer.into_parts();
        let idle = Box::pin(tokio::time::sleep(patience));
        let range = range.filter(|_| parts.status.is_success());
        let (is_renewed, left) = (range.is_some(), range.unwrap_or(DOCUMENT_BYTES_MAX));
        let received = Received { body, traffic: self.traffic.clone(), patience, idle, is_renewed, left };
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(received)))
    }
}

fn broken(kind: HttpErrorKind, error: impl std::error::Error + Send + Sync + 'static) -> HttpError {
    HttpError::new(kind, error)
}

/// The kind of a request's failure, from which the client decides whether to try again.
fn failed(error: reqwest::Error) -> HttpError {
    let kind = match &error {
        error if error.is_connect() => HttpErrorKind::Connect,
        error if error.is_timeout() => HttpErrorKind::Timeout,
        error if error.is_builder() || error.is_redirect() => HttpErrorKind::Unknown,
        // The connection ended in the middle of a message.
        _ => HttpErrorKind::Interrupted,
    };
    // The client adds the request itself.
    broken(kind, error.without_url())
}

/// The body of a request, whose bytes are counted as they are sent.
struct Counted {
    body: HttpRequestBody,
    own: Traffic,
    all: Traffic,
}

impl Body for Counted {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            let bytes = frame.data_ref().map_or(0, Bytes::len) as u64;
            self.own.add(bytes);
            self.all.add(bytes);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The bytes of the range that a request asks for.
fn range_bytes(headers: &HeaderMap) -> Option<u64> {
    let (first, last) = headers.get(RANGE)?.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    last.checked_sub(first)?.checked_add(1)
}

/// The body of an answer, whose bytes are counted as they arrive; given up when none do for too long, and no longer than was
/// asked for, whatever the store sends. A document has as long for all of its bytes.
struct Received {
    body: reqwest::Body,
    traffic: Traffic,
    patience: Duration,
    idle: Pin<Box<tokio::time::Sleep>>,
    /// Whether each byte that arrives allows for further time.
    is_renewed: bool,
    /// How many more bytes are read.
    left: u64,
}

impl Received {
    /// The part of what has arrived that is read.
    fn take(&mut self, frame: Frame<Bytes>) -> Frame<Bytes> {
        let mut data = frame.into_data().unwrap_or_default();
        self.traffic.add(data.len() as u64);
        data.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.left -= data.len() as u64;
        Frame::data(data)
    }
}

impl Body for Received {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                if self.is_renewed {
                    let deadline = tokio::time::Instant::now() + self.patience;
                    self.idle.as_mut().reset(deadline);
                } else if self.idle.as_mut().poll(context).is_ready() {
                    let late = broken(HttpErrorKind::Timeout, Idle(self.patience));
                    return Poll::Ready(Some(Err(late)));
                }
                Poll::Ready(Some(Ok(self.take(frame))))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(failed(error)))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => match self.idle.as_mut().poll(context) {
                Poll::Ready(()) => {
                    Poll::Ready(Some(Err(broken(HttpErrorKind::Timeout, Idle(self.patience)))))
                }
                Poll::Pending => Poll::Pending,
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0 || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        // Whatever the store says of its length, no more than this is read.
        let mut hint = SizeHint::default();
        hint.set_upper(self.body.size_hint().upper().unwrap_or(self.left).min(self.left));
        hint
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_range_are_known() {
        let bytes = |text: &'static str| {
            range_bytes(&HeaderMap::from_iter([(RANGE, HeaderValue::from_static(text))]))
        };
        assert_eq!((bytes("bytes=0-0"), bytes("bytes=4-11")), (Some(1), Some(8)));
        for other in ["bytes=5-4", "bytes=5-", "bytes=-5", "bytes=0-18446744073709551615", "lines=0-1", "x"] {
            assert_eq!(bytes(other), None, "{other}");
        }
        assert_eq!(range_bytes(&HeaderMap::new()), None);
    }
}
