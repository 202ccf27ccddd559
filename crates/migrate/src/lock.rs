//! One way to take a mutex that is rollback for single steps only.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes it. What a thread that panicked left behind is whole, or is looked at by whoever comes next all the same.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
