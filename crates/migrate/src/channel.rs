//! Frames over a link: [`Outlet`] numbers and sends them, [`Inlet`] receives and checks them; both keep the time
//! limits. A [`Channel`] is the two together, for as long as one thread does both.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use limosa_clockwork::{Monitor, now};

use crate::link::{self, Link, LinkError, TlsError, Wait};
use crate::stream::body::{decode_abort, encode_abort};
use crate::stream::{Compression, Packer, Unpacker, unpack};
use crate::stream::{Damage, HEADER_BYTES, Header, Kind, MigrationId, PREFACE_BYTES, Preface, PrefaceFlags};
use crate::{Cancel, Error, Result};

/// How often, at least, each side says that it is alive.
const PROGRESS_EVERY: Duration = Duration::from_millis(250);
/// How long a side that called off waits for the other to have read why.
pub(crate) const LINGER: Duration = Duration::from_secs(2);

/// How often a side says that it is alive, so that the other does not take it for silent.
pub(crate) fn pulse(silence_max: Duration) -> Duration {
    PROGRESS_EVERY.min(silence_max / 4)
}

const COMPRESSING: &str = "making room to compress in";

/// What is wrong with a link, as an error that says where.
fn link_failed(link: &dyn Link, error: LinkError, doing: &'static str, limit: Duration) -> Error {
    let peer = link.peer().into();
    match error {
        LinkError::Cancelled => Error::Cancelled,
        LinkError::TimedOut => Error::TimedOut { peer, doing, limit },
        error => Error::Link { peer, doing, error },
    }
}

/// The sending half of a link. Threads that send come one after the other, in the order in which they ask.
pub(crate) struct Outlet<'a> {
    link: &'a dyn Link,
    silence_max: Duration,
    turns: Monitor<Turns>,
    compression: OnceLock<Compression>,
    /// Of which nobody is compressing with one now. There are never more than threads that send at once.
    packers: Monitor<Vec<Packer>>,
}

/// Whose turn it is. The state is away while somebody sends, and is handed on to who has waited longest.
struct Turns {
    state: Option<OutletState>,
    waiting: VecDeque<Arc<Monitor<Option<OutletState>>>>,
}

struct OutletState {
    sequence: u32,
    sent_bytes: u64,
    /// When something was sent last.
    last: Instant,
    /// The rest of a frame that a cancel came into. It is sent before the ABORT, which could not be read without.
    unfinished: Vec<u8>,
}

/// A turn at sending.
struct Turn<'t, 'a> {
    outlet: &'t Outlet<'a>,
    state: Option<OutletState>,
}

impl Drop for Turn<'_, '_> {
    fn drop(&mut self) {
        let mut turns = self.outlet.turns.lock();
        match turns.waiting.pop_front() {
            None => turns.state = self.state.take(),
            Some(next) => {
                drop(turns);
                *next.lock() = self.state.take();
                next.notify_all();
            }
        }
    }
}

