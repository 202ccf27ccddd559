//! [`Monitor`]: a value behind a mutex, with a condition variable to wait for changes of the value.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Instant;

use crate::hook;

/// A mutex that owns a value, and its condition variable.
///
/// The mutex is never poisoned: when a thread panics with the lock held, the next thread finds the value as the panic
/// left it.
#[derive(Default)]
pub struct Monitor<T> {
    value: Mutex<T>,
    changed: Condvar,
    /// The number of threads that wait. A condition variable would ask the system to wake threads even if there are none.
    waiting: AtomicUsize,
}

/// A locked [`Monitor`]. A thread may hold the lock while it blocks, as in a write to a link.
#[must_use = "dropping the guard unlocks the monitor"]
pub struct Guard<'a, T> {
    value: MutexGuard<'a, T>,
    monitor: &'a Monitor<T>,
    // Declared after `value`, so that the mutex is unlocked before the report.
    _unlocked: Unlocked,
}

/// Reports to the simulator, when it is dropped, that the monitor at this address is unlocked.
struct Unlocked(usize);

impl<T> Monitor<T> {
    /// A monitor that owns `value`.
    pub const fn new(value: T) -> Monitor<T> {
        Monitor { value: Mutex::new(value), changed: Condvar::new(), waiting: AtomicUsize::new(0) }
    }

    /// Locks the monitor; blocks while another thread holds the lock.
    #[track_caller]
    pub fn lock(&self) -> Guard<'_, T> {
        match hook::current() {
            Some(task) => self.guard(task.lock(self.address(), || match self.value.try_lock() {
                Ok(value) => Some(value),
                Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            })),
            None => self.guard(self.value.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }

    /// Unlocks the monitor, waits for [`Monitor::notify_all`] or for the time `until`, and locks the monitor again.
    /// The flag is `true` when the wait timed out.
    ///
    /// A wait may also end without a notification (a spurious wake-up), so the caller checks its condition again.
    ///
    /// # Panics
    ///
    /// When the guard belongs to another monitor.
    #[track_caller]
    pub fn wait<'a>(&'a self, guard: Guard<'a, T>, until: Option<Instant>) -> (Guard<'a, T>, bool) {
        self.wait_with(guard, until, false)
    }

    /// A [`Monitor::wait`] that stands for a `poll` of file descriptors. In a simulation,
    /// [`wake_polls`](crate::wake_polls) ends it as well. Outside of a simulation it is the same as [`Monitor::wait`].
    ///
    /// # Panics
    ///
    /// When the guard belongs to another monitor.
    #[track_caller]
    pub fn wait_as_poll<'a>(&'a self, guard: Guard<'a, T>, until: Option<Instant>) -> (Guard<'a, T>, bool) {
        self.wait_with(guard, until, true)
    }

    #[track_caller]
    fn wait_with<'a>(
        &'a self,
        guard: Guard<'a, T>,
        until: Option<Instant>,
        as_poll: bool,
    ) -> (Guard<'a, T>, bool) {
        assert!(std::ptr::eq(self, guard.monitor), "the guard belongs to another monitor");
        if let Some(task) = hook::current() {
            // The task keeps running until its wait begins, so no notification is lost in between.
            drop(guard);
            let timed_out = task.wait(self.address(), until, as_poll);
            return (self.lock(), timed_out);
        }
        let Guard { value, .. } = guard;
        // Counted with the lock held, so that a thread that changes the value afterwards finds this one counted.
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let (value, timed_out) = match until {
            None => (self.changed.wait(value).unwrap_or_else(PoisonError::into_inner), false),
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                let waited = self.changed.wait_timeout(value, left);
                let (value, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
                (value, timeout.timed_out())
            }
        };
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        (self.guard(value), timed_out)
    }

    /// Ends all waits on this monitor. The caller has changed the value before, with the lock held.
    #[track_caller]
    pub fn notify_all(&self) {
        match hook::current() {
            Some(task) => task.notify(self.address()),
            None if self.waiting.load(Ordering::Relaxed) > 0 => self.changed.notify_all(),
            None => {}
        }
    }

    /// Consumes the monitor and returns its value.
    pub fn into_inner(self) -> T {
        self.value.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn guard<'a>(&'a self, value: MutexGuard<'a, T>) -> Guard<'a, T> {
        Guard { value, monitor: self, _unlocked: Unlocked(self.address()) }
    }

    /// Identifies the monitor while it is borrowed.
    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

impl Drop for Unlocked {
    fn drop(&mut self) {
        if let Some(task) = hook::current() {
            task.unlocked(self.0);
        }
    }
}

impl<T> fmt::Debug for Monitor<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").finish_non_exhaustive()
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

impl<T: fmt::Debug> fmt::Debug for Guard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_notification_ends_a_wait() {
        let number = Monitor::new(0);
        crate::scope(|scope| {
            let waiter = scope.spawn("waiter", || {
                let mut guard = number.lock();
                while *guard == 0 {
                    (guard, _) = number.wait(guard, None);
                }
                *guard
            });
            *number.lock() = 7;
            number.notify_all();
            assert_eq!(waiter.join().unwrap(), 7);
        });
        assert_eq!(number.into_inner(), 7);
    }

    #[test]
    fn of_many_threads_that_hand_a_turn_round_none_waits_for_ever() {
        const THREADS: usize = 4;
        let turn = Monitor::new(0);
        crate::scope(|scope| {
            for own in 0..THREADS {
                let turn = &turn;
                scope.spawn("thread", move || {
                    for round in 0..2_000 {
                        let mut guard = turn.lock();
                        while *guard != round * THREADS + own {
                            // Some of these waits end by themselves, just as they are notified.
                            let until = (own == 0).then(crate::now);
                            (guard, _) = turn.wait(guard, until);
                        }
                        *guard += 1;
                        drop(guard);
                        turn.notify_all();
                    }
                });
            }
        });
        assert_eq!(turn.waiting.load(Ordering::Relaxed), 0);
        assert_eq!(turn.into_inner(), 2_000 * THREADS);
    }

    #[test]
    fn a_wait_ends_when_its_time_has_come() {
        let monitor = Monitor::new(());
        let until = crate::now() + Duration::from_millis(2);
        let mut guard = monitor.lock();
        loop {
            let timed_out;
            (guard, timed_out) = monitor.wait(guard, Some(until));
            if timed_out {
                break;
            }
        }
        assert!(crate::now() >= until);
    }

    #[test]
    fn a_wait_until_a_past_time_times_out_at_once() {
        let monitor = Monitor::new(());
        assert!(monitor.wait(monitor.lock(), Some(crate::now())).1);
    }

    #[test]
    fn a_panic_with_the_lock_held_does_not_poison_the_monitor() {
        let value = Monitor::new(1);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            *value.lock() = 2;
            let _guard = value.lock();
            std::panic::resume_unwind(Box::new(()));
        }));
        assert!(panicked.is_err());
        assert_eq!(*value.lock(), 2);
    }
}
