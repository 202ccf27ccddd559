//! [`Baton`]: a thread of a simulation runs only while it has its baton, so that one runs at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;

/// Lets the thread of a task run.
#[derive(Clone)]
pub(crate) struct Baton {
    go: Arc<AtomicBool>,
    thread: Thread,
}

impl Baton {
    /// The baton of a thread that waits for `go` with [`await_baton`].
    pub(crate) fn new(go: Arc<AtomicBool>, thread: Thread) -> Baton {
        Baton { go, thread }
    }

    pub(crate) fn hand_over(self) {
        self.go.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

/// Blocks until the calling thread is handed its baton.
pub(crate) fn await_baton(go: &AtomicBool) {
    while !go.swap(false, Ordering::Acquire) {
        std::thread::park();
    }
}
