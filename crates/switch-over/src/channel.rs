//! [`Channel`]: frames and fds between the two servers, over a socket pair that the old one made. Each wait has a limit.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use limosa_foreign_fd::{Foreign, ForeignFd};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::body::Refusal;
use crate::error::{Cause, Step};
use crate::frame::{FRAME_FDS_MAX, HEADER_BYTES, Header, Kind, Malformed, split_numbers};
use crate::peer::Peer;

/// How the new server gets the fds of the old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FdTransport {
    /// It pulls them by the numbers that the old one names (`pidfd_getfd`): the kernel checks each.
    Pulled,
    /// The old one sends them (SCM_RIGHTS), to a child that it started itself and gave the channel. For where the kernel lets
    /// no child pull from its parent.
    Sent,
}

/// What is sent at once, unless there is less.
const OUTPUT_BYTES: usize = 256 << 10;
/// What is read at once.
const INPUT_BYTES: usize = 64 << 10;
/// Fds that came with frames that were not read yet: those of what is read at once, each frame of a header and a number.
const FDS_AHEAD_MAX: usize = 4096;

/// The time until then, for poll.
pub(crate) fn timeout(until: Option<Instant>) -> Option<Timespec> {
    let left = until?.saturating_duration_since(Instant::now());
    Some(Timespec {
        tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    })
}

/// A frame as it was read.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<ForeignFd>,
}

/// One end of the channel.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: Foreign<UnixStream>,
    transport: FdTransport,
    /// The new server's: where it pulls from.
    pull_from: Option<Peer>,
    output: Vec<u8>,
    /// A frame may have been sent in part, so that no other can follow.
    is_cut_short: bool,
    /// Bytes that were read, and how many of them are used up.
    input: Vec<u8>,
    used: usize,
    /// Fds that came and that no frame has taken yet.
    fds: VecDeque<ForeignFd>,
}