impl<'a> Outlet<'a> {
    pub(crate) fn new(link: &'a dyn Link, silence_max: Duration) -> Outlet<'a> {
        let state = OutletState { sequence: 0, sent_bytes: 0, last: now(), unfinished: Vec::new() };
        let turns = Turns { state: Some(state), waiting: VecDeque::new() };
        Outlet {
            link,
            silence_max,
            turns: Monitor::new(turns),
            compression: OnceLock::new(),
            packers: Monitor::default(),
        }
    }

    /// From now on devices' data and memory are compressed.
    pub(crate) fn compress(&self, compression: Option<Compression>) {
        if let Some(compression) = compression {
            let _ = self.compression.set(compression);
        }
    }

    pub(crate) fn has_peer(&self) -> bool {
        self.link.has_peer()
    }

    pub(crate) fn peer(&self) -> &str {
        self.link.peer()
    }

    /// Sends what is before the first frame.
    pub(crate) fn send_preface(
        &self,
        id: MigrationId,
        flags: PrefaceFlags,
        cancel: Option<&Cancel>,
    ) -> Result<()> {
        let bytes = Preface::new(id, flags).encode();
        let mut turn = self.turn();
        let Some(state) = &mut turn.state else { return Err(Error::Cancelled) };
        let sent = state.write_all(self, &bytes, &[], cancel, "sending the preface");
        // It is not a frame, and has no number.
        state.sequence = 0;
        sent
    }

    /// How many send or wait to.
    pub(crate) fn busy(&self) -> usize {
        let turns = self.turns.lock();
        usize::from(turns.state.is_none()) + turns.waiting.len()
    }

    fn turn(&self) -> Turn<'_, 'a> {
        let mut turns = self.turns.lock();
        if let Some(state) = turns.state.take() {
            return Turn { outlet: self, state: Some(state) };
        }
        let place = Arc::<Monitor<Option<OutletState>>>::default();
        turns.waiting.push_back(Arc::clone(&place));
        drop(turns);
        let mut handed = place.lock();
        while handed.is_none() {
            (handed, _) = place.wait(handed, None);
        }
        Turn { outlet: self, state: handed.take() }
    }

    /// Sends a frame.
    pub(crate) fn send(
        &self,
        kind: Kind,
        section: u32,
        position: u64,
        payload: &[u8],
        cancel: Option<&Cancel>,
    ) -> Result<Header> {
        // Before the turn, which others wait for.
        let header = Header::new(kind, section, position, 0, payload);
        let Some(compression) = self.compression.get().filter(|_| kind.may_be_compressed()) else {
            return self.send_with(header, payload, cancel);
        };
        let spare = self.packers.lock().pop();
        let mut packer = match spare {
            Some(packer) => packer,
            None => Packer::new(*compression).map_err(|error| Error::Os { doing: COMPRESSING, error })?,
        };
        let sent = match packer.pack(payload) {
            // Whoever asked knows nothing of it.
            Some(packed) => self
                .send_with(header.packed(packed), packed, cancel)
                .map(|sent| Header { sequence: sent.sequence, ..header }),
            None => self.send_with(header, payload, cancel),
        };
        self.packers.lock().push(packer);
        sent
    }

    fn send_with(&self, mut header: Header, payload: &[u8], cancel: Option<&Cancel>) -> Result<Header> {
        let mut turn = self.turn();
        let Some(state) = &mut turn.state else { return Err(Error::Cancelled) };
        header.sequence = state.sequence;
        state.write_all(self, &header.encode(), payload, cancel, "sending")?;
        state.sent_bytes += payload.len() as u64;
        Ok(header)
    }

    /// Says that this side is alive, when nothing was said for a while and nobody is saying something now.
    pub(crate) fn pulse(&self, cancel: Option<&Cancel>) -> Result<()> {
        let said = match &self.turns.lock().state {
            Some(state) if state.last + pulse(self.silence_max) <= now() => state.sent_bytes,
            _ => return Ok(()),
        };
        self.send(Kind::PROGRESS, 0, 0, &said.to_le_bytes(), cancel).map(drop)
    }
}

impl OutletState {
    fn write_all(
        &mut self,
        outlet: &Outlet<'_>,
        first: &[u8],
        second: &[u8],
        cancel: Option<&Cancel>,
        doing: &'static str,
    ) -> Result<()> {
        self.write(Wait::within(outlet.silence_max, cancel), outlet, first, second, doing)
    }

