//! [`Connection`]: the first link of a move, with frames in both directions and the exchanges that begin and end a move.

use std::time::Duration;

use limosa_clockwork::{Guard, Monitor, catch, now};
use limosa_stream::body::encode_abort;
use limosa_stream::{AbortCode, Damage, Header, Kind, MigrationId, Preface, PrefaceFlags, Proofs};

use super::frame_reader::within;
use super::{Frame, FrameReader, FrameWriter, link_failed};
use crate::link::{Link, LinkError, Wait};
use crate::protocol::limits::Limits;
use crate::{Cancel, Error, Result};

/// Both directions of a move's first link, shared by the threads of one side.
pub(crate) struct Connection<'a> {
    link: &'a dyn Link,
    limits: Limits,
    pub(crate) writer: FrameWriter<'a>,
    reader: Monitor<FrameReader>,
    last_words: Monitor<LastWords>,
}

/// The words that end a move.
struct LastWords {
    /// How much of `last_words_max` is left for this side's reason and the peer's own together.
    left: Duration,
    /// Whether this side has sent REFUSED, which has the reason.
    refused: bool,
}

/// A received frame, with its payload.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
}

impl<'a> Connection<'a> {
    pub(crate) fn new(link: &'a dyn Link, limits: Limits) -> Connection<'a> {
        let writer = FrameWriter::new(link, limits.silence_max);
        let reader = Monitor::new(FrameReader::new(link, limits.silence_max));
        let last_words = Monitor::new(LastWords { left: limits.last_words_max, refused: false });
        Connection { link, limits, writer, reader, last_words }
    }

    pub(crate) fn has_peer(&self) -> bool {
        self.link.has_peer()
    }

    /// The link, to read from.
    pub(crate) fn link(&self) -> &'a dyn Link {
        self.link
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The receiving half, locked for one thread.
    pub(crate) fn reader(&self) -> Guard<'_, FrameReader> {
        self.reader.lock()
    }

    pub(crate) fn send_preface(
        &self,
        id: MigrationId,
        flags: PrefaceFlags,
        cancel: Option<&Cancel>,
    ) -> Result<()> {
        self.writer.preface(id, flags, cancel)
    }

    pub(crate) fn receive_preface(&self, cancel: Option<&Cancel>) -> Result<Preface> {
        self.reader().preface(self.link, cancel)
    }

    pub(crate) fn send(&self, frame: &Frame<'_>, cancel: Option<&Cancel>) -> Result<()> {
        self.writer.send(frame, cancel)
    }

    /// The next frame that is not PROGRESS. The peer may be silent for `silence_max`, and send PROGRESS only for `limit`.
    pub(crate) fn receive(
        &self,
        doing: &'static str,
        limit: Duration,
        cancel: Option<&Cancel>,
    ) -> Result<Received> {
        let within = within(limit);
        let mut reader = self.reader();
        loop {
            crate::error::check_cancel(cancel)?;
            let header = reader.next(self.link, doing, within, cancel)?;
            if header.kind != Kind::PROGRESS {
                let payload = reader.payload(&header).to_vec();
                return Ok(Received { header, payload });
            }
            // Frames may arrive so fast that no read waits: the limit is checked here as well.
            if within.is_some_and(|(until, _)| until <= now()) {
                return Err(self.failed(LinkError::TimedOut, doing, limit));
            }
        }
    }

    /// The payload of the next frame, which must be of this kind.
    pub(crate) fn expect(
        &self,
        kind: Kind,
        doing: &'static str,
        limit: Duration,
        cancel: Option<&Cancel>,
    ) -> Result<Vec<u8>> {
        let received = self.receive(doing, limit, cancel)?;
        if received.header.kind != kind {
            let why = format!("{kind} is due");
            return Err(self.damaged(Damage::Misplaced { kind: received.header.kind, why }));
        }
        Ok(received.payload)
    }

    /// Sends ABORT with the reason, unless the peer knows it.
    pub(crate) fn abort(&self, error: &Error) {
        let mut words = self.last_words.lock();
        if self.has_peer() && !error.peer_needs_no_word() && !words.refused {
            let payload = encode_abort(error.abort_code(), &error.to_string());
            self.say(&mut words, &Frame::new(Kind::ABORT, &payload), error);
        }
    }

    /// Sends REFUSED with the reason and its proof: this side will never run the move. Without proofs [`Connection::abort`]
    /// tells the reason.
    pub(crate) fn refuse(&self, error: &Error, proofs: &Proofs) {
        let mut words = self.last_words.lock();
        if !proofs.are_none() && !words.refused {
            let reason = encode_abort(error.abort_code(), &error.to_string());
            let payload = proofs.prove(Kind::REFUSED, &reason);
            self.say(&mut words, &Frame::new(Kind::REFUSED, &payload), error);
            words.refused = true;
        }
    }

    fn say(&self, words: &mut LastWords, frame: &Frame<'_>, error: &Error) {
        let began = now();
        let _ = catch(|| self.writer.last_word(frame, error, words.left));
        words.left = words.left.saturating_sub(now() - began);
    }

    /// Ends the link after [`Connection::abort`], and returns the better reason. After an ABORT the peer gets the time to
    /// read it, since a socket that is closed with bytes unread may take back what was sent on it last. Where a link has
    /// failed, the peer's own ABORT may still come, and tells why.
    pub(crate) fn part(&self, why: Error) -> Error {
        let gives_reason = matches!(why, Error::Link { .. });
        // A link that panics now ends here all the same.
        let _ = catch(|| match &why {
            Error::Link { .. } | Error::Aborted { .. } => self.link.finish(),
            _ if self.has_peer() => self.link.part(Wait::within(self.last_words.lock().left, None)),
            _ => self.link.finish(),
        });
        if !gives_reason {
            return why;
        }
        match self.last_words() {
            Some(told) if !is_echo(&told, &why) => told,
            _ => self.writer.explain(why),
        }
    }

