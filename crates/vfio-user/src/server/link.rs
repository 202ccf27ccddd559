//! One connection's sockets, shared by the thread that serves requests and the threads of a model
//! that reach the client's memory by messages (`vfio-user.rst: Command Concurrency, Socket`).
//!
//! Whoever needs something from the socket takes the receiver and leads: what it receives for
//! others it hands to them, commands it queues. Mostly that is the serving thread, which leads
//! while it waits for the next command; while a request is handled anybody may, the handler too,
//! so that a model's DMA comes to its end whatever the other threads are waiting for.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU8};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use limosa_foreign_fd::Foreign;
use limosa_protocol::Errno;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::{Shutdown, shutdown};

use super::buffer::Buffer;
use super::dma::{Exchange, Twin};
use super::handover::Received;
use crate::codec::{Command, Header, Kind};
use crate::connection::{self, ConnectionError, Fds, Receiver, Sender, Sending, Waits};

/// Bodies of commands other than those that carry data are refused above this many bytes.
const BODY_BYTES_MAX: usize = 64 << 10;

/// A message that is too long is drained, and refused, up to this many bytes; beyond it the
/// connection ends.
const DRAIN_BYTES_MAX: usize = 64 << 20;

/// Commands that arrive while a request waits for the client's memory.
const QUEUE_COMMANDS_MAX: usize = 1024;
/// The bytes of their bodies.
const QUEUE_BYTES_MAX: usize = 4 << 20;
/// Their fds.
const QUEUE_FDS_MAX: usize = 256;

/// The longest body that a command may be kept with.
pub(super) const MESSAGE_BYTES_MAX: usize = crate::version::DATA_XFER_BYTES_MAX as usize + 64;

/// What another process hands over of a connection is more than it can have received.
pub(super) const TOO_MUCH: ConnectionError =
    ConnectionError::Broken("more was handed over than a connection can have received");

/// A connection.
pub(super) struct Link {
    sender: Sender,
    pub(super) shared: Mutex<Shared>,
    pub(super) turn: Condvar,
    /// The client's DMA messages are not those of the specification ([`Capabilities::are_qemus`]).
    ///
    /// [`Capabilities::are_qemus`]: crate::version::Capabilities::are_qemus
    pub(super) foreign_dma: AtomicBool,
    /// That this was said.
    pub(super) foreign_dma_said: AtomicBool,
    /// The socket for the server's commands, when one was negotiated.
    pub(super) twin: OnceLock<Twin>,
    /// The thread that serves requests.
    pub(super) serving: ThreadId,
    /// The most bytes of data that a command may carry.
    data_bytes_max: usize,
    pub(super) dma_limit: Duration,
    /// An eventfd that wakes the thread that serves.
    waker: OwnedFd,
    /// It may have been written to.
    is_woken: AtomicBool,
    /// Whether the thread that serves reads: [`BUSY`], [`IDLE`] or [`STOPPED`].
    reads: AtomicU8,
}

/// The thread that serves may read from the socket, or handles a request.
const BUSY: u8 = 0;
/// It sleeps between two requests, and reads nothing before it is busy again.
const IDLE: u8 = 1;
/// It was idle, and must not become busy: the connection is paused.
const STOPPED: u8 = 2;

/// What the threads of a connection share.
pub(super) struct Shared {
    /// Not there while somebody leads.
    pub(super) receiver: Option<Box<Receiver>>,
    pub(super) queue: VecDeque<Queued>,
    queued_bytes: usize,
    queued_fds: usize,
    pub(super) exchanges: Vec<Exchange>,
    pub(super) next_id: u16,
    /// Threads that wait for their turn.
    pub(super) waiting: usize,
    /// Why the connection is over.
    pub(super) over: bool,
    /// The request being handled waited for the client's memory in vain: it does so once.
    pub(super) gave_up: bool,
}

pub(super) struct Queued {
    pub(super) header: Header,
    pub(super) fds: Fds,
    pub(super) body: Vec<u8>,
    pub(super) fits: Fits,
}

/// A command.
pub(super) struct Incoming {
    pub(super) header: Header,
    pub(super) fds: Fds,
    /// Bytes of its body.
    pub(super) body_bytes: usize,
    /// Bytes of its body that are in the buffer; the others are with the receiver.
    pub(super) held: usize,
    /// Held for a body that was not received yet.
    pub(super) receiver: Option<Box<Receiver>>,
    pub(super) fits: Fits,
}

