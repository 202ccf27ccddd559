//! [`FrameWriter`]: the sending half of a link, shared by several threads. A thread that finds the link busy queues a small
//! frame for the current sender, and waits for its turn with a large one.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use limosa_clockwork::{Monitor, catch, now};
use limosa_stream::buffer::Gauge;
use limosa_stream::{Compression, HEADER_BYTES, Header, Kind, MigrationId, Packer, Preface, PrefaceFlags};

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
    /// For how many milliseconds this process stood still, at most, if that was longer than the peer may be silent.
    stood_still: AtomicU64,
    /// The packers that no thread uses now. There are at most as many as threads that send at once.
    packers: Monitor<Vec<Packer>>,
}

/// The queue of a link. A thread that sends has taken the state, and passes it on to the thread that has waited longest.
struct WriteQueue {
    state: Option<WriterState>,
    waiting: VecDeque<Waiting>,
    /// Bytes of the queued frames.
    queued_bytes: usize,
    /// Why a queued frame could not be sent. It stays, since the frames queued after that one are lost as well.
    failed: Option<Error>,
    /// The thread that sends now waits for nothing, so that no frame is left to it.
    is_brief: bool,
}

/// An entry of the queue.
enum Waiting {
    /// A thread that waits for its turn.
    Thread(Arc<Monitor<Option<WriterState>>>),
    /// A small frame: header and payload.
    Frame(Header, Box<[u8]>),
}

struct WriterState {
    sequence: u32,
    sent_bytes: u64,
    last_sent: Instant,
    /// The rest of a frame whose sending ended early. It is sent first, since the peer expects it.
    unfinished: Vec<u8>,
}

/// A turn at sending. Its end sends the frames that were queued meanwhile.
struct WriteTurn<'t, 'a> {
    writer: &'t FrameWriter<'a>,
    state: Option<WriterState>,
    cancel: Option<&'t Cancel>,
}

impl Drop for WriteTurn<'_, '_> {
    fn drop(&mut self) {
        let mut failed = None;
        loop {
            let mut queue = self.writer.queue.lock();
            if let Some(error) = failed.take() {
                queue.failed.get_or_insert(error);
            }
            match queue.waiting.pop_front() {
                None => {
                    queue.state = self.state.take();
                    return;
                }
                Some(Waiting::Thread(next)) => {
                    drop(queue);
                    *next.lock() = self.state.take();
                    return next.notify_all();
                }
                Some(Waiting::Frame(header, payload)) => {
                    queue.queued_bytes -= HEADER_BYTES + payload.len();
                    let failed_before = queue.failed.is_some();
                    drop(queue);
                    if let (Some(state), false) = (&mut self.state, failed_before) {
                        // A panic must not take the turn with it, for which others wait.
                        let written = catch(|| state.write_frame(self.writer, header, &payload, self.cancel));
                        let written = written.map_err(|panic| Error::panicked("sending on a link", &panic));
                        failed = written.flatten().err();
                    }
                }
            }
        }
    }
}

