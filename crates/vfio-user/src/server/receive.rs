//! Receiving: messages off a socket, in whatever pieces they come, and the fds that came with them
//! (`vfio-user.rst: Header`).
//!
//! A small message costs one `recvmsg`, several that are there already cost one together. Longer
//! bodies are received where they belong. Fds are those of the message whose bytes they came with:
//! the kernel ends a read at the bytes that carry fds, so of several messages in one read it is
//! the last.

use std::io::IoSliceMut;
use std::mem::{MaybeUninit, take};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use limosa_protocol::Errno;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg, sockopt};
use zerocopy::FromBytes;

use crate::codec::Header;

/// Messages up to this many bytes are received without knowing how long they are.
const BUFFER_BYTES: usize = 8192;

/// The most fds that the kernel passes with one write (`SCM_MAX_FD`): there is room for all of
/// them, so that a peer which sends too many is refused and not misunderstood.
const FDS_MAX: usize = 253;

/// Why nothing more can be received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum End {
    /// The peer closed the connection between two messages.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed the connection within a message.
    #[error("the peer closed the connection within a message")]
    Cut,
    /// The peer began a message and did not finish it in time, or did not take a reply.
    #[error("the peer stalled within a message")]
    Stalled,
    /// The peer did not negotiate a version in time.
    #[error("the peer did not negotiate a version in time")]
    Silent,
    /// The peer broke the protocol so that it cannot be followed any more.
    #[error("the peer broke the protocol: {0}")]
    Broken(&'static str),
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Failed(Errno),
}

/// How long to wait for a message to begin.
#[derive(Clone, Copy)]
pub(super) enum Wait {
    /// For ever.
    Forever,
    /// Until then.
    Until(Instant),
}

/// The fds of one message.
#[derive(Default)]
pub(super) struct Fds {
    pub(super) fds: Vec<OwnedFd>,
    /// More were sent than could be taken.
    pub(super) lost: bool,
}

/// What was received of the stream and not taken yet.
pub(super) struct Receiver {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Where `start` is in the stream.
    position: u64,
    /// Of the message being received.
    current: Fds,
    /// Of the message that begins there in the stream, received together with others before it.
    later: Option<(u64, Fds)>,
    /// When waiting for the rest of the message began.
    waiting_since: Option<Instant>,
    limit: Duration,
    /// Whether the socket's own time limit is set. Without it a wait costs less, and an idle client
    /// is waited for without.
    timed: bool,
}

impl Receiver {
    /// Each message must be complete within `limit` of its first byte.
    pub(super) fn new(limit: Duration) -> Receiver {
        Receiver {
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            position: 0,
            current: Fds::default(),
            later: None,
            waiting_since: None,
            limit,
            timed: false,
        }
    }

    /// Takes the next message's header; `None` when none began within the wait. The message before
    /// must have been taken whole.
    pub(super) fn header(&mut self, socket: BorrowedFd<'_>, wait: Wait) -> Result<Option<Header>, End> {
        if let Some((_, fds)) = self.later.take_if(|(at, _)| *at == self.position) {
            self.current = fds;
        }
        while self.end - self.start < Header::BYTES {
            if !self.receive_more(socket, wait)? {
                return Ok(None);
            }
        }
        let header = peek_header(&self.buffer[self.start..self.end]);
        self.advance(Header::BYTES);
        Ok(header)
    }

    /// Takes the next bytes of the message's body.
    pub(super) fn body(&mut self, socket: BorrowedFd<'_>, mut into: &mut [u8]) -> Result<(), End> {
        let here = into.len().min(self.end - self.start);
        into[..here].copy_from_slice(&self.buffer[self.start..self.start + here]);
        self.advance(here);
        into = &mut into[here..];
        while !into.is_empty() {
            self.check_limit(socket)?;
            match receive(socket, into, RecvFlags::WAITALL, &mut self.current) {
                Ok(0) => return Err(End::Cut),
                Ok(bytes) => {
                    self.position += bytes as u64;
                    into = &mut into[bytes..];
                }
                Err(errno) => self.try_again(errno)?,
            }
        }
        Ok(())
    }

    /// Takes the next bytes of the message's body and drops them.
    pub(super) fn drop_body(&mut self, socket: BorrowedFd<'_>, mut bytes: usize) -> Result<(), End> {
        let mut scratch = [0; 16 << 10];
        while bytes > 0 {
            let piece = bytes.min(scratch.len());
            self.body(socket, &mut scratch[..piece])?;
            bytes -= piece;
        }
        Ok(())
    }

