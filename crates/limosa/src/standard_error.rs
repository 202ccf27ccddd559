//! Standard error, written by a thread of its own. A terminal that is held (Ctrl-S), or a pipe that nobody reads, blocks the thread that
//! writes to it, and a thread of a move must not be blocked while a guest stands still. Lines that do not fit into the queue are dropped
//! and counted.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// The most bytes that wait to be written.
const LINES_BYTES_MAX: usize = 1 << 20;
/// A bar is drawn only if fewer bytes than these wait: nobody would see it in time.
const BAR_BYTES_MAX: usize = 4 << 10;
/// How long standard output waits for the lines that precede it here.
const SETTLE_MAX: Duration = Duration::from_millis(200);
/// How long the process waits at its end until everything is written.
const END_MAX: Duration = Duration::from_secs(2);

static QUEUE: Queue = Queue::new();

/// The text for the thread that writes.
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    waiting: VecDeque<Vec<u8>>,
    /// The bytes that wait, and those that are being written.
    bytes: usize,
    /// How many lines were dropped since one was written.
    dropped: u64,
    has_writer: bool,
}

impl Queue {
    const fn new() -> Queue {
        let state = State { waiting: VecDeque::new(), bytes: 0, dropped: 0, has_writer: false };
        Queue { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues this if no more than `bytes_max` bytes wait then. Returns whether there is a thread that writes.
    fn put(&self, text: &[u8], bytes_max: usize, is_line: bool) -> bool {
        let mut state = self.state();
        if !state.has_writer {
            return false;
        }
        if state.bytes + text.len() > bytes_max {
            state.dropped += u64::from(is_line);
            return true;
        }
        state.bytes += text.len();
        state.waiting.push_back(text.to_vec());
        self.changed.notify_all();
        true
    }

    /// The next text to write; after a gap, the number of lines that are missing.
    fn next(&self) -> Vec<u8> {
        let mut state = self.state();
        loop {
            if let Some(text) = state.waiting.pop_front() {
                return text;
            }
            if state.dropped > 0 {
                let dropped = std::mem::take(&mut state.dropped);
                let lines = if dropped == 1 { "line was" } else { "lines were" };
                let text = format!("limosa: {dropped} {lines} dropped here: nobody read standard error\n")
                    .into_bytes();
                state.bytes += text.len();
                return text;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn written(&self, bytes: usize) {
        self.state().bytes -= bytes;
        self.changed.notify_all();
    }

    /// Waits until everything is written, but not longer than this.
    fn drain(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut state = self.state();
        while state.has_writer && (state.bytes > 0 || state.dropped > 0) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Starts the thread. Without it, callers write themselves, and may be blocked.
pub fn begin() {
    QUEUE.state().has_writer = true;
    let write = || {
        loop {
            let text = QUEUE.next();
            write_all(&text);
            QUEUE.written(text.len());
        }
    };
    if thread::Builder::new().name("standard error".into()).spawn(write).is_err() {
        QUEUE.state().has_writer = false;
    }
}

/// Waits until everything is written, but not for long: the process ends.
pub fn end() {
    QUEUE.drain(END_MAX);
}

/// Waits until everything is written, for a shorter time: a caller is about to write to standard output, which may be the same terminal.
pub fn settle() {
    QUEUE.drain(SETTLE_MAX);
}

/// Writes a line, or several.
pub fn line(text: &[u8]) {
    if !QUEUE.put(text, LINES_BYTES_MAX, true) {
        write_all(text);
    }
}

/// Draws a bar, unless it would have to wait.
pub fn bar(text: &[u8]) {
    if !QUEUE.put(text, BAR_BYTES_MAX, false) {
        write_all(text);
    }
}

/// Nobody is left to be told where this fails.
fn write_all(mut text: &[u8]) {
    // Not through the standard library's lock, for which other threads would wait.
    let to = io::stderr();
    while !text.is_empty() {
        match rustix::io::write(to.as_fd(), text) {
            Ok(written) => text = &text[written..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                let _ = poll(&mut [PollFd::new(&to, PollFlags::OUT)], None);
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_reads_is_dropped_and_counted() {
        let queue = Queue::new();
        assert!(!queue.put(b"early", 100, true), "there is no thread");
        queue.state().has_writer = true;
        assert!(queue.put(b"one\n", 6, true));
        for line in [b"two\n", b"3rd\n"] {
            assert!(queue.put(line, 6, true));
        }
        assert!(queue.put(b"a bar", 6, false), "which is missed by nobody");
        assert_eq!(queue.next(), b"one\n");
        queue.written(4);
        let missing = String::from_utf8(queue.next()).unwrap();
        assert_eq!(missing, "limosa: 2 lines were dropped here: nobody read standard error\n");
        // It is being written, for ever.
        queue.drain(Duration::ZERO);
        queue.written(missing.len());
        queue.drain(Duration::MAX.min(Duration::from_secs(3600)));
        assert_eq!(queue.state().bytes, 0);
    }
}
