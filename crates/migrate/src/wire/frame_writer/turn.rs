//! Whose turn it is to send: a thread that finds the link busy waits in the queue, and so does a small frame.

use std::collections::VecDeque;
use std::sync::Arc;

use limosa_clockwork::{Monitor, catch};
use limosa_stream::HEADER_BYTES;

use super::batch::SmallFrame;
use super::{FrameWriter, WriterState};
use crate::{Cancel, Error};

/// The queue of a link. A thread that sends has taken the state, and passes it on to the thread that has waited longest.
pub(super) struct WriteQueue {
    pub(super) state: Option<WriterState>,
    pub(super) waiting: VecDeque<Waiting>,
    /// Bytes of the queued frames.
    pub(super) queued_bytes: usize,
    /// Why a queued frame could not be sent. It stays, since the frames queued after that one are lost as well.
    pub(super) failed: Option<Error>,
    /// The thread that sends now waits for nothing, so that no frame is left to it.
    pub(super) is_brief: bool,
}

/// An entry of the queue.
pub(super) enum Waiting {
    /// A thread that waits for its turn.
    Thread(Arc<Monitor<Option<WriterState>>>),
    /// A small frame.
    Frame(SmallFrame),
}

impl WriteQueue {
    /// Takes away the frames before the first thread that waits.
    fn take_frames(&mut self) -> Vec<SmallFrame> {
        let mut frames = Vec::new();
        while let Some(Waiting::Frame(_)) = self.waiting.front()
            && let Some(Waiting::Frame(frame)) = self.waiting.pop_front()
        {
            self.queued_bytes -= HEADER_BYTES + frame.1.len();
            frames.push(frame);
        }
        frames
    }
}

/// A turn at sending. Its end sends the frames that were queued meanwhile, or leaves them to the next thread, which sends them
/// in one write with its own frame.
pub(super) struct WriteTurn<'t, 'a> {
    pub(super) writer: &'t FrameWriter<'a>,
    pub(super) state: Option<WriterState>,
    pub(super) cancel: Option<&'t Cancel>,
}

impl Drop for WriteTurn<'_, '_> {
    fn drop(&mut self) {
        let Some(mut state) = self.state.take() else { return };
        let mut failed = None;
        loop {
            let mut queue = self.writer.queue.lock();
            if let Some(error) = failed.take() {
                queue.failed.get_or_insert(error);
            }
            state.queued.extend(queue.take_frames());
            if queue.failed.is_some() {
                state.queued.clear();
            }
            if let Some(Waiting::Thread(next)) = queue.waiting.pop_front() {
                drop(queue);
                *next.lock() = Some(state);
                return next.notify_all();
            }
            if state.queued.is_empty() {
                queue.state = Some(state);
                return;
            }
            drop(queue);
            // A panic must not take the turn with it, for which others wait.
            let written = catch(|| state.write_queued(self.writer, self.cancel));
            let written = written.map_err(|panic| Error::panicked("sending on a link", &panic));
            failed = written.flatten().err();
        }
    }
}

impl<'a> FrameWriter<'a> {
    /// Waits for the turn of this thread.
    pub(super) fn turn<'t>(&'t self, cancel: Option<&'t Cancel>) -> WriteTurn<'t, 'a> {
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
}
