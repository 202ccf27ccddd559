//! [`Wire`]: a raw connection to a vfio-user server, as bytes and fds (`vfio-user.rst: Socket`). The checks of the family
//! `vfio-user` use it to send messages that no client sends.

mod raw;
mod socket;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use limosa_foreign_fd::ForeignFd;

pub(crate) use raw::{Answer, Body, Message, Raw, info_request, next_client, version};
pub use socket::SocketWire;

/// A raw connection: bytes and fds out, bytes and fds in. Every wait has a limit.
pub trait Wire: Send {
    /// Sends all of these bytes, and the fds with the first of them. `TimedOut` when the server has not taken them by then;
    /// `BrokenPipe` or `ConnectionReset` when it closed the connection.
    fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>], until: Instant) -> io::Result<()>;

    /// Receives what there is, at least one byte, and appends the fds that came with it. 0 bytes: the server closed the
    /// connection. `TimedOut` when nothing came by then.
    fn receive(&mut self, into: &mut [u8], fds: &mut Vec<ForeignFd>, until: Instant) -> io::Result<usize>;
}

/// Makes a raw connection.
pub(crate) type Dial = Arc<dyn Fn() -> io::Result<Box<dyn Wire>> + Send + Sync>;
