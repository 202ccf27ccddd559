//! One way to lock a mutex that is held for single steps only.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks it, also after a thread has panicked with the lock: single steps leave no half-done change behind.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
