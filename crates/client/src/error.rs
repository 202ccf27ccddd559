//! What can go wrong between a VMM and a device, split by whose fault it is.

use std::time::Duration;

use limosa_protocol::Errno;

/// The result of every call on a device.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call on a device failed.
///
/// After [`Error::Refused`] and [`Error::Usage`] the device is as usable as before; after [`Error::Timeout`],
/// [`Error::Disconnected`] and [`Error::Misbehaved`] the transport may have to be opened again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The device answered with an errno.
    #[error("{device}: {request} refused: {errno}{}", after(.hint))]
    Refused {
        /// The device, as the user named it.
        device: String,
        /// What was asked, in the standard's words.
        request: String,
        /// The answer.
        errno: Errno,
        /// Its meaning in this case and the remedy; empty if the errno is sufficient.
        hint: Box<str>,
    },
    /// No answer within the limit.
    #[error("{device}: no answer to {request} within {limit:?}")]
    Timeout {
        /// The device.
        device: String,
        /// What was asked.
        request: String,
        /// How long was waited.
        limit: Duration,
    },
    /// The other side went away.
    #[error("{device}: connection lost: {reason}")]
    Disconnected {
        /// The device.
        device: String,
        /// What was seen.
        reason: String,
    },
    /// The other side broke the protocol.
    #[error("{device}: the peer broke the protocol: {what}")]
    Misbehaved {
        /// The device.
        device: String,
        /// What was expected and what came.
        what: String,
    },
    /// The call itself is wrong, and nothing was sent.
    #[error("{device}: {what}")]
    Usage {
        /// The device.
        device: String,
        /// What is wrong with it, and what would be right.
        what: String,
    },
    /// A system call on this side failed.
    #[error("{device}: {what}: {errno}{}", after(.hint))]
    Os {
        /// The device.
        device: String,
        /// What was being done.
        what: String,
        /// The system's answer.
        errno: Errno,
        /// Its meaning in this case and the remedy; empty if the errno is sufficient.
        hint: Box<str>,
    },
}

fn after(hint: &str) -> impl std::fmt::Display {
    let separator = if hint.is_empty() { "" } else { "; " };
    format!("{separator}{hint}")
}

impl Error {
    /// The errno of the device's or the system's answer, if there is one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Refused { errno, .. } | Error::Os { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Whether the device refused with this errno.
    pub fn is_refused(&self, with: Errno) -> bool {
        matches!(self, Error::Refused { errno, .. } if *errno == with)
    }

    /// Whether the connection to the device is lost, so that no further request is possible over it.
    pub fn is_connection_lost(&self) -> bool {
        matches!(self, Error::Timeout { .. } | Error::Disconnected { .. } | Error::Misbehaved { .. })
    }
}