impl Channel {
    /// `pull_from` is the old server, for the new one.
    pub(crate) fn new(
        socket: OwnedFd,
        transport: FdTransport,
        pull_from: Option<Peer>,
    ) -> io::Result<Channel> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Channel {
            socket: Foreign::new(UnixStream::from(socket)),
            transport,
            pull_from,
            output: Vec::new(),
            is_cut_short: false,
            input: Vec::new(),
            used: 0,
            fds: VecDeque::new(),
        })
    }

    pub(crate) fn transport(&self) -> FdTransport {
        self.transport
    }

    /// The old server, for the new one.
    pub(crate) fn into_peer(self) -> Option<Peer> {
        self.pull_from
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Puts a frame behind those that are to be sent; sends them if that is much, or if fds go with it.
    pub(crate) fn queue(
        &mut self,
        kind: Kind,
        body: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<(), Cause> {
        let sends_fds = self.transport == FdTransport::Sent && !fds.is_empty();
        if sends_fds {
            self.flush(until)?;
        }
        let bytes: usize = body.iter().map(|part| part.len()).sum();
        let header = Header { kind, length: bytes + fds.len() * 4, fds: fds.len() };
        self.output.extend(header.encode());
        self.output.extend(fds.iter().flat_map(|fd| fd.as_raw_fd().to_le_bytes()));
        body.iter().for_each(|part| self.output.extend(*part));
        match sends_fds {
            true => self.flush_with(fds, until),
            false if self.output.len() >= OUTPUT_BYTES => self.flush(until),
            false => Ok(()),
        }
    }

    /// Sends a frame and all before it.
    pub(crate) fn send(&mut self, kind: Kind, body: &[u8], until: Instant) -> Result<(), Cause> {
        self.queue(kind, &[body], &[], until)?;
        self.flush(until)
    }

    /// Sends what is queued.
    pub(crate) fn flush(&mut self, until: Instant) -> Result<(), Cause> {
        self.flush_with(&[], until)
    }

    fn flush_with(&mut self, mut fds: &[BorrowedFd<'_>], until: Instant) -> Result<(), Cause> {
        let mut output = std::mem::take(&mut self.output);
        let mut rest = output.as_slice();
        let was_cut_short = std::mem::replace(&mut self.is_cut_short, true);
        while !rest.is_empty() {
            match send_some(&self.socket, rest, fds) {
                Ok(sent) => {
                    rest = &rest[sent..];
                    // They go with the first byte.
                    fds = &[];
                }
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, until)?,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Cause::Ended),
                Err(errno) => return Err(Cause::Io(errno.into())),
            }
        }
        self.is_cut_short = was_cut_short;
        if !output.is_empty() {
            tracing::trace!(bytes = output.len(), "frames sent");
        }
        output.clear();
        self.output = output;
        Ok(())
    }

    /// Sends a frame if there is room for it, for a peer that need not get it. What is queued is not sent: this side does not
    /// go on, and the fds that it names are closed.
    pub(crate) fn notify(&mut self, kind: Kind, body: &[u8]) {
        self.output.clear();
        if !self.is_cut_short {
            let sent = self.send(kind, body, Instant::now());
            tracing::debug!(?kind, ?sent, "the other server was told");
        }
    }

    fn wait(&self, what: PollFlags, until: Instant) -> Result<(), Cause> {
        loop {
            let mut fds = [PollFd::new(&*self.socket, what)];
            match rustix::event::poll(&mut fds, timeout(Some(until)).as_ref()) {
                Ok(0) if Instant::now() >= until => return Err(Cause::Late),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(Cause::Io(errno.into())),
            }
        }
    }

    /// Waits until there is something to read, or `stop` is readable.
    pub(crate) fn wait_unless(&self, stop: Option<BorrowedFd<'_>>, until: Instant) -> Result<(), Cause> {
        let Some(stop) = stop else { return Ok(()) };
        loop {
            let mut fds =
                [PollFd::new(&*self.socket, PollFlags::IN), PollFd::from_borrowed_fd(stop, PollFlags::IN)];
            match rustix::event::poll(&mut fds, timeout(Some(until)).as_ref()) {
                Ok(0) if Instant::now() >= until => return Err(Cause::Late),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) if !fds[1].revents().is_empty() => return Err(Cause::Stopped),
                Ok(_) => return Ok(()),
                Err(errno) => return Err(Cause::Io(errno.into())),
            }
        }
    }

    /// Reads until so many bytes are there that are not used up.
    fn fill(&mut self, bytes: usize, until: Instant) -> Result<(), Cause> {
        while self.input.len() - self.used < bytes {
            self.input.drain(..self.used);
            self.used = 0;
            let filled = self.input.len();
            self.input.resize(filled.max(bytes - 1) + INPUT_BYTES, 0);
            let mut fds = Vec::new();
            let received = limosa_foreign_fd::receive(
                &*self.socket,
                &mut self.input[filled..],
                RecvFlags::DONTWAIT,
                &mut fds,
            );
            self.input.truncate(filled + received.as_ref().map_or(0, |received| received.bytes));
            match received {
                Ok(received) if received.lost_fds => return Err(Cause::Io(Errno::MFILE.into())),
                Ok(received) if received.bytes == 0 => return Err(Cause::Ended),
                Ok(_) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, until)?,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Err(Cause::Ended),
                Err(errno) => return Err(Cause::Io(errno.into())),
            }
            self.fds.extend(fds);
            let max = match self.transport {
                FdTransport::Pulled => 0,
                FdTransport::Sent => FDS_AHEAD_MAX,
            };
            if self.fds.len() > max {
                let count = self.fds.len();
                return Err(Malformed::new("fds that came unasked", count, "none, or those of frames").into());
            }
        }
        Ok(())
    }

    /// Reads a frame with its fds. A refusal of the other side is an error.
    pub(crate) fn receive(&mut self, until: Instant) -> Result<Frame, Cause> {
        self.fill(HEADER_BYTES, until)?;
        let (header, _) = self.input[self.used..].split_first_chunk().expect("that many were read");
        let header = Header::decode(header)?;
        let bytes = HEADER_BYTES + header.length;
        self.fill(bytes, until)?;
        let payload = &self.input[self.used + HEADER_BYTES..self.used + bytes];
        let (numbers, body) = split_numbers(&header, payload)?;
        if header.kind == Kind::Refused {
            return Err(Cause::RefusedByOther(Refusal::decode(body)?));
        }
        let (kind, body) = (header.kind, body.to_vec());
        tracing::trace!(?kind, "frame received");
        self.used += bytes;
        let fds = self.take_fds(&numbers)?;
        Ok(Frame { kind, body, fds })
    }

    fn take_fds(&mut self, numbers: &[i32]) -> Result<Vec<ForeignFd>, Cause> {
        let count = numbers.len();
        match (self.transport, &self.pull_from) {
            _ if count == 0 => Ok(Vec::new()),
            (FdTransport::Pulled, Some(peer)) => {
                let pull = |number: &i32| {
                    let pulled = peer.pull(*number).map(ForeignFd::from).map_err(Cause::Io)?;
                    tracing::trace!(number, "fd pulled");
                    Ok(pulled)
                };
                numbers.iter().map(pull).collect()
            }
            (FdTransport::Sent, _) if count <= self.fds.len() => Ok(self.fds.drain(..count).collect()),
            _ => {
                Err(Malformed::new("a frame's fds", count, "those that came, none from the new server")
                    .into())
            }
        }
    }

    /// Reads a frame of this kind, without fds.
    pub(crate) fn expect(
        &mut self,
        kind: Kind,
        what: &'static str,
        until: Instant,
    ) -> Result<Vec<u8>, Cause> {
        let frame = self.receive(until)?;
        match frame.kind == kind && frame.fds.is_empty() {
            true => Ok(frame.body),
            false => Err(Malformed::new("a frame's kind", frame.kind as u16, what).into()),
        }
    }
}

fn send_some(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    if fds.is_empty() {
        return rustix::net::send(socket, bytes, flags);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::TOOMANYREFS);
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)
}

/// A step's cause as an error.
pub(crate) trait At<T> {
    fn at(self, step: Step) -> Result<T, crate::Error>;
}

impl<T> At<T> for Result<T, Cause> {
    fn at(self, step: Step) -> Result<T, crate::Error> {
        self.map_err(|cause| crate::Error { step, cause })
    }
}
