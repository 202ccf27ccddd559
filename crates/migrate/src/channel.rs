//! Frames over a link: numbers them, checks them, keeps the time limits, passes ABORT on as an error
//! and PROGRESS as a sign of life.

use std::io::IoSlice;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::link::{self, Link, LinkError, TlsError, Wait};
use crate::stream::body::{decode_abort, encode_abort};
use crate::stream::{Damage, HEADER_BYTES, Header, Kind, MigrationId, PREFACE_BYTES, Preface, PrefaceFlags};
use crate::{Cancel, Error, Result};

/// How often the side that is busy says that it is alive.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);
/// How long a side that called off waits for the other to have read why.
const LINGER: Duration = Duration::from_secs(2);
/// The most frames that are taken from the other side before sending goes on.
const LOOK_FRAMES_MAX: usize = 64;
/// How many bytes are sent between two looks for word from the other side.
const LOOK_EVERY_BYTES: usize = 1 << 20;

/// One direction each of frames out and in over a link.
pub(crate) struct Channel<'a> {
    link: &'a dyn Link,
    cancel: Option<&'a Cancel>,
    silence_max: Duration,
    sequence_out: u32,
    sequence_in: u32,
    /// The header that is being read; kept, so that a look can stop in its middle.
    header: [u8; HEADER_BYTES],
    header_bytes: usize,
    payload: Vec<u8>,
    unseen_bytes: usize,
    sent_bytes: u64,
    written_bytes: u64,
    /// The rest of a frame that a cancel came into. It is sent before the ABORT, which could not be read without.
    unfinished: Vec<u8>,
}

