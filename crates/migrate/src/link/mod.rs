//! Byte links between the two ends of a move: UNIX and TCP sockets, optionally under TLS or with limited bandwidth.
//!
//! A [`Link`] carries bytes. It may write or read fewer than it was asked to; framing and checksums are the task of the
//! layer above. Every wait has a deadline and ends when the move is called off.

mod address;
mod connector;
mod fingerprint;
mod limited;
mod socket;
mod tls;

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use address::{Address, AddressError};
pub use connector::Connector;
pub use fingerprint::{Fingerprint, NotAFingerprint};
pub use limited::{Bandwidth, LimitedLink};
pub use limosa_host::User;
pub(crate) use socket::poll_for;
pub use socket::{Listener, SocketLink, connect, stays_within_host};
pub(crate) use tls::is_tls;
pub use tls::{Tls, TlsError, TlsLink};

use limosa_guest_memory::{PinnedBytes, SendPart};

use crate::Cancel;
use crate::cancel::after;

/// The limit of a wait: its deadline, and the handle that ends it early.
///
/// A link that shares a [`Bandwidth`] does not count the wait for its budget: see [`LimitedLink`].
#[derive(Clone, Copy, Debug)]
pub struct Wait<'a> {
    /// When to give up. With a deadline in the past, a call does what it can without waiting.
    pub deadline: Instant,
    /// Ends the wait early.
    pub cancel: Option<&'a Cancel>,
}

