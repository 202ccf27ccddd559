//! [`Process`]: tasks of a simulation that crash together. Also the functions by which a task queries the simulator.

use std::rc::Rc;
use std::thread::Builder;
use std::time::Duration;

use super::state::ProcessState;
use super::task::{Task, current};
use crate::thread::Thread;
use crate::{Handle, Scope};

/// A process of the simulation. A thread belongs to the process of the thread that started it.
///
/// All functions panic outside of a simulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process(usize);

impl Process {
    /// Adds a process to the simulation. It has no threads yet.
    ///
    /// # Panics
    ///
    /// Outside of a simulation.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Process {
        let task = here();
        let mut state = task.core().lock();
        state.processes.push(ProcessState::new(name));
        Process(state.processes.len() - 1)
    }

    /// The process of the calling thread.
    ///
    /// # Panics
    ///
    /// Outside of a simulation.
    #[must_use]
    pub fn current() -> Process {
        Process(here().process())
    }

    /// Starts a thread of this process. After a crash, this restarts the process.
    ///
    /// # Panics
    ///
    /// Outside of a simulation, or when the system refused to start the thread.
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
        let name = name.into().replace('\0', " ");
        let child = id.spawn_in(&here(), self.0, scope.threads, Builder::new(), name, f);
        Handle(Thread::Simulated(child.expect("the system starts a thread")))
    }

    /// Refuses threads to this process. From now on, `after` calls of [`Scope::try_spawn`] by its threads succeed, and
    /// all later calls return `EAGAIN`, until [`Process::allow_threads`]. A crash does not lift the limit.
    ///
    /// [`Scope::spawn`] and [`Process::spawn`] are neither refused nor counted.
    pub fn refuse_threads(self, after: u64) {
        here().core().lock().processes[self.0].threads_left = Some(after);
    }

    /// Lifts the limit of [`Process::refuse_threads`].
    pub fn allow_threads(self) {
        here().core().lock().processes[self.0].threads_left = None;
    }

    /// Crashes the process. Each of its threads unwinds from its current call of this crate, or else from its next
    /// one. [`Handle::join`] then returns a payload for which [`is_crash`](super::is_crash) is `true`.
    pub fn crash(self) {
        here().core().lock().crash(self.0);
    }

    /// Number of calls of this crate that the threads of this process have made.
    #[must_use]
    pub fn points(self) -> u64 {
        here().core().lock().processes[self.0].points
    }

    /// Waits until the threads of this process have made `points` calls of this crate, and returns `true` before any
    /// other task runs. Returns `false` when the process cannot get there: no task is ready, and
    /// no wait has a deadline.
    #[track_caller]
    pub fn reaches(self, points: u64) -> bool {
        here().await_points(self.0, points)
    }
}

/// Whether the process of the calling thread has crashed. The thread is unwinding, and its destructors must not have
/// effects that a crashed process could not have.
#[must_use]
pub fn crashing() -> bool {
    current().is_some_and(|task| task.is_crashed())
}

/// A random number below `below`, which the seed determines.
///
/// # Panics
///
/// Outside of a simulation.
#[must_use]
pub fn random(below: u64) -> u64 {
    here().core().lock().program_random.below(below)
}

/// Virtual time since the start of the simulation.
///
/// # Panics
///
/// Outside of a simulation.
#[must_use]
pub fn elapsed() -> Duration {
    here().core().lock().now
}

/// Adds a line to the trace. `note` is called only when the simulation keeps its trace. No-op outside of a simulation.
#[track_caller]
pub fn note(note: impl FnOnce() -> String) {
    if let Some(task) = current() {
        task.note(note);
    }
}

fn here() -> Rc<Task> {
    current().expect("in a simulation")
}
