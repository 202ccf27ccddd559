//! [`Acceptor`]: takes connections from a listener, several at a time, so that a client that stays silent, or is not
//! migrating, does not block others.

use std::collections::VecDeque;
use std::fmt;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::Error;
use crate::cancel::timespec;
use crate::link::{
    Address, Fingerprint, FurtherLinks, Link, LinkError, Listener, SocketLink, Tls, TlsLink, Wait,
};
use crate::lock::lock;
use crate::wire::{FrameReader, say_why};
use limosa_stream::{Damage, PREFACE_BYTES, Preface};

/// The most connections that may wait for their preface at once. One more closes the one that has been silent for
/// longest, so that a source never waits for clients that stay silent.
pub const PENDING_MAX: usize = 16;

/// A connection, once it is known what it is.
pub enum Incoming {
    /// A source, or a further link of one: it has sent a preface. The preface can still be read from the link.
    Peer(Box<dyn Link>),
    /// A client that is not a source, or a connection that could not be looked at. It is closed.
    NotAPeer {
        /// The client.
        peer: String,
        /// The reason: it failed in the TLS handshake, sent something other than a preface, left or stayed
        /// silent. [`Error::TimedOut`] also when more clients than [`PENDING_MAX`] connected. [`Error::Os`] when this
        /// side could not start a thread for it.
        why: Error,
    },
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Incoming::Peer(link) => f.debug_tuple("Peer").field(&link.peer()).finish(),
            Incoming::NotAPeer { peer, why } => {
                f.debug_struct("NotAPeer").field("peer", peer).field("why", why).finish()
            }
        }
    }
}

/// Accepts connections, at most [`PENDING_MAX`] at a time, and reads the preface of each in a thread of its own, under
/// TLS after the handshake. Connections come out in the order in which their prefaces arrive.
///
/// As [`FurtherLinks`] it gives a destination the further links of its move:
///
/// ```no_run
/// use limosa_migrate::link::Wait;
/// use limosa_migrate::{Acceptor, Incoming};
/// use limosa_migrate::{Destination, Received};
///
/// fn receive(destination: &Destination<'_>, acceptor: &Acceptor, wait: Wait<'_>) -> std::io::Result<Option<Received>> {
///     match acceptor.accept(wait).map_err(std::io::Error::other)? {
///         Incoming::Peer(link) => Ok(Some(destination.receive_over(&link, acceptor))),
///         Incoming::NotAPeer { .. } => Ok(None),
///     }
/// }
/// ```
#[derive(Debug)]
pub struct Acceptor {
    listener: Listener,
    tls: Option<Tls>,
    silence_max: Duration,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// An eventfd: readable when a connection has become ready since it was read.
    wake: OwnedFd,
}

impl Shared {
    fn wake(&self) {
        // Refused only when the counter is at its maximum, where the eventfd is readable as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

#[derive(Debug, Default)]
struct State {
    /// Connections of which it is known what they are.
    ready: VecDeque<Incoming>,
    /// Connections that have sent no preface yet, and those that are being refused, oldest first.
    pending: VecDeque<Pending>,
    next_number: u64,
}

#[derive(Debug)]
struct Pending {
    number: u64,
    link: Arc<SocketLink>,
    since: Instant,
}

impl Acceptor {
    /// Accepts from this listener, under TLS if certificates are given. `silence_max` bounds the TLS handshake of each
    /// connection, and then the wait for its preface. Fails when the process has no file descriptors left.
    pub fn new(listener: Listener, tls: Option<Tls>, silence_max: Duration) -> std::io::Result<Acceptor> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { state: Mutex::default(), wake });
        Ok(Acceptor { listener, tls, silence_max, shared })
    }

    /// The address that it listens on.
    pub fn address(&self) -> &Address {
        self.listener.address()
    }

