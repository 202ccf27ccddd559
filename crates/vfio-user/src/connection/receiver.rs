//! The receiving half: where messages begin and end in the stream of bytes, and which of them the
//! fds belong to.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use zerocopy::FromBytes;

use super::ConnectionError;
use crate::codec::Header;
use crate::version::MSG_FDS_MAX;

/// The receiving half of a connection.
///
/// [`Receiver::next`] goes from message to message; between two calls the body is looked at
/// ([`Receiver::head`]), taken ([`Receiver::read`]) or left. What is left of it, bytes and fds, the
/// next call of [`Receiver::next`] throws away, so that a message that is refused costs nothing.
pub struct Receiver {
    socket: Arc<UnixStream>,
    buffer: Box<[u8; Receiver::BUFFER_BYTES]>,
    /// What of the buffer is filled.
    start: usize,
    end: usize,
    /// Where in the stream `buffer[start]` is.
    position: u64,
    /// Where in the stream the current message ends.
    message_end: u64,
    fds: Vec<Arrived>,
    refuses_fds: bool,
}

/// An fd that no message has claimed yet.
struct Arrived {
    /// Where in the stream the last byte is that came together with it. The system never receives
    /// past the end of what was sent with fds, so this byte belongs to their message.
    position: u64,
    /// `None` stands for fds that were too many, or for which this process had no room.
    fd: Option<OwnedFd>,
}

/// The fds of one message.
#[derive(Debug, Default)]
pub struct Fds {
    /// In the order in which they were sent.
    pub fds: Vec<OwnedFd>,
    /// There were more; the system closed them.
    pub truncated: bool,
}

impl Receiver {
    /// Bytes of the receive buffer.
    pub const BUFFER_BYTES: usize = 8192;

    pub(super) fn new(socket: Arc<UnixStream>) -> Receiver {
        Receiver {
            socket,
            buffer: Box::new([0; Receiver::BUFFER_BYTES]),
            start: 0,
            end: 0,
            position: 0,
            message_end: 0,
            fds: Vec::new(),
            refuses_fds: false,
        }
    }

    /// The socket.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Whether fds that come from now on are refused: the system closes them, and receiving costs it
    /// less.
    pub fn refuse_fds(&mut self, refuse: bool) {
        self.refuses_fds = refuse;
    }

    /// Goes to the next message, past what is left of the current one, and returns its header.
    /// Without a deadline it waits for ever.
    pub fn next(&mut self, deadline: Option<Instant>) -> Result<Header, ConnectionError> {
        self.drain(deadline)?;
        if !self.fds.is_empty() {
            let end = self.message_end;
            self.fds.retain(|arrived| arrived.position >= end);
        }
        while self.end - self.start < Header::BYTES {
            let idle = self.end == self.start;
            self.fill(deadline).map_err(|error| match error {
                ConnectionError::Cut if idle => ConnectionError::Closed,
                other => other,
            })?;
        }
        let (header, _) = Header::read_from_prefix(&self.buffer[self.start..self.end])
            .expect("that many bytes were received");
        let body = header.body_bytes().map_err(ConnectionError::Framing)?;
        self.take(Header::BYTES);
        self.message_end = self.position + body as u64;
        Ok(header)
    }

    /// Whether a whole header, or part of one, has been received already.
    pub fn has_more(&self) -> bool {
        self.position + (self.end - self.start) as u64 > self.message_end
    }

    /// Bytes of the current message's body that were not taken yet.
    pub fn body_left(&self) -> usize {
        (self.message_end - self.position) as usize
    }

    /// Looks at the next bytes of the body: at least `want` of them or all that are left, at most
    /// [`Receiver::BUFFER_BYTES`].
    pub fn head(&mut self, want: usize, deadline: Option<Instant>) -> Result<&[u8], ConnectionError> {
        let left = self.body_left();
        let want = want.min(left).min(Receiver::BUFFER_BYTES);
        while self.end - self.start < want {
            self.fill(deadline)?;
        }
        let have = (self.end - self.start).min(left);
        Ok(&self.buffer[self.start..self.start + have])
    }

    /// Takes bytes that [`Receiver::head`] has shown.
    pub fn consume(&mut self, bytes: usize) {
        self.take(bytes.min(self.body_left()).min(self.end - self.start));
    }

