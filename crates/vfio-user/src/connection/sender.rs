//! The sending half. Any thread may send; a message is never torn by another.
//!
//! If the socket is full, a server waits until there is space ([`Sender::send`]). A client ([`Sender::send_with`])
//! passes its own wait function, so that two sides that both send cannot block each other. Replies to the peer's
//! requests need not wait at all: [`Sender::reply`] queues the part that cannot be sent.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use limosa_foreign_fd::Foreign;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::{ConnectionError, Waits};
use crate::version::MSG_FDS_MAX;

/// The sending half of a connection.
pub struct Sender {
    socket: Arc<Foreign<UnixStream>>,
    /// How long the peer may take for a message.
    limit: Duration,
    /// Held while the bytes of a message go out.
    turn: Mutex<Turn>,
    /// Queued replies, to be sent as soon as possible.
    kept: Mutex<Kept>,
    /// Whether anything is queued, here or in the write turn.
    keeps: AtomicBool,
}

#[derive(Default)]
struct Kept {
    replies: VecDeque<Vec<u8>>,
    bytes: usize,
}

#[derive(Default)]
struct Turn {
    /// The rest of a queued reply that was sent in part.
    rest: Vec<u8>,
    rest_at: usize,
    /// A message was sent in part and cannot be completed.
    broken: bool,
}

impl Sender {
    /// Limit on the bytes of replies that are queued for a peer that does not read them.
    pub const KEPT_BYTES_MAX: usize = 80 << 20;
    /// The most of them.
    pub const KEPT_MAX: usize = 4096;

    pub(super) fn new(socket: Arc<Foreign<UnixStream>>, waits: Waits) -> Sender {
        Sender {
            socket,
            limit: waits.message,
            turn: Mutex::default(),
            kept: Mutex::default(),
            keeps: AtomicBool::new(false),
        }
    }