    /// The next connection of which it is known what it is. New connections are accepted only during these calls;
    /// prefaces are read between them, too.
    pub fn accept(&self, wait: Wait<'_>) -> Result<Incoming, LinkError> {
        loop {
            // Cleared before the queue is looked at: a connection that becomes ready later wakes the poll.
            let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
            let mut state = lock(&self.shared.state);
            if let Some(incoming) = state.ready.pop_front() {
                if !state.ready.is_empty() {
                    // Another thread may be waiting for it.
                    self.shared.wake();
                }
                return Ok(incoming);
            }
            drop(state);
            match self.listener.accept(Wait { deadline: Instant::now(), cancel: None }) {
                Ok(link) => {
                    self.start(link, thread::Builder::new());
                    wait.left()?;
                }
                Err(LinkError::TimedOut) => self.poll(wait)?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until a client connects or a connection becomes ready.
    fn poll(&self, wait: Wait<'_>) -> Result<(), LinkError> {
        let left = timespec(wait.left()?);
        let mut fds =
            vec![PollFd::new(&self.listener, PollFlags::IN), PollFd::new(&self.shared.wake, PollFlags::IN)];
        fds.extend(wait.cancel.map(|cancel| PollFd::new(cancel, PollFlags::IN)));
        match poll(&mut fds, Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Starts the thread that finds out what a new connection is.
    fn start(&self, link: SocketLink, thread: thread::Builder) {
        let link = Arc::new(link);
        let number = {
            let mut state = lock(&self.shared.state);
            if state.pending.len() >= PENDING_MAX
                && let Some(oldest) = state.pending.pop_front()
            {
                oldest.link.cut();
                let (peer, limit) = (oldest.link.peer().to_owned(), oldest.since.elapsed());
                let doing = "more clients connected than may wait for their preface";
                let why = Error::TimedOut { peer: peer.clone(), doing, limit };
                state.ready.push_back(Incoming::NotAPeer { peer, why });
            }
            let number = state.next_number;
            state.next_number += 1;
            let since = Instant::now();
            state.pending.push_back(Pending { number, link: Arc::clone(&link), since });
            number
        };
        let peer_thread = PeerThread {
            shared: Arc::clone(&self.shared),
            number,
            tls: self.tls.clone(),
            silence_max: self.silence_max,
        };
        let peer = link.peer().to_owned();
        let started = thread.name("limosa: accepted".into()).spawn(move || peer_thread.run(link));
        if let Err(error) = started {
            let mut state = lock(&self.shared.state);
            state.pending.retain(|pending| pending.number != number);
            let why = Error::Os { doing: "starting a thread for a connection", error };
            state.ready.push_back(Incoming::NotAPeer { peer, why });
        }
    }
}

impl Drop for Acceptor {
    /// Closes the connections that are still pending.
    fn drop(&mut self) {
        lock(&self.shared.state).pending.drain(..).for_each(|pending| pending.link.cut());
    }
}

/// The further links of a move, at the destination. Connections that are not peers are passed over, with a warning in
/// the log.
impl FurtherLinks for Acceptor {
    fn next(&self, wait: Wait<'_>) -> Result<Box<dyn Link>, LinkError> {
        loop {
            match self.accept(wait)? {
                Incoming::Peer(link) => return Ok(link),
                Incoming::NotAPeer { peer, why } => {
                    tracing::warn!(peer, "while waiting for a further link of the move: {why}");
                }
            }
        }
    }
}

/// The thread of one connection, until its preface has arrived or it is refused.
struct PeerThread {
    shared: Arc<Shared>,
    number: u64,
    tls: Option<Tls>,
    silence_max: Duration,
}

impl PeerThread {
    fn run(self, link: Arc<SocketLink>) {
        let peer = link.peer().to_owned();
        let link: Box<dyn Link> = match &self.tls {
            None => Box::new(link),
            Some(tls) => match TlsLink::accept(link, tls, Wait::within(self.silence_max, None)) {
                Ok(link) => Box::new(link),
                Err(error) => {
                    let doing = "in the TLS handshake";
                    let why = match error {
                        LinkError::TimedOut => {
                            Error::TimedOut { peer: peer.clone(), doing, limit: self.silence_max }
                        }
                        error => Error::Link { peer: peer.clone(), doing, error },
                    };
                    return self.is_ready(Incoming::NotAPeer { peer, why });
                }
            },
        };
        let mut reader = FrameReader::new(&*link, self.silence_max);
        let why = match reader.preface_bytes(&*link, None) {
            Ok(preface) => match Preface::decode(&preface) {
                Err(damage @ Damage::NotAStream) => reader.damaged(damage),
                // Any other damage is reported by the code that uses the link.
                _ => {
                    let link = WithPreface { inner: link, preface: Mutex::new((preface, 0)) };
                    return self.is_ready(Incoming::Peer(Box::new(link)));
                }
            },
            Err(why) => why,
        };
        let why = say_why(&*link, why, self.silence_max);
        self.is_ready(Incoming::NotAPeer { peer, why });
    }

    /// Queues the connection, unless it was closed to make room for another.
    fn is_ready(&self, incoming: Incoming) {
        let mut state = lock(&self.shared.state);
        if let Some(at) = state.pending.iter().position(|pending| pending.number == self.number) {
            state.pending.remove(at);
            state.ready.push_back(incoming);
        }
        drop(state);
        self.shared.wake();
    }
}

/// A link whose preface was read already, and can be read once more.
struct WithPreface {
    inner: Box<dyn Link>,
    /// The preface, and how many of its bytes were read again.
    preface: Mutex<([u8; PREFACE_BYTES], usize)>,
}

impl Link for WithPreface {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.inner.write(slices, wait)
    }

    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        let mut preface = lock(&self.preface);
        let (bytes, read) = &mut *preface;
        if *read == PREFACE_BYTES || into.is_empty() {
            drop(preface);
            return self.inner.read(into, wait);
        }
        let part = &bytes[*read..];
        let length = part.len().min(into.len());
        into[..length].copy_from_slice(&part[..length]);
        *read += length;
        Ok(length)
    }

    fn finish(&self) {
        self.inner.finish();
    }

    fn part(&self, wait: Wait<'_>) {
        self.inner.part(wait);
    }

    fn peer(&self) -> &str {
        self.inner.peer()
    }

    fn has_peer(&self) -> bool {
        self.inner.has_peer()
    }

    fn peer_fingerprint(&self) -> Option<Fingerprint> {
        self.inner.peer_fingerprint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_for_which_no_thread_can_be_started_is_an_error_and_no_panic() {
        let listener = Listener::bind(&Address::Tcp("127.0.0.1".into(), 0)).unwrap();
        let acceptor = Acceptor::new(listener, None, Duration::from_secs(10)).unwrap();
        let (near, far) = SocketLink::pair().unwrap();
        // No system has room for such a stack.
        acceptor.start(near, thread::Builder::new().stack_size(1 << 62));
        let wait = Wait::within(Duration::from_secs(10), None);
        let Incoming::NotAPeer { peer, why } = acceptor.accept(wait).unwrap() else {
            panic!("it is no peer")
        };
        assert_eq!(peer, "the destination");
        assert!(matches!(why, Error::Os { .. }), "{why}");
        assert!(matches!(far.read(&mut [0], wait), Err(LinkError::Closed)), "it is closed");
        assert!(lock(&acceptor.shared.state).pending.is_empty());
    }
}
