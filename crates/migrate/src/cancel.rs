//! [`Cancel`]: calls a move off from another thread, at any moment, waking what waits.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// A handle to call a move off. Clones are the same handle.
///
/// Before the commit the move is undone. From the commit on it has no effect: only the destination
/// may run then.
#[derive(Clone, Debug)]
pub struct Cancel(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cancelled: AtomicBool,
    wake: OwnedFd,
}

impl Cancel {
    /// A handle that has not been used. Fails when the process is out of file descriptors.
    pub fn new() -> std::io::Result<Cancel> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Cancel(Arc::new(Inner { cancelled: AtomicBool::new(false), wake })))
    }

    /// Calls the move off.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
        // Only a counter at its end refuses, and that wakes as well.
        let _ = rustix::io::write(&self.0.wake, &1u64.to_ne_bytes());
    }

    /// Whether somebody has called it off.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    /// Waits for that long, or until somebody calls it off; whether somebody did.
    pub fn wait(&self, time: Duration) -> bool {
        let deadline = std::time::Instant::now() + time;
        while !self.is_cancelled() {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                break;
            }
            let mut fds = [PollFd::new(&self.0.wake, PollFlags::IN)];
            // Whatever ends it early, the loop looks again.
            let _ = poll(&mut fds, Some(&timespec(left)));
        }
        self.is_cancelled()
    }
}

impl AsFd for Cancel {
    /// Readable once the move is called off.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }
}

/// For `poll`; rounded up to a nanosecond so that a wait never spins.
pub(crate) fn timespec(time: Duration) -> Timespec {
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    Timespec { tv_sec: seconds, tv_nsec: time.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_when_somebody_cancels() {
        let cancel = Cancel::new().unwrap();
        assert!(!cancel.wait(Duration::from_millis(1)));
        let other = cancel.clone();
        let thread = std::thread::spawn(move || other.wait(Duration::from_secs(60)));
        cancel.cancel();
        assert!(thread.join().unwrap());
        assert!(cancel.is_cancelled());
    }
}
