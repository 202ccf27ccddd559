//! [`Team`]: how the work of one side's threads ends. The first failure counts, a cancel or a failure wakes all threads, and
//! a panic is a failure like any other.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use limosa_clockwork::{Guard, Monitor, Scope};

use crate::cancel::Watch;
use crate::error::guard;
use crate::lock::lock;
use crate::{Cancel, Error, Result};

/// A value that threads of the team wait for. They are woken when the team's work ends.
pub(crate) type Shared<T> = Arc<Monitor<T>>;

trait Wake: Send + Sync {
    fn wake(&self);
}

impl<T: Send> Wake for Monitor<T> {
    fn wake(&self) {
        // A thread that has checked the value and does not wait yet still holds the lock.
        drop(self.lock());
        self.notify_all();
    }
}

/// The state that the threads of one side share about the end of their work.
pub(crate) struct Team {
    /// Ends every wait. Cancelled by the first failure, by the user's cancel, and at the end.
    ended: Cancel,
    failure: Monitor<Option<Error>>,
    wakeups: Arc<Mutex<Vec<Arc<dyn Wake>>>>,
    _watch: Watch,
}

impl Team {
    /// A team whose work ends at the latest when this handle is cancelled.
    pub(crate) fn new(cancel: Option<&Cancel>) -> Result<Team> {
        let ended = match cancel {
            Some(cancel) => cancel.child(),
            None => Cancel::new(),
        };
        let ended = ended.map_err(|error| Error::Os { doing: "making an event", error })?;
        let wakeups = Arc::<Mutex<Vec<Arc<dyn Wake>>>>::default();
        let watched = Arc::clone(&wakeups);
        let _watch = ended.watch(move || {
            let all = lock(&watched).clone();
            all.iter().for_each(|shared| shared.wake());
        });
        Ok(Team { ended, failure: Monitor::default(), wakeups, _watch })
    }

    /// A value that the team's threads can wait for.
    pub(crate) fn share<T: Send + 'static>(&self, value: T) -> Shared<T> {
        let shared = Arc::new(Monitor::new(value));
        lock(&self.wakeups).push(Arc::clone(&shared) as Arc<dyn Wake>);
        shared
    }

    /// The handle for waits on links: cancelled when the work is to end.
    pub(crate) fn ended(&self) -> &Cancel {
        &self.ended
    }

    /// Fails once the work is to end. The reason is that of [`Team::first_failure`].
    pub(crate) fn check(&self) -> Result<()> {
        if self.ended.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Waits until the condition holds, and returns whether it does before `until`. Fails once the work is to end.
    pub(crate) fn wait<'s, T>(
        &self,
        shared: &'s Monitor<T>,
        mut guard: Guard<'s, T>,
        until: Option<Instant>,
        mut is_done: impl FnMut(&T) -> bool,
    ) -> Result<(Guard<'s, T>, bool)> {
        let mut timed_out = false;
        loop {
            self.check()?;
            if is_done(&guard) {
                return Ok((guard, true));
            }
            if timed_out {
                return Ok((guard, false));
            }
            (guard, timed_out) = shared.wait(guard, until);
        }
    }

    /// Reports a failure. The first failure counts, and ends the work of all threads.
    pub(crate) fn fail(&self, error: Error) {
        {
            let mut failure = self.failure.lock();
            match &*failure {
                // The other side has said why it ended the link.
                Some(Error::Link { .. }) if matches!(error, Error::Aborted { .. }) => *failure = Some(error),
                Some(_) => {}
                None => *failure = Some(error),
            }
        }
        self.end();
    }

    /// Ends the work.
    pub(crate) fn end(&self) {
        self.ended.cancel();
    }

    /// The first failure, or this error if there was none.
    pub(crate) fn first_failure(&self, otherwise: Error) -> Error {
        self.failure.lock().take().unwrap_or(otherwise)
    }

    /// Starts a thread of the team. Its error, or its panic, is the team's failure.
    pub(crate) fn spawn<'scope>(
        &'scope self,
        scope: Scope<'scope, '_>,
        name: String,
        work: impl FnOnce() -> Result<()> + Send + 'scope,
    ) -> Result<()> {
        let body = {
            let name = name.clone();
            move || {
                if let Err(error) = guard(&name, work) {
                    self.fail(error);
                }
            }
        };
        let started = scope.try_spawn(format!("limosa: {name}"), body);
        started.map(drop).map_err(|error| Error::Os { doing: STARTING, error })
    }
}

/// The step of the engine in which the system refused to start a thread.
pub(crate) const STARTING: &str = "starting a thread of the move";

/// Calls a function when it is dropped, also by a panic.
pub(crate) struct OnDrop<F: FnMut()>(pub(crate) F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[cfg(test)]
mod tests {
    use limosa_clockwork::scope;

    use super::*;

    #[test]
    fn the_first_failure_counts_and_wakes_all() {
        let team = Team::new(None).unwrap();
        let never = team.share(false);
        scope(|scope| {
            let (team, never) = (&team, &never);
            for _ in 0..3 {
                team.spawn(scope, "waits".into(), move || {
                    team.wait(never, never.lock(), None, |never| *never).map(drop)
                })
                .unwrap();
            }
            team.spawn(scope, "panics".into(), || panic!("a defect of somebody's")).unwrap();
        });
        let failure = team.first_failure(Error::Cancelled);
        let Error::Panicked { place, message } = failure else { panic!("{failure}") };
        assert_eq!((place.as_str(), message.as_str()), ("panics", "a defect of somebody's"));
        assert!(matches!(team.check(), Err(Error::Cancelled)));
    }

    #[test]
    fn a_user_s_cancel_wakes_what_waits() {
        let cancel = Cancel::new().unwrap();
        let team = Team::new(Some(&cancel)).unwrap();
        let never = team.share(false);
        scope(|scope| {
            let waiting =
                scope.spawn("waits", || team.wait(&never, never.lock(), None, |never| *never).is_err());
            cancel.cancel();
            assert!(waiting.join().unwrap());
        });
    }
}
