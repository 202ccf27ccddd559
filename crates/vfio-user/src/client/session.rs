//! [`Session`]: the open session, and the device's state as known to the client.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use limosa_foreign_fd::Foreign;
use limosa_protocol::State;

/// The session that is open, for streams on other threads.
#[derive(Default)]
pub(super) struct Session {
    /// Grows with every session that opens or ends.
    number: AtomicU64,
    /// The device's state plus one, 0 while it is unknown.
    state: AtomicU32,
    /// The socket for its data, if it does not use messages.
    pub(super) socket: Mutex<Option<Arc<Foreign<UnixStream>>>>,
    changes: Mutex<Changes>,
}

/// The changes of the state, SETs and resets. The answer to a GET of another thread may be older than one of them.
#[derive(Default)]
struct Changes {
    begun: u64,
    under_way: u32,
}

/// A change of the state in progress.
pub(super) struct Change<'a>(&'a Session);

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.0.changes().under_way -= 1;
    }
}

impl Session {
    pub fn number(&self) -> u64 {
        self.number.load(Ordering::SeqCst)
    }

    pub fn state(&self) -> Option<State> {
        State::from_raw(self.state.load(Ordering::SeqCst).wrapping_sub(1))
    }

    pub fn set_state(&self, state: Option<State>) {
        self.state.store(state.map_or(0, |state| state.raw() + 1), Ordering::SeqCst);
    }

    fn changes(&self) -> MutexGuard<'_, Changes> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a change of the state.
    pub fn change(&self) -> Change<'_> {
        let mut changes = self.changes();
        changes.begun += 1;
        changes.under_way += 1;
        drop(changes);
        Change(self)
    }

    /// The number of changes so far; `None` during a change.
    pub fn settled(&self) -> Option<u64> {
        let changes = self.changes();
        (changes.under_way == 0).then_some(changes.begun)
    }

    /// Records the state from a GET that was sent after this number of changes, unless there has been a change
    /// since.
    pub fn learn(&self, state: Option<State>, settled: Option<u64>) {
        let changes = self.changes();
        if changes.under_way > 0 || settled != Some(changes.begun) {
            return;
        }
        if let (Some(known), Some(state)) = (self.state(), state)
            && known != state
            && !(known.is_saving() && state.is_saving())
        {
            self.end();
        }
        self.set_state(state);
    }

    /// Ends the session for streams that are out.
    pub fn end(&self) {
        self.number.fetch_add(1, Ordering::SeqCst);
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// All data of a load has been written: the server first loads the data in flight.
    pub fn finish_load(&self) {
        if let Some(socket) = &*self.socket.lock().unwrap_or_else(PoisonError::into_inner) {
            // It may be shut down already.
            let _ = socket.shutdown(Shutdown::Write);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Another thread's GET was answered STOP, then RESUMING was entered, and only then the answer was looked at: the load's
    /// stream was told that its session had ended.
    #[test]
    fn an_answer_that_is_older_than_a_change_ends_no_session() {
        let session = Session::default();
        session.learn(Some(State::Stop), session.settled());
        assert_eq!(session.state(), Some(State::Stop));
        let settled = session.settled();
        let change = session.change();
        assert_eq!(session.settled(), None);
        session.set_state(Some(State::Resuming));
        let number = session.number();
        for _ in 0..2 {
            session.learn(Some(State::Stop), settled);
            session.learn(Some(State::Stop), None);
            assert_eq!((session.state(), session.number()), (Some(State::Resuming), number));
        }
        drop(change);
        session.learn(Some(State::Stop), settled);
        assert_eq!((session.state(), session.number()), (Some(State::Resuming), number));
        // One that is not ends it.
        session.learn(Some(State::Stop), session.settled());
        assert_eq!((session.state(), session.number()), (Some(State::Stop), number + 1));
    }
}
