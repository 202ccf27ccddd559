//! [`SocketWire`]: a [`Wire`] over a UNIX socket.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use limosa_foreign_fd::{FDS_MAX, Foreign, ForeignFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::Wire;

/// A connected UNIX socket.
#[derive(Debug)]
pub struct SocketWire(Foreign<UnixStream>);

impl SocketWire {
    /// Takes over a connected socket.
    pub fn new(socket: impl Into<Foreign<UnixStream>>) -> io::Result<SocketWire> {
        let socket = socket.into();
        socket.set_nonblocking(true)?;
        Ok(SocketWire(socket))
    }

    /// Waits for the socket to be ready, or `TimedOut`.
    fn ready(&self, what: PollFlags, until: Instant) -> io::Result<()> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let limit = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            match poll(&mut [PollFd::new(&*self.0, what)], Some(&limit)) {
                Ok(0) if left.is_zero() => return Err(io::ErrorKind::TimedOut.into()),
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Drop for SocketWire {
    /// The server sees the end at once, whenever the socket is closed.
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&*self.0, rustix::net::Shutdown::Both);
    }
}

impl Wire for SocketWire {
    fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>], until: Instant) -> io::Result<()> {
        let mut fds = &fds[..fds.len().min(FDS_MAX)];
        let mut sent = 0;
        while sent < bytes.len() {
            let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut room);
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(fds));
            }
            let pieces = [IoSlice::new(&bytes[sent..])];
            match rustix::net::sendmsg(&*self.0, &pieces, &mut control, SendFlags::NOSIGNAL) {
                Ok(taken) => {
                    sent += taken;
                    fds = &[];
                }
                Err(rustix::io::Errno::AGAIN) => self.ready(PollFlags::OUT, until)?,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn receive(&mut self, into: &mut [u8], fds: &mut Vec<ForeignFd>, until: Instant) -> io::Result<usize> {
        loop {
            match limosa_foreign_fd::receive(&*self.0, into, RecvFlags::empty(), fds) {
                Ok(received) => return Ok(received.bytes),
                Err(rustix::io::Errno::AGAIN) => self.ready(PollFlags::IN, until)?,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
