//! A command as its handler sees it, and its outcome (`vfio-user.rst: Header`).

use std::io::IoSlice;
use std::os::fd::BorrowedFd;

use limosa_foreign_fd::ForeignFd;
use limosa_protocol::Errno;
use zerocopy::IntoBytes;

use super::link::Link;
use crate::codec::{Command, Header, Kind};
use crate::connection::{ConnectionError, Receiver};

/// The outcome of a request.
pub(super) enum Outcome {
    /// Its reply was sent, or it wanted none.
    Replied,
    /// It is refused.
    Refused(Errno),
    /// It waits until the device runs again.
    Held,
}

/// The outcome, or the connection's end.
pub(super) type Handled = Result<Outcome, ConnectionError>;

impl From<Result<(), Errno>> for Outcome {
    fn from(result: Result<(), Errno>) -> Outcome {
        result.map_or_else(Outcome::Refused, |()| Outcome::Replied)
    }
}

/// A command as its handler sees it.
pub(super) struct Job {
    pub(super) header: Header,
    pub(super) fds: Vec<ForeignFd>,
    /// For data that is still on the socket.
    pub(super) receiver: Option<Box<Receiver>>,
}

impl Job {
    /// Whether the client waits for a reply.
    pub(super) fn wants_reply(&self) -> bool {
        self.header.kind() != Ok(Kind::Posted)
    }

    /// Replies with this body, if a reply is wanted.
    pub(super) fn reply(&self, link: &Link, body: &[u8]) -> Handled {
        self.reply_pieces(link, &[body], &[])
    }

    /// Replies with a body of up to three pieces, and fds.
    pub(super) fn reply_pieces(&self, link: &Link, body: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Handled {
        if self.wants_reply() {
            let header = reply_header(&self.header, body.iter().map(|piece| piece.len()).sum())?;
            let mut pieces = [IoSlice::new(&[]); 4];
            pieces[0] = IoSlice::new(header.as_bytes());
            for (to, from) in pieces[1..].iter_mut().zip(body) {
                *to = IoSlice::new(from);
            }
            link.send(&mut pieces[..=body.len()], fds)?;
        }
        Ok(Outcome::Replied)
    }

    /// Replies with an errno, if a reply is wanted.
    pub(super) fn refuse(&self, link: &Link, errno: Errno) -> Result<(), ConnectionError> {
        let header = &self.header;
        tracing::debug!(command = %header.command, id = header.id, %errno, "refused");
        if !self.wants_reply() {
            return Ok(());
        }
        link.send(&mut [IoSlice::new(header.refusal(errno).as_bytes())], &[])
    }
}

/// The header of a reply; the limits of requests bound its size.
pub(super) fn reply_header(header: &Header, body_bytes: usize) -> Result<Header, ConnectionError> {
    header.reply(body_bytes).ok_or(ConnectionError::Broken("a reply above 4 GiB"))
}

/// The most fds that a command may come with.
pub(super) fn fds_max(command: Command) -> usize {
    match command {
        Command::DMA_MAP => 1,
        Command::DEVICE_SET_IRQS => usize::MAX,
        _ => 0,
    }
}
