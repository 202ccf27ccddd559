//! One connection (`vfio-user.rst: Socket`): messages and fds over a UNIX stream socket, as two
//! halves that different threads may hold, [`Receiver`] and [`Sender`].
//!
//! A message is sent in one call. Receiving a message that fits the receive buffer also takes one call; longer ones are
//! received directly into their destination. Nothing is allocated for a message without fds.

mod receiver;
mod sender;

pub use receiver::{Fds, Receiver};
pub(crate) use sender::wait_ready;
pub use sender::{Sender, Sending};

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use limosa_foreign_fd::Foreign;
use limosa_protocol::Errno;
use rustix::net::sockopt;

/// Why a connection did not carry a message, or is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The peer closed the connection between two messages.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed the connection within a message.
    #[error("the peer closed the connection within a message")]
    Cut,
    /// The deadline passed; the expected message may still arrive.
    #[error("the peer did not answer in time")]
    TimedOut,
    /// The peer began a message and did not finish it in time, or did not take one.
    #[error("the peer stalled within a message")]
    Stalled,
    /// The peer did not negotiate a version in time.
    #[error("the peer did not negotiate a version in time")]
    Silent,
    /// A protocol violation after which the connection cannot continue.
    #[error("the protocol was broken: {0}")]
    Broken(&'static str),
    /// The peer sends requests faster than it reads the replies.
    #[error("the peer does not take its replies")]
    Backlog,
    /// More fds in one message than the peer accepts.
    #[error("{0} fds in one message are too many")]
    Fds(usize),
    /// Another process serves the connection now.
    #[error("another process serves the connection")]
    Given,
    /// A system call failed.
    #[error("the socket failed: {0}")]
    Os(Errno),
}

impl From<rustix::io::Errno> for ConnectionError {
    fn from(errno: rustix::io::Errno) -> ConnectionError {
        match errno {
            rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET => ConnectionError::Closed,
            other => ConnectionError::Os(errno_of(other)),
        }
    }
}

/// The system's errno as the protocol carries it.
pub(crate) fn errno_of(errno: rustix::io::Errno) -> Errno {
    Errno::from_raw(errno.raw_os_error().unsigned_abs())
}

/// How long the halves of a connection wait.
#[derive(Clone, Copy, Debug)]
pub struct Waits {
    /// Time limit for receiving a message from its first byte to its last, and for the peer to read one.
    pub message: Duration,
    /// A wait that has a deadline ends between its deadline and so long after it.
    pub sleep: Duration,
}

impl Waits {
    /// The waits of a connection whose messages, and whose shortest deadlines, have these limits. They
    /// are exceeded by at most an eighth.
    pub fn new(message: Duration, shortest: Duration) -> Waits {
        Waits { message, sleep: message.min(shortest) / 8 }
    }
}

/// Splits a connected socket. Unreceived data of the peer is dropped with it.
pub fn split(
    stream: impl Into<Foreign<UnixStream>>,
    waits: Waits,
) -> Result<(Receiver, Sender), ConnectionError> {
    let stream = stream.into();
    // A blocking socket: no call but the transfer itself is needed for a message.
    stream.set_nonblocking(false).map_err(|_| ConnectionError::Os(Errno::EIO))?;
    // A zero limit would mean none at all.
    let least = Duration::from_millis(1);
    let waits = Waits { message: waits.message.max(least), sleep: waits.sleep.max(least) };
    set_send_buffer(&stream)?;
    let socket = Arc::new(stream);
    Ok((Receiver::new(Arc::clone(&socket), waits), Sender::new(socket, waits)))
}

/// Sets the largest send buffer that the system allows, for fewer context switches within a large message.
pub(crate) fn set_send_buffer(socket: &UnixStream) -> rustix::io::Result<()> {
    sockopt::set_socket_send_buffer_size(socket, SEND_BUFFER_BYTES)
}

const SEND_BUFFER_BYTES: usize = 4 << 20;

#[cfg(test)]
mod tests;
