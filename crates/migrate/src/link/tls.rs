//! Links over TLS 1.3 (RFC 8446) with both sides authenticated: [`Tls`], what a side shows and whom it
//! believes, and [`TlsLink`], a link within another.

mod config;
mod error;

use std::fmt;
use std::io::{self, IoSlice, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustls::{ClientConnection, Connection, ServerConnection};

pub use config::Tls;
pub use error::TlsError;

use super::{Address, Link, LinkError, SocketLink, Wait};
use crate::lock::lock;

/// Room for what was received and is not decrypted yet.
const INBOX_BYTES: usize = 128 << 10;
/// The most that is encrypted at once.
const PLAIN_BYTES_MAX: usize = 256 << 10;
/// How long the last records may take that are owed to the other side: its alert, or the end.
const LINGER: Duration = Duration::from_secs(2);

/// A link whose bytes cross another one under TLS.
///
/// Until the other side's certificate is accepted nothing of the stream is sent to it. A destination's accepting
/// comes after the source's handshake is done: a source whose certificate is refused is told when it reads, as
/// [`LinkError::Tls`], which is before anything is moved.
///
/// The end is [`LinkError::Closed`], whether the other side announced it (close_notify, by [`Link::finish`]) or the
/// link broke off: the stream itself says what is whole. What is buffered is bounded, to less than one MiB.
pub struct TlsLink<L: Link = SocketLink> {
    inner: L,
    tls: Tls,
    /// Never rollback while the inner link is waited for, so that one thread can read while another writes.
    session: Mutex<Connection>,
    queue: Mutex<DeviceQueue>,
    outbox: Mutex<Outbox>,
}

/// What has come and is not decrypted yet.
struct DeviceQueue {
    bytes: Box<[u8]>,
    /// What of it the session has not taken yet.
    unread: std::ops::Range<usize>,
    /// Of all that came.
    first_byte: Option<u8>,
    /// What came is not to be believed, and nothing more of it is looked at.
    broken: bool,
}

/// What is encrypted and has not gone out yet.
#[derive(Default)]
struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
}

impl<L: Link> fmt::Debug for TlsLink<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsLink")
            .field("peer", &self.inner.peer())
            .field("tls", &self.tls)
            .finish_non_exhaustive()
    }
}

impl<L: Link> TlsLink<L> {
    /// The source's side: shakes hands with the destination to which `inner` is connected, and refuses it unless its
    /// certificate is made out to [`Tls::expected_name`].
    pub fn connect(inner: L, tls: &Tls, address: &Address, wait: Wait<'_>) -> Result<TlsLink<L>, LinkError> {
        let name = tls.expected_name(address)?;
        let session = ClientConnection::new(tls.client(), name).map_err(|error| failed(error, tls))?;
        TlsLink::shake_hands(inner, Connection::Client(session), tls, wait)
    }

    /// The destination's side: shakes hands with the source that has connected.
    pub fn accept(inner: L, tls: &Tls, wait: Wait<'_>) -> Result<TlsLink<L>, LinkError> {
        let session = ServerConnection::new(tls.server()).map_err(|error| failed(error, tls))?;
        TlsLink::shake_hands(inner, Connection::Server(session), tls, wait)
    }

    fn shake_hands(
        inner: L,
        mut session: Connection,
        tls: &Tls,
        wait: Wait<'_>,
    ) -> Result<TlsLink<L>, LinkError> {
        session.set_buffer_limit(Some(PLAIN_BYTES_MAX));
        let queue =
            DeviceQueue { bytes: vec![0; INBOX_BYTES].into(), unread: 0..0, first_byte: None, broken: false };
        let link = TlsLink {
            inner,
            tls: tls.clone(),
            session: Mutex::new(session),
            queue: Mutex::new(queue),
            outbox: Mutex::default(),
        };
        loop {
            let shaken = link.flush(&mut lock(&link.outbox), wait).map_err(|error| link.last_word(error));
            if shaken.is_ok() && !lock(&link.session).is_handshaking() {
                return Ok(link);
            }
            match shaken.and_then(|()| link.fill(&mut lock(&link.queue), wait)) {
                Ok(()) => {}
                Err(LinkError::Closed) => return Err(TlsError::Closed.into()),
                Err(error) => {
                    link.refuse(wait);
                    return Err(error);
                }
            }
        }
    }

    /// Sends all that is encrypted.
    fn flush(&self, outbox: &mut Outbox, wait: Wait<'_>) -> Result<(), LinkError> {
        loop {
            if outbox.sent == outbox.bytes.len() {
                outbox.sent = 0;
                outbox.bytes.clear();
                let mut session = lock(&self.session);
                while session.wants_write() {
                    session.write_tls(&mut outbox.bytes)?;
                }
                if outbox.bytes.is_empty() {
                    return Ok(());
                }
            }
            outbox.sent += self.inner.write(&[IoSlice::new(&outbox.bytes[outbox.sent..])], wait)?;
        }
    }

