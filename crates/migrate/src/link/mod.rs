//! Byte links between the two ends of a move: UNIX and TCP sockets, also under TLS or with a limit to their
//! bandwidth.
//!
//! A [`Link`] moves bytes, possibly fewer than asked; framing, checksums and the order of things are
//! above it. Every wait ends at a deadline or when the move is called off.

mod acceptor;
mod address;
mod limited;
mod socket;
mod tls;

use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use acceptor::{Acceptor, Incoming, PENDING_MAX};
pub use address::{Address, AddressError};
pub use limited::{Bandwidth, LimitedLink};
pub use socket::{Listener, SocketLink, connect};
pub(crate) use tls::is_tls;
pub use tls::{Tls, TlsError, TlsLink};

use crate::Cancel;

/// How long a link may wait, and who may end the wait.
#[derive(Clone, Copy, Debug)]
pub struct Wait<'a> {
    /// When to give up. A moment in the past allows what can be done without waiting.
    pub deadline: Instant,
    /// Ends the wait early.
    pub cancel: Option<&'a Cancel>,
}

impl<'a> Wait<'a> {
    /// This long from now.
    pub fn within(time: Duration, cancel: Option<&'a Cancel>) -> Wait<'a> {
        let now = limosa_clockwork::now();
        // A limit beyond what the clock can express is no limit; a year is none either.
        let deadline = now.checked_add(time).unwrap_or(now + Duration::from_secs(365 * 86_400));
        Wait { deadline, cancel }
    }

    /// What is left of it; [`LinkError::Cancelled`] or [`LinkError::TimedOut`] when nothing is.
    pub fn left(&self) -> Result<Duration, LinkError> {
        if self.cancel.is_some_and(Cancel::is_cancelled) {
            return Err(LinkError::Cancelled);
        }
        match self.deadline.saturating_duration_since(limosa_clockwork::now()) {
            Duration::ZERO => Err(LinkError::TimedOut),
            left => Ok(left),
        }
    }
}

/// Why a link did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The deadline passed.
    #[error("no progress within the time limit")]
    TimedOut,
    /// The move was called off.
    #[error("cancelled")]
    Cancelled,
    /// The other end is gone.
    #[error("closed by the other end")]
    Closed,
    /// The two sides do not trust each other, or only one of them speaks TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The system refused.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl From<rustix::io::Errno> for LinkError {
    fn from(errno: rustix::io::Errno) -> LinkError {
        use rustix::io::Errno;
        match errno {
            Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN | Errno::CONNABORTED => LinkError::Closed,
            errno => LinkError::Io(errno.into()),
        }
    }
}

/// A byte link: in order, both ways. One thread may write while another reads; two that write, or two that read,
/// come one after the other.
pub trait Link: Send + Sync {
    /// Writes at least one byte of these slices, in order, and says how many.
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError>;

    /// Reads at least one byte and says how many; [`LinkError::Closed`] at the end.
    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError>;

    /// Says to the other end that nothing more comes. Reading goes on.
    fn finish(&self);

    /// Says so as well, and drops what still comes until the other end closes, or until the wait is over: a socket
    /// that is closed with bytes unread may take back what was sent on it last.
    fn part(&self, wait: Wait<'_>) {
        self.finish();
        let mut dropped = [0; 64 << 10];
        while wait.left().is_ok() && self.read(&mut dropped, wait).is_ok() {}
    }

    /// The other end, for messages.
    fn peer(&self) -> &str;

    /// Whether somebody reads and answers at the other end. A file has nobody.
    fn has_peer(&self) -> bool {
        true
    }
}

/// Where a move gets its further links from: the source connects, the destination accepts. Closures are.
pub trait FurtherLinks: Sync {
    /// The next link to the same peer.
    fn next(&self, wait: Wait<'_>) -> Result<Box<dyn Link>, LinkError>;
}

impl<F: Fn(Wait<'_>) -> Result<Box<dyn Link>, LinkError> + Sync> FurtherLinks for F {
    fn next(&self, wait: Wait<'_>) -> Result<Box<dyn Link>, LinkError> {
        self(wait)
    }
}

macro_rules! link_for {
    ($($pointer:ident),*) => {$(
        impl<L: Link + ?Sized> Link for $pointer<L> {
            fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
                (**self).write(slices, wait)
            }

            fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
                (**self).read(into, wait)
            }

            fn finish(&self) {
                (**self).finish();
            }

            fn part(&self, wait: Wait<'_>) {
                (**self).part(wait);
            }

            fn peer(&self) -> &str {
                (**self).peer()
            }

            fn has_peer(&self) -> bool {
                (**self).has_peer()
            }
        }
    )*};
}

link_for!(Box, Arc);
