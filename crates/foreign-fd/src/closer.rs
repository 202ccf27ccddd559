//! The closer: threads that drop what may block while it is dropped. They are started on demand, and end when there is
//! nothing left to drop.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Threads that may be stuck at once.
const THREADS_MAX: usize = 8;

/// While more than this many values wait because all threads are stuck, no more fds should be taken from peers.
pub const WAITING_MAX: usize = 64;

struct Closer {
    /// What nobody drops yet. When all threads are stuck, it stays here: fds that are not closed are better than a
    /// process that hangs.
    waiting: VecDeque<Box<dyn Send>>,
    threads: usize,
    /// Threads that are dropping something.
    busy: usize,
}

/// Fewer wait than before.
static CAUGHT_UP: Condvar = Condvar::new();

static CLOSER: Mutex<Closer> = Mutex::new(Closer { waiting: VecDeque::new(), threads: 0, busy: 0 });

fn lock() -> MutexGuard<'static, Closer> {
    // Nothing under this lock panics half-way through a change.
    CLOSER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether no more than [`WAITING_MAX`] values wait to be dropped, or no longer do after a while. Whoever takes fds from a
/// peer although more wait fills the table of open files, and in the end the kernel closes what has no room there, in the
/// thread that receives.
pub fn keeps_up(within: Duration) -> bool {
    let is_behind = |closer: &mut Closer| closer.waiting.len() > WAITING_MAX;
    let waited = CAUGHT_UP.wait_timeout_while(lock(), within, is_behind);
    !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
}

/// Drops a value on a thread of the closer.
pub(crate) fn drop_elsewhere(value: Box<dyn Send>) {
    let mut closer = lock();
    closer.waiting.push_back(value);
    let waiting = closer.waiting.len();
    let start = closer.threads < THREADS_MAX && waiting > closer.threads - closer.busy;
    closer.threads += usize::from(start);
    drop(closer);
    if waiting > THREADS_MAX && waiting.is_power_of_two() {
        tracing::error!(waiting, "files of peers cannot be closed: closing others blocks");
    }
    if start && let Err(error) = std::thread::Builder::new().name("limosa: closer".into()).spawn(work) {
        lock().threads -= 1;
        tracing::error!(%error, waiting, "files of peers are not closed: no thread can be started");
    }
}

fn work() {
    let mut closer = lock();
    while let Some(value) = closer.waiting.pop_front() {
        closer.busy += 1;
        if closer.waiting.len() == WAITING_MAX {
            CAUGHT_UP.notify_all();
        }
        drop(closer);
        // A panic in somebody's destructor is reported by its hook, and costs nothing but that value.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(value)));
        closer = lock();
        closer.busy -= 1;
    }
    closer.threads -= 1;
}
