//! The errors of a store, in words that say what to do.

use std::error::Error;
use std::io::{self, ErrorKind};

use limosa_migrate::link::LinkError;
use limosa_stream::{escaped, without_passwords};

use crate::config::Client;

/// The access that was attempted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    Writing,
    Reading,
}

/// The object was replaced while it was being read.
pub(crate) fn changed() -> LinkError {
    let what = "the object was replaced while it was being read, and is discarded; load it again";
    io::Error::new(ErrorKind::InvalidData, what).into()
}

/// There is an object already, and it may not be replaced.
pub(crate) fn exists() -> LinkError {
    let what = "there is an object already; choose another key, or ask to replace it";
    io::Error::new(ErrorKind::AlreadyExists, what).into()
}

impl Client {
    /// An error of the store's client, with its meaning and what to do.
    pub(crate) fn explain(&self, error: &object_store::Error, doing: Doing) -> LinkError {
        let text = chain(error);
        let Client { bucket, endpoint, region, .. } = self;
        let said = said(&text);
        let rights = match doing {
            Doing::Writing => "s3:PutObject and s3:AbortMultipartUpload",
            Doing::Reading => "s3:GetObject",
        };
        let (kind, what) = match code(&text).unwrap_or_default() {
            "NoSuchBucket" => (
                ErrorKind::NotFound,
                format!(
                    "there is no bucket `{bucket}` at {endpoint}; create it, or check AWS_ENDPOINT_URL and AWS_REGION"
                ),
            ),
            "NoSuchKey" => {
                (ErrorKind::NotFound, format!("there is no such object in bucket `{bucket}` at {endpoint}"))
            }
            "InvalidAccessKeyId"
            | "SignatureDoesNotMatch"
            | "ExpiredToken"
            | "InvalidToken"
            | "NotSignedUp" => (
                ErrorKind::PermissionDenied,
                format!(
                    "{endpoint} does not accept the credentials ({said}); check AWS_ACCESS_KEY_ID, \
                     AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
                ),
            ),
            "RequestTimeTooSkewed" => (
                ErrorKind::PermissionDenied,
                format!("{endpoint} refuses a request of another time ({said}); set this machine's clock"),
            ),
            "AuthorizationHeaderMalformed" | "PermanentRedirect" | "IllegalLocationConstraintException" => (
                ErrorKind::PermissionDenied,
                format!("bucket `{bucket}` is not in region {region} ({said}); set AWS_REGION to its region"),
            ),
            "NotImplemented" if doing == Doing::Writing => (
                ErrorKind::Unsupported,
                format!(
                    "{endpoint} lacks something ({said}); if that is If-None-Match when an upload is completed, only \
                     an object that may be replaced can be written there"
                ),
            ),
            "NoSuchUpload" => {
                (ErrorKind::Other, "the upload was aborted by another client; save again".into())
            }
            _ => self.by_kind(error, &text, &said, rights),
        };
        io::Error::new(kind, what).into()
    }

    /// For answers without an S3 error code, such as those to HEAD, and for errors on the way to the store.
    fn by_kind(
        &self,
        error: &object_store::Error,
        text: &str,
        said: &str,
        rights: &str,
    ) -> (ErrorKind, String) {
        let Client { bucket, endpoint, region, .. } = self;
        match error {
            object_store::Error::NotFound { .. } => {
                (ErrorKind::NotFound, format!("there is no such object in bucket `{bucket}` at {endpoint}"))
            }
            object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => (
                ErrorKind::PermissionDenied,
                format!(
                    "{endpoint} denies access to bucket `{bucket}` ({said}); these credentials need {rights} \
                     there"
                ),
            ),
            _ if text.contains("bare redirect")
                || text.contains("301 Moved")
                || text.contains("307 Temp") =>
            {
                (
                    ErrorKind::PermissionDenied,
                    format!("bucket `{bucket}` is not in region {region}; set AWS_REGION to its region"),
                )
            }
            _ => {
                let reason = innermost(error);
                (ErrorKind::ConnectionAborted, format!("{endpoint}: {reason}; is the store up?"))
            }
        }
    }
}

/// Whether the store refuses a range that begins behind the end of the object. The error has no kind of its own, and names
/// of objects and addresses of stores are in its text too.
pub(crate) fn is_beyond_the_end(error: &object_store::Error) -> bool {
    let text = chain(error);
    matches!(error, object_store::Error::Generic { .. })
        && (code(&text) == Some("InvalidRange") || text.contains("non-2xx status code: 416 "))
}

/// The error and its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// The innermost cause.
fn innermost(error: &dyn Error) -> String {
    let mut innermost = error;
    while let Some(cause) = innermost.source() {
        innermost = cause;
    }
    // An answer that is not an S3 error document may be any text.
    shown(&innermost.to_string())
}

/// The code in S3's error document.
fn code(text: &str) -> Option<&str> {
    let code = element(text, "Code")?;
    code.bytes().all(|letter| letter.is_ascii_alphanumeric()).then_some(code)
}

/// The code and message of the store's answer.
fn said(text: &str) -> String {
    let message = shown(element(text, "Message").unwrap_or_default());
    match code(text) {
        Some(code) if message.is_empty() => code.into(),
        Some(code) => format!("{code}: {message}"),
        None => "it gives no reason".into(),
    }
}

fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    rest.split_once(&format!("</{name}>")).map(|(inside, _)| inside)
}

/// A store's text as it may be printed: not too long, without a password, and what does something on a terminal escaped.
fn shown(text: &str) -> String {
    let end = text.char_indices().nth(300).map_or(text.len(), |(at, _)| at);
    escaped(&without_passwords(&text[..end])).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_s_text_does_nothing_on_a_terminal() {
        let text =
            "<Error><Code>AccessDenied</Code><Message>\x1b[2Jnot\nyours, \u{202e}\"é\"</Message></Error>";
        assert_eq!(said(text), r#"AccessDenied: \u{1b}[2Jnot\nyours, \u{202e}"é""#);
        assert_eq!(shown(&"a".repeat(1000)).len(), 300);
        for wrong in ["<Code>\x1b[2J</Code>", "<Code>Access", "Access</Code>", ""] {
            assert_eq!(said(wrong), "it gives no reason", "{wrong:?}");
        }
    }
}
