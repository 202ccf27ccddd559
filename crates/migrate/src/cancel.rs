//! [`Cancel`]: ends a move from another thread, at any moment, and wakes the threads that wait.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::lock::lock;

/// A handle that cancels a move. Clones are the same handle.
///
/// Before the commit the move is undone. From the commit on a cancel has no effect, since only the destination may run.
#[derive(Clone)]
pub struct Cancel(Arc<Inner>);

impl std::fmt::Debug for Cancel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cancel").field("cancelled", &self.is_cancelled()).finish_non_exhaustive()
    }
}

struct Inner {
    cancelled: AtomicBool,
    wake: OwnedFd,
    children: Mutex<Vec<Weak<Inner>>>,
    watches: Mutex<Vec<Weak<dyn Fn() + Send + Sync>>>,
}

/// Keeps the function of a [`Cancel::watch`]: it is called as long as this exists.
pub(crate) struct Watch(#[expect(dead_code, reason = "only kept")] Arc<dyn Fn() + Send + Sync>);

impl Cancel {
    /// A new handle. Fails when the process has no file descriptors left.
    pub fn new() -> std::io::Result<Cancel> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Cancel(Arc::new(Inner {
            cancelled: AtomicBool::new(false),
            wake,
            children: Mutex::default(),
            watches: Mutex::default(),
        })))
    }

    /// A handle that is cancelled with this one, and can be cancelled alone.
    pub(crate) fn child(&self) -> std::io::Result<Cancel> {
        let child = Cancel::new()?;
        let mut children = lock(&self.0.children);
        children.retain(|child| child.strong_count() > 0);
        children.push(Arc::downgrade(&child.0));
        drop(children);
        if self.is_cancelled() {
            child.cancel();
        }
        Ok(child)
    }

    /// Calls this function when the handle is cancelled; at once if it was cancelled already.
    pub(crate) fn watch(&self, act: impl Fn() + Send + Sync + 'static) -> Watch {
        let act: Arc<dyn Fn() + Send + Sync> = Arc::new(act);
        lock(&self.0.watches).push(Arc::downgrade(&act));
        if self.is_cancelled() {
            act();
        }
        Watch(act)
    }

    /// Cancels the move.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
        // Refused only when the counter is at its maximum, where the eventfd is readable as well.
        let _ = rustix::io::write(&self.0.wake, &1u64.to_ne_bytes());
        let children = std::mem::take(&mut *lock(&self.0.children));
        children.iter().filter_map(Weak::upgrade).for_each(|child| Cancel(child).cancel());
        let watches = std::mem::take(&mut *lock(&self.0.watches));
        watches.iter().filter_map(Weak::upgrade).for_each(|act| act());
        limosa_clockwork::wake_polls();
    }

    /// Whether the move was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    /// Waits for this time, or until the move is cancelled. Returns whether it was cancelled.
    pub fn wait(&self, time: Duration) -> bool {
        let deadline = after(limosa_clockwork::now(), time);
        while !self.is_cancelled() {
            let left = deadline.saturating_duration_since(limosa_clockwork::now());
            if left.is_zero() {
                break;
            }
            let mut fds = [PollFd::new(&self.0.wake, PollFlags::IN)];
            // If a signal ends it early, the loop tries again.
            let _ = poll(&mut fds, Some(&timespec(left)));
        }
        self.is_cancelled()
    }
}

impl AsFd for Cancel {
    /// Readable once the move is cancelled.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }
}

/// The moment `time` after another. A moment that the clock cannot express is replaced by one that is a year away.
pub(crate) fn after(moment: Instant, time: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 86_400);
    moment.checked_add(time).or_else(|| moment.checked_add(YEAR)).unwrap_or(moment)
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
    fn a_child_is_cancelled_with_its_parent_and_not_the_other_way_round() {
        let parent = Cancel::new().unwrap();
        let (early, other) = (parent.child().unwrap(), parent.child().unwrap());
        early.cancel();
        assert!(!parent.is_cancelled() && !other.is_cancelled());
        parent.cancel();
        assert!(other.is_cancelled() && parent.child().unwrap().is_cancelled());
    }

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
