//! The receiving half: where messages begin and end in the stream of bytes, and which of them the
//! fds belong to.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use limosa_foreign_fd::{Foreign, ForeignFd, keeps_up};
use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvFlags, sockopt};
use zerocopy::FromBytes;

use super::{ConnectionError, Waits, wait_ready};
use crate::codec::Header;
use crate::version::MSG_FDS_MAX;

/// The receiving half of a connection.
///
/// [`Receiver::next`] goes from message to message; between two calls the caller peeks at the body
/// ([`Receiver::head`]), reads it ([`Receiver::read`]) or leaves it. The next call of [`Receiver::next`] drops the rest
/// of it, bytes and fds, so that a refused message needs no handling.
///
/// A message that has begun must be complete within [`Waits::message`], whatever deadline a call has; otherwise the
/// error is [`ConnectionError::Stalled`]. A call's own deadline also applies within a message, even if it arrives byte
/// by byte; data that has already arrived is still received.
///
/// Fds are received whether they are expected or not, since the system would otherwise close them in the receiving
/// thread. They are closed in the background ([`ForeignFd`]).
pub struct Receiver {
    wire: Wire,
    buffer: Box<[u8; Receiver::BUFFER_BYTES]>,
    /// The filled part of the buffer.
    start: usize,
    end: usize,
    /// Where in the stream `buffer[start]` is.
    position: u64,
    /// Where in the stream the current message ends.
    message_end: u64,
    /// There is a current message.
    within: bool,
}

/// The socket, and the fds received from it.
struct Wire {
    socket: Arc<Foreign<UnixStream>>,
    waits: Waits,
    /// Whether the socket's own time limit is set. Without it a wait is cheaper.
    timed: bool,
    /// When waiting for the rest of a message began.
    waiting_since: Option<Instant>,
    fds: Vec<Arrived>,
    /// Buffer for received fds.
    came: Vec<ForeignFd>,
    /// Fds of peers cannot be closed as fast as they come.
    is_behind: bool,
}

/// An fd that no message has claimed yet.
struct Arrived {
    /// Position in the stream of the last byte that was received together with it. The system never receives beyond
    /// the end of data that was sent with fds, so this byte belongs to their message.
    position: u64,
    /// `None` for excess fds, or for fds that exceed this process's limit.
    fd: Option<ForeignFd>,
    /// Whether they exceed this process's limit.
    is_lost: bool,
}

/// The fds of one message.
#[derive(Debug, Default)]
pub struct Fds {
    /// In the order in which they were sent.
    pub fds: Vec<ForeignFd>,
    /// There were more fds, which were dropped.
    pub truncated: bool,
    /// Some of those exceeded this process's limit of open files.
    pub lost: bool,
}

impl Receiver {
    /// Bytes of the receive buffer.
    pub const BUFFER_BYTES: usize = 8192;
    /// Limit on the bytes that one call waits for before the deadline is checked.
    const PIECE_BYTES_MAX: usize = 256 << 10;

    pub(super) fn new(socket: Arc<Foreign<UnixStream>>, waits: Waits) -> Receiver {
        Receiver {
            wire: Wire {
                socket,
                waits,
                timed: false,
                waiting_since: None,
                fds: Vec::new(),
                came: Vec::new(),
                is_behind: false,
            },
            buffer: Box::new([0; Receiver::BUFFER_BYTES]),
            start: 0,
            end: 0,
            position: 0,
            message_end: 0,
            within: false,
        }
    }

    /// The socket.
    pub fn socket(&self) -> &UnixStream {
        &self.wire.socket
    }

    /// Skips the rest of the current message and returns the header of the next one. Without a deadline it waits
    /// forever.
    ///
    /// A header whose size is below its own length ([`Header::body_bytes`] tells) is treated as a message without a
    /// body.
    pub fn next(&mut self, deadline: Option<Instant>) -> Result<Header, ConnectionError> {
        self.skip(deadline)?;
        self.fill_to(Header::BYTES, deadline)?;
        let (header, _) = Header::read_from_prefix(&self.buffer[self.start..self.end])
            .expect("that many bytes were received");
        self.take(Header::BYTES);
        self.message_end = self.position + header.body_bytes().unwrap_or(0) as u64;
        self.within = true;
        Ok(header)
    }