    /// The socket.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Ends the connection for both halves and for the peer, and wakes waiting threads.
    pub fn shutdown(&self) {
        // It may be shut down already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Sends one message, given in parts, with its fds. If the socket is full, sleeps until there is space:
    /// [`ConnectionError::Stalled`] if the peer has not read enough within [`Waits::message`](super::Waits::message).
    pub fn send(&self, parts: &mut [IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> Result<(), ConnectionError> {
        self.hold().send(parts, fds)
    }

    /// The same until a deadline, if that is earlier; [`ConnectionError::TimedOut`] if no byte of it was sent by then,
    /// so that the connection can continue.
    pub fn send_by(
        &self,
        parts: &mut [IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), ConnectionError> {
        let mut sending = self.hold();
        sending.deadline = Some(deadline.min(Instant::now() + self.limit));
        sending.send(parts, fds).map_err(|error| match error {
            ConnectionError::Stalled if !sending.turn.broken => ConnectionError::TimedOut,
            other => other,
        })
    }

    /// Takes the write turn, for a message that is produced piece by piece.
    pub fn hold(&self) -> Sending<'_> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        Sending { sender: self, turn, deadline: None }
    }

    /// Sends one message; when the socket is full, calls `wait`, which returns when it is worth to
    /// try again.
    pub fn send_with(
        &self,
        parts: &mut [IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        mut wait: impl FnMut() -> Result<(), ConnectionError>,
    ) -> Result<(), ConnectionError> {
        self.hold().send_all(parts, fds, &mut || wait().map(|()| true))?;
        // A thread that found the write turn taken may have queued a reply.
        if self.keeps() {
            self.flush()?;
        }
        Ok(())
    }

    /// Sends a reply without waiting for the socket or other senders; the part that cannot be sent now is sent
    /// before the next message, or by [`Sender::flush`].
    pub fn reply(&self, parts: &mut [IoSlice<'_>]) -> Result<(), ConnectionError> {
        let mut parts = parts;
        if let Some(mut turn) = self.try_turn() {
            if turn.broken {
                return Err(ConnectionError::Closed);
            }
            if self.flush_in(&mut turn)? {
                let mut begun = false;
                while !parts.is_empty() {
                    match send_some(&self.socket, parts, &[])? {
                        Some(bytes) => IoSlice::advance_slices(&mut parts, bytes),
                        None => break,
                    }
                    begun = true;
                }
                if begun {
                    turn.rest = concat(parts);
                    turn.rest_at = 0;
                    if !turn.rest.is_empty() {
                        self.keeps.store(true, Ordering::SeqCst);
                    }
                    return Ok(());
                }
            }
        }
        self.keep(parts)?;
        // The thread with the write turn may have checked before this was queued.
        self.flush().map(drop)
    }

    /// Queues a reply behind the others.
    fn keep(&self, parts: &[IoSlice<'_>]) -> Result<(), ConnectionError> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = kept.bytes + parts.iter().map(|part| part.len()).sum::<usize>();
        if bytes > Sender::KEPT_BYTES_MAX || kept.replies.len() >= Sender::KEPT_MAX {
            return Err(ConnectionError::Backlog);
        }
        kept.bytes = bytes;
        kept.replies.push_back(concat(parts));
        self.keeps.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// The queued replies, for another process to send. `None` while a thread is sending.
    pub fn export(&self) -> Option<Vec<u8>> {
        let turn = self.try_turn()?;
        let mut bytes = turn.rest[turn.rest_at..].to_vec();
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.replies.iter().for_each(|reply| bytes.extend_from_slice(reply));
        Some(bytes)
    }

    /// Continues where another process has stopped, with its queued replies.
    pub fn import(&self, bytes: Vec<u8>) {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.keeps.store(!bytes.is_empty(), Ordering::SeqCst);
        (turn.rest, turn.rest_at) = (bytes, 0);
    }

    /// Whether there are queued replies that [`Sender::flush`] has to send.
    pub fn keeps(&self) -> bool {
        self.keeps.load(Ordering::SeqCst)
    }

    /// Sends queued replies as far as the socket accepts them, and returns whether that was all. Never waits.
    pub fn flush(&self) -> Result<bool, ConnectionError> {
        while self.keeps() {
            // The thread with the write turn flushes afterwards.
            let Some(mut turn) = self.try_turn() else { return Ok(false) };
            if !self.flush_in(&mut turn)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Sleeps until the socket accepts more.
    pub fn wait_writable(&self, deadline: Instant) -> Result<(), ConnectionError> {
        // Also with a peer that reads a little each time.
        if Instant::now() >= deadline {
            return Err(ConnectionError::TimedOut);
        }
        let mut fds = [PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::OUT)];
        wait_ready(&mut fds, deadline)
    }

    fn try_turn(&self) -> Option<MutexGuard<'_, Turn>> {
        match self.turn.try_lock() {
            Ok(turn) => Some(turn),
            Err(TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn flush_in(&self, turn: &mut Turn) -> Result<bool, ConnectionError> {
        if !self.keeps() {
            return Ok(true);
        }
        loop {
            while turn.rest_at < turn.rest.len() {
                match send_some(&self.socket, &[IoSlice::new(&turn.rest[turn.rest_at..])], &[])? {
                    Some(bytes) => turn.rest_at += bytes,
                    None => return Ok(false),
                }
            }
            turn.rest = Vec::new();
            turn.rest_at = 0;
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            match kept.replies.pop_front() {
                Some(reply) => {
                    kept.bytes -= reply.len();
                    turn.rest = reply;
                }
                None => {
                    self.keeps.store(false, Ordering::SeqCst);
                    return Ok(true);
                }
            }
        }
    }
}

/// The write turn of a connection: no other message is sent between the pieces that are sent in it.
pub struct Sending<'a> {
    sender: &'a Sender,
    turn: MutexGuard<'a, Turn>,
    /// The time by which the peer must have read everything sent in this turn; from the first wait on.
    deadline: Option<Instant>,
}

impl Sending<'_> {
    /// Sends a message, or the next piece of one, with fds: like [`Sender::send`], whose limit holds
    /// for all pieces together.
    pub fn send(&mut self, parts: &mut [IoSlice<'_>], fds: &[BorrowedFd<'_>]) -> Result<(), ConnectionError> {
        let (sender, mut deadline) = (self.sender, self.deadline);
        let mut wait = || {
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + sender.limit);
            sender.wait_writable(deadline).map(|()| true).map_err(stalled)
        };
        let sent = self.send_all(parts, fds, &mut wait);
        self.deadline = deadline;
        sent
    }

    /// The same for a message without fds. `wait` gets the limit; once it returns false, the rest is queued
    /// ([`Sender::flush`]).
    pub fn send_or_keep(
        &mut self,
        parts: &mut [IoSlice<'_>],
        wait: impl Fn(Instant) -> Result<bool, ConnectionError>,
    ) -> Result<(), ConnectionError> {
        let (limit, mut deadline) = (self.sender.limit, self.deadline);
        let mut wait = || wait(*deadline.get_or_insert_with(|| Instant::now() + limit)).map_err(stalled);
        self.send_all(parts, &[], &mut wait)
    }

    fn send_all(
        &mut self,
        parts: &mut [IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        wait: Wait<'_>,
    ) -> Result<(), ConnectionError> {
        if fds.len() > MSG_FDS_MAX {
            return Err(ConnectionError::Fds(fds.len()));
        }
        if self.turn.broken {
            return Err(ConnectionError::Closed);
        }
        while !self.sender.flush_in(&mut self.turn)? {
            if !wait()? {
                let is_empty = parts.iter().all(|part| part.is_empty());
                return if is_empty { Ok(()) } else { self.sender.keep(parts) };
            }
        }
        // A short message in one piece costs the system less than the same in parts.
        let mut short = [0; SHORT_BYTES];
        let bytes = if fds.is_empty() && parts.len() > 1 { gather(parts, &mut short) } else { 0 };
        match bytes {
            0 => self.send_parts(parts, fds, wait),
            _ => self.send_parts(&mut [IoSlice::new(&short[..bytes])], fds, wait),
        }
    }

    fn send_parts(
        &mut self,
        mut parts: &mut [IoSlice<'_>],
        mut fds: &[BorrowedFd<'_>],
        wait: Wait<'_>,
    ) -> Result<(), ConnectionError> {
        let mut begun = false;
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            if let Some(bytes) = send_some(&self.sender.socket, parts, fds)? {
                IoSlice::advance_slices(&mut parts, bytes);
                fds = &[];
                begun = true;
                continue;
            }
            match wait() {
                Ok(true) => {}
                Ok(false) => {
                    (self.turn.rest, self.turn.rest_at) = (concat(parts), 0);
                    self.sender.keeps.store(true, Ordering::SeqCst);
                    return Ok(());
                }
                Err(error) => {
                    if begun {
                        self.turn.broken = true;
                        self.sender.shutdown();
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

/// Waits for space; `false` to queue the message instead, which is possible only without fds.
type Wait<'a> = &'a mut dyn FnMut() -> Result<bool, ConnectionError>;

/// The peer did not read a message in time.
fn stalled(error: ConnectionError) -> ConnectionError {
    match error {
        ConnectionError::TimedOut => ConnectionError::Stalled,
        other => other,
    }
}

/// Messages up to this length are sent in one piece.
const SHORT_BYTES: usize = 256;

/// Copies the parts together if they fit, and returns their length, else 0.
fn gather(parts: &[IoSlice<'_>], into: &mut [u8; SHORT_BYTES]) -> usize {
    let mut at = 0;
    for part in parts {
        let Some(room) = into.get_mut(at..at + part.len()) else { return 0 };
        room.copy_from_slice(part);
        at += part.len();
    }
    at
}

fn concat(parts: &[IoSlice<'_>]) -> Vec<u8> {
    parts.iter().flat_map(|part| part.iter().copied()).collect()
}

/// Sleeps until one of the fds is ready.
pub(crate) fn wait_ready(fds: &mut [PollFd<'_>], deadline: Instant) -> Result<(), ConnectionError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match rustix::event::poll(fds, Some(&timeout)) {
            Ok(0) => return Err(ConnectionError::TimedOut),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends as much as the socket accepts now; `None` if that is nothing.
fn send_some(
    socket: &UnixStream,
    parts: &[IoSlice<'_>],
    fds: &[BorrowedFd<'_>],
) -> Result<Option<usize>, ConnectionError> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    if let ([whole], []) = (parts, fds) {
        loop {
            match rustix::net::send(socket, whole, flags) {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MSG_FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(ConnectionError::Fds(fds.len()));
    }
    loop {
        match rustix::net::sendmsg(socket, parts, &mut control, flags) {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