    fn write(
        &mut self,
        wait: Wait<'_>,
        outlet: &Outlet<'_>,
        first: &[u8],
        second: &[u8],
        doing: &'static str,
    ) -> Result<()> {
        let mut sent = 0;
        while sent < first.len() + second.len() {
            let rest = sent.saturating_sub(first.len());
            let slices = [IoSlice::new(&first[sent.min(first.len())..]), IoSlice::new(&second[rest..])];
            let slices = if sent < first.len() { &slices[..] } else { &slices[1..] };
            match outlet.link.write(slices, wait) {
                Ok(bytes) => {
                    // A frame counts from its first byte on.
                    self.sequence = self.sequence.wrapping_add(u32::from(sent == 0));
                    sent += bytes;
                }
                Err(error) => {
                    if matches!(error, LinkError::Cancelled) && sent > 0 {
                        self.unfinished = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                    }
                    return Err(link_failed(outlet.link, error, doing, outlet.silence_max));
                }
            }
        }
        self.last = now();
        Ok(())
    }
}

/// The receiving half of a link.
pub(crate) struct Inlet<'a> {
    link: &'a dyn Link,
    silence_max: Duration,
    sequence: u32,
    /// The header that is being read; kept, so that a look can stop in its middle.
    header: [u8; HEADER_BYTES],
    header_bytes: usize,
    /// At least as long as the frame's payload.
    payload: Vec<u8>,
    unpacker: Option<Unpacker>,
    /// What the next payload that is compressed goes into.
    unpacked: Vec<u8>,
}

impl<'a> Inlet<'a> {
    pub(crate) fn new(link: &'a dyn Link, silence_max: Duration) -> Inlet<'a> {
        Inlet {
            link,
            silence_max,
            sequence: 0,
            header: [0; HEADER_BYTES],
            header_bytes: 0,
            payload: Vec::new(),
            unpacker: None,
            unpacked: Vec::new(),
        }
    }

    /// Payloads that are compressed are so in this way.
    pub(crate) fn decompress(&mut self, compression: Option<Compression>) -> Result<()> {
        let unpacker = compression.map(Unpacker::new).transpose();
        self.unpacker = unpacker.map_err(|error| Error::Os { doing: COMPRESSING, error })?;
        Ok(())
    }

    /// Of a further link, whose first frame, a JOIN, has been taken.
    pub(crate) fn after_join(link: &'a dyn Link, silence_max: Duration) -> Inlet<'a> {
        Inlet { sequence: 1, ..Inlet::new(link, silence_max) }
    }

    pub(crate) fn peer(&self) -> &str {
        self.link.peer()
    }

    fn has_peer(&self) -> bool {
        self.link.has_peer()
    }

    /// The next frame, whose payload is then in [`Inlet::payload`]; `None` when none has begun within the wait. ABORT
    /// is [`Error::Aborted`].
    pub(crate) fn next(&mut self, doing: &'static str, wait: Wait<'_>) -> Result<Option<Header>> {
        while self.header_bytes < HEADER_BYTES {
            match self.link.read(&mut self.header[self.header_bytes..], wait) {
                Ok(bytes) => self.header_bytes += bytes,
                Err(LinkError::TimedOut) => return Ok(None),
                Err(error) => return Err(self.failed(error, doing)),
            }
        }
        let header = Header::decode(&self.header).map_err(|damage| self.damaged(damage))?;
        header.check_sequence(self.sequence).map_err(|damage| self.damaged(damage))?;
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = header.length as usize;
        if self.payload.len() < bytes {
            self.payload.resize(bytes, 0);
        }
        let wait = Wait::within(self.silence_max, wait.cancel);
        let mut filled = 0;
        while filled < bytes {
            match self.link.read(&mut self.payload[filled..bytes], wait) {
                Ok(bytes) => filled += bytes,
                Err(error) => return Err(self.failed(error, doing)),
            }
        }
        self.header_bytes = 0;
        let payload = &self.payload[..bytes];
        header.check_payload(payload).map_err(|damage| self.damaged(damage))?;
        if header.kind == Kind::ABORT {
            let (code, reason) = decode_abort(payload);
            return Err(Error::Aborted { peer: self.peer().into(), code, reason });
        }
        if header.compressed {
            let unpacked = unpack(self.unpacker.as_mut(), &header, payload, &mut self.unpacked);
            let header = unpacked.map_err(|damage| self.damaged(damage))?;
            std::mem::swap(&mut self.payload, &mut self.unpacked);
            return Ok(Some(header));
        }
        Ok(Some(header))
    }

    /// The payload of the frame that came last.
    pub(crate) fn payload(&self, header: &Header) -> &[u8] {
        &self.payload[..header.length as usize]
    }

    /// Takes the payload of the frame that came last away, for another buffer.
    pub(crate) fn take_payload(&mut self, header: &Header, instead: Vec<u8>) -> Vec<u8> {
        let mut taken = std::mem::replace(&mut self.payload, instead);
        taken.truncate(header.length as usize);
        taken
    }

    /// What is wrong with what came, as an error that names the sender.
    pub(crate) fn damaged(&self, damage: Damage) -> Error {
        Error::Stream { from: self.peer().into(), damage }
    }

    pub(crate) fn timed_out(&self, doing: &'static str, limit: Duration) -> Error {
        link_failed(self.link, LinkError::TimedOut, doing, limit)
    }

    fn failed(&self, error: LinkError, doing: &'static str) -> Error {
        match error {
            LinkError::Closed if !self.has_peer() => {
                let what = if self.header_bytes > 0 { "a frame" } else { "its frames: the SUM is missing" };
                self.damaged(Damage::Truncated { what })
            }
            error => link_failed(self.link, error, doing, self.silence_max),
        }
    }
}

/// Both directions of a link, in one hand.
pub(crate) struct Channel<'a> {
    link: &'a dyn Link,
    cancel: Option<&'a Cancel>,
    silence_max: Duration,
    /// Shared with the threads of the work.
    pub(crate) outlet: Arc<Outlet<'a>>,
    pub(crate) inlet: Inlet<'a>,
}

impl<'a> Channel<'a> {
    /// Over this link. `silence_max` is how long the other side may say nothing.
    pub(crate) fn new(link: &'a dyn Link, cancel: Option<&'a Cancel>, silence_max: Duration) -> Channel<'a> {
        let (outlet, inlet) = (Outlet::new(link, silence_max), Inlet::new(link, silence_max));
        Channel { link, cancel, silence_max, outlet: Arc::new(outlet), inlet }
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