impl<'a> FrameWriter<'a> {
    pub(crate) fn new(link: &'a dyn Link, silence_max: Duration) -> FrameWriter<'a> {
        let state = WriterState { sequence: 0, sent_bytes: 0, last_sent: now(), unfinished: Vec::new() };
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
        let sent = state.write(self, [&bytes, &[]], cancel, "sending the preface");
        // It is not a frame, and has no number.
        state.sequence = 0;
        sent
    }

    /// Sends a frame, or queues it for the thread that sends now. A later call reports that a queued frame could not be sent.
    pub(crate) fn post(&self, frame: &Frame<'_>, cancel: Option<&Cancel>) -> Result<()> {
        if frame.payload.len() <= SMALL_BYTES_MAX && self.enqueue(frame)? {
            return Ok(());
        }
        self.send(frame, cancel)
    }

    /// Sends a frame.
    pub(crate) fn send(&self, frame: &Frame<'_>, cancel: Option<&Cancel>) -> Result<()> {
        // Checksums and compression come before the turn, for which other threads wait.
        let header = header_of(frame);
        let compression = self.compression.get().filter(|_| frame.kind.may_be_compressed());
        let Some((compression, buffers)) = compression else {
            return self.send_with(header, frame.payload, cancel);
        };
        let spare = self.packers.lock().pop();
        let mut packer = match spare {
            Some(packer) => packer,
            None => Packer::counted(*compression, buffers)
                .map_err(|error| Error::Os { doing: COMPRESSING, error })?,
        };
        let sent = match packer.pack(frame.payload) {
            Some(packed) => self.send_with(header.packed(packed), packed, cancel),
            None => self.send_with(header, frame.payload, cancel),
        };
        self.packers.lock().push(packer);
        sent
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
            let mut header = header_of(&Frame::new(Kind::PROGRESS, &sent_bytes));
            header.sequence = state.sequence;
            let at_once = Wait { deadline: now(), cancel: None };
            match state.write_within(&|| at_once, self, [&header.encode(), &sent_bytes], "sending") {
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
        let mut header = header_of(frame);
        header.sequence = state.sequence;
        let whole = Wait::within(limit, None);
        state.write_within(&|| whole, self, [&header.encode(), frame.payload], "calling off").is_ok()
    }

    /// How many threads and frames send or wait.
    pub(crate) fn busy(&self) -> usize {
        let queue = self.queue.lock();
        usize::from(queue.state.is_none()) + queue.waiting.len()
    }

    fn turn<'t>(&'t self, cancel: Option<&'t Cancel>) -> WriteTurn<'t, 'a> {
        let mut queue = self.queue.lock();
        if let Some(state) = queue.state.take() {
            return WriteTurn { writer: self, state: Some(state), cancel };
        }
        let ticket = Arc::<Monitor<Option<WriterState>>>::default();
        queue.waiting.push_back(Waiting::Thread(Arc::clone(&ticket)));
        drop(queue);
        let mut handed = ticket.lock();
        while handed.is_none() {
            (handed, _) = ticket.wait(handed, None);
        }
        WriteTurn { writer: self, state: handed.take(), cancel }
    }

    /// Queues a small frame for the current sender, if there is one and there is room.
    fn enqueue(&self, frame: &Frame<'_>) -> Result<bool> {
        let header = header_of(frame);
        let mut queue = self.queue.lock();
        if let Some(error) = &queue.failed {
            return Err(error.again());
        }
        let bytes = HEADER_BYTES + frame.payload.len();
        if queue.state.is_some() || queue.is_brief || queue.queued_bytes + bytes > QUEUED_BYTES_MAX {
            return Ok(false);
        }
        queue.queued_bytes += bytes;
        queue.waiting.push_back(Waiting::Frame(header, frame.payload.into()));
        Ok(true)
    }

    fn send_with(&self, header: Header, payload: &[u8], cancel: Option<&Cancel>) -> Result<()> {
        let mut turn = self.turn(cancel);
        if let Some(error) = &self.queue.lock().failed {
            return Err(error.again());
        }
        let Some(state) = &mut turn.state else { return Err(Error::Cancelled) };
        state.write_frame(self, header, payload, cancel)
    }
}

fn header_of(frame: &Frame<'_>) -> Header {
    Header::new(frame.kind, frame.section, frame.position, 0, frame.payload)
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
        self.write(writer, [&header.encode(), payload], cancel, "sending")?;
        self.sent_bytes += payload.len() as u64;
        Ok(())
    }

    /// Every byte that the link takes renews the limit for a link that takes none.
    fn write(
        &mut self,
        writer: &FrameWriter<'_>,
        parts: [&[u8]; 2],
        cancel: Option<&Cancel>,
        doing: &'static str,
    ) -> Result<()> {
        self.write_within(&|| Wait::within(writer.silence_max, cancel), writer, parts, doing)
    }

