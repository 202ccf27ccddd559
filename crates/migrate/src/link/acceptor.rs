//! Whoever connects to a listener, several at a time: who says nothing, or what no move begins with, holds up nobody
//! who has one.

use std::collections::VecDeque;
use std::fmt;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::{Address, Link, LinkError, Listener, SocketLink, Tls, TlsLink, Wait};
use crate::Error;
use crate::cancel::timespec;
use crate::lock::lock;
use crate::wire::{FrameReader, say_why};
use limosa_stream::{Damage, PREFACE_BYTES, Preface};

/// How many may be connected at once that have not said yet what they want. When one more comes, the one goes that has
/// said nothing for longest, so that a sender never has to wait for them.
pub const PENDING_MAX: usize = 16;

/// Who has connected.
pub enum Incoming {
    /// It has sent a preface, which the link still has to be read for: a source that moves or asks, or a further link.
    Peer(Box<dyn Link>),
    /// It is no source: it failed in the TLS handshake, sent something else than a preface, left or stayed silent.
    NotAPeer {
        /// Which.
        peer: String,
        /// What it did instead. [`Error::TimedOut`] also when it had to go because others came.
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

/// Takes those who connect to a listener, [`PENDING_MAX`] at a time, each in a thread of its own until it has sent its
/// preface, under TLS after the handshake. They come out in the order in which they have done so.
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
    /// Readable when somebody has been heard since it was read.
    wake: OwnedFd,
}

impl Shared {
    fn wake(&self) {
        // Only a counter at its end refuses, and that wakes as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

#[derive(Debug, Default)]
struct State {
    heard: VecDeque<Incoming>,
    /// Those who have not been heard, or are being told why they are not taken, in the order in which they came.
    unheard: VecDeque<Unheard>,
    next: u64,
}

#[derive(Debug)]
struct Unheard {
    number: u64,
    link: Arc<SocketLink>,
    since: Instant,
}

impl Acceptor {
    /// At this listener, under TLS where that is given. `silence_max` is how long each of them may take for the
    /// handshake, and then for the preface. Fails when the process is out of file descriptors.
    pub fn new(listener: Listener, tls: Option<Tls>, silence_max: Duration) -> std::io::Result<Acceptor> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { state: Mutex::default(), wake });
        Ok(Acceptor { listener, tls, silence_max, shared })
    }

    /// Where it listens.
    pub fn address(&self) -> &Address {
        self.listener.address()
    }

    /// The next one that has been heard. Nobody is accepted but in these calls; who was accepted is heard on between
    /// them.
    pub fn next(&self, wait: Wait<'_>) -> Result<Incoming, LinkError> {
        loop {
            // Read before the look, so that whoever is heard after it wakes the poll.
            let _ = rustix::io::read(&self.shared.wake, &mut [0; 8]);
            let mut state = lock(&self.shared.state);
            if let Some(arrival) = state.heard.pop_front() {
                if !state.heard.is_empty() {
                    // Somebody else may be waiting for it.
                    self.shared.wake();
                }
                return Ok(arrival);
            }
            drop(state);
            match self.listener.accept(Wait { deadline: Instant::now(), cancel: None }) {
                Ok(link) => {
                    self.hear(link);
                    wait.left()?;
                }
                Err(LinkError::TimedOut) => self.poll(wait)?,
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits until somebody connects or has been heard.
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

    fn hear(&self, link: SocketLink) {
        let link = Arc::new(link);
        let number = {
            let mut state = lock(&self.shared.state);
            if state.unheard.len() >= PENDING_MAX
                && let Some(longest) = state.unheard.pop_front()
            {
                longest.link.cut();
                let (peer, limit) = (longest.link.peer().to_owned(), longest.since.elapsed());
                let why = Error::TimedOut { peer: peer.clone(), doing: "others came", limit };
                state.heard.push_back(Incoming::NotAPeer { peer, why });
            }
            let number = state.next;
            state.next += 1;
            let since = Instant::now();
            state.unheard.push_back(Unheard { number, link: Arc::clone(&link), since });
            number
        };
        let hearing = Hearing {
            shared: Arc::clone(&self.shared),
            number,
            tls: self.tls.clone(),
            silence_max: self.silence_max,
        };
        let peer = link.peer().to_owned();
        let thread = std::thread::Builder::new().name("limosa: arrival".into());
        if let Err(error) = thread.spawn(move || hearing.run(link)) {
            let mut state = lock(&self.shared.state);
            state.unheard.retain(|unheard| unheard.number != number);
            let why = Error::Os { doing: "starting a thread for who has connected", error };
            state.heard.push_back(Incoming::NotAPeer { peer, why });
        }
    }
}

impl Drop for Acceptor {
    /// Who has not been heard is closed.
    fn drop(&mut self) {
        lock(&self.shared.state).unheard.drain(..).for_each(|unheard| unheard.link.cut());
    }
}

/// The thread of one that has connected.
struct Hearing {
    shared: Arc<Shared>,
    number: u64,
    tls: Option<Tls>,
    silence_max: Duration,
}

impl Hearing {
    fn run(self, link: Arc<SocketLink>) {
        let peer = link.peer().to_owned();
        let link: Box<dyn Link> = match &self.tls {
            None => Box::new(link),
            Some(tls) => match TlsLink::accept(link, tls, Wait::within(self.silence_max, None)) {
                Ok(link) => Box::new(link),
                Err(error) => {
                    let doing = "shaking hands under TLS";
                    let why = match error {
                        LinkError::TimedOut => {
                            Error::TimedOut { peer: peer.clone(), doing, limit: self.silence_max }
                        }
                        error => Error::Link { peer: peer.clone(), doing, error },
                    };
                    return self.is(Incoming::NotAPeer { peer, why });
                }
            },
        };
        let mut reader = FrameReader::new(&*link, self.silence_max);
        let why = match reader.preface_bytes(&*link, None) {
            Ok(preface) => match Preface::decode(&preface) {
                Err(damage @ Damage::NotAStream) => reader.damaged(damage),
                // Whatever else is wrong with it, whoever takes the link says so.
                _ => {
                    let heard = Heard { inner: link, preface: Mutex::new((preface, 0)) };
                    return self.is(Incoming::Peer(Box::new(heard)));
                }
            },
            Err(why) => why,
        };
        say_why(&*link, &why, self.silence_max);
        self.is(Incoming::NotAPeer { peer, why });
    }

    /// It has been heard, unless it had to go before.
    fn is(&self, arrival: Incoming) {
        let mut state = lock(&self.shared.state);
        if let Some(at) = state.unheard.iter().position(|unheard| unheard.number == self.number) {
            state.unheard.remove(at);
            state.heard.push_back(arrival);
        }
        drop(state);
        self.shared.wake();
    }
}

/// A link whose preface has been read, and is read again by whoever takes it.
struct Heard {
    inner: Box<dyn Link>,
    /// And how much of it has been read again.
    preface: Mutex<([u8; PREFACE_BYTES], usize)>,
}

impl Link for Heard {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.inner.write(slices, wait)
    }

    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        let mut preface = lock(&self.preface);
        let (bytes, given) = &mut *preface;
        if *given == PREFACE_BYTES || into.is_empty() {
            drop(preface);
            return self.inner.read(into, wait);
        }
        let part = &bytes[*given..];
        let length = part.len().min(into.len());
        into[..length].copy_from_slice(&part[..length]);
        *given += length;
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
}