    /// Takes the next `into.len()` bytes of the body, or as many as are left, and returns how many
    /// these are. What is not in the buffer is received straight into `into`.
    ///
    /// On failure part of the body is lost; the next message can still be reached.
    pub fn read(&mut self, into: &mut [u8], deadline: Option<Instant>) -> Result<usize, ConnectionError> {
        let bytes = into.len().min(self.body_left());
        let into = &mut into[..bytes];
        let mut done = bytes.min(self.end - self.start);
        into[..done].copy_from_slice(&self.buffer[self.start..self.start + done]);
        self.take(done);
        while done < bytes {
            let got = receive(
                &self.socket,
                &mut into[done..],
                &mut self.fds,
                self.position,
                RecvFlags::WAITALL,
                self.refuses_fds,
                deadline,
            )?;
            done += got;
            self.position += got as u64;
        }
        Ok(bytes)
    }

    /// Whether fds of the current message have arrived.
    pub fn has_fds(&self) -> bool {
        self.fds.iter().any(|arrived| arrived.position < self.message_end)
    }

    /// The fds of the current message that have arrived: all of them once its body has.
    pub fn fds(&mut self) -> Fds {
        let mut taken = Fds::default();
        if self.fds.is_empty() {
            return taken;
        }
        let end = self.message_end;
        let mut kept = Vec::new();
        for arrived in self.fds.drain(..) {
            match arrived {
                // Those of a later message, which the buffer holds already.
                Arrived { position, .. } if position >= end => kept.push(arrived),
                Arrived { fd: Some(fd), .. } => taken.fds.push(fd),
                Arrived { fd: None, .. } => taken.truncated = true,
            }
        }
        self.fds = kept;
        taken
    }

    /// Throws away what is left of the body.
    fn drain(&mut self, deadline: Option<Instant>) -> Result<(), ConnectionError> {
        while self.body_left() > 0 {
            if self.end == self.start {
                // Not through fill: what is thrown away may be much.
                let bytes = self.body_left().min(Receiver::BUFFER_BYTES);
                let into = &mut self.buffer[..bytes];
                let got = receive(
                    &self.socket,
                    into,
                    &mut self.fds,
                    self.position,
                    RecvFlags::empty(),
                    self.refuses_fds,
                    deadline,
                )?;
                self.position += got as u64;
            } else {
                self.take(self.body_left().min(self.end - self.start));
            }
        }
        Ok(())
    }

    fn take(&mut self, bytes: usize) {
        self.start += bytes;
        self.position += bytes as u64;
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Receives more into the buffer.
    fn fill(&mut self, deadline: Option<Instant>) -> Result<(), ConnectionError> {
        if self.end == Receiver::BUFFER_BYTES {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let at = self.position + (self.end - self.start) as u64;
        let into = &mut self.buffer[self.end..];
        self.end +=
            receive(&self.socket, into, &mut self.fds, at, RecvFlags::empty(), self.refuses_fds, deadline)?;
        Ok(())
    }
}

/// Receives at least one byte. The end of the stream is [`ConnectionError::Cut`].
fn receive(
    socket: &UnixStream,
    into: &mut [u8],
    fds: &mut Vec<Arrived>,
    position: u64,
    flags: RecvFlags,
    refuses_fds: bool,
    deadline: Option<Instant>,
) -> Result<usize, ConnectionError> {
    if refuses_fds {
        return loop {
            match rustix::net::recv(socket, &mut *into, flags) {
                Ok((0, _)) => break Err(ConnectionError::Cut),
                Ok((bytes, _)) => break Ok(bytes),
                Err(error) => pause(error, deadline)?,
            }
        };
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MSG_FDS_MAX))];
    let got = loop {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, flags) {
            Ok(got) => {
                let position = position + (got.bytes as u64).saturating_sub(1);
                let mut count = 0;
                for message in control.drain() {
                    let RecvAncillaryMessage::ScmRights(rights) = message else { continue };
                    fds.extend(rights.map(|fd| Arrived { position, fd: Some(fd) }));
                    count += 1;
                }
                if got.flags.contains(ReturnFlags::CTRUNC) {
                    fds.push(Arrived { position, fd: None });
                    count += 1;
                }
                // Pieces of one message may each bring fds; together they are as limited as one.
                if count > 0 && fds.len() > 4 * MSG_FDS_MAX {
                    fds.truncate(4 * MSG_FDS_MAX);
                    fds.push(Arrived { position, fd: None });
                }
                break got.bytes;
            }
            Err(error) => pause(error, deadline)?,
        }
    };
    match got {
        0 => Err(ConnectionError::Cut),
        bytes => Ok(bytes),
    }
}

/// Whether to go on receiving after an error: it was only a pause, and the deadline is ahead.
fn pause(error: rustix::io::Errno, deadline: Option<Instant>) -> Result<(), ConnectionError> {
    match error {
        rustix::io::Errno::INTR => Ok(()),
        rustix::io::Errno::AGAIN => match deadline {
            Some(deadline) if Instant::now() >= deadline => Err(ConnectionError::TimedOut),
            _ => Ok(()),
        },
        error => Err(error.into()),
    }
}
