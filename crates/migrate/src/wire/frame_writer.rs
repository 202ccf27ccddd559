//! The sending half of a link: frames, one after the other, from whichever threads send. Who comes while another sends
//! leaves a small frame with him, and waits for his turn with a large one.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use limosa_clockwork::{Monitor, now};

use super::{COMPRESSING, link_failed, pulse};
use crate::link::{Link, LinkError, Wait};
use crate::{Cancel, Error, Result};
use limosa_stream::body::encode_abort;
use limosa_stream::buffer::Gauge;
use limosa_stream::{Compression, HEADER_BYTES, Header, Kind, MigrationId, Packer, Preface, PrefaceFlags};

/// The largest payload that is left with another.
const SMALL_BYTES_MAX: usize = 1 << 10;
/// The most bytes of frames that are left with another and not sent yet.
const LEFT_BYTES_MAX: usize = 64 << 10;

/// The sending half of a link. Threads that send come one after the other, in the order in which they ask.
pub(crate) struct FrameWriter<'a> {
    link: &'a dyn Link,
    silence_max: Duration,
    turns: Monitor<Turns>,
    compression: OnceLock<(Compression, Arc<Gauge>)>,
    /// Of which nobody is compressing with one now. There are never more than threads that send at once.
    packers: Monitor<Vec<Packer>>,
}

/// Whose turn it is. The state is away while somebody sends, and is handed on to who has waited longest.
struct Turns {
    state: Option<WriterState>,
    waiting: VecDeque<Waiting>,
    /// Of the frames that are left with others.
    left_bytes: usize,
    /// Why a frame that was left with another could not be sent.
    failed: Option<Error>,
}

/// What is next on a link.
enum Waiting {
    /// A thread, for its turn.
    Thread(Arc<Monitor<Option<WriterState>>>),
    /// A small frame, header and payload.
    Frame(Header, Box<[u8]>),
}

struct WriterState {
    sequence: u32,
    sent_bytes: u64,
    /// When something was sent last.
    last: Instant,
    /// The rest of a frame that a cancel came into. It is sent before the ABORT, which could not be read without.
    unfinished: Vec<u8>,
}

/// A turn at sending. What was left meanwhile is sent at its end.
struct Turn<'t, 'a> {
    writer: &'t FrameWriter<'a>,
    state: Option<WriterState>,
    /// Ends what is sent for others as well.
    cancel: Option<&'t Cancel>,
}

impl Drop for Turn<'_, '_> {
    fn drop(&mut self) {
        let mut failed = None;
        loop {
            let mut turns = self.writer.turns.lock();
            if let Some(error) = failed.take() {
                turns.failed.get_or_insert(error);
            }
            match turns.waiting.pop_front() {
                None => {
                    turns.state = self.state.take();
                    return;
                }
                Some(Waiting::Thread(next)) => {
                    drop(turns);
                    *next.lock() = self.state.take();
                    return next.notify_all();
                }
                Some(Waiting::Frame(header, payload)) => {
                    turns.left_bytes -= HEADER_BYTES + payload.len();
                    let failed_before = turns.failed.is_some();
                    drop(turns);
                    if let (Some(state), false) = (&mut self.state, failed_before) {
                        failed = state.write_frame(self.writer, header, &payload, self.cancel).err();
                    }
                }
            }
        }
    }
}