    /// Gives the fds of a message of which all, or only the head, was taken.
    pub(super) fn finish_head(&mut self, all: bool) -> Fds {
        if all { self.finish() } else { take(&mut self.current) }
    }

    /// Ends the message that was taken and gives its fds.
    pub(super) fn finish(&mut self) -> Fds {
        self.waiting_since = None;
        take(&mut self.current)
    }

    fn advance(&mut self, bytes: usize) {
        self.start += bytes;
        self.position += bytes as u64;
    }

    /// Receives into the buffer; `false` when the wait was over before a message began.
    fn receive_more(&mut self, socket: BorrowedFd<'_>, wait: Wait) -> Result<bool, End> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        if self.end > 0 {
            self.check_limit(socket)?;
        } else {
            match wait {
                Wait::Forever => self.set_timed(socket, false)?,
                Wait::Until(instant) if !readable(socket, instant)? => return Ok(false),
                Wait::Until(_) => {}
            }
        }
        let mut fds = Fds::default();
        match receive(socket, &mut self.buffer[self.end..], RecvFlags::empty(), &mut fds) {
            Ok(0) => return Err(if self.end == 0 { End::Closed } else { End::Cut }),
            Ok(bytes) => self.end += bytes,
            Err(rustix::io::Errno::AGAIN) if self.end == 0 => return Ok(false),
            Err(rustix::io::Errno::CONNRESET) if self.end == 0 => return Err(End::Closed),
            Err(errno) => self.try_again(errno)?,
        }
        if fds.lost || !fds.fds.is_empty() {
            self.attribute(fds);
        }
        Ok(true)
    }

    /// Finds the message that holds the last byte received.
    fn attribute(&mut self, fds: Fds) {
        let mut at = self.start;
        while let Some(header) = peek_header(&self.buffer[at..self.end]) {
            let next = at.saturating_add(Header::BYTES.max(header.size as usize));
            if next >= self.end {
                break;
            }
            at = next;
        }
        if at == self.start {
            self.current.add(fds.fds);
            self.current.lost |= fds.lost;
        } else {
            self.later = Some((self.position + (at - self.start) as u64, fds));
        }
    }

    /// Before waiting for the rest of a message.
    fn check_limit(&mut self, socket: BorrowedFd<'_>) -> Result<(), End> {
        self.set_timed(socket, true)?;
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        if since.elapsed() > self.limit { Err(End::Stalled) } else { Ok(()) }
    }

    fn set_timed(&mut self, socket: BorrowedFd<'_>, timed: bool) -> Result<(), End> {
        if self.timed != timed {
            let limit = timed.then_some(self.limit);
            sockopt::set_socket_timeout(socket, sockopt::Timeout::Recv, limit)
                .map_err(|errno| End::Failed(errno_of(errno)))?;
            self.timed = timed;
        }
        Ok(())
    }

    fn try_again(&self, errno: rustix::io::Errno) -> Result<(), End> {
        match errno {
            rustix::io::Errno::INTR | rustix::io::Errno::AGAIN => Ok(()),
            rustix::io::Errno::CONNRESET => Err(End::Cut),
            other => Err(End::Failed(errno_of(other))),
        }
    }
}

impl Fds {
    fn add(&mut self, fds: impl IntoIterator<Item = OwnedFd>) {
        for fd in fds {
            if self.fds.len() < FDS_MAX {
                self.fds.push(fd);
            } else {
                self.lost = true;
            }
        }
    }
}

/// The header at the start of these bytes, if all of it is there.
fn peek_header(bytes: &[u8]) -> Option<Header> {
    Header::read_from_prefix(bytes).ok().map(|(header, _)| header)
}

/// One `recvmsg`. Every fd is closed on exec.
fn receive(
    socket: BorrowedFd<'_>,
    into: &mut [u8],
    flags: RecvFlags,
    fds: &mut Fds,
) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message =
        recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, flags | RecvFlags::CMSG_CLOEXEC)?;
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            fds.add(received);
        }
    }
    // Also when this process has no room for more fds.
    fds.lost |= message.flags.contains(ReturnFlags::CTRUNC);
    Ok(message.bytes)
}

/// Waits until there is something to receive, or the end.
fn readable(socket: BorrowedFd<'_>, until: Instant) -> Result<bool, End> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(End::Failed(errno_of(errno))),
        }
    }
}

/// The system's errno as the protocol carries it.
pub(super) fn errno_of(errno: rustix::io::Errno) -> Errno {
    Errno::from_raw(errno.raw_os_error().unsigned_abs())
}
