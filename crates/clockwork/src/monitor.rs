//! [`Monitor`]: a value that one thread at a time has, and that others wait for a change of.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Instant;

use crate::hook;

/// A mutex and the condition variable that goes with it.
///
/// A thread that panics with the value in hand leaves it as it is for the next: there is no poison.
#[derive(Default)]
pub struct Monitor<T> {
    value: Mutex<T>,
    changed: Condvar,
}

/// The value of a [`Monitor`], in hand. It may be held across what blocks, such as the writing to a link.
#[must_use = "the value is given back at once when the guard is not kept"]
pub struct Guard<'a, T> {
    value: MutexGuard<'a, T>,
    monitor: &'a Monitor<T>,
    // After `value`: fields are dropped in order.
    _unlocked: Unlocked,
}

/// Tells a simulation that a monitor's value has been given back.
struct Unlocked(usize);

impl<T> Monitor<T> {
    /// A monitor over this value.
    pub const fn new(value: T) -> Monitor<T> {
        Monitor { value: Mutex::new(value), changed: Condvar::new() }
    }

    /// Takes the value in hand, as soon as nobody else has it.
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

    /// Gives the value out of hand until somebody says [`Monitor::notify_all`], or until that moment, and takes it
    /// back; and whether the moment came. It may also return for no reason, so the caller looks again.
    ///
    /// # Panics
    ///
    /// When the guard is another monitor's.
    #[track_caller]
    pub fn wait<'a>(&'a self, guard: Guard<'a, T>, until: Option<Instant>) -> (Guard<'a, T>, bool) {
        assert!(std::ptr::eq(self, guard.monitor), "a guard is waited with on its own monitor");
        if let Some(task) = hook::current() {
            drop(guard);
            let timed_out = task.wait(self.address(), until);
            return (self.lock(), timed_out);
        }
        let Guard { value, .. } = guard;
        let Some(until) = until else {
            return (self.guard(self.changed.wait(value).unwrap_or_else(PoisonError::into_inner)), false);
        };
        let left = until.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout(value, left);
        let (value, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        (self.guard(value), timeout.timed_out())
    }

    /// Wakes everybody who waits on this monitor.
    #[track_caller]
    pub fn notify_all(&self) {
        match hook::current() {
            Some(task) => task.notify(self.address()),
            None => self.changed.notify_all(),
        }
    }

    /// The value, of a monitor that nobody else has.
    pub fn into_inner(self) -> T {
        self.value.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn guard<'a>(&'a self, value: MutexGuard<'a, T>) -> Guard<'a, T> {
        Guard { value, monitor: self, _unlocked: Unlocked(self.address()) }
    }

    /// What tells this monitor from others for as long as somebody borrows it.
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
    fn a_wait_ends_when_somebody_notifies() {
        let turn = Monitor::new(0);
        crate::scope(|scope| {
            let waiter = scope.spawn("waiter", || {
                let mut guard = turn.lock();
                while *guard == 0 {
                    (guard, _) = turn.wait(guard, None);
                }
                *guard
            });
            *turn.lock() = 7;
            turn.notify_all();
            assert_eq!(waiter.join().unwrap(), 7);
        });
        assert_eq!(turn.into_inner(), 7);
    }

    #[test]
    fn a_wait_until_a_moment_ends_then() {
        let nobody = Monitor::new(());
        let until = crate::now() + Duration::from_millis(2);
        let mut guard = nobody.lock();
        loop {
            let timed_out;
            (guard, timed_out) = nobody.wait(guard, Some(until));
            if timed_out {
                break;
            }
        }
        assert!(crate::now() >= until);
    }

    #[test]
    fn a_moment_in_the_past_times_out_at_once() {
        let nobody = Monitor::new(());
        assert!(nobody.wait(nobody.lock(), Some(crate::now())).1);
    }

    #[test]
    fn a_panic_with_the_value_in_hand_leaves_it_to_others() {
        let value = Monitor::new(1);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            *value.lock() = 2;
            let _held = value.lock();
            std::panic::resume_unwind(Box::new(()));
        }));
        assert!(panicked.is_err());
        assert_eq!(*value.lock(), 2);
    }
}
