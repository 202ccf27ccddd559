//! One connection (`vfio-user.rst: Socket`): messages and fds over a UNIX stream socket, as two
//! halves that different threads may hold, [`Receiver`] and [`Sender`].
//!
//! A message goes out in one `sendmsg`. One that fits the receive buffer costs one `recvmsg`; what
//! is longer is received where it belongs. Nothing is allocated for a message without fds.

mod receiver;
mod sender;

pub use receiver::{Fds, Receiver};
pub use sender::Sender;
pub(crate) use sender::wait_ready;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use limosa_protocol::Errno;
use rustix::net::sockopt;

use crate::codec::DecodeError;

/// Why a connection did not carry a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The peer closed the connection between two messages.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed the connection within a message.
    #[error("the peer closed the connection within a message")]
    Cut,
    /// The deadline passed. Receiving may go on later; a message that was sent in part makes the
    /// connection useless, and it is shut down.
    #[error("the peer did not answer in time")]
    TimedOut,
    /// The bytes are not a message, and where the next one starts is unknown.
    #[error("the peer sent what is not a message: {0}")]
    Framing(DecodeError),
    /// The peer asks faster than it takes the answers.
    #[error("the peer does not take its replies")]
    Backlog,
    /// More fds in one message than the peer takes.
    #[error("{0} fds in one message are too many")]
    Fds(usize),
    /// A system call failed.
    #[error("{0}")]
    Os(Errno),
}

impl From<rustix::io::Errno> for ConnectionError {
    fn from(errno: rustix::io::Errno) -> ConnectionError {
        match errno {
            rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET => ConnectionError::Closed,
            other => ConnectionError::Os(Errno::from_raw(other.raw_os_error().unsigned_abs())),
        }
    }
}

/// Splits a connected socket. `limit` is how long a wait that has a deadline sleeps at a time: a
/// wait ends between its deadline and `limit` after it.
pub fn split(stream: UnixStream, limit: Duration) -> Result<(Receiver, Sender), ConnectionError> {
    // A zero limit would mean none at all.
    let limit = limit.max(Duration::from_millis(1));
    sockopt::set_socket_timeout(&stream, sockopt::Timeout::Recv, Some(limit))?;
    // As much as the system allows: fewer switches between the two sides within a large message.
    sockopt::set_socket_send_buffer_size(&stream, SEND_BUFFER_BYTES)?;
    stream.set_nonblocking(false).map_err(|_| ConnectionError::Os(Errno::EIO))?;
    let socket = Arc::new(stream);
    Ok((Receiver::new(Arc::clone(&socket)), Sender::new(socket)))
}

const SEND_BUFFER_BYTES: usize = 4 << 20;

#[cfg(test)]
mod tests;