    /// The reason that the peer gives for ending the move, if one comes.
    fn last_words(&self) -> Option<Error> {
        if !self.has_peer() {
            return None;
        }
        let within = within(self.last_words.lock().left);
        let mut reader = self.reader();
        loop {
            match catch(|| reader.next(self.link, "listening for a reason", within, None)).ok()? {
                Err(error @ Error::Aborted { .. }) => return Some(error),
                Err(_) => return None,
                Ok(_) if within.is_some_and(|(until, _)| until <= now()) => return None,
                Ok(_) => {}
            }
        }
    }

    /// Damage, as an error that names the sender.
    pub(crate) fn damaged(&self, damage: Damage) -> Error {
        Error::Stream { from: self.link.peer().into(), damage }
    }

    /// A link's error, as an error that names the peer.
    pub(crate) fn failed(&self, error: LinkError, doing: &'static str, limit: Duration) -> Error {
        link_failed(self.link.peer(), error, doing, limit)
    }
}

/// Whether the peer's reason is only that the link has failed for it too, which it does once this side gives the link up.
fn is_echo(told: &Error, why: &Error) -> bool {
    matches!(told, Error::Aborted { code: AbortCode::Link, .. })
        && !matches!(why, Error::Link { error: LinkError::Closed, .. })
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;

    use limosa_clockwork::simulation::Simulation;

    use super::*;

    /// A link to a peer that neither reads nor writes.
    struct Dark;

    impl Dark {
        fn wait(wait: Wait<'_>) -> Result<usize, LinkError> {
            let nothing = Monitor::new(());
            let mut guard = nothing.lock();
            while now() < wait.deadline {
                (guard, _) = nothing.wait(guard, Some(wait.deadline));
            }
            Err(LinkError::TimedOut)
        }
    }

    impl Link for Dark {
        fn write(&self, _: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
            Dark::wait(wait)
        }
        fn read(&self, _: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
            Dark::wait(wait)
        }
        fn finish(&self) {}
        fn peer(&self) -> &str {
            "the peer"
        }
    }

    #[test]
    fn a_peer_that_read_no_abort_was_listened_to_for_as_long_again() {
        let silence_max = Duration::from_secs(4);
        let limits = Limits::new(&crate::Options::default().with_silence_max(silence_max));
        let last_words_max = limits.last_words_max;
        let run = Simulation::new(1).run(|| {
            let connection = Connection::new(&Dark, limits);
            let why = connection.failed(LinkError::TimedOut, "listening to it", silence_max);
            connection.abort(&why);
            connection.part(why).to_string()
        });
        let run = run.unwrap();
        assert!(run.value.contains("nothing came within 4s"), "{}", run.value);
        // Each step of a simulation takes some time as well.
        assert!(run.time < last_words_max + Duration::from_millis(1), "{:?}", run.time);
    }

    /// A link that fails to write once, and is whole otherwise.
    struct Failing {
        inner: crate::link::SocketLink,
        fails: std::sync::atomic::AtomicBool,
    }

    impl Link for Failing {
        fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
            match self.fails.swap(false, std::sync::atomic::Ordering::SeqCst) {
                true => Err(LinkError::Io(std::io::Error::other("no buffers"))),
                false => self.inner.write(slices, wait),
            }
        }
        fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
            self.inner.read(into, wait)
        }
        fn finish(&self) {
            self.inner.finish();
        }
        fn peer(&self) -> &str {
            self.inner.peer()
        }
    }

    #[test]
    fn the_peer_s_echo_of_a_failed_write_hid_why_the_write_failed() {
        let limits = Limits::new(&crate::Options::default());
        for (panics, expected) in [(false, "no buffers"), (true, "it panicked: oh")] {
            let (near, far) = crate::link::SocketLink::pair().unwrap();
            let near = Failing { inner: near, fails: true.into() };
            let why = std::thread::scope(|scope| {
                scope.spawn(|| {
                    let peer = Connection::new(&far, limits);
                    let heard = peer.receive("waiting for data", limits.silence_max, None).unwrap_err();
                    let why = match panics {
                        true => Error::Panicked { place: "it".into(), message: "oh".into() },
                        false => heard,
                    };
                    peer.abort(&why);
                    peer.part(why)
                });
                let connection = Connection::new(&near, limits);
                let why = connection.send(&Frame::new(Kind::STOPPED, &[]), None).unwrap_err();
                connection.part(why).to_string()
            });
            assert!(why.contains(expected), "{why}");
        }
    }

    #[test]
    fn a_side_that_stood_still_heard_of_a_closed_link_and_not_why() {
        let limits = Limits::new(&crate::Options::default().with_silence_max(Duration::from_secs(1)));
        for (late, reason) in [
            (Duration::from_millis(900), "closed by the other end"),
            (Duration::from_secs(7), "this process stood still for 7s"),
        ] {
            let (near, far) = crate::link::SocketLink::pair().unwrap();
            let connection = Connection::new(&near, limits);
            assert_eq!(connection.writer.was_late(late), late > limits.silence_max);
            // A link that is dropped is closed by another thread, later.
            far.cut();
            let why = connection.failed(LinkError::Closed, "listening to it", limits.silence_max);
            connection.abort(&why);
            let why = connection.part(why).to_string();
            assert!(why.contains(reason), "{why}");
        }
    }
}