/// Whether a command's size can be dealt with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fits {
    Yes,
    /// Too long; it was drained.
    Drained,
    /// Not complete when the device's own wait ended.
    Late,
    /// Too long to be drained: the connection ends with the refusal.
    Ends,
}

impl Link {
    pub(super) fn new(
        socket: Foreign<UnixStream>,
        data_bytes_max: usize,
        message_limit: Duration,
        dma_limit: Duration,
    ) -> Result<Link, ConnectionError> {
        let waits = Waits::new(message_limit, message_limit);
        let (receiver, sender) = connection::split(socket, waits)?;
        Ok(Link {
            sender,
            shared: Mutex::new(Shared {
                receiver: Some(Box::new(receiver)),
                queue: VecDeque::new(),
                queued_bytes: 0,
                queued_fds: 0,
                exchanges: Vec::new(),
                next_id: 0,
                waiting: 0,
                over: false,
                gave_up: false,
            }),
            turn: Condvar::new(),
            foreign_dma: AtomicBool::new(false),
            foreign_dma_said: AtomicBool::new(false),
            twin: OnceLock::new(),
            serving: std::thread::current().id(),
            data_bytes_max,
            dma_limit,
            waker: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            is_woken: AtomicBool::new(false),
            reads: AtomicU8::new(BUSY),
        })
    }

    /// Goes on where another process has stopped: with what it had received, commands that wait, and its last id.
    pub(super) fn import(
        &self,
        (bytes, fds): Received,
        queue: Vec<Queued>,
        next_id: u16,
        foreign_dma: bool,
    ) -> Result<(), ConnectionError> {
        self.foreign_dma.store(foreign_dma, Relaxed);
        let mut shared = self.lock();
        let receiver = shared.receiver.take().and_then(|receiver| receiver.import(&bytes, fds));
        shared.receiver = Some(Box::new(receiver.ok_or(TOO_MUCH)?));
        shared.queued_bytes = queue.iter().map(|queued| queued.body.len()).sum();
        shared.queued_fds = queue.iter().map(|queued| queued.fds.fds.len()).sum();
        shared.queue = queue.into();
        shared.next_id = next_id;
        Ok(())
    }