    /// The same; `None` once it is so late, also with a peer that never stops sending.
    pub fn next_until(&mut self, until: Instant) -> Result<Option<Header>, ConnectionError> {
        let next = (|| {
            self.skip(Some(until))?;
            if Instant::now() >= until {
                return Err(ConnectionError::TimedOut);
            }
            if !self.has_more() {
                wait_ready(&mut [PollFd::new(&**self.wire.socket, PollFlags::IN)], until)?;
            }
            self.next(Some(until))
        })();
        match next {
            Err(ConnectionError::TimedOut) => Ok(None),
            next => next.map(Some),
        }
    }

    /// Drops the rest of the current message.
    pub fn skip(&mut self, deadline: Option<Instant>) -> Result<(), ConnectionError> {
        if !self.within {
            return Ok(());
        }
        while self.body_left() > 0 {
            if self.end == self.start {
                // Not through fill, since the rest may be large.
                let bytes = self.body_left().min(Receiver::BUFFER_BYTES);
                let into = &mut self.buffer[..bytes];
                let got = self.wire.receive(into, self.position, true, RecvFlags::empty(), deadline)?;
                self.position += got as u64;
                in_time(self.body_left() == 0, deadline)?;
            } else {
                self.take(self.body_left().min(self.end - self.start));
            }
        }
        self.within = false;
        self.wire.waiting_since = None;
        if !self.wire.fds.is_empty() {
            let end = self.message_end;
            self.wire.fds.retain(|arrived| arrived.position >= end);
        }
        Ok(())
    }

    /// Whether a header, or part of one, has already been received.
    pub fn has_more(&self) -> bool {
        self.position + (self.end - self.start) as u64 > self.message_end
    }

    /// Bytes of the current message's body that have not been read yet.
    pub fn body_left(&self) -> usize {
        (self.message_end - self.position) as usize
    }

    /// Peeks at the next bytes of the body: at least `want` of them or all remaining ones, at most
    /// [`Receiver::BUFFER_BYTES`].
    pub fn head(&mut self, want: usize, deadline: Option<Instant>) -> Result<&[u8], ConnectionError> {
        let left = self.body_left();
        self.fill_to(want.min(left).min(Receiver::BUFFER_BYTES), deadline)?;
        let have = (self.end - self.start).min(left);
        Ok(&self.buffer[self.start..self.start + have])
    }

    /// Consumes bytes that [`Receiver::head`] has returned.
    pub fn consume(&mut self, bytes: usize) {
        self.take(bytes.min(self.body_left()).min(self.end - self.start));
    }

    /// Reads the next `into.len()` bytes of the body, or as many as are left, and returns their number. Bytes that
    /// are not in the buffer are received directly into `into`.
    ///
    /// On failure part of the body is lost; the next message can still be reached.
    pub fn read(&mut self, into: &mut [u8], deadline: Option<Instant>) -> Result<usize, ConnectionError> {
        let bytes = into.len().min(self.body_left());
        let into = &mut into[..bytes];
        let mut done = bytes.min(self.end - self.start);
        into[..done].copy_from_slice(&self.buffer[self.start..self.start + done]);
        self.take(done);
        while done < bytes {
            // In pieces: the deadline is checked between two calls, and a peer that always sends one more byte could
            // keep a single call waiting forever.
            let piece = (bytes - done).min(Receiver::PIECE_BYTES_MAX);
            let into = &mut into[done..done + piece];
            let got = self.wire.receive(into, self.position, true, RecvFlags::WAITALL, deadline)?;
            done += got;
            self.position += got as u64;
            in_time(done == bytes, deadline)?;
        }
        Ok(bytes)
    }

    /// Reads those of the next `into.len()` bytes of the body that have arrived, without waiting; returns their
    /// number.
    pub fn read_now(&mut self, into: &mut [u8]) -> Result<usize, ConnectionError> {
        let bytes = into.len().min(self.body_left());
        let into = &mut into[..bytes];
        let done = bytes.min(self.end - self.start);
        if done > 0 || bytes == 0 {
            into[..done].copy_from_slice(&self.buffer[self.start..self.start + done]);
            self.take(done);
            return Ok(done);
        }
        let got = self.wire.receive_if_there(into, self.position)?;
        self.position += got as u64;
        Ok(got)
    }

    /// Sleeps until more of the current message has come.
    pub fn wait_for_more(&mut self) -> Result<(), ConnectionError> {
        if self.end > self.start || self.body_left() == 0 {
            return Ok(());
        }
        self.wire.check_limit()?;
        let until = Instant::now() + self.wire.waits.message;
        wait_ready(&mut [PollFd::new(&**self.wire.socket, PollFlags::IN)], until).map_err(|error| match error
        {
            ConnectionError::TimedOut => ConnectionError::Stalled,
            other => other,
        })
    }