impl<'a> Channel<'a> {
    /// Over this link. `silence_max` is how long the other side may say nothing.
    pub(crate) fn new(link: &'a dyn Link, cancel: Option<&'a Cancel>, silence_max: Duration) -> Channel<'a> {
        Channel {
            link,
            cancel,
            silence_max,
            sequence_out: 0,
            sequence_in: 0,
            header: [0; HEADER_BYTES],
            header_bytes: 0,
            payload: Vec::new(),
            unseen_bytes: 0,
            sent_bytes: 0,
            written_bytes: 0,
            unfinished: Vec::new(),
        }
    }

    pub(crate) fn peer(&self) -> String {
        self.link.peer().into()
    }

    pub(crate) fn has_peer(&self) -> bool {
        self.link.has_peer()
    }

    /// From now on a cancel has no effect: the move is being undone, or past its commit.
    pub(crate) fn ignore_cancel(&mut self) {
        self.cancel = None;
    }

    /// [`Error::Cancelled`] when somebody called the move off.
    pub(crate) fn check_cancel(&self) -> Result<()> {
        if self.cancel.is_some_and(Cancel::is_cancelled) { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Waits while a device has nothing to say; word from the other side or a cancel ends it early.
    pub(crate) fn pause(&mut self, time: Duration) -> Result<()> {
        if self.has_peer() {
            return self.look(Instant::now() + time);
        }
        match self.cancel {
            Some(cancel) if cancel.wait(time) => Err(Error::Cancelled),
            Some(_) => Ok(()),
            None => {
                std::thread::park_timeout(time);
                Ok(())
            }
        }
    }

    pub(crate) fn send_preface(&mut self, id: MigrationId, flags: PrefaceFlags) -> Result<()> {
        let bytes = Preface::new(id, flags).encode();
        self.write_all(&bytes, &[], "sending the preface")
    }

    pub(crate) fn receive_preface(&mut self) -> Result<Preface> {
        let mut bytes = [0; PREFACE_BYTES];
        let wait = Wait::within(self.silence_max, self.cancel);
        let mut filled = 0;
        while filled < bytes.len() {
            filled += match self.link.read(&mut bytes[filled..], wait) {
                Err(LinkError::Closed) if !self.has_peer() => {
                    return Err(self.damaged(Damage::Truncated { what: "its preface" }));
                }
                read => {
                    read.map_err(|error| self.failed(error, "waiting for the preface", self.silence_max))?
                }
            };
            // Three bytes tell, and an alert is no longer than seven.
            if link::is_tls(&bytes[..filled]) {
                return Err(self.failed(
                    TlsError::TlsPeer.into(),
                    "waiting for the preface",
                    self.silence_max,
                ));
            }
        }
        Preface::decode(&bytes).map_err(|damage| self.damaged(damage))
    }

    /// Sends a frame. Now and then it looks for word from the other side, so that an ABORT ends a
    /// long transfer soon.
    pub(crate) fn send(&mut self, kind: Kind, section: u32, position: u64, payload: &[u8]) -> Result<Header> {
        let header = Header::new(kind, section, position, self.sequence_out, payload);
        self.unseen_bytes += payload.len();
        if self.unseen_bytes >= LOOK_EVERY_BYTES && self.has_peer() {
            self.unseen_bytes = 0;
            self.look(Instant::now())?;
        }
        self.sent_bytes += payload.len() as u64;
        let before = self.written_bytes;
        let sent = self.write_all(&header.encode(), payload, "sending");
        if self.written_bytes != before {
            self.sequence_out = self.sequence_out.wrapping_add(1);
        }
        match sent {
            Err(error @ Error::Link { .. }) if self.has_peer() => Err(self.last_words().unwrap_or(error)),
            sent => sent.map(|()| header),
        }
    }

    /// The next frame that is not PROGRESS; ABORT is [`Error::Aborted`]. The other side may be silent
    /// for [`Channel::new`]'s limit, and with PROGRESS keep this side waiting for `within`.
    pub(crate) fn receive(
        &mut self,
        doing: &'static str,
        within: Option<Duration>,
    ) -> Result<(Header, &[u8])> {
        let overall = within.map(|limit| (Wait::within(limit, self.cancel), limit));
        loop {
            self.check_cancel()?;
            let mut wait = (Wait::within(self.silence_max, self.cancel), self.silence_max);
            if let Some(overall) = overall
                && overall.0.deadline < wait.0.deadline
            {
                wait = overall;
            }
            self.fill_header(wait.0).map_err(|error| self.receive_failed(error, doing, wait.1))?;
            let header = self.take_frame(doing)?;
            if header.kind != Kind::PROGRESS {
                return Ok((header, &self.payload));
            }
            // There may always be more of these at hand, so that nothing is ever waited for.
            if let Some((wait, limit)) = overall {
                wait.left().map_err(|error| self.failed(error, doing, limit))?;
            }
        }
    }

    /// The frame of this kind, or else an error.
    pub(crate) fn expect(&mut self, kind: Kind, doing: &'static str, within: Duration) -> Result<&[u8]> {
        let (header, _) = self.receive(doing, Some(within))?;
        if header.kind != kind {
            let why = format!("{kind} is due");
            return Err(self.damaged(Damage::Misplaced { kind: header.kind, why }));
        }
        Ok(&self.payload)
    }

    /// Runs what takes long in another thread, and meanwhile tells the other side that this one is
    /// alive.
    pub(crate) fn attend<T: Send>(&mut self, busy: impl FnOnce() -> T + Send) -> T {
        if !self.has_peer() {
            return busy();
        }
        std::thread::scope(|scope| {
            let (done, is_done) = channel::<()>();
            let thread = scope.spawn(move || {
                let result = busy();
                drop(done);
                result
            });
            while is_done.recv_timeout(PROGRESS_EVERY) == Err(RecvTimeoutError::Timeout) {
                // A link that has failed shows when it is used next.
                let _ = self.send(Kind::PROGRESS, 0, 0, &self.sent_bytes.to_le_bytes());
            }
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Tells the other side that the move is off and why, and gives it the time to read that.
    pub(crate) fn abort(&mut self, error: &Error) {
        self.ignore_cancel();
        if !self.has_peer() || error.peer_needs_no_word() {
            // Whoever waits for this side to have read its last words need not wait longer.
            self.link.finish();
            return;
        }
        let header_and_reason = encode_abort(error.abort_code(), &error.to_string());
        let header = Header::new(Kind::ABORT, 0, 0, self.sequence_out, &header_and_reason);
        self.sequence_out = self.sequence_out.wrapping_add(1);
        self.silence_max = self.silence_max.min(LINGER);
        let mut frame = std::mem::take(&mut self.unfinished);
        frame.extend_from_slice(&header.encode());
        if self.write_all(&frame, &header_and_reason, "calling off").is_ok() {
            self.linger();
        }
    }

    /// Reads and drops what still comes until the other side closes: a socket that is closed with
    /// bytes unread may take back what was sent on it last.
    fn linger(&mut self) {
        self.link.finish();
        let wait = Wait::within(self.silence_max.min(LINGER), None);
        let mut dropped = [0; 64 << 10];
        while wait.left().is_ok() && self.link.read(&mut dropped, wait).is_ok() {}
    }

    /// What is wrong with what came, as an error that names the sender.
    pub(crate) fn damaged(&self, damage: Damage) -> Error {
        Error::Stream { from: self.peer(), damage }
    }

    /// Takes what the other side has sent until then. Nobody is to send anything but ABORT and
    /// PROGRESS while this side sends.
    fn look(&mut self, deadline: Instant) -> Result<()> {
        // Whoever never stops saying that he lives holds up nobody.
        for _ in 0..LOOK_FRAMES_MAX {
            match self.fill_header(Wait { deadline, cancel: self.cancel }) {
                Err(LinkError::TimedOut) => return Ok(()),
                Err(error) => return Err(self.receive_failed(error, "sending", Duration::ZERO)),
                Ok(()) => {}
            }
            let header = self.take_frame("sending")?;
            if header.kind != Kind::PROGRESS {
                let why = "nothing was asked".into();
                return Err(self.damaged(Damage::Misplaced { kind: header.kind, why }));
            }
        }
        Ok(())
    }

    /// After a failed send: the ABORT that explains it, when there is one.
    fn last_words(&mut self) -> Option<Error> {
        let wait = Wait::within(LINGER, self.cancel);
        loop {
            self.fill_header(wait).ok()?;
            match self.take_frame("sending") {
                Err(error @ Error::Aborted { .. }) => return Some(error),
                Err(_) => return None,
                Ok(_) if wait.left().is_err() => return None,
                Ok(_) => {}
            }
        }
    }

    fn fill_header(&mut self, wait: Wait<'_>) -> Result<(), LinkError> {
        while self.header_bytes < HEADER_BYTES {
            self.header_bytes += self.link.read(&mut self.header[self.header_bytes..], wait)?;
        }
        Ok(())
    }

    /// The header is there: checks it, reads the payload, checks that.
    fn take_frame(&mut self, doing: &'static str) -> Result<Header> {
        let header = Header::decode(&self.header).map_err(|damage| self.damaged(damage))?;
        header.check_sequence(self.sequence_in).map_err(|damage| self.damaged(damage))?;
        self.sequence_in = self.sequence_in.wrapping_add(1);
        self.payload.resize(header.length as usize, 0);
        let wait = Wait::within(self.silence_max, self.cancel);
        let mut filled = 0;
        while filled < self.payload.len() {
            match self.link.read(&mut self.payload[filled..], wait) {
                Ok(bytes) => filled += bytes,
                Err(error) => return Err(self.receive_failed(error, doing, self.silence_max)),
            }
        }
        self.header_bytes = 0;
        header.check_payload(&self.payload).map_err(|damage| self.damaged(damage))?;
        if header.kind == Kind::ABORT {
            let (code, reason) = decode_abort(&self.payload);
            return Err(Error::Aborted { peer: self.peer(), code, reason });
        }
        Ok(header)
    }

    fn write_all(&mut self, first: &[u8], second: &[u8], doing: &'static str) -> Result<()> {
        let wait = Wait::within(self.silence_max, self.cancel);
        let mut sent = 0;
        while sent < first.len() + second.len() {
            let rest = sent.saturating_sub(first.len());
            let slices = [IoSlice::new(&first[sent.min(first.len())..]), IoSlice::new(&second[rest..])];
            let slices = if sent < first.len() { &slices[..] } else { &slices[1..] };
            match self.link.write(slices, wait) {
                Ok(bytes) => {
                    sent += bytes;
                    self.written_bytes += bytes as u64;
                }
                Err(error) => {
                    if matches!(error, LinkError::Cancelled) && sent > 0 {
                        self.unfinished = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                    }
                    return Err(self.failed(error, doing, self.silence_max));
                }
            }
        }
        Ok(())
    }

    fn failed(&self, error: LinkError, doing: &'static str, limit: Duration) -> Error {
        match error {
            LinkError::Cancelled => Error::Cancelled,
            LinkError::TimedOut => Error::TimedOut { peer: self.peer(), doing, limit },
            error => Error::Link { peer: self.peer(), doing, error },
        }
    }

    fn receive_failed(&self, error: LinkError, doing: &'static str, limit: Duration) -> Error {
        match error {
            LinkError::Closed if !self.has_peer() => {
                let what = if self.header_bytes > 0 { "a frame" } else { "its frames: the SUM is missing" };
                self.damaged(Damage::Truncated { what })
            }
            error => self.failed(error, doing, limit),
        }
    }
}
