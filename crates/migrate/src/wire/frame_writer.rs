//! [`FrameWriter`]: the sending half of a link, shared by several threads. A thread that finds the link busy queues a small
//! frame for the current sender, and waits for its turn with a large one.

mod batch;
#[cfg(test)]
mod tests;
mod turn;

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use limosa_clockwork::{Monitor, now};
use limosa_guest_memory::SendPart;
use limosa_stream::buffer::Gauge;
use limosa_stream::{Compression, HEADER_BYTES, Header, Kind, MigrationId, Packer, Preface, PrefaceFlags};

use batch::{Batch, Payload, SmallFrame, small};
use turn::{Waiting, WriteQueue, WriteTurn};

use super::{COMPRESSING, Frame, link_failed};
use crate::link::{Link, LinkError, Wait};
use crate::{Cancel, Error, Result};

/// The largest payload that is queued for another sender.
const SMALL_BYTES_MAX: usize = 1 << 10;
/// The most bytes of frames in the queue.
const QUEUED_BYTES_MAX: usize = 64 << 10;

/// The sending half of a link. Threads take turns to send, in the order in which they ask.
pub(crate) struct FrameWriter<'a> {
    link: &'a dyn Link,
    silence_max: Duration,
    queue: Monitor<WriteQueue>,
    compression: OnceLock<(Compression, Arc<Gauge>)>,
    /// Whether memory is sent without checksums.
    is_unchecked: AtomicBool,
    /// For how many milliseconds this process stood still, at most, if that was longer than the peer may be silent.
    stood_still: AtomicU64,
    /// The packers that no thread uses now. There are at most as many as threads that send at once.
    packers: Monitor<Vec<Packer>>,
}

struct WriterState {
    sequence: u32,
    sent_bytes: u64,
    last_sent: Instant,
    /// The rest of a frame whose sending ended early. It is sent first, since the peer expects it.
    unfinished: Vec<u8>,
    /// Frames that were queued before this turn, and are sent in one write with the next frame.
    queued: Vec<SmallFrame>,
}

impl<'a> FrameWriter<'a> {
    pub(crate) fn new(link: &'a dyn Link, silence_max: Duration) -> FrameWriter<'a> {
        let state = WriterState {
            sequence: 0,
            sent_bytes: 0,
            last_sent: now(),
            unfinished: Vec::new(),
            queued: Vec::new(),
        };
        let queue = WriteQueue {
            state: Some(state),
            waiting: VecDeque::new(),
            queued_bytes: 0,
            failed: None,
            is_brief: false,
        };
        FrameWriter {
            link,
            silence_max,
            queue: Monitor::new(queue),
            compression: OnceLock::new(),
            is_unchecked: AtomicBool::new(false),
            stood_still: AtomicU64::new(0),
            packers: Monitor::default(),
        }
    }

    /// From now on compresses device data and memory, in buffers that this gauge counts.
    pub(crate) fn compress(&self, compression: Option<Compression>, buffers: &Arc<Gauge>) {
        if let Some(compression) = compression {
            let _ = self.compression.set((compression, Arc::clone(buffers)));
        }
    }

    /// From now on sends memory that is not compressed without checksums.
    pub(crate) fn waive_checksums(&self) {
        self.is_unchecked.store(true, Ordering::Relaxed);
    }

    /// The link that it writes to.
    pub(crate) fn link(&self) -> &'a dyn Link {
        self.link
    }

    /// Whether memory is sent from where it lies, by [`FrameWriter::send_memory`]. A page may change meanwhile, so that no
    /// checksum would be that of the bytes that are sent.
    pub(crate) fn sends_in_place(&self) -> bool {
        self.is_unchecked.load(Ordering::Relaxed)
            && self.compression.get().is_none()
            && self.link.sends_memory()
    }

    /// Whether the checksums of memory are those of its pages as they are.
    pub(crate) fn sums_pages(&self) -> bool {
        !self.is_unchecked.load(Ordering::Relaxed) && self.compression.get().is_none()
    }

