//! The sending half of a link: frames, one after the other, from whichever threads send.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use limosa_clockwork::{Monitor, now};

use super::{COMPRESSING, link_failed, pulse};
use crate::buffer::Gauge;
use crate::link::{Link, LinkError, Wait};
use crate::stream::body::encode_abort;
use crate::stream::{Compression, Header, Kind, MigrationId, Packer, Preface, PrefaceFlags};
use crate::{Cancel, Error, Result};

/// The sending half of a link. Threads that send come one after the other, in the order in which they ask.
pub(crate) struct Outlet<'a> {
    link: &'a dyn Link,
    silence_max: Duration,
    turns: Monitor<Turns>,
    compression: OnceLock<(Compression, Arc<Gauge>)>,
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

    /// From now on devices' data and memory are compressed; what that holds is counted.
    pub(crate) fn compress(&self, compression: Option<Compression>, buffers: &Arc<Gauge>) {
        if let Some(compression) = compression {
            let _ = self.compression.set((compression, Arc::clone(buffers)));
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

    /// Sends what is left of a frame that a cancel came into, and why the move is off; whether that went out.
    pub(super) fn abort(&self, error: &Error, limit: Duration) -> bool {
        let mut turn = self.turn();
        let Some(state) = &mut turn.state else { return false };
        let code_and_reason = encode_abort(error.abort_code(), &error.to_string());
        let header = Header::new(Kind::ABORT, 0, 0, state.sequence, &code_and_reason);
        let mut frame = std::mem::take(&mut state.unfinished);
        frame.extend_from_slice(&header.encode());
        state.write(Wait::within(limit, None), self, &frame, &code_and_reason, "calling off").is_ok()
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
        let Some((compression, buffers)) = self.compression.get().filter(|_| kind.may_be_compressed()) else {
            return self.send_with(header, payload, cancel);
        };
        let spare = self.packers.lock().pop();
        let mut packer = match spare {
            Some(packer) => packer,
            None => Packer::counted(*compression, buffers)
                .map_err(|error| Error::Os { doing: COMPRESSING, error })?,
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
