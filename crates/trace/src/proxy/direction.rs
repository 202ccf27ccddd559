//! One direction of a connection. Fds stay with the bytes with which they were sent.
//!
//! A receive that extends beyond the end of a message can return bytes of that message together with the fds of the next
//! (unix(7): *ancillary messages are a barrier*, behind the bytes, not before). So no receive extends beyond the end of a header
//! or a body, and bytes that were received with fds are sent with them in one call.

use std::io;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use limosa_foreign_fd::{FDS_MAX, ForeignFd, receive};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::event::{Direction, printable};
use crate::framer::{Framed, Framer};
use crate::recorder::RecorderHandle;
use crate::seen::Seen;

/// Bytes that are forwarded at once.
const PIECE_BYTES: usize = 256 << 10;
/// The longest name of an fd, in letters.
const FD_NAME_MAX: usize = 128;

/// Why a direction ended before its peer closed it.
enum Broken {
    Os(Errno),
    /// More fds came than this process has room for.
    LostFds,
}

impl From<Errno> for Broken {
    fn from(errno: Errno) -> Broken {
        Broken::Os(errno)
    }
}

/// Forwards everything until the peer closes its end, and then closes the other end in this direction. If one of the sockets
/// fails, the whole connection is shut down.
pub fn pass_on(
    conversation: u32,
    from: &UnixStream,
    to: &UnixStream,
    direction: Direction,
    recorder: &RecorderHandle,
) {
    let mut pass = Pass { conversation, direction, recorder, framer: Framer::default() };
    let passed = pass.all(from, to);
    let time_ns = recorder.now_ns();
    let mut framer = std::mem::take(&mut pass.framer);
    framer.end(&mut |framed| pass.framed(framed));
    match passed {
        // The other end may have ended already.
        Ok(()) => drop(to.shutdown(Shutdown::Write)),
        Err(broken) => {
            for end in [from, to] {
                let _ = end.shutdown(Shutdown::Both);
            }
            let text = match broken {
                // One end is gone, which its own direction reports.
                Broken::Os(Errno::PIPE | Errno::CONNRESET) => return,
                Broken::Os(errno) => format!("the connection was given up: {errno}"),
                Broken::LostFds => {
                    "the connection was given up: more fds came than this process may have; raise its limit of \
                     open files"
                        .to_owned()
                }
            };
            recorder.record(Seen::Note { time_ns, pid: None, text });
        }
    }
}

struct Pass<'a> {
    conversation: u32,
    direction: Direction,
    recorder: &'a RecorderHandle,
    framer: Framer,
}

impl Pass<'_> {
    fn all(&mut self, from: &UnixStream, to: &UnixStream) -> Result<(), Broken> {
        let mut buffer = vec![0; PIECE_BYTES];
        let (mut fds, mut more_fds) = (Vec::new(), Vec::new());
        loop {
            let want = self.framer.until_boundary().unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            let got = take(from, &mut buffer[..want], RecvFlags::empty(), &mut fds)?;
            if got == 0 {
                return Ok(());
            }
            self.see(&buffer[..got], &fds);
            // A body that has arrived already is sent with its header, as it was most likely sent.
            let rest = match self.framer.until_boundary() {
                Some(rest) if !self.framer.is_between() => rest.min(PIECE_BYTES - got),
                _ => 0,
            };
            let more = match rest {
                0 => 0,
                rest => match take(from, &mut buffer[got..got + rest], RecvFlags::DONTWAIT, &mut more_fds) {
                    Err(Broken::Os(Errno::AGAIN)) => 0,
                    more => more?,
                },
            };
            self.see(&buffer[got..got + more], &more_fds);
            if more_fds.is_empty() {
                give(to, &buffer[..got + more], &fds)?;
            } else {
                give(to, &buffer[..got], &fds)?;
                give(to, &buffer[got..got + more], &more_fds)?;
            }
            // The receiver has its own copies by now.
            fds.clear();
            more_fds.clear();
        }
    }

    /// Records before forwarding, so that no answer is recorded before its request.
    fn see(&mut self, bytes: &[u8], fds: &[ForeignFd]) {
        let names = if self.recorder.is_deaf() { Vec::new() } else { fds.iter().map(name).collect() };
        let mut framer = std::mem::take(&mut self.framer);
        framer.push(self.recorder.now_ns(), bytes, names, &mut |framed| self.framed(framed));
        self.framer = framer;
    }

    fn framed(&self, framed: Framed) {
        let (conversation, direction) = (self.conversation, self.direction);
        self.recorder.record(match framed {
            Framed::Message(message) => Seen::Message { conversation, direction, message },
            Framed::Malformed(malformed) => {
                Seen::Malformed { time_ns: self.recorder.now_ns(), conversation, direction, malformed }
            }
        });
    }
}

fn take(
    from: &UnixStream,
    into: &mut [u8],
    flags: RecvFlags,
    fds: &mut Vec<ForeignFd>,
) -> Result<usize, Broken> {
    let received = rustix::io::retry_on_intr(|| receive(from, into, flags, fds))?;
    if received.lost_fds { Err(Broken::LostFds) } else { Ok(received.bytes) }
}

/// Sends all of the bytes, the fds with the first of them.
fn give(to: &UnixStream, mut bytes: &[u8], fds: &[ForeignFd]) -> Result<(), Errno> {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut fds = &fds[..];
    while !bytes.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::TOOBIG);
        }
        let parts = [io::IoSlice::new(bytes)];
        let sent = rustix::io::retry_on_intr(|| sendmsg(to, &parts, &mut control, SendFlags::NOSIGNAL))?;
        bytes = &bytes[sent..];
        fds = &[];
    }
    Ok(())
}

/// The file of an fd, as the system names it: a path, `/memfd:guest`, `anon_inode:[eventfd]`.
fn name(fd: &ForeignFd) -> String {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let target = rustix::fs::readlink(link, Vec::new());
    let target = target.map(|target| target.to_string_lossy().into_owned()).unwrap_or_else(|_| "?".into());
    printable(&target.chars().take(FD_NAME_MAX).collect::<String>())
}
