//! Links over TLS 1.3 (RFC 8446) with both ends authenticated: [`Tls`] holds the certificates, and [`TlsLink`] wraps
//! another link.

mod config;
mod error;

use std::fmt;
use std::io::{self, IoSlice, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustls::{ClientConnection, Connection, ServerConnection};

pub use config::Tls;
pub use error::TlsError;

use super::{Address, Fingerprint, Link, LinkError, SocketLink, Wait};
use crate::cancel::after;
use crate::lock::lock;

/// The size of the buffer for received bytes that are not decrypted yet.
const RECEIVED_BYTES: usize = 128 << 10;
/// The most bytes that are encrypted at once.
const PLAIN_BYTES_MAX: usize = 256 << 10;
/// The longest time that the last records, an alert or close_notify, may take to go out.
const LINGER: Duration = Duration::from_secs(2);

/// A link that carries its bytes over another link under TLS.
///
/// Nothing of the stream is sent before the other end's certificate is accepted. A destination accepts a source's
/// certificate only after the source has finished its handshake. So a source whose certificate is refused learns of it
/// from its first read, as [`LinkError::Tls`], before anything is moved.
///
/// The end of the stream is [`LinkError::Closed`], both after close_notify ([`Link::finish`]) and when the inner link
/// breaks off: the migration stream itself shows whether it is complete. Buffers are bounded, to less than 1 MiB.
///
/// A write renews its deadline whenever bytes move on the inner link.
pub struct TlsLink<L: Link = SocketLink> {
    inner: L,
    tls: Tls,
    /// Not locked during waits for the inner link, so that one thread can read while another writes.
    session: Mutex<Connection>,
    received: Mutex<Received>,
    outbox: Mutex<Outbox>,
}

/// Received bytes that are not decrypted yet.
struct Received {
    bytes: Box<[u8]>,
    /// The part that the session has not taken yet.
    unread: std::ops::Range<usize>,
    /// The first byte of the connection.
    first_byte: Option<u8>,
    /// The session has failed, and reads nothing more.
    broken: bool,
}

/// Encrypted bytes that are not sent yet.
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
    /// The source's end: does the handshake over `inner`, and refuses a destination whose certificate is not issued to
    /// [`Tls::expected_name`].
    pub fn connect(inner: L, tls: &Tls, address: &Address, wait: Wait<'_>) -> Result<TlsLink<L>, LinkError> {
        let name = tls.expected_name(address)?;
        let session = ClientConnection::new(tls.client(), name).map_err(|error| failed(error, tls))?;
        TlsLink::shake_hands(inner, Connection::Client(session), tls, wait)
    }

    /// The destination's end: does the handshake with a source that has connected.
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
        let received =
            Received { bytes: vec![0; RECEIVED_BYTES].into(), unread: 0..0, first_byte: None, broken: false };
        let link = TlsLink {
            inner,
            tls: tls.clone(),
            session: Mutex::new(session),
            received: Mutex::new(received),
            outbox: Mutex::default(),
        };
        loop {
            let shaken = link.flush(&mut lock(&link.outbox), wait).map_err(|error| link.last_word(error));
            if shaken.is_ok() && !lock(&link.session).is_handshaking() {
                return Ok(link);
            }
            match shaken.and_then(|()| link.fill(&mut lock(&link.received), wait)) {
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
        while self.flush_some(outbox, wait)? {}
        Ok(())
    }

    /// Sends everything that is encrypted. The deadline is renewed whenever bytes move.
    fn flush_steadily(&self, outbox: &mut Outbox, wait: Wait<'_>) -> Result<(), LinkError> {
        let limit = wait.deadline.saturating_duration_since(limosa_clockwork::now());
        let renewed = || Wait { deadline: after(limosa_clockwork::now(), limit), ..wait };
        while self.flush_some(outbox, renewed())? {}
        Ok(())
    }

    /// Writes once to the inner link. Returns false when there was nothing to send.
    fn flush_some(&self, outbox: &mut Outbox, wait: Wait<'_>) -> Result<bool, LinkError> {
        if outbox.sent == outbox.bytes.len() {
            outbox.sent = 0;
            outbox.bytes.clear();
            let mut session = lock(&self.session);
            while session.wants_write() {
                session.write_tls(&mut outbox.bytes)?;
            }
            if outbox.bytes.is_empty() {
                return Ok(false);
            }
        }
        outbox.sent += self.inner.write(&[IoSlice::new(&outbox.bytes[outbox.sent..])], wait)?;
        Ok(true)
    }

    /// Receives at least one byte and passes it to the session.
    fn fill(&self, received: &mut Received, wait: Wait<'_>) -> Result<(), LinkError> {
        if received.broken {
            return Err(LinkError::Closed);
        }
        if received.unread.is_empty() {
            let bytes = self.inner.read(&mut received.bytes, wait)?;
            received.unread = 0..bytes;
            received.first_byte = received.first_byte.or(received.bytes[..bytes].first().copied());
        }
        let mut session = lock(&self.session);
        received.unread.start += session.read_tls(&mut &received.bytes[received.unread.clone()])?;
        let processed = session.process_new_packets();
        drop(session);
        processed.map(drop).map_err(|error| {
            received.broken = true;
            // Sends the alert if that is possible at once. The other end may not read; this end's error counts more.
            let _ = self.flush_owed(Wait { deadline: Instant::now(), ..wait });
            let is_tls = received.first_byte.is_some_and(|byte| matches!(byte, ALERT | HANDSHAKE));
            if is_tls { failed(error, &self.tls) } else { TlsError::PlainPeer.into() }
        })
    }

    /// Sends the session's own records. A thread that is writing sends them before its data.
    fn flush_owed(&self, wait: Wait<'_>) -> Result<(), LinkError> {
        match self.outbox.try_lock() {
            Ok(mut outbox) => self.flush(&mut outbox, wait),
            Err(_) => Ok(()),
        }
    }

    /// The reason for a closed link, if the other end sent an alert. A thread that is reading finds the alert itself.
    fn last_word(&self, error: LinkError) -> LinkError {
        if matches!(error, LinkError::Closed)
            && let Ok(mut received) = self.received.try_lock()
        {
            let at_hand = Wait { deadline: Instant::now(), cancel: None };
            loop {
                match self.fill(&mut received, at_hand) {
                    Ok(()) => {}
                    Err(why @ LinkError::Tls(_)) => return why,
                    Err(_) => break,
                }
            }
        }
        error
    }

    /// Sends the alert, and gives the other end time to read it.
    fn refuse(&self, wait: Wait<'_>) {
        let wait = Wait { deadline: wait.deadline.min(after(limosa_clockwork::now(), LINGER)), ..wait };
        let _ = self.flush(&mut lock(&self.outbox), wait);
        self.inner.part(wait);
    }
}

impl<L: Link> Link for TlsLink<L> {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let mut outbox = lock(&self.outbox);
        self.flush_steadily(&mut outbox, wait).map_err(|error| self.last_word(error))?;
        let taken = lock(&self.session).writer().write_vectored(slices)?;
        match self.flush_steadily(&mut outbox, wait) {
            // The bytes are taken, and are sent before any others.
            Ok(()) | Err(LinkError::TimedOut | LinkError::Cancelled) => Ok(taken),
            Err(error) => Err(self.last_word(error)),
        }
    }

    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        let mut received = lock(&self.received);
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
                // The other end may be waiting for this one to read.
                Ok(()) | Err(LinkError::TimedOut | LinkError::Closed) => {}
                Err(error) => return Err(error),
            }
            self.fill(&mut received, wait)?;
        }
    }

    /// Waits up to two seconds until close_notify is sent.
    fn finish(&self) {
        let mut outbox = lock(&self.outbox);
        lock(&self.session).send_close_notify();
        // Refused only when the connection is gone already.
        let _ = self.flush(&mut outbox, Wait::within(LINGER, None));
        self.inner.finish();
    }

    /// Received data is not decrypted any more: after close_notify the session could not send an alert about it.
    fn part(&self, wait: Wait<'_>) {
        self.finish();
        self.inner.part(wait);
    }

    fn peer(&self) -> &str {
        self.inner.peer()
    }

    fn peer_fingerprint(&self) -> Option<Fingerprint> {
        let session = lock(&self.session);
        let certificate = session.peer_certificates()?.first()?;
        // The hash of a cipher suite that every provider for TLS 1.3 has (RFC 8446, section 9.1).
        let suite = rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13()?;
        let hash = suite.common.hash_provider.hash(certificate);
        hash.as_ref().try_into().ok().map(Fingerprint)
    }
}

/// Record types (RFC 8446, section 5.1).
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;

/// Whether the first bytes of a connection begin a TLS handshake record or an alert record.
pub(crate) fn is_tls(first: &[u8]) -> bool {
    matches!(first, [ALERT | HANDSHAKE, 3, 0..=4, ..])
}

fn failed(error: rustls::Error, tls: &Tls) -> LinkError {
    error::session(error, tls.ca(), tls.certificate()).into()
}