    /// Receives available data into the buffer, without waiting. Returns whether a whole message is there, or as
    /// much of one as the buffer holds, so that [`Receiver::next`] and a short body need no wait. Only between two
    /// messages.
    pub fn gather(&mut self) -> Result<bool, ConnectionError> {
        loop {
            let held = &self.buffer[self.start..self.end];
            if let Ok((header, _)) = Header::read_from_prefix(held) {
                let whole = Header::BYTES + header.body_bytes().unwrap_or(0);
                if held.len() >= whole.min(Receiver::BUFFER_BYTES) {
                    return Ok(true);
                }
            }
            self.make_room();
            let at = self.position + (self.end - self.start) as u64;
            let idle = self.end == self.start;
            let got =
                self.wire.receive_if_there(&mut self.buffer[self.end..], at).map_err(
                    |error| match error {
                        ConnectionError::Cut if idle => ConnectionError::Closed,
                        other => other,
                    },
                )?;
            if got == 0 {
                return Ok(false);
            }
            self.end += got;
        }
    }

    /// The header of the next message, when it is in the buffer. Only between two messages.
    pub fn held_header(&self) -> Option<Header> {
        Header::read_from_prefix(&self.buffer[self.start..self.end]).ok().map(|(header, _)| header)
    }

    /// Whether fds of the current message have arrived.
    pub fn has_fds(&self) -> bool {
        self.wire.fds.iter().any(|arrived| arrived.position < self.message_end)
    }

    /// The fds of the current message that have arrived: all of them once its body has.
    pub fn fds(&mut self) -> Fds {
        let mut taken = Fds::default();
        if self.wire.fds.is_empty() {
            return taken;
        }
        let end = self.message_end;
        let mut kept = Vec::new();
        for arrived in self.wire.fds.drain(..) {
            match arrived {
                // Those of a later message, which the buffer holds already.
                Arrived { position, .. } if position >= end => kept.push(arrived),
                Arrived { fd: Some(fd), .. } => taken.fds.push(fd),
                Arrived { fd: None, is_lost, .. } => {
                    taken.truncated = true;
                    taken.lost |= is_lost;
                }
            }
        }
        self.wire.fds = kept;
        taken
    }