    pub(crate) fn send_preface(&mut self, id: MigrationId, flags: PrefaceFlags) -> Result<()> {
        self.outlet.send_preface(id, flags, self.cancel)
    }

    pub(crate) fn receive_preface(&mut self) -> Result<Preface> {
        let doing = "waiting for the preface";
        let mut bytes = [0; PREFACE_BYTES];
        let wait = Wait::within(self.silence_max, self.cancel);
        let mut filled = 0;
        while filled < bytes.len() {
            filled += match self.link.read(&mut bytes[filled..], wait) {
                Err(LinkError::Closed) if !self.has_peer() => {
                    return Err(self.damaged(Damage::Truncated { what: "its preface" }));
                }
                read => read.map_err(|error| self.inlet.failed(error, doing))?,
            };
            // Three bytes tell, and an alert is no longer than seven.
            if link::is_tls(&bytes[..filled]) {
                return Err(self.inlet.failed(TlsError::TlsPeer.into(), doing));
            }
        }
        Preface::decode(&bytes).map_err(|damage| self.damaged(damage))
    }

    /// Sends a frame.
    pub(crate) fn send(&mut self, kind: Kind, section: u32, position: u64, payload: &[u8]) -> Result<Header> {
        match self.outlet.send(kind, section, position, payload, self.cancel) {
            Err(error @ Error::Link { .. }) if self.has_peer() => Err(self.last_words().unwrap_or(error)),
            sent => sent,
        }
    }