    pub(crate) fn has_peer(&self) -> bool {
        self.link.has_peer()
    }

    pub(crate) fn peer(&self) -> &str {
        self.link.peer()
    }

    /// Sends the preface, before the first frame.
    pub(crate) fn preface(
        &self,
        id: MigrationId,
        flags: PrefaceFlags,
        cancel: Option<&Cancel>,
    ) -> Result<()> {
        let bytes = Preface::new(id, flags).encode();
        let mut turn = self.turn(cancel);
        let Some(state) = &mut turn.state else { return Err(Error::Cancelled) };
        state.write_preface(self, &bytes, cancel)
    }

    /// Sends a frame, or queues it for the thread that sends now. A later call reports that a queued frame could not be sent.
    pub(crate) fn post(&self, frame: &Frame<'_>, cancel: Option<&Cancel>) -> Result<()> {
        self.post_all(&[], frame, &[], cancel)
    }

    /// The same with small frames before and after it, in one write.
    pub(crate) fn post_all(
        &self,
        before: &[Frame<'_>],
        frame: &Frame<'_>,
        after: &[Frame<'_>],
        cancel: Option<&Cancel>,
    ) -> Result<()> {
        if frame.payload.len() <= SMALL_BYTES_MAX {
            let all = before.iter().chain([frame]).chain(after);
            if self.enqueue(all)? {
                return Ok(());
            }
        }
        self.send_all(before, frame, after, cancel)
    }

    /// Sends a frame.
    pub(crate) fn send(&self, frame: &Frame<'_>, cancel: Option<&Cancel>) -> Result<()> {
        self.send_all(&[], frame, &[], cancel)
    }

    fn send_all(
        &self,
        before: &[Frame<'_>],
        frame: &Frame<'_>,
        after: &[Frame<'_>],
        cancel: Option<&Cancel>,
    ) -> Result<()> {
        // Checksums and compression come before the turn, for which other threads wait.
        let [before, after] = [before, after].map(|frames| frames.iter().map(small).collect::<Vec<_>>());
        let send = |header: Header, payload: &[u8]| {
            self.send_batch(cancel, 0, |batch| {
                batch.add(&before);
                batch.add_large(header, Payload::Bytes(payload));
                batch.add(&after);
            })
        };
        let compression = self.compression.get().filter(|_| frame.kind.may_be_compressed());
        let Some((compression, buffers)) = compression else {
            let is_unchecked = frame.kind.may_be_unchecked() && self.is_unchecked.load(Ordering::Relaxed);
            let header = if is_unchecked { unchecked(frame, frame.payload.len()) } else { header_of(frame) };
            return send(header, frame.payload);
        };
        let header = header_of(frame);
        let spare = self.packers.lock().pop();
        let mut packer = match spare {
            Some(packer) => packer,
            None => Packer::counted(*compression, buffers)
                .map_err(|error| Error::Os { doing: COMPRESSING, error })?,
        };
        let sent = match packer.pack(frame.payload) {
            Some(packed) => send(header.packed(packed), packed),
            None => send(header, frame.payload),
        };
        self.packers.lock().push(packer);
        sent
    }

    /// Sends a frame of memory without a checksum, whose payload is these parts and not that of `frame`. `address` names the memory
    /// in an error. A page that changes meanwhile has to be sent again.
    pub(crate) fn send_memory(
        &self,
        frame: &Frame<'_>,
        address: u64,
        parts: &[SendPart<'_>],
        cancel: Option<&Cancel>,
    ) -> Result<()> {
        let header = unchecked(frame, parts.iter().map(SendPart::len).sum());
        self.send_batch(cancel, address, |batch| batch.add_large(header, Payload::Memory(parts)))
    }

    /// Sends a keep-alive, if nothing was sent for `interval` and no thread is sending now. Never waits: a full link has data
    /// for the peer to read.
    pub(crate) fn keep_alive(&self, interval: Duration) -> Result<()> {
        let mut queue = self.queue.lock();
        let is_due = |state: &mut WriterState| state.last_sent + interval <= now();
        let Some(state) = queue.state.take_if(is_due) else { return Ok(()) };
        queue.is_brief = true;
        drop(queue);
        let mut turn = WriteTurn { writer: self, state: Some(state), cancel: None };
        let sent = turn.state.as_mut().map_or(Ok(()), |state| {
            let sent_bytes = state.sent_bytes.to_le_bytes();
            let mut batch = Batch::new(state.sequence);
            batch.add(&[small(&Frame::new(Kind::PROGRESS, &sent_bytes))]);
            let at_once = Wait { deadline: now(), cancel: None };
            match state.write_batch(&|| at_once, self, &batch, "sending", 0) {
                Err(Error::TimedOut { .. }) => Ok(()),
                sent => sent,
            }
        });
        // Only threads can be waiting, and the first of them goes on here.
        self.queue.lock().is_brief = false;
        drop(turn);
        sent
    }

    /// The thread that sends keep-alives went on so much later than it wanted to. Returns whether that is longer than a side may
    /// be silent.
    pub(crate) fn was_late(&self, late: Duration) -> bool {
        let is_too_late = late > self.silence_max;
        if is_too_late {
            let millis = u64::try_from(late.as_millis()).unwrap_or(u64::MAX);
            self.stood_still.fetch_max(millis, Ordering::Relaxed);
        }
        is_too_late
    }

    /// A better reason for a link that was closed, if this process was silent for too long.
    pub(crate) fn explain(&self, why: Error) -> Error {
        match (why, self.stood_still.load(Ordering::Relaxed)) {
            (Error::Link { peer, error: LinkError::Closed, .. }, millis @ 1..) => {
                Error::Suspended { peer, time: Duration::from_millis(millis), limit: self.silence_max }
            }
            (why, _) => why,
        }
    }

    /// Sends a frame that ends the move for this reason. Returns whether it was sent within the limit.
    pub(crate) fn last_word(&self, frame: &Frame<'_>, error: &Error, limit: Duration) -> bool {
        // Frames that other threads have queued, or will, are not waited for.
        self.queue.lock().failed.get_or_insert_with(|| error.again());
        let mut turn = self.turn(None);
        let Some(state) = &mut turn.state else { return false };
        state.queued.clear();
        let mut batch = Batch::new(state.sequence);
        batch.add_large(header_of(frame), Payload::Bytes(frame.payload));
        let whole = Wait::within(limit, None);
        state.write_batch(&|| whole, self, &batch, "calling off", 0).is_ok()
    }

    /// How many threads and frames send or wait.
    pub(crate) fn busy(&self) -> usize {
        let queue = self.queue.lock();
        usize::from(queue.state.is_none()) + queue.waiting.len()
    }

    /// Queues small frames for the current sender, if there is one and there is room.
    fn enqueue<'f>(&self, frames: impl Iterator<Item = &'f Frame<'f>>) -> Result<bool> {
        let frames: Vec<_> = frames.map(small).collect();
        let bytes: usize = frames.iter().map(|(_, payload)| HEADER_BYTES + payload.len()).sum();
        let mut queue = self.queue.lock();
        if let Some(error) = &queue.failed {
            return Err(error.again());
        }
        if queue.state.is_some() || queue.is_brief || queue.queued_bytes + bytes > QUEUED_BYTES_MAX {
            return Ok(false);
        }
        queue.queued_bytes += bytes;
        queue.waiting.extend(frames.into_iter().map(Waiting::Frame));
        Ok(true)
    }

    /// Sends frames, and before them those that were queued. `address` names the memory of a frame in an error.
    fn send_batch<'p>(
        &self,
        cancel: Option<&Cancel>,
        address: u64,
        fill: impl FnOnce(&mut Batch<'p>),
    ) -> Result<()> {
        let mut turn = self.turn(cancel);
        if let Some(error) = &self.queue.lock().failed {
            return Err(error.again());
        }
        let Some(state) = &mut turn.state else { return Err(Error::Cancelled) };
        let mut batch = Batch::new(state.sequence);
        let queued = std::mem::take(&mut state.queued);
        batch.add(&queued);
        fill(&mut batch);
        let wait = || Wait::within(self.silence_max, cancel);
        let sent = state.write_batch(&wait, self, &batch, "sending", address);
        match &sent {
            Ok(()) => state.sent_bytes += batch.payload_bytes,
            Err(_) if queued.is_empty() => {}
            Err(error) => _ = self.queue.lock().failed.get_or_insert_with(|| error.again()),
        }
        sent
    }
}

fn header_of(frame: &Frame<'_>) -> Header {
    match frame.crc {
        Some(crc) => Header::with_crc(frame.kind, frame.section, frame.position, 0, frame.payload.len(), crc),
        None => Header::new(frame.kind, frame.section, frame.position, 0, frame.payload),
    }
}

/// The header of a frame of memory without a checksum.
fn unchecked(frame: &Frame<'_>, bytes: usize) -> Header {
    Header::unchecked(frame.kind, frame.section, frame.position, 0, bytes)
}

impl WriterState {
    fn write_preface(
        &mut self,
        writer: &FrameWriter<'_>,
        bytes: &[u8],
        cancel: Option<&Cancel>,
    ) -> Result<()> {
        self.unfinished.extend_from_slice(bytes);
        self.finish(&|| Wait::within(writer.silence_max, cancel), writer, "sending the preface")
    }

    /// Sends the rest of a frame whose sending ended early.
    fn finish<'w>(
        &mut self,
        wait: &dyn Fn() -> Wait<'w>,
        writer: &FrameWriter<'_>,
        doing: &'static str,
    ) -> Result<()> {
        let failed = |error| link_failed(writer.link.peer(), error, doing, writer.silence_max);
        while !self.unfinished.is_empty() {
            let sent = writer.link.write(&[IoSlice::new(&self.unfinished)], wait()).map_err(failed)?;
            self.unfinished.drain(..sent);
            self.last_sent = now();
        }
        Ok(())
    }

    /// Sends the frames that were queued.
    fn write_queued(&mut self, writer: &FrameWriter<'_>, cancel: Option<&Cancel>) -> Result<()> {
        let mut batch = Batch::new(self.sequence);
        batch.add(&std::mem::take(&mut self.queued));
        self.write_batch(&|| Wait::within(writer.silence_max, cancel), writer, &batch, "sending", 0)?;
        self.sent_bytes += batch.payload_bytes;
        Ok(())
    }

    /// Sends frames. Every byte that the link takes renews the limit for a link that takes none. `address` names the memory of
    /// a frame in an error.
    fn write_batch<'w>(
        &mut self,
        wait: &dyn Fn() -> Wait<'w>,
        writer: &FrameWriter<'_>,
        batch: &Batch<'_>,
        doing: &'static str,
        address: u64,
    ) -> Result<()> {
        self.finish(wait, writer, doing)?;
        let (first, mut sent) = (self.sequence, 0);
        while sent < batch.len() {
            match batch.write(writer.link, sent, wait()) {
                Ok(bytes) => {
                    sent += bytes;
                    // A frame has its number from its first byte on.
                    self.sequence = first.wrapping_add(batch.begun(sent));
                }
                Err(error) => {
                    if matches!(error, LinkError::Cancelled | LinkError::TimedOut | LinkError::Memory(_)) {
                        self.unfinished = batch.rest_of_frame(sent);
                    }
                    return Err(match error {
                        LinkError::Memory(error) => Error::Memory { address, error },
                        error => link_failed(writer.link.peer(), error, doing, writer.silence_max),
                    });
                }
            }
        }
        self.last_sent = now();
        Ok(())
    }
}