    fn write_within<'w>(
        &mut self,
        wait: &dyn Fn() -> Wait<'w>,
        writer: &FrameWriter<'_>,
        [first, second]: [&[u8]; 2],
        doing: &'static str,
    ) -> Result<()> {
        let failed = |error| link_failed(writer.link.peer(), error, doing, writer.silence_max);
        while !self.unfinished.is_empty() {
            let sent = writer.link.write(&[IoSlice::new(&self.unfinished)], wait()).map_err(failed)?;
            self.unfinished.drain(..sent);
            self.last_sent = now();
        }
        let mut sent = 0;
        while sent < first.len() + second.len() {
            let rest = sent.saturating_sub(first.len());
            let slices = [IoSlice::new(&first[sent.min(first.len())..]), IoSlice::new(&second[rest..])];
            let slices = if sent < first.len() { &slices[..] } else { &slices[1..] };
            match writer.link.write(slices, wait()) {
                Ok(bytes) => {
                    // A frame has its number from its first byte on.
                    self.sequence = self.sequence.wrapping_add(u32::from(sent == 0));
                    sent += bytes;
                }
                Err(error) => {
                    if matches!(error, LinkError::Cancelled | LinkError::TimedOut) && sent > 0 {
                        self.unfinished = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                    }
                    return Err(failed(error));
                }
            }
        }
        self.last_sent = now();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::FrameReader;
    use super::*;
    use crate::link::SocketLink;
    use limosa_stream::AbortCode;
    use limosa_stream::body::encode_abort;

    const SILENCE_MAX: Duration = Duration::from_millis(50);

    #[test]
    fn a_keep_alive_on_a_full_link_waits_for_nothing_and_breaks_no_frame() {
        let (near, far) = SocketLink::pair().unwrap();
        let writer = FrameWriter::new(&near, SILENCE_MAX);
        let mut sent = 0;
        let large = vec![1; 100_000];
        while writer.send(&Frame::of(0, Kind::MEMORY_DATA, &large), None).is_ok() {
            sent += 1;
        }
        for _ in 0..100 {
            writer.keep_alive(Duration::ZERO).unwrap();
        }
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| {
                let mut reader = FrameReader::new(&far, Duration::from_secs(10));
                (0..=sent + 1).map(|_| reader.next(&far, "reading", None, None).unwrap().kind).last().unwrap()
            });
            // The frame that did not fit is whole in the end, and numbers go on behind it.
            while !reading.is_finished() {
                writer.keep_alive(Duration::ZERO).unwrap();
            }
            assert_eq!(reading.join().unwrap(), Kind::PROGRESS);
        });
    }

    #[test]
    fn an_error_of_a_queued_frame_is_told_by_every_later_call() {
        let (near, far) = SocketLink::pair().unwrap();
        let writer = FrameWriter::new(&near, SILENCE_MAX);
        let turn = writer.turn(None);
        writer.post(&Frame::new(Kind::STOPPED, &[]), None).unwrap();
        // Nobody waits for a socket to be closed.
        far.cut();
        drop(turn);
        let small = Frame::new(Kind::STOPPED, &[]);
        for _ in 0..3 {
            assert!(matches!(writer.send(&small, None), Err(Error::Link { .. })));
            assert!(matches!(writer.post(&small, None), Err(Error::Link { .. })));
        }
    }

    /// A link on which every write waits until it may go on.
    struct Gated {
        inner: SocketLink,
        /// The threads that wrote, and how many more may.
        state: Monitor<(Vec<std::thread::ThreadId>, usize)>,
    }

    impl Link for Gated {
        fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
            let mut state = self.state.lock();
            state.0.push(std::thread::current().id());
            self.state.notify_all();
            while state.1 == 0 {
                (state, _) = self.state.wait(state, None);
            }
            state.1 -= 1;
            self.inner.write(slices, wait)
        }
        fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
            self.inner.read(into, wait)
        }
        fn finish(&self) {}
        fn peer(&self) -> &str {
            "the peer"
        }
    }

    #[test]
    fn a_frame_that_was_left_to_a_keep_alive_held_up_the_thread_that_watches_the_guest() {
        let (near, _far) = SocketLink::pair().unwrap();
        let link = Gated { inner: near, state: Monitor::default() };
        let writer = FrameWriter::new(&link, SILENCE_MAX);
        std::thread::scope(|scope| {
            let alive = scope.spawn(|| writer.keep_alive(Duration::ZERO).unwrap());
            let mut state = link.state.lock();
            while state.0.is_empty() {
                (state, _) = link.state.wait(state, None);
            }
            drop(state);
            let posts = scope.spawn(|| writer.post(&Frame::new(Kind::STOPPED, &[]), None).unwrap());
            while writer.busy() < 2 {
                std::thread::yield_now();
            }
            link.state.lock().1 = 1;
            link.state.notify_all();
            // The frame is not sent yet, and this thread goes on.
            let (alive, thread) = (alive.thread().id(), alive.join());
            thread.unwrap();
            link.state.lock().1 = 1;
            link.state.notify_all();
            let poster = posts.thread().id();
            posts.join().unwrap();
            assert_eq!(link.state.lock().0, [alive, poster]);
        });
    }

    #[test]
    fn an_abort_waits_for_no_frame_that_another_thread_has_queued() {
        let (near, far) = SocketLink::pair().unwrap();
        let writer = FrameWriter::new(&near, SILENCE_MAX);
        let turn = writer.turn(None);
        for _ in 0..100 {
            writer.post(&Frame::new(Kind::STOPPED, &[]), None).unwrap();
        }
        std::thread::scope(|scope| {
            let aborts = scope.spawn(|| {
                let abort = encode_abort(AbortCode::Cancelled, "cancelled");
                writer.last_word(&Frame::new(Kind::ABORT, &abort), &Error::Cancelled, Duration::from_secs(10))
            });
            while writer.busy() < 102 {
                std::thread::yield_now();
            }
            drop(turn);
            assert!(aborts.join().unwrap());
        });
        assert!(writer.post(&Frame::new(Kind::STOPPED, &[]), None).is_err(), "it was the last one");
        let mut reader = FrameReader::new(&far, Duration::from_secs(10));
        let first = reader.next(&far, "reading", None, None);
        assert!(matches!(first, Err(Error::Aborted { .. })), "{first:?}");
    }
}
