//! An answer compared with the model's expectation, and the signature of a difference.

use limosa_client::{Error, Result};
use limosa_protocol::Errno;

use super::model::Driver;
use super::request::Request;

/// Where a device and the model differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Differs {
    /// The key of this difference: the request, the state in which it came, the actual and the expected answer.
    pub signature: String,
}

/// The expected answer.
pub(super) enum Expected {
    Done,
    Refused,
    With(Errno),
    /// A refusal of a session that has ended. A stream that is used in the wrong direction may be refused for that reason first:
    /// the kernel checks the direction before it calls the driver.
    Ended {
        is_wrong_way: bool,
    },
    Anything,
}

/// The name of an errno without its description.
fn name(errno: Errno) -> String {
    errno.to_string().split(' ').next().unwrap_or_default().to_owned()
}

impl Driver {
    /// The state in which a request came, as far as a difference depends on it.
    fn met(&self, request: &Request) -> String {
        let is_of_log = matches!(request, Request::LogStart(..) | Request::LogStop | Request::LogReport(..));
        match self.logging {
            _ if !self.drives => "beside the thread that drives".into(),
            // A log does not depend on the state, so a difference is the same in each.
            Some(true) if is_of_log => "with the log on".into(),
            Some(false) if is_of_log => "with the log off".into(),
            _ => format!("in {}", self.state),
        }
    }

    pub(super) fn differs(&self, request: &Request, got: &str, expected: &str) -> Differs {
        let met = self.met(request);
        Differs { signature: format!("{} {met}: {got}, expected {expected}", request.kind()) }
    }

    /// Compares an answer with the expected one.
    pub(super) fn judge<T>(
        &self,
        request: &Request,
        answer: Result<T>,
        expected: Expected,
    ) -> std::result::Result<Option<T>, Differs> {
        let words = match expected {
            Expected::Done => "success".to_owned(),
            Expected::Refused => "a refusal".to_owned(),
            Expected::With(errno) => name(errno),
            Expected::Ended { .. } => name(Errno::ENODEV),
            Expected::Anything => "success or a refusal".to_owned(),
        };
        match (answer, expected) {
            (Ok(value), Expected::Done | Expected::Anything) => Ok(Some(value)),
            // Nothing was sent.
            (Err(Error::Usage { .. }), _) => Ok(None),
            (Err(Error::Refused { errno: Errno::ENODEV, .. }), Expected::Ended { .. }) => Ok(None),
            (Err(Error::Refused { errno: Errno::EBADF, .. }), Expected::Ended { is_wrong_way: true }) => {
                Ok(None)
            }
            // It depends neither on the state nor on what is written.
            (answer, Expected::Ended { .. }) => {
                let got = match answer {
                    Ok(_) => "success".into(),
                    Err(Error::Refused { errno, .. }) => name(errno),
                    Err(error) if error.is_connection_lost() => "the connection is lost".into(),
                    Err(_) => "a system error".into(),
                };
                let what = match request {
                    Request::Read(_) | Request::OldRead(_) => "a read from",
                    _ => "a write to",
                };
                let signature = format!("{what} a session that has ended: {got}, expected {words}");
                Err(Differs { signature })
            }
            (Ok(_), _) => Err(self.differs(request, "success", &words)),
            (Err(Error::Refused { .. }), Expected::Refused | Expected::Anything) => Ok(None),
            (Err(Error::Refused { errno, .. }), Expected::With(wanted)) if errno == wanted => Ok(None),
            (Err(Error::Refused { errno, .. }), _) => Err(self.differs(request, &name(errno), &words)),
            (Err(error), _) => {
                let kind =
                    if error.is_connection_lost() { "the connection is lost" } else { "a system error" };
                Err(self.differs(request, kind, &words))
            }
        }
    }
}