impl<'a> FrameWriter<'a> {
    pub(crate) fn new(link: &'a dyn Link, silence_max: Duration) -> FrameWriter<'a> {
        let state = WriterState { sequence: 0, sent_bytes: 0, last: now(), unfinished: Vec::new() };
        let turns = Turns { state: Some(state), waiting: VecDeque::new(), left_bytes: 0, failed: None };
        FrameWriter {
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
        let mut turn = self.turn(cancel);
        let Some(state) = &mut turn.state else { return Err(Error::Cancelled) };
        let sent = state.write_all(self, &bytes, &[], cancel, "sending the preface");
        // It is not a frame, and has no number.
        state.sequence = 0;
        sent
    }

    /// Sends what is left of a frame that a cancel came into, and why the move is off; whether that went out.
    pub(super) fn abort(&self, error: &Error, limit: Duration) -> bool {
        let mut turn = self.turn(None);
        let Some(state) = &mut turn.state else { return false };
        let code_and_reason = encode_abort(error.abort_code(), &error.to_string());
        let header = Header::new(Kind::ABORT, 0, 0, state.sequence, &code_and_reason);
        let mut frame = std::mem::take(&mut state.unfinished);
        frame.extend_from_slice(&header.encode());
        state.write(Wait::within(limit, None), None, self, &frame, &code_and_reason, "calling off").is_ok()
    }

    /// How many send or wait to.
    pub(crate) fn busy(&self) -> usize {
        let turns = self.turns.lock();
        usize::from(turns.state.is_none()) + turns.waiting.len()
    }

    fn turn<'t>(&'t self, cancel: Option<&'t Cancel>) -> Turn<'t, 'a> {
        let mut turns = self.turns.lock();
        if let Some(state) = turns.state.take() {
            return Turn { writer: self, state: Some(state), cancel };
        }
        let place = Arc::<Monitor<Option<WriterState>>>::default();
        turns.waiting.push_back(Waiting::Thread(Arc::clone(&place)));
        drop(turns);
        let mut handed = place.lock();
        while handed.is_none() {
            (handed, _) = place.wait(handed, None);
        }
        Turn { writer: self, state: handed.take(), cancel }
    }

    /// Leaves a small frame with whoever sends now; whether somebody does.
    fn leave(&self, header: Header, payload: &[u8]) -> bool {
        let mut turns = self.turns.lock();
        let bytes = HEADER_BYTES + payload.len();
        if turns.state.is_some() || turns.left_bytes + bytes > LEFT_BYTES_MAX {
            return false;
        }
        turns.left_bytes += bytes;
        turns.waiting.push_back(Waiting::Frame(header, payload.into()));
        true
    }

    /// Sends a frame, or leaves it with a thread that sends now: that it could not be sent shows at a later one.
    pub(crate) fn post(
        &self,
        kind: Kind,
        section: u32,
        position: u64,
        payload: &[u8],
        cancel: Option<&Cancel>,
    ) -> Result<()> {
        let is_small = payload.len() <= SMALL_BYTES_MAX;
        match is_small && self.leave(Header::new(kind, section, position, 0, payload), payload) {
            true => Ok(()),
            false => self.send(kind, section, position, payload, cancel),
        }
    }

    /// Sends a frame.
    pub(crate) fn send(
        &self,
        kind: Kind,
        section: u32,
        position: u64,
        payload: &[u8],
        cancel: Option<&Cancel>,
    ) -> Result<()> {
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
            Some(packed) => self.send_with(header.packed(packed), packed, cancel),
            None => self.send_with(header, payload, cancel),
        };
        self.packers.lock().push(packer);
        sent
    }

    fn send_with(&self, header: Header, payload: &[u8], cancel: Option<&Cancel>) -> Result<()> {
        let mut turn = self.turn(cancel);
        if let Some(error) = self.turns.lock().failed.take() {
            return Err(error);
        }
        let Some(state) = &mut turn.state else { return Err(Error::Cancelled) };
        state.write_frame(self, header, payload, cancel)
    }

    /// Says that this side is alive, when nothing was said for a while and nobody is saying something now.
    pub(crate) fn pulse(&self, cancel: Option<&Cancel>) -> Result<()> {
        let said = match &self.turns.lock().state {
            Some(state) if state.last + pulse(self.silence_max) <= now() => state.sent_bytes,
            _ => return Ok(()),
        };
        self.send(Kind::PROGRESS, 0, 0, &said.to_le_bytes(), cancel)
    }
}

impl WriterState {
    fn write_frame(
        &mut self,
        writer: &FrameWriter<'_>,
        mut header: Header,
        payload: &[u8],
        cancel: Option<&Cancel>,
    ) -> Result<()> {
        header.sequence = self.sequence;
        self.write_all(writer, &header.encode(), payload, cancel, "sending")?;
        self.sent_bytes += payload.len() as u64;
        Ok(())
    }

    fn write_all(
        &mut self,
        writer: &FrameWriter<'_>,
        first: &[u8],
        second: &[u8],
        cancel: Option<&Cancel>,
        doing: &'static str,
    ) -> Result<()> {
        let wait = Wait::within(writer.silence_max, cancel);
        self.write(wait, Some(writer.silence_max), writer, first, second, doing)
    }

    /// With `renewed`, the deadline is renewed whenever bytes move.
    fn write(
        &mut self,
        mut wait: Wait<'_>,
        renewed: Option<Duration>,
        writer: &FrameWriter<'_>,
        first: &[u8],
        second: &[u8],
        doing: &'static str,
    ) -> Result<()> {
        let mut sent = 0;
        while sent < first.len() + second.len() {
            let rest = sent.saturating_sub(first.len());
            let slices = [IoSlice::new(&first[sent.min(first.len())..]), IoSlice::new(&second[rest..])];
            let slices = if sent < first.len() { &slices[..] } else { &slices[1..] };
            match writer.link.write(slices, wait) {
                Ok(bytes) => {
                    // A frame counts from its first byte on.
                    self.sequence = self.sequence.wrapping_add(u32::from(sent == 0));
                    sent += bytes;
                    if let Some(limit) = renewed {
                        wait = Wait::within(limit, wait.cancel);
                    }
                }
                Err(error) => {
                    if matches!(error, LinkError::Cancelled) && sent > 0 {
                        self.unfinished = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                    }
                    return Err(link_failed(writer.link, error, doing, writer.silence_max));
                }
            }
        }
        self.last = now();
        Ok(())
    }
}
