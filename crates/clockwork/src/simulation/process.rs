//! [`Process`]: some tasks of a simulation that crash together; and what a task can ask its simulation for.

use std::rc::Rc;
use std::time::Duration;

use super::state::ProcessState;
use super::task::{Task, current};
use crate::thread::Thread;
use crate::{Handle, Scope};

/// A process of the simulation. Threads belong to the process of the thread that starts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process(usize);

impl Process {
    /// A further process.
    ///
    /// # Panics
    ///
    /// Outside of a simulation; this is so of all functions here.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Process {
        let task = here();
        let mut state = task.core().lock();
        state.processes.push(ProcessState { name: name.into(), points: 0 });
        Process(state.processes.len() - 1)
    }

    /// Starts a thread in it, its first one or one more; also after a crash, as its restart.
    #[track_caller]
    pub fn spawn<'scope, R, F>(
        self,
        scope: Scope<'scope, '_>,
        name: impl Into<String>,
        f: F,
    ) -> Handle<'scope, R>
    where
        R: Send + 'scope,
        F: FnOnce() -> R + Send + 'scope,
    {
        let id = scope.simulated.expect("a scope of the simulation");
        Handle(Thread::Simulated(id.spawn_in(&here(), self.0, scope.threads, name.into(), f)))
    }

    /// Crashes it: every thread that it has unwinds at the call of this crate that it is in, or at its next one.
    /// [`Handle::join`] gives a payload of which [`is_crash`](super::is_crash) is true.
    pub fn crash(self) {
        here().core().lock().crash(self.0);
    }

    /// How many calls of this crate its threads have made.
    #[must_use]
    pub fn points(self) -> u64 {
        here().core().lock().processes[self.0].points
    }

    /// Waits for its threads to have made so many calls of this crate, and goes on before anybody else does; `false`
    /// when all others have come to rest before that.
    #[track_caller]
    pub fn reaches(self, points: u64) -> bool {
        here().await_points(self.0, points)
    }
}

/// Whether the calling thread unwinds because its process crashed: what it does now, the process never did.
#[must_use]
pub fn crashing() -> bool {
    current().is_some_and(|task| task.is_crashed())
}

/// A number below this one, which the seed determines.
#[must_use]
pub fn random(below: u64) -> u64 {
    here().core().lock().chance.below(below)
}

/// How much virtual time has passed since the simulation began.
#[must_use]
pub fn elapsed() -> Duration {
    here().core().lock().now
}

/// Adds a line to the trace, when it is kept. Outside of a simulation nothing.
#[track_caller]
pub fn note(note: impl FnOnce() -> String) {
    if let Some(task) = current() {
        task.note(note);
    }
}

fn here() -> Rc<Task> {
    current().expect("in a simulation")
}
