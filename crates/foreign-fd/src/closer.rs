//! The closer: threads that drop values whose drop may block. They are started on demand, and end when there is
//! nothing left to drop.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Threads that may be stuck at once.
const THREADS_MAX: usize = 8;

/// While more than this many values wait because all threads are stuck, no more fds should be taken from peers.
pub const WAITING_MAX: usize = 64;

/// All threads are stuck if none has got anything done for so long.
const STUCK_AFTER: Duration = Duration::from_secs(1);

struct Closer {
    /// What nobody drops yet. When all threads are stuck, it stays here: fds that are not closed are better than a
    /// process that hangs.
    waiting: VecDeque<Box<dyn Send>>,
    threads: usize,
    /// Threads that are dropping something.
    busy: usize,
    /// When a thread took something up, or had done with it. `None` before the first one.
    last_step: Option<Instant>,
    /// It was said that all are stuck.
    is_told: bool,
}

impl Closer {
    const fn new() -> Closer {
        Closer { waiting: VecDeque::new(), threads: 0, busy: 0, last_step: None, is_told: false }
    }

    fn step(&mut self, now: Instant) {
        (self.last_step, self.is_told) = (Some(now), false);
    }

    /// Whether it is to be said that all threads are stuck. A flood of values that are dropped as they come is none.
    fn tells(&mut self, now: Instant) -> bool {
        let is_stuck = self.busy == THREADS_MAX
            && self.waiting.len() > THREADS_MAX
            && self.last_step.is_some_and(|last| now.saturating_duration_since(last) >= STUCK_AFTER);
        is_stuck && !std::mem::replace(&mut self.is_told, true)
    }
}

/// Fewer wait than before.
static CAUGHT_UP: Condvar = Condvar::new();

static CLOSER: Mutex<Closer> = Mutex::new(Closer::new());

fn lock() -> MutexGuard<'static, Closer> {
    // Nothing under this lock panics half-way through a change.
    CLOSER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether no more than [`WAITING_MAX`] values wait to be dropped, or no longer do after a while. Receiving more fds
/// from a peer beyond that fills the table of open files, and then the kernel closes excess fds in the receiving
/// thread.
pub fn keeps_up(within: Duration) -> bool {
    let is_behind = |closer: &mut Closer| closer.waiting.len() > WAITING_MAX;
    let waited = CAUGHT_UP.wait_timeout_while(lock(), within, is_behind);
    let (closer, waited) = waited.unwrap_or_else(PoisonError::into_inner);
    tell_if_stuck(closer);
    !waited.timed_out()
}

fn tell_if_stuck(mut closer: MutexGuard<'static, Closer>) {
    let (waiting, tells) = (closer.waiting.len(), closer.tells(Instant::now()));
    drop(closer);
    if tells {
        tracing::error!(waiting, "files of peers cannot be closed: closing others blocks");
    }
}

/// Drops a value on a thread of the closer.
pub(crate) fn drop_elsewhere(value: Box<dyn Send>) {
    let mut closer = lock();
    closer.waiting.push_back(value);
    let waiting = closer.waiting.len();
    let start = closer.threads < THREADS_MAX && waiting > closer.threads - closer.busy;
    closer.threads += usize::from(start);
    tell_if_stuck(closer);
    if start && let Err(error) = std::thread::Builder::new().name("limosa: closer".into()).spawn(work) {
        lock().threads -= 1;
        tracing::error!(%error, waiting, "files of peers are not closed: no thread can be started");
    }
}

fn work() {
    let mut closer = lock();
    while let Some(value) = closer.waiting.pop_front() {
        closer.busy += 1;
        closer.step(Instant::now());
        if closer.waiting.len() == WAITING_MAX {
            CAUGHT_UP.notify_all();
        }
        drop(closer);
        // A panic in somebody's destructor is reported by its hook, and costs nothing but that value.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(value)));
        closer = lock();
        closer.busy -= 1;
        closer.step(Instant::now());
    }
    closer.threads -= 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It was called stuck by the length of its queue.
    #[test]
    fn a_flood_that_was_closed_as_it_came_was_an_error() {
        let (mut closer, mut now) = (Closer::new(), Instant::now());
        (closer.threads, closer.busy) = (THREADS_MAX, THREADS_MAX);
        for _ in 0..4 * WAITING_MAX {
            now += STUCK_AFTER / 2;
            closer.waiting.push_back(Box::new(()));
            assert!(!closer.tells(now));
            closer.step(now);
        }
        // Nothing is got done any more: that is said once, and again when it stops anew.
        for _ in 0..2 {
            assert!(!closer.tells(now + STUCK_AFTER / 2));
            now += STUCK_AFTER;
            assert!(closer.tells(now));
            assert!(!closer.tells(now + STUCK_AFTER));
            closer.step(now);
        }
        // A thread is free.
        closer.busy -= 1;
        assert!(!closer.tells(now + STUCK_AFTER));
    }
}