    fn take(&mut self, bytes: usize) {
        self.start += bytes;
        self.position += bytes as u64;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Receives until there are at least `want` bytes in the buffer.
    fn fill_to(&mut self, want: usize, deadline: Option<Instant>) -> Result<(), ConnectionError> {
        while self.end - self.start < want {
            let idle = !self.within && self.end == self.start;
            self.fill(deadline).map_err(|error| match error {
                ConnectionError::Cut if idle => ConnectionError::Closed,
                other => other,
            })?;
            in_time(self.end - self.start >= want, deadline)?;
        }
        Ok(())
    }

    /// The bytes received beyond the current message, and their fds, each with the offset of the last byte that it
    /// came with; `None` for dropped fds. Only between two messages.
    pub fn export(&self) -> (&[u8], impl Iterator<Item = (u64, Option<&ForeignFd>)>) {
        let fds = self.wire.fds.iter().filter(|arrived| arrived.position >= self.position);
        let fds = fds.map(|arrived| (arrived.position - self.position, arrived.fd.as_ref()));
        (&self.buffer[self.start..self.end], fds)
    }

    /// Continues where another process's receiver has stopped ([`Receiver::export`]). `None` for more than a
    /// receiver holds.
    #[must_use]
    pub fn import(mut self, bytes: &[u8], fds: Vec<(u64, Option<ForeignFd>)>) -> Option<Receiver> {
        self.buffer.get_mut(..bytes.len())?.copy_from_slice(bytes);
        self.end = bytes.len();
        if fds.len() > 4 * MSG_FDS_MAX + 1 || fds.iter().any(|(at, _)| *at >= bytes.len() as u64) {
            return None;
        }
        let arrived = |(position, fd)| Arrived { position, fd, is_lost: false };
        self.wire.fds = fds.into_iter().map(arrived).collect();
        Some(self)
    }

    fn make_room(&mut self) {
        if self.end == Receiver::BUFFER_BYTES {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }

    /// Receives more into the buffer.
    fn fill(&mut self, deadline: Option<Instant>) -> Result<(), ConnectionError> {
        self.make_room();
        let begun = self.within || self.end > self.start;
        let at = self.position + (self.end - self.start) as u64;
        let into = &mut self.buffer[self.end..];
        self.end += self.wire.receive(into, at, begun, RecvFlags::empty(), deadline)?;
        Ok(())
    }
}

impl Wire {
    /// Receives at least one byte, which is at `position` in the stream. The end of the stream is
    /// [`ConnectionError::Cut`].
    fn receive(
        &mut self,
        into: &mut [u8],
        position: u64,
        begun: bool,
        flags: RecvFlags,
        deadline: Option<Instant>,
    ) -> Result<usize, ConnectionError> {
        let mut hurry = RecvFlags::empty();
        if begun {
            self.check_limit()?;
        }
        if !begun && deadline.is_none() {
            self.set_timed(false)?;
        } else if !self.timed {
            // Usually the data is already there, and no time limit is needed to wait for it.
            hurry = RecvFlags::DONTWAIT;
        }
        loop {
            match self.receive_now(into, position, flags | hurry) {
                Ok(_) if self.is_behind => return Err(BEHIND),
                Ok(0) | Err(rustix::io::Errno::CONNRESET) => return Err(ConnectionError::Cut),
                Ok(bytes) => return Ok(bytes),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) if !hurry.is_empty() => {
                    hurry = RecvFlags::empty();
                    self.set_timed(true)?;
                }
                Err(rustix::io::Errno::AGAIN) => {
                    if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                        return Err(ConnectionError::TimedOut);
                    }
                    if begun {
                        self.check_limit()?;
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Receives available data; 0 if there is none.
    fn receive_if_there(&mut self, into: &mut [u8], position: u64) -> Result<usize, ConnectionError> {
        loop {
            match self.receive_now(into, position, RecvFlags::DONTWAIT) {
                Ok(_) if self.is_behind => return Err(BEHIND),
                Ok(0) | Err(rustix::io::Errno::CONNRESET) => return Err(ConnectionError::Cut),
                Ok(bytes) => return Ok(bytes),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(0),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// One call.
    fn receive_now(
        &mut self,
        into: &mut [u8],
        position: u64,
        flags: RecvFlags,
    ) -> Result<usize, rustix::io::Errno> {
        let got = limosa_foreign_fd::receive(&*self.socket, into, flags, &mut self.came)?;
        if !self.came.is_empty() || got.lost_fds {
            self.sort_in(position + (got.bytes as u64).saturating_sub(1), got.lost_fds);
        }
        Ok(got.bytes)
    }

    /// Records the fds that came with a byte, or that there were too many.
    #[cold]
    fn sort_in(&mut self, position: u64, lost: bool) {
        let too_many = lost || self.came.len() > MSG_FDS_MAX;
        let fds = self.came.drain(..).take(MSG_FDS_MAX);
        self.fds.extend(fds.map(|fd| Arrived { position, fd: Some(fd), is_lost: false }));
        if too_many {
            self.fds.push(Arrived { position, fd: None, is_lost: lost });
        }
        // Pieces of one message may each bring fds; together they are as limited as one.
        if self.fds.len() > 4 * MSG_FDS_MAX {
            self.fds.truncate(4 * MSG_FDS_MAX);
            self.fds.push(Arrived { position, fd: None, is_lost: false });
        }
        self.is_behind = !keeps_up(CLOSING_MAX);
    }

    /// Before waiting for the rest of a message.
    fn check_limit(&mut self) -> Result<(), ConnectionError> {
        match self.waiting_since {
            None => self.waiting_since = Some(Instant::now()),
            Some(since) if since.elapsed() > self.waits.message => return Err(ConnectionError::Stalled),
            Some(_) => {}
        }
        Ok(())
    }

    fn set_timed(&mut self, timed: bool) -> Result<(), ConnectionError> {
        if self.timed != timed {
            let limit = timed.then_some(self.waits.sleep);
            sockopt::set_socket_timeout(&*self.socket, sockopt::Timeout::Recv, limit)?;
            self.timed = timed;
        }
        Ok(())
    }
}

const BEHIND: ConnectionError =
    ConnectionError::Broken("fds that cannot be closed, as closing others blocks");

/// How long the closing of other fds may delay a peer that sends more of them.
const CLOSING_MAX: Duration = Duration::from_secs(1);

/// [`ConnectionError::TimedOut`] when there is more to receive and the deadline has passed.
fn in_time(done: bool, deadline: Option<Instant>) -> Result<(), ConnectionError> {
    match deadline {
        Some(deadline) if !done && Instant::now() >= deadline => Err(ConnectionError::TimedOut),
        _ => Ok(()),
    }
}