    /// The next frame that is not PROGRESS; ABORT is [`Error::Aborted`]. The other side may be silent
    /// for [`Channel::new`]'s limit, and with PROGRESS keep this side waiting for `within`.
    pub(crate) fn receive(&mut self, doing: &'static str, within: Duration) -> Result<(Header, &[u8])> {
        let overall = Wait::within(within, self.cancel);
        loop {
            self.check_cancel()?;
            let mut wait = (Wait::within(self.silence_max, self.cancel), self.silence_max);
            if overall.deadline < wait.0.deadline {
                wait = (overall, within);
            }
            let Some(header) = self.inlet.next(doing, wait.0)? else {
                return Err(self.inlet.timed_out(doing, wait.1));
            };
            if header.kind != Kind::PROGRESS {
                return Ok((header, self.inlet.payload(&header)));
            }
            // There may always be more of these at hand, so that nothing is ever waited for.
            if matches!(overall.left(), Err(LinkError::TimedOut)) {
                return Err(self.inlet.timed_out(doing, within));
            }
        }
    }

    /// The frame of this kind, or else an error.
    pub(crate) fn expect(&mut self, kind: Kind, doing: &'static str, within: Duration) -> Result<&[u8]> {
        let (header, _) = self.receive(doing, within)?;
        if header.kind != kind {
            let why = format!("{kind} is due");
            return Err(self.damaged(Damage::Misplaced { kind: header.kind, why }));
        }
        Ok(self.inlet.payload(&header))
    }

    /// Does what takes long, and meanwhile lets another thread tell the other side that this one is alive.
    pub(crate) fn attend<T>(&self, busy: impl FnOnce() -> T) -> T {
        if !self.has_peer() {
            return busy();
        }
        let done = Monitor::new(false);
        limosa_clockwork::scope(|scope| {
            scope.spawn("limosa: alive", || {
                let mut is_done = done.lock();
                while !*is_done {
                    let timed_out;
                    (is_done, timed_out) = done.wait(is_done, Some(now() + pulse(self.silence_max)));
                    if timed_out && !*is_done {
                        drop(is_done);
                        // A link that has failed shows when it is used next.
                        let _ = self.outlet.pulse(self.cancel);
                        is_done = done.lock();
                    }
                }
            });
            let _told = OnDrop(|| {
                *done.lock() = true;
                done.notify_all();
            });
            busy()
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
        let code_and_reason = encode_abort(error.abort_code(), &error.to_string());
        let limit = self.silence_max.min(LINGER);
        let said = {
            let mut turn = self.outlet.turn();
            let Some(state) = &mut turn.state else { return };
            let header = Header::new(Kind::ABORT, 0, 0, state.sequence, &code_and_reason);
            let mut frame = std::mem::take(&mut state.unfinished);
            frame.extend_from_slice(&header.encode());
            let wait = Wait::within(limit, None);
            state.write(wait, &self.outlet, &frame, &code_and_reason, "calling off").is_ok()
        };
        if said {
            self.link.part(Wait::within(limit, None));
        }
    }

    /// What is wrong with what came, as an error that names the sender.
    pub(crate) fn damaged(&self, damage: Damage) -> Error {
        self.inlet.damaged(damage)
    }

    /// What is wrong with this link, or with a further one.
    pub(crate) fn link_failed(&self, error: LinkError, doing: &'static str) -> Error {
        link_failed(self.link, error, doing, self.silence_max)
    }

    /// After a failed send: the ABORT that explains it, when there is one.
    fn last_words(&mut self) -> Option<Error> {
        let wait = Wait::within(LINGER, self.cancel);
        loop {
            match self.inlet.next("sending", wait) {
                Err(error @ Error::Aborted { .. }) => return Some(error),
                Err(_) | Ok(None) => return None,
                Ok(_) if wait.left().is_err() => return None,
                Ok(_) => {}
            }
        }
    }
}

/// Does something at the end, also of a panic.
pub(crate) struct OnDrop<F: FnMut()>(pub(crate) F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