    /// Receives at least one byte and hands it to the session.
    fn fill(&self, queue: &mut DeviceQueue, wait: Wait<'_>) -> Result<(), LinkError> {
        if queue.broken {
            return Err(LinkError::Closed);
        }
        if queue.unread.is_empty() {
            let bytes = self.inner.read(&mut queue.bytes, wait)?;
            queue.unread = 0..bytes;
            queue.first_byte = queue.first_byte.or(queue.bytes[..bytes].first().copied());
        }
        let mut session = lock(&self.session);
        queue.unread.start += session.read_tls(&mut &queue.bytes[queue.unread.clone()])?;
        let processed = session.process_new_packets();
        drop(session);
        processed.map(drop).map_err(|error| {
            queue.broken = true;
            // The other side is to learn why. It may not be reading; what is known here is worth more.
            let _ = self.flush_owed(Wait { deadline: Instant::now(), ..wait });
            let is_tls = queue.first_byte.is_some_and(|byte| matches!(byte, ALERT | HANDSHAKE));
            if is_tls { failed(error, &self.tls) } else { TlsError::PlainPeer.into() }
        })
    }

    /// Sends what the session owes to the other side. A thread that is writing does so itself, before its own.
    fn flush_owed(&self, wait: Wait<'_>) -> Result<(), LinkError> {
        match self.outbox.try_lock() {
            Ok(mut outbox) => self.flush(&mut outbox, wait),
            Err(_) => Ok(()),
        }
    }

    /// Why the link was closed, where the other side has said so. A thread that is reading finds it itself.
    fn last_word(&self, error: LinkError) -> LinkError {
        if matches!(error, LinkError::Closed)
            && let Ok(mut queue) = self.queue.try_lock()
        {
            let at_hand = Wait { deadline: Instant::now(), cancel: None };
            loop {
                match self.fill(&mut queue, at_hand) {
                    Ok(()) => {}
                    Err(why @ LinkError::Tls(_)) => return why,
                    Err(_) => break,
                }
            }
        }
        error
    }

    /// The alert goes out; then the other side gets the time to read it.
    fn refuse(&self, wait: Wait<'_>) {
        let wait = Wait { deadline: wait.deadline.min(Instant::now() + LINGER), ..wait };
        let _ = self.flush(&mut lock(&self.outbox), wait);
        self.inner.part(wait);
    }
}

impl<L: Link> Link for TlsLink<L> {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let mut outbox = lock(&self.outbox);
        self.flush(&mut outbox, wait).map_err(|error| self.last_word(error))?;
        let taken = lock(&self.session).writer().write_vectored(slices)?;
        match self.flush(&mut outbox, wait) {
            // It is taken, and goes out before anything else does.
            Ok(()) | Err(LinkError::TimedOut | LinkError::Cancelled) => Ok(taken),
            Err(error) => Err(self.last_word(error)),
        }
    }

    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        let mut queue = lock(&self.queue);
        loop {
            if wait.cancel.is_some_and(crate::Cancel::is_cancelled) {
                return Err(LinkError::Cancelled);
            }
            match io::Read::read(&mut lock(&self.session).reader(), into) {
                Ok(0) if !into.is_empty() => return Err(LinkError::Closed),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Ok(read?),
            }
            match self.flush_owed(wait) {
                // The other side may wait for this one to read first.
                Ok(()) | Err(LinkError::TimedOut | LinkError::Closed) => {}
                Err(error) => return Err(error),
            }
            self.fill(&mut queue, wait)?;
        }
    }

    /// Waits up to two seconds for the other side to take what is owed to it.
    fn finish(&self) {
        let mut outbox = lock(&self.outbox);
        lock(&self.session).send_close_notify();
        // Refused only when the connection is gone already.
        let _ = self.flush(&mut outbox, Wait::within(LINGER, None));
        self.inner.finish();
    }

    /// What still comes is not decrypted: a session that has said that it ends cannot answer what it does not believe.
    fn part(&self, wait: Wait<'_>) {
        self.finish();
        self.inner.part(wait);
    }

    fn peer(&self) -> &str {
        self.inner.peer()
    }
}

/// Types of records (RFC 8446, 5.1).
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;

/// Whether these, the first bytes that came, begin a record of the TLS handshake, or an alert in one.
pub(crate) fn is_tls(first: &[u8]) -> bool {
    matches!(first, [ALERT | HANDSHAKE, 3, 0..=4, ..])
}

fn failed(error: rustls::Error, tls: &Tls) -> LinkError {
    error::session(error, tls.ca(), tls.certificate()).into()
}
