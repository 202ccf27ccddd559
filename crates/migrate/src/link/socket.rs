//! Links over stream sockets, UNIX and TCP. A frame's header and payload go out in one `sendmsg`; waits use `poll`.
//!
//! A peer can send fds over a UNIX socket. A link expects none, and one that arrives fails it. Closing an fd may block,
//! so that another thread does it; the same holds of fds that are still in a socket when it is closed.

mod connect;
mod listener;

use std::io::{IoSlice, IoSliceMut};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use limosa_foreign_fd::{Foreign, ForeignFd, receive_parts};
use limosa_guest_memory::{PinnedBytes, SendPart};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown};

use super::{Link, LinkError, Wait};
use crate::cancel::timespec;
pub(super) use connect::connect_to;
pub use connect::{connect, stays_within_host};
pub use listener::Listener;

/// A connected stream socket.
#[derive(Debug)]
pub struct SocketLink {
    fd: ForeignFd,
    peer: String,
}

impl SocketLink {
    /// Wraps a connected stream socket; `peer` names the other end in messages.
    pub fn new(socket: impl Into<OwnedFd>, peer: impl Into<String>) -> SocketLink {
        SocketLink { fd: Foreign::new(socket.into()), peer: peer.into() }
    }

    /// A TCP connection that belongs to this process alone. No fds arrive on it and closing it never blocks, so it
    /// needs no thread for that. Strangers that connect again and again would otherwise take many threads.
    fn tcp(socket: TcpStream, peer: String) -> SocketLink {
        SocketLink { fd: Foreign::harmless(socket.into()), peer }
    }

    /// Both ends of a link within this process.
    pub fn pair() -> std::io::Result<(SocketLink, SocketLink)> {
        let (one, other) = UnixStream::pair()?;
        Ok((SocketLink::new(one, "the destination"), SocketLink::new(other, "the source")))
    }

    /// Shuts down both directions for both ends. Threads that wait on the link return.
    pub fn cut(&self) {
        // Refused only when the connection is gone already.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }
}

/// Calls `attempt` until it returns something other than EAGAIN, and waits for the events between the calls.
fn retry<T>(
    fd: &impl AsFd,
    events: PollFlags,
    wait: Wait<'_>,
    mut attempt: impl FnMut() -> Result<T, Errno>,
) -> Result<T, LinkError> {
    retry_or(fd, events, wait, LinkError::from, &mut attempt)
}

/// The same with another meaning of the system's errors.
fn retry_or<T>(
    fd: &impl AsFd,
    events: PollFlags,
    wait: Wait<'_>,
    failed: impl Fn(Errno) -> LinkError,
    mut attempt: impl FnMut() -> Result<T, Errno>,
) -> Result<T, LinkError> {
    loop {
        if wait.cancel.is_some_and(crate::Cancel::is_cancelled) {
            return Err(LinkError::Cancelled);
        }
        match attempt() {
            Err(Errno::AGAIN) => {}
            Err(Errno::INTR) => continue,
            done => return done.map_err(failed),
        }
        poll_for(fd, events, wait)?;
    }
}

/// Waits for the events. Returns whether there are any: a cancel, a signal and the deadline end the wait too.
pub(crate) fn poll_for(fd: &impl AsFd, events: PollFlags, wait: Wait<'_>) -> Result<bool, LinkError> {
    let left = timespec(wait.left()?);
    let mut fds = [PollFd::new(fd, events), PollFd::new(fd, events)];
    let mut watched = 1;
    if let Some(cancel) = wait.cancel {
        (fds[1], watched) = (PollFd::new(cancel, PollFlags::IN), 2);
    }
    match poll(&mut fds[..watched], Some(&left)) {
        Ok(_) => Ok(!fds[0].revents().is_empty()),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

impl AsFd for SocketLink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Link for SocketLink {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        retry(&self.fd, PollFlags::OUT, wait, || {
            rustix::net::sendmsg(&self.fd, slices, &mut SendAncillaryBuffer::default(), flags)
        })
    }

    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.read_parts(&mut [IoSliceMut::new(into)], wait)
    }

    fn read_parts(&self, into: &mut [IoSliceMut<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let has_room = into.iter().any(|part| !part.is_empty());
        let got =
            retry(&self.fd, PollFlags::IN, wait, || receive_parts(&self.fd, into, RecvFlags::DONTWAIT))?;
        if got == 0 && has_room { Err(LinkError::Closed) } else { Ok(got) }
    }

    fn read_to_memory(
        &self,
        memory: &PinnedBytes,
        from: usize,
        behind: &mut [u8],
        wait: Wait<'_>,
    ) -> Result<usize, LinkError> {
        let has_room = from < memory.len() || !behind.is_empty();
        let got = retry_or(&self.fd, PollFlags::IN, wait, LinkError::of_memory, || {
            memory.receive(&self.fd, from, behind)
        })?;
        if got == 0 && has_room { Err(LinkError::Closed) } else { Ok(got) }
    }

    fn sends_memory(&self) -> bool {
        true
    }

    fn write_parts(&self, parts: &[SendPart<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        retry_or(&self.fd, PollFlags::OUT, wait, LinkError::of_memory, || PinnedBytes::send(&self.fd, parts))
    }

    fn finish(&self) {
        // Refused only when the connection is gone already.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
    }

    fn peer(&self) -> &str {
        &self.peer
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::Cancel;

    fn soon(cancel: Option<&Cancel>) -> Wait<'_> {
        Wait::within(Duration::from_millis(5), cancel)
    }

    #[test]
    fn waits_end_at_the_deadline_at_a_cancel_and_at_the_close() {
        let (one, other) = SocketLink::pair().unwrap();
        let mut byte = [0];
        assert!(matches!(one.read(&mut byte, soon(None)), Err(LinkError::TimedOut)));
        let cancel = Cancel::new().unwrap();
        cancel.cancel();
        let long = Wait::within(Duration::from_secs(60), Some(&cancel));
        assert!(matches!(one.read(&mut byte, long), Err(LinkError::Cancelled)));
        let full = [0; 1 << 16];
        let stuck = loop {
            if let Err(error) = one.write(&[IoSlice::new(&full)], soon(None)) {
                break error;
            }
        };
        assert!(matches!(stuck, LinkError::TimedOut));
        drop(other);
        // Not `soon`: on a busy machine that time has passed before the link is looked at.
        let long = Wait::within(Duration::from_secs(60), None);
        assert!(matches!(one.write(&[IoSlice::new(&full)], long), Err(LinkError::Closed)));
        assert!(matches!(one.read(&mut byte, long), Err(LinkError::Closed)));
    }
}