impl<'a> Wait<'a> {
    /// A deadline `time` from now. [`Duration::MAX`] is no deadline.
    pub fn within(time: Duration, cancel: Option<&'a Cancel>) -> Wait<'a> {
        Wait { deadline: after(limosa_clockwork::now(), time), cancel }
    }

    /// The time until the deadline; [`LinkError::Cancelled`] or [`LinkError::TimedOut`] when the wait is over.
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

/// Why a call on a link failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
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
    /// The two ends do not trust each other, or only one of them uses TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The guest memory of a transfer does not exist.
    #[error("guest memory: {0}")]
    Memory(std::io::Error),
    /// The system refused.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

impl LinkError {
    /// Why a call failed that moves guest memory.
    pub(crate) fn of_memory(errno: rustix::io::Errno) -> LinkError {
        match errno {
            rustix::io::Errno::FAULT => LinkError::Memory(crate::memory::cut_short()),
            errno => errno.into(),
        }
    }
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

/// [`Link::read_parts`] by [`Link::read`].
pub(crate) fn read_first_part(
    link: &(impl Link + ?Sized),
    into: &mut [IoSliceMut<'_>],
    wait: Wait<'_>,
) -> Result<usize, LinkError> {
    match into.iter_mut().find(|part| !part.is_empty()) {
        Some(part) => link.read(part, wait),
        None => Ok(0),
    }
}

/// [`Link::read_to_memory`] by [`Link::read`].
pub(crate) fn read_through_buffer(
    link: &(impl Link + ?Sized),
    memory: &PinnedBytes,
    from: usize,
    behind: &mut [u8],
    wait: Wait<'_>,
) -> Result<usize, LinkError> {
    let room = memory.len() - from.min(memory.len());
    if room == 0 {
        return link.read(behind, wait);
    }
    let mut piece = [0; 16 << 10];
    let room = room.min(piece.len());
    let bytes = link.read(&mut piece[..room], wait)?;
    memory.write(from, &piece[..bytes]).map_err(LinkError::of_memory)?;
    Ok(bytes)
}

/// An ordered byte stream in both directions. One thread may write while another reads; concurrent writes are done one
/// after the other, and so are concurrent reads.
pub trait Link: Send + Sync {
    /// Writes at least one byte of these slices, in order. Returns how many bytes were written.
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError>;

    /// Reads at least one byte. Returns how many bytes were read; [`LinkError::Closed`] at the end of the stream.
    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError>;

    /// Reads at least one byte into these buffers, in order, like [`Link::read`]. The default reads into the first one
    /// that is not empty; a link that can fill several in one call saves its reader the next call.
    fn read_parts(&self, into: &mut [IoSliceMut<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        read_first_part(self, into, wait)
    }

    /// Reads at least one byte: into guest memory from its byte `from` on, and behind its end into `behind`. The
    /// default reads through a small buffer; a link that receives into the memory itself saves the copy.
    /// [`LinkError::Memory`] where the memory does not exist.
    fn read_to_memory(
        &self,
        memory: &PinnedBytes,
        from: usize,
        behind: &mut [u8],
        wait: Wait<'_>,
    ) -> Result<usize, LinkError> {
        read_through_buffer(self, memory, from, behind, wait)
    }

    /// Whether the link sends guest memory from where it lies, by [`Link::write_parts`].
    fn sends_memory(&self) -> bool {
        false
    }

    /// Writes at least one byte of these parts, in order, as [`Link::write`]. Called only where [`Link::sends_memory`] is true. The
    /// default copies all of them first.
    fn write_parts(&self, parts: &[SendPart<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let mut bytes = Vec::with_capacity(parts.iter().map(SendPart::len).sum());
        for part in parts {
            part.append_to(&mut bytes).map_err(LinkError::of_memory)?;
        }
        self.write(&[IoSlice::new(&bytes)], wait)
    }

    /// Whether everything that is read was certainly written by the peer: the link has checksums of its own, with a
    /// key, and those of the stream add nothing. By default true where the peer has presented a certificate.
    fn is_authenticated(&self) -> bool {
        self.peer_fingerprint().is_some()
    }

    /// Ends the stream to the other end. Reading is still possible.
    fn finish(&self);

    /// Ends the stream as well, then reads and drops data until the other end closes or the wait is over. Closing a
    /// socket that has unread data may discard what was sent on it last.
    fn part(&self, wait: Wait<'_>) {
        self.finish();
        let mut dropped = [0; 64 << 10];
        while wait.left().is_ok() && self.read(&mut dropped, wait).is_ok() {}
    }

    /// The other end's name, for messages.
    fn peer(&self) -> &str;

    /// Whether the other end has a peer that reads and answers. A file has none.
    fn has_peer(&self) -> bool {
        true
    }

    /// The fingerprint of the other end's certificate; `None` if it presented none. A link that wraps another link
    /// returns that link's.
    fn peer_fingerprint(&self) -> Option<Fingerprint> {
        None
    }
}

/// Makes the further links of a move: a source connects them ([`Connector`]), a destination accepts them
/// ([`Acceptor`](crate::Acceptor)). A closure can serve as well.
pub trait FurtherLinks: Sync {
    /// The next link to the same peer.
    ///
    /// # Errors
    ///
    /// Any error but [`LinkError::Cancelled`] means that there are no more links. The move goes on with fewer.
    fn next(&self, wait: Wait<'_>) -> Result<Box<dyn Link>, LinkError>;
}

impl<F: Fn(Wait<'_>) -> Result<Box<dyn Link>, LinkError> + Sync> FurtherLinks for F {
    fn next(&self, wait: Wait<'_>) -> Result<Box<dyn Link>, LinkError> {
        self(wait)
    }
}

/// The methods of [`Link`] that a wrapper passes on unchanged.
macro_rules! forward_link {
    (|$this:ident| $to:expr) => {
        fn finish(&self) {
            let $this = self;
            $to.finish();
        }

        fn part(&self, wait: $crate::link::Wait<'_>) {
            let $this = self;
            $to.part(wait);
        }

        fn peer(&self) -> &str {
            let $this = self;
            $to.peer()
        }

        fn has_peer(&self) -> bool {
            let $this = self;
            $to.has_peer()
        }

        fn peer_fingerprint(&self) -> Option<$crate::link::Fingerprint> {
            let $this = self;
            $to.peer_fingerprint()
        }

        fn is_authenticated(&self) -> bool {
            let $this = self;
            $to.is_authenticated()
        }

        fn sends_memory(&self) -> bool {
            let $this = self;
            $to.sends_memory()
        }
    };
}
pub(crate) use forward_link;

macro_rules! link_for {
    ($($pointer:ident),*) => {$(
        impl<L: Link + ?Sized> Link for $pointer<L> {
            fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
                (**self).write(slices, wait)
            }

            fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
                (**self).read(into, wait)
            }

            fn read_parts(&self, into: &mut [IoSliceMut<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
                (**self).read_parts(into, wait)
            }

            fn read_to_memory(
                &self,
                memory: &PinnedBytes,
                from: usize,
                behind: &mut [u8],
                wait: Wait<'_>,
            ) -> Result<usize, LinkError> {
                (**self).read_to_memory(memory, from, behind, wait)
            }

            fn write_parts(&self, parts: &[SendPart<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
                (**self).write_parts(parts, wait)
            }

            forward_link!(|this| (**this));
        }
    )*};
}

link_for!(Box, Arc);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_without_a_limit_does_not_overflow_the_clock() {
        for time in [Duration::MAX, Duration::from_secs(u64::MAX / 2), Duration::from_secs(i64::MAX as u64)] {
            let wait = Wait::within(time, None);
            assert!(wait.left().unwrap() > Duration::from_secs(86_400));
            let (one, other) = SocketLink::pair().unwrap();
            one.write(&[IoSlice::new(b"a")], wait).unwrap();
            assert_eq!(other.read(&mut [0], wait).unwrap(), 1);
        }
        let (mut last, mut step) = (Instant::now(), Duration::from_secs(1 << 62));
        while step > Duration::ZERO {
            last = last.checked_add(step).unwrap_or(last);
            step /= 2;
        }
        assert!(after(last, Duration::MAX) >= last, "at the end of the clock's range");
    }
}
