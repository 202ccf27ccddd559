//! [`Gate`]: accesses and session data run concurrently, arcs and resets exclusively.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use limosa_guest_memory::{ManyReaders, ReadGuard, WriteGuard};
use limosa_protocol::Errno;

/// A lock with a time limit for exclusive holders.
#[derive(Default)]
pub(super) struct Gate {
    passing: ManyReaders<()>,
    holder: Mutex<Holder>,
    free: Condvar,
}

#[derive(Default)]
struct Holder {
    /// An exclusive holder has the gate, or waits for the others to leave.
    is_there: bool,
    /// The number of those that wait until there is none.
    waiting: usize,
}

/// Exclusive access: no other call is in progress.
pub(super) struct Alone<'a> {
    gate: &'a Gate,
    passing: Option<WriteGuard<'a, ()>>,
}

impl Gate {
    /// For a call that may run concurrently with others of its kind.
    pub(super) fn pass(&self) -> ReadGuard<'_, ()> {
        self.passing.read()
    }

    /// For a call that needs exclusive access: ETIMEDOUT if the others have not returned by `until`.
    pub(super) fn alone(&self, until: Instant) -> Result<Alone<'_>, Errno> {
        let mut holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        while holder.is_there {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Errno::ETIMEDOUT);
            }
            holder.waiting += 1;
            holder = self.free.wait_timeout(holder, left).unwrap_or_else(PoisonError::into_inner).0;
            holder.waiting -= 1;
        }
        holder.is_there = true;
        drop(holder);
        let mut alone = Alone { gate: self, passing: None };
        alone.passing = Some(self.passing.write_until(until).ok_or(Errno::ETIMEDOUT)?);
        Ok(alone)
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        drop(self.passing.take());
        let mut holder = self.gate.holder.lock().unwrap_or_else(PoisonError::into_inner);
        holder.is_there = false;
        let is_awaited = holder.waiting > 0;
        drop(holder);
        if is_awaited {
            self.gate.free.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_wants_to_be_alone_gives_up_when_a_call_does_not_return_and_lets_others_pass() {
        let gate = Gate::default();
        let passing = gate.pass();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..2 {
                    let until = Instant::now() + Duration::from_millis(20);
                    assert_eq!(gate.alone(until).err(), Some(Errno::ETIMEDOUT));
                }
                drop(gate.pass());
            });
        });
        drop(passing);
        let alone = gate.alone(Instant::now() + Duration::from_secs(60)).unwrap();
        std::thread::scope(|scope| {
            let another = scope.spawn(|| gate.alone(Instant::now() + Duration::from_secs(60)).map(drop));
            drop(alone);
            assert_eq!(another.join().unwrap(), Ok(()));
        });
    }
}
