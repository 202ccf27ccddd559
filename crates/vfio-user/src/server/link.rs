//! One connection's sockets, shared by the thread that serves requests and the threads of a model that access the
//! client's memory by messages (`vfio-user.rst: Command Concurrency, Socket`).
//!
//! A thread that needs data from the socket takes the receiver and becomes the leader: it passes replies to the threads
//! that wait for them, and queues commands. Usually that is the serving thread, which leads while it waits for the next
//! command. While a request is being handled any thread may lead, including the handler, so that a model's DMA
//! completes whatever the other threads are waiting for.

mod wait;

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU8};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use limosa_foreign_fd::Foreign;
use limosa_protocol::Errno;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{Shutdown, shutdown};

use super::buffer::Buffer;
use super::dma::{Exchange, Twin};
use super::handover::Received;
use crate::codec::{Command, Header, Kind};
use crate::connection::{self, ConnectionError, Fds, Receiver, Sender, Sending, Waits};

pub(super) use wait::Something;

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

/// Limit on the body of a queued command.
pub(super) const MESSAGE_BYTES_MAX: usize = crate::version::DATA_XFER_BYTES_MAX as usize + 64;

/// Another process has handed over more data of a connection than it can have received.
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
    /// Whether this warning was logged.
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
    /// Whether the thread that serves reads: [`wait::BUSY`] and its siblings.
    reads: AtomicU8,
    /// The connection has to pause: no thread waits for the client to read its replies.
    pauses: AtomicBool,
}

/// The data shared by the threads of a connection.
pub(super) struct Shared {
    /// `None` while there is a leader.
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

/// Whether a command's size is acceptable.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Fits {
    Yes,
    /// Too long; it was drained.
    Drained,
    /// Incomplete when the device's own wait ended.
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
            reads: AtomicU8::new(wait::BUSY),
            pauses: AtomicBool::new(false),
        })
    }

    /// Continues where another process has stopped: with its received data, queued commands, and last id.
    pub(super) fn import(
        &self,
        (bytes, fds): Received,
        unsent: Vec<u8>,
        queue: Vec<Queued>,
        next_id: u16,
        foreign_dma: bool,
    ) -> Result<(), ConnectionError> {
        self.sender.import(unsent);
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

    /// Waits for the next command, whose body, or the head of it, is in `buffer`; `None` if none arrives by then. Only the first
    /// command of a connection has a limit.
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

    /// Receives until a command arrives.
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
            if until.is_some() {
                self.check_first(&header)?;
            }
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

    /// Receives one message and dispatches it; `None` if none arrives in time.
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
            // The device does not wait for the rest of a slow command; the command is not handled either.
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
        // The serving thread may sleep in poll(2) on the socket, from which this command was already received.
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

    /// Refuses what cannot begin a connection of vfio-user: a client that speaks another protocol is not listened to until its time
    /// is over.
    fn check_first(&self, header: &Header) -> Result<(), ConnectionError> {
        let body_bytes = header.body_bytes().unwrap_or(0);
        let is_long =
            header.command != Command::VERSION && self.fits(header.command, body_bytes) != Fits::Yes;
        match is_reply(header) || is_long {
            true => Err(ConnectionError::Broken("its first message is none of vfio-user")),
            false => Ok(()),
        }
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

    /// Returns the receiver, so that other threads can receive.
    pub(super) fn give_back(&self, receiver: Box<Receiver>) {
        let mut shared = self.lock();
        shared.receiver = Some(receiver);
        if shared.waiting > 0 {
            self.turn.notify_all();
        }
    }

    /// Waits for a change, until `until` at the latest; `false` if the time has passed.
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

    /// Stops receiving, except for data that the client has already sent.
    pub(super) fn end_receiving(&self) {
        let _ = shutdown(self.sender.socket(), Shutdown::Read);
    }

    /// Sends these pieces as one message by then. ETIMEDOUT if the client's socket has no space; any other failure
    /// ends the connection.
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

    /// Sends these pieces as one message, with fds. A failure ends the connection, because its stream is broken.
    /// While the connection has to pause, the part for which the socket has no space is queued.
    pub(super) fn send(
        &self,
        pieces: &mut [IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ConnectionError> {
        self.send_in_pieces(|sending| match fds {
            [] => sending.send_or_keep(pieces, |until| self.wait_for_room(until)),
            fds => sending.send(pieces, fds),
        })
    }

    /// Whether there are queued replies.
    pub(super) fn keeps(&self) -> bool {
        self.sender.keeps()
    }

    /// The queued replies, for another process to send. `None` while a thread is sending.
    pub(super) fn unsent(&self) -> Option<Vec<u8>> {
        self.sender.export()
    }

    /// Sends without waiting; the part for which the socket has no space is queued, and sent by [`Link::flush`].
    pub(super) fn send_now(&self, pieces: &mut [IoSlice<'_>]) -> Result<(), ConnectionError> {
        self.sender.reply(pieces).inspect_err(|_| self.end())
    }

    /// Sends the queue of [`Link::send_now`].
    pub(super) fn flush(&self) -> Result<(), ConnectionError> {
        if !self.sender.keeps() {
            return Ok(());
        }
        // An empty message waits for the queued ones.
        self.send(&mut [], &[])
    }

    /// The client's credentials.
    pub(super) fn socket(&self) -> &UnixStream {
        self.sender.socket()
    }

    /// The same for a message that is produced piece by piece.
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

/// The result of [`Link::pump`].
pub(super) enum Pumped {
    /// Nothing in time.
    Nothing,
    /// The outcome of the caller's own exchange.
    Mine(Result<(), Errno>),
    /// A message for another thread.
    Other,
    /// A command, and the queue is full.
    Full,
}

/// The leader's own exchange, and the destination of its data.
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