    /// The same for its twin socket.
    pub(super) fn import_twin(
        &self,
        socket: Foreign<UnixStream>,
        message_limit: Duration,
        next_id: u16,
        received: Received,
    ) -> Result<(), ConnectionError> {
        let twin = Twin::import(socket, message_limit, next_id, received)?;
        self.twin.set(twin).map_err(|_| ConnectionError::Broken("two twin sockets"))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        // Nothing under this lock panics half-way through a change.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next command, whose body, or the head of it, is in `buffer`; `None` when none
    /// came until then.
    pub(super) fn next(
        &self,
        buffer: &mut Buffer,
        until: Option<Instant>,
    ) -> Result<Option<Incoming>, ConnectionError> {
        let mut shared = self.lock();
        shared.gave_up = false;
        let mut receiver = loop {
            if let Some(queued) = shared.queue.pop_front() {
                shared.queued_bytes -= queued.body.len();
                shared.queued_fds -= queued.fds.fds.len();
                drop(shared);
                return Ok(Some(queued.take(buffer)));
            }
            if let Some(receiver) = shared.receiver.take() {
                break receiver;
            }
            if shared.over {
                return Err(ConnectionError::Closed);
            }
            shared = self.wait(shared, None).0;
        };
        drop(shared);
        let incoming = self.lead(&mut receiver, buffer, until);
        match incoming {
            Ok(Some(mut incoming)) if incoming.held < incoming.body_bytes => {
                incoming.receiver = Some(receiver);
                Ok(Some(incoming))
            }
            other => {
                self.give_back(receiver);
                match other {
                    Err(ConnectionError::TimedOut) => Ok(None),
                    other => other,
                }
            }
        }
    }

    /// Receives until a command comes.
    fn lead(
        &self,
        receiver: &mut Receiver,
        buffer: &mut Buffer,
        until: Option<Instant>,
    ) -> Result<Option<Incoming>, ConnectionError> {
        loop {
            let header = match until {
                None => receiver.next(None)?,
                Some(until) => match receiver.next_until(until)? {
                    Some(header) => header,
                    None => return Ok(None),
                },
            };
            let body_bytes = receiver.body_left();
            if is_reply(&header) {
                self.hand_over(receiver, header, None, until)?;
                continue;
            }
            let fits = self.fits(header.command, body_bytes);
            let mut incoming =
                Incoming { header, fds: Fds::default(), body_bytes, held: 0, receiver: None, fits };
            if fits == Fits::Yes {
                // Long data goes where it belongs, and not into the buffer first.
                let held = match header.command {
                    Command::MIG_DATA_WRITE if body_bytes > IN_ONE_PIECE => MIG_DATA_HEAD,
                    _ => body_bytes,
                };
                receiver.read(buffer.bytes(held), until)?;
                incoming.held = held;
            } else {
                self.drain(receiver, fits, until)?;
                incoming.body_bytes = 0;
            }
            incoming.fds = receiver.fds();
            return Ok(Some(incoming));
        }
    }

    /// Receives one message for whoever it is meant for; `None` when none came in time.
    ///
    /// A reply to `mine` is received into its memory, and its outcome returned.
    pub(super) fn pump(
        &self,
        receiver: &mut Receiver,
        until: Instant,
        mine: &mut Mine<'_>,
    ) -> Result<Pumped, ConnectionError> {
        let Some(header) = receiver.next_until(until)? else {
            return Ok(Pumped::Nothing);
        };
        let body_bytes = receiver.body_left();
        if is_reply(&header) {
            let done = self.hand_over(receiver, header, Some(mine), Some(until))?;
            return Ok(done.map_or(Pumped::Other, Pumped::Mine));
        }
        let mut fits = self.fits(header.command, body_bytes);
        let mut body = Vec::new();
        if fits == Fits::Yes {
            body.resize(body_bytes, 0);
            // The device does not wait for the rest of a command that comes slowly; nor is it handled.
            match receiver.read(&mut body, Some(until)) {
                Err(ConnectionError::TimedOut) => fits = Fits::Late,
                read => _ = read?,
            }
        }
        if fits != Fits::Yes {
            body.clear();
            match self.drain(receiver, fits, Some(until)) {
                // The next message begins behind it all the same.
                Err(ConnectionError::TimedOut) => {}
                drained => drained?,
            }
        }
        let fds = receiver.fds();
        let mut shared = self.lock();
        shared.queued_bytes += body.len();
        shared.queued_fds += fds.fds.len();
        shared.queue.push_back(Queued { header, fds, body, fits });
        let full = shared.queue.len() >= QUEUE_COMMANDS_MAX
            || shared.queued_bytes >= QUEUE_BYTES_MAX
            || shared.queued_fds >= QUEUE_FDS_MAX;
        drop(shared);
        // The serving thread may sleep in poll(2), on a socket that this command is not in any more.
        self.wake();
        Ok(if full { Pumped::Full } else { Pumped::Other })
    }

    fn drain(
        &self,
        receiver: &mut Receiver,
        fits: Fits,
        until: Option<Instant>,
    ) -> Result<(), ConnectionError> {
        if fits == Fits::Drained { receiver.skip(until) } else { Ok(()) }
    }

    fn fits(&self, command: Command, body_bytes: usize) -> Fits {
        let bytes_max = match command {
            // The longest fixed part before data is 16 bytes.
            Command::REGION_WRITE | Command::MIG_DATA_WRITE => self.data_bytes_max + 16,
            _ => BODY_BYTES_MAX,
        };
        match body_bytes {
            bytes if bytes <= bytes_max => Fits::Yes,
            bytes if bytes <= DRAIN_BYTES_MAX => Fits::Drained,
            _ => Fits::Ends,
        }
    }

    /// Lets others receive.
    pub(super) fn give_back(&self, receiver: Box<Receiver>) {
        let mut shared = self.lock();
        shared.receiver = Some(receiver);
        if shared.waiting > 0 {
            self.turn.notify_all();
        }
    }

    /// Waits until something changed, at the longest until then; `false` when that came first.
    pub(super) fn wait<'a>(
        &self,
        mut shared: MutexGuard<'a, Shared>,
        until: Option<Instant>,
    ) -> (MutexGuard<'a, Shared>, bool) {
        shared.waiting += 1;
        let (mut shared, in_time) = match until {
            None => (self.turn.wait(shared).unwrap_or_else(PoisonError::into_inner), true),
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                let (shared, timeout) =
                    self.turn.wait_timeout(shared, left).unwrap_or_else(PoisonError::into_inner);
                (shared, !timeout.timed_out())
            }
        };
        shared.waiting -= 1;
        (shared, in_time)
    }

    /// Ends the connection: every wait on it ends.
    pub(super) fn end(&self) {
        self.lock().over = true;
        self.turn.notify_all();
        self.sender.shutdown();
        if let Some(twin) = self.twin.get() {
            twin.end();
        }
    }

    /// No more is received than what the client sent already.
    pub(super) fn end_receiving(&self) {
        let _ = shutdown(self.sender.socket(), Shutdown::Read);
    }

    /// Sends these pieces as one message until then. ETIMEDOUT when the client has no room for it; on
    /// any other failure the connection is over.
    pub(super) fn send_by(&self, pieces: &mut [IoSlice<'_>], until: Instant) -> Result<(), Errno> {
        match self.sender.send_by(pieces, &[], until) {
            Ok(()) => Ok(()),
            Err(ConnectionError::TimedOut) => Err(Errno::ETIMEDOUT),
            Err(error) => {
                tracing::debug!(%error, "connection over while sending for DMA");
                self.end();
                Err(Errno::ECONNRESET)
            }
        }
    }

    /// Sends these pieces as one message, with fds. On failure the connection is over, because its
    /// stream is.
    pub(super) fn send(
        &self,
        pieces: &mut [IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        self.send_in_pieces(|sending| sending.send(pieces, fds))
    }

    /// Sends without waiting; what the client has no room for is kept, and goes with [`Link::flush`].
    pub(super) fn send_now(&self, pieces: &mut [IoSlice<'_>]) -> Result<(), ConnectionError> {
        self.sender.reply(pieces).inspect_err(|_| self.end())
    }

    /// Sends what [`Link::send_now`] kept.
    pub(super) fn flush(&self) -> Result<(), ConnectionError> {
        if !self.sender.keeps() {
            return Ok(());
        }
        // A message of nothing waits for those that are kept.
        self.send(&mut [], &[])
    }

    /// Sleeps until a command has come, [`Link::wake`] was called, or it is so late. Of a command that is longer than the
    /// receive buffer, only the first part has come. Nothing that the client sent is taken from the connection, so that another
    /// process can go on with it. While it sleeps it can be stopped without being woken ([`Link::stop_if_idle`]), if
    /// `may_stop`.
    pub(super) fn wait_for_something(
        &self,
        until: Option<Instant>,
        may_stop: bool,
    ) -> Result<Something, ConnectionError> {
        let mut is_ready = false;
        loop {
            if self.was_woken() {
                return Ok(Something::Woken);
            }
            let mut shared = self.lock();
            if !shared.queue.is_empty() {
                return Ok(Something::Command);
            }
            if shared.over {
                return Err(ConnectionError::Closed);
            }
            let Some(mut receiver) = shared.receiver.take() else {
                let in_time = self.wait(shared, until).1;
                if !in_time {
                    return Ok(Something::Late);
                }
                continue;
            };
            drop(shared);
            // Mostly nothing has come yet, and a look at the socket is one call for nothing.
            let gathered =
                if is_ready || receiver.has_more() { self.gather(&mut receiver) } else { Ok(false) };
            self.give_back(receiver);
            if gathered? {
                return Ok(Something::Command);
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Ok(Something::Late);
            }
            if !may_stop {
                is_ready = self.poll(PollFlags::IN, until)?;
                continue;
            }
            self.reads.store(IDLE, SeqCst);
            let polled = self.poll(PollFlags::IN, until);
            if self.reads.compare_exchange(IDLE, BUSY, SeqCst, SeqCst).is_err() {
                return Ok(Something::Woken);
            }
            is_ready = polled?;
        }
    }

    /// Stops the thread that serves where it sleeps between two requests, and says whether it did. Then it reads nothing before
    /// [`Link::set_busy`], and need not be woken for that.
    pub(super) fn stop_if_idle(&self) -> bool {
        !self.sender.keeps() && self.reads.compare_exchange(IDLE, STOPPED, SeqCst, SeqCst).is_ok()
    }

    /// Lets it go on, if it sleeps there still without knowing that it was stopped.
    pub(super) fn go_on_idle(&self) -> bool {
        self.reads.compare_exchange(STOPPED, IDLE, SeqCst, SeqCst).is_ok()
    }

    /// Called by the thread that serves, which may read from now on, or will not before it was told that it may.
    pub(super) fn set_busy(&self) {
        self.reads.store(BUSY, SeqCst);
    }

    /// Whether the thread that serves was not stopped.
    pub(super) fn is_busy(&self) -> bool {
        self.reads.load(SeqCst) == BUSY
    }

    /// Whether a command has come. Replies before it go to the threads that wait for them.
    fn gather(&self, receiver: &mut Receiver) -> Result<bool, ConnectionError> {
        while receiver.gather()? {
            if !receiver.held_header().is_some_and(|header| is_reply(&header)) {
                return Ok(true);
            }
            let header = receiver.next(None)?;
            self.hand_over(receiver, header, None, None)?;
            receiver.skip(None)?;
        }
        Ok(false)
    }

    /// Sleeps until [`Link::wake`] was called, the client has gone, or it is so late. What the client sends stays where it is.
    pub(super) fn wait_for_wake(&self, until: Option<Instant>) -> Result<(), ConnectionError> {
        if self.poll(PollFlags::RDHUP, until)? { Err(ConnectionError::Closed) } else { Ok(()) }
    }

    /// Sleeps until that happens on the socket, and says whether it has, or until [`Link::wake`], or until it is so late.
    fn poll(&self, events: PollFlags, until: Option<Instant>) -> Result<bool, ConnectionError> {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = [PollFd::new(self.sender.socket(), events), PollFd::new(&self.waker, PollFlags::IN)];
        match poll(&mut fds, left.as_ref()) {
            Ok(_) => {
                let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
                if ready(&fds[1]) {
                    self.is_woken.store(true, SeqCst);
                }
                Ok(ready(&fds[0]))
            }
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether [`Link::wake`] was called since the last time.
    pub(super) fn was_woken(&self) -> bool {
        if !self.is_woken.swap(false, SeqCst) {
            return false;
        }
        // Nothing is there when the waker has not come to its write yet: then this is woken once more.
        let _ = rustix::io::read(&self.waker, &mut [0; 8]);
        true
    }

    /// Wakes the thread that serves, where it waits with [`Link::wait_for_something`] or [`Link::wait_for_wake`].
    pub(super) fn wake(&self) {
        self.is_woken.store(true, SeqCst);
        // Fails only when the counter is full, that is, woken.
        let _ = rustix::io::write(&self.waker, &1u64.to_ne_bytes());
        let shared = self.lock();
        if shared.waiting > 0 {
            self.turn.notify_all();
        }
    }

    /// Whether the client has closed its end, or will send nothing more: its connection is about to be over.
    pub(super) fn has_hung_up(&self) -> bool {
        let ready =
            poll(&mut [PollFd::new(self.sender.socket(), PollFlags::RDHUP)], Some(&Timespec::default()));
        ready.is_ok_and(|ready| ready > 0)
    }

    /// The client's credentials.
    pub(super) fn socket(&self) -> &UnixStream {
        self.sender.socket()
    }

    /// The same for a message that is made piece by piece.
    pub(super) fn send_in_pieces(
        &self,
        send: impl FnOnce(&mut Sending<'_>) -> Result<(), ConnectionError>,
    ) -> Result<(), ConnectionError> {
        let sent = send(&mut self.sender.hold());
        if sent.is_err() {
            self.end();
        }
        sent
    }
}

/// What [`Link::wait_for_something`] waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Something {
    /// A command can be taken.
    Command,
    /// [`Link::wake`].
    Woken,
    /// Nothing in time.
    Late,
}

/// What [`Link::pump`] received.
pub(super) enum Pumped {
    /// Nothing in time.
    Nothing,
    /// The outcome of the caller's own exchange.
    Mine(Result<(), Errno>),
    /// Something for somebody else.
    Other,
    /// A command, and there is no room for another.
    Full,
}

/// The exchange of the thread that leads, and where its data goes.
pub(super) struct Mine<'a> {
    pub(super) id: u16,
    pub(super) data: Option<&'a mut [u8]>,
}

/// MIG_DATA_WRITE up to this many bytes is received like any other message.
const IN_ONE_PIECE: usize = 2048;
const MIG_DATA_HEAD: usize = 8;

fn is_reply(header: &Header) -> bool {
    matches!(header.kind(), Ok(Kind::Reply | Kind::Refusal(_)))
}

impl Queued {
    fn take(self, buffer: &mut Buffer) -> Incoming {
        let bytes = self.body.len();
        buffer.bytes(bytes).copy_from_slice(&self.body);
        Incoming {
            header: self.header,
            fds: self.fds,
            body_bytes: bytes,
            held: bytes,
            receiver: None,
            fits: self.fits,
        }
    }
}
