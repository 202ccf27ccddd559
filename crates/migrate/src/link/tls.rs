//! Links over TLS 1.3 (RFC 8446) with both sides authenticated: [`Tls`], what a side shows and whom it
//! believes, and [`TlsLink`], a link within another.

mod config;
mod error;

use std::fmt;
use std::io::{self, IoSlice, Write};
use std::time::{Duration, Instant};

use rustls::{ClientConnection, Connection, ServerConnection};

pub use config::Tls;
pub use error::TlsError;

use super::{Address, Link, LinkError, SocketLink, Wait};

/// Room for what was received and is not decrypted yet.
const INBOX_BYTES: usize = 128 << 10;
/// The most that is encrypted before it has been sent.
const OUTBOX_BYTES_MAX: usize = 256 << 10;
/// How long the last records may take that are owed to the other side: its alert, or the end.
const LINGER: Duration = Duration::from_secs(2);

/// A link whose bytes cross another one under TLS.
///
/// Until the other side's certificate is accepted nothing of the stream is sent to it. A destination's accepting
/// comes after the source's handshake is done: a source whose certificate is refused is told when it reads, as
/// [`LinkError::Tls`], which is before anything is moved.
///
/// The end is [`LinkError::Closed`], whether the other side announced it (close_notify, by [`Link::finish`]) or the
/// link broke off: the stream itself says what is whole. What is buffered is bounded, to about half a MiB.
pub struct TlsLink<L: Link = SocketLink> {
    inner: L,
    session: Connection,
    tls: Tls,
    inbox: Box<[u8]>,
    /// What of the inbox the session has not taken yet.
    unread: std::ops::Range<usize>,
    /// Of all that came.
    first_byte: Option<u8>,
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
        session.set_buffer_limit(Some(OUTBOX_BYTES_MAX));
        let mut link = TlsLink {
            inner,
            session,
            tls: tls.clone(),
            inbox: vec![0; INBOX_BYTES].into(),
            unread: 0..0,
            first_byte: None,
        };
        loop {
            let shaken = link.flush(wait).map_err(|error| link.last_word(error));
            if shaken.is_ok() && !link.session.is_handshaking() {
                return Ok(link);
            }
            match shaken.and_then(|()| link.fill(wait)) {
                Ok(()) => {}
                Err(LinkError::Closed) => return Err(TlsError::Closed.into()),
                Err(error) => {
                    link.part(wait);
                    return Err(error);
                }
            }
        }
    }

    /// Sends all that is encrypted.
    fn flush(&mut self, wait: Wait<'_>) -> Result<(), LinkError> {
        while self.session.wants_write() {
            let mut outlet = Outlet { inner: &mut self.inner, wait, failed: None };
            if let Err(error) = self.session.write_tls(&mut outlet) {
                return Err(outlet.failed.unwrap_or(LinkError::Io(error)));
            }
        }
        Ok(())
    }

    /// Receives at least one byte and hands it to the session.
    fn fill(&mut self, wait: Wait<'_>) -> Result<(), LinkError> {
        if self.unread.is_empty() {
            let bytes = self.inner.read(&mut self.inbox, wait)?;
            self.unread = 0..bytes;
            self.first_byte = self.first_byte.or(self.inbox[..bytes].first().copied());
        }
        let taken = self.session.read_tls(&mut &self.inbox[self.unread.clone()])?;
        self.unread.start += taken;
        match self.session.process_new_packets() {
            Ok(_) => Ok(()),
            Err(error) => {
                // The other side is to learn why. It may not be reading; what is known here is worth more.
                let _ = self.flush(Wait { deadline: Instant::now(), ..wait });
                let is_tls = self.first_byte.is_some_and(|byte| matches!(byte, ALERT | HANDSHAKE));
                Err(if is_tls { failed(error, &self.tls) } else { TlsError::PlainPeer.into() })
            }
        }
    }

    /// Why the link was closed, where the other side has said so.
    fn last_word(&mut self, error: LinkError) -> LinkError {
        if matches!(error, LinkError::Closed) {
            let at_hand = Wait { deadline: Instant::now(), cancel: None };
            loop {
                match self.fill(at_hand) {
                    Ok(()) => {}
                    Err(why @ LinkError::Tls(_)) => return why,
                    Err(_) => break,
                }
            }
        }
        error
    }

    /// The alert goes out; then the other side gets the time to read it: a socket that is closed with bytes unread
    /// may take back what was sent on it last.
    fn part(&mut self, wait: Wait<'_>) {
        let wait = Wait { deadline: wait.deadline.min(Instant::now() + LINGER), ..wait };
        let _ = self.flush(wait);
        self.inner.finish();
        while wait.left().is_ok() && self.inner.read(&mut self.inbox, wait).is_ok() {}
    }
}

impl<L: Link> Link for TlsLink<L> {
    fn write(&mut self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        self.flush(wait).map_err(|error| self.last_word(error))?;
        let taken = self.session.writer().write_vectored(slices)?;
        match self.flush(wait) {
            // It is taken, and goes out before anything else does.
            Ok(()) | Err(LinkError::TimedOut | LinkError::Cancelled) => Ok(taken),
            Err(error) => Err(self.last_word(error)),
        }
    }

    fn read(&mut self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        loop {
            if wait.cancel.is_some_and(crate::Cancel::is_cancelled) {
                return Err(LinkError::Cancelled);
            }
            match io::Read::read(&mut self.session.reader(), into) {
                Ok(0) if !into.is_empty() => return Err(LinkError::Closed),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return Ok(read?),
            }
            match self.flush(wait) {
                // The other side may wait for this one to read first.
                Ok(()) | Err(LinkError::TimedOut | LinkError::Closed) => {}
                Err(error) => return Err(error),
            }
            self.fill(wait)?;
        }
    }

    /// Waits up to two seconds for the other side to take what is owed to it.
    fn finish(&mut self) {
        self.session.send_close_notify();
        // Refused only when the connection is gone already.
        let _ = self.flush(Wait::within(LINGER, None));
        self.inner.finish();
    }

    fn peer(&self) -> &str {
        self.inner.peer()
    }
}

/// Where a session sends its records.
struct Outlet<'a, L> {
    inner: &'a mut L,
    wait: Wait<'a>,
    failed: Option<LinkError>,
}

impl<L: Link> Write for Outlet<'_, L> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.inner.write(slices, self.wait).map_err(|error| {
            self.failed = Some(error);
            io::ErrorKind::Other.into()
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
