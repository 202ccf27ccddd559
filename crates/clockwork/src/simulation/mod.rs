//! A simulation of threads: real ones, of which one runs at a time, in an order that a seed determines, under a
//! virtual clock.
//!
//! Every call of this crate gives the turn away, or may. Who goes next is drawn; when nobody can go on, the clock
//! jumps to the next moment that somebody waits for; when there is none, the simulation has failed and says what every
//! task waits for. The same seed gives the same run, as long as what runs in it
//!
//! - waits, starts threads and reads the clock through this crate alone,
//! - holds no other lock across a call of it,
//! - takes nothing else that differs from run to run (addresses, random numbers, the order of a hash map) for a decision.
//!
//! Tasks belong to [`Process`]es, which [crash](Process::crash) as one and can be started again.
//!
//! ```
//! use std::time::Duration;
//! use limosa_clockwork::{Monitor, Simulation, scope, sleep};
//!
//! let run = Simulation::new(7).run(|| {
//!     let bell = Monitor::new(false);
//!     scope(|scope| {
//!         scope.spawn("ringer", || {
//!             sleep(Duration::from_secs(3600));
//!             *bell.lock() = true;
//!             bell.notify_all();
//!         });
//!         let mut rung = bell.lock();
//!         while !*rung {
//!             (rung, _) = bell.wait(rung, None);
//!         }
//!     });
//! });
//! assert!(run.unwrap().time >= Duration::from_secs(3600));
//! ```

mod failure;
mod process;
mod random;
mod state;
pub(crate) mod task;
mod trace;

use std::panic::Location;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use failure::{Failure, What};
pub use process::{Process, crashing, elapsed, note, random};
pub use task::is_crash;

use state::State;
use task::{Core, SIMULATIONS, Watch};

/// How long a task may go on without a call of this crate, real time: longer, and it waits for what cannot come.
const STUCK_AFTER: Duration = Duration::from_secs(120);

/// A simulation, before it runs.
pub struct Simulation {
    seed: u64,
    steps_max: u64,
    time_max: Duration,
    trace: bool,
    watch: Option<Watch>,
}

/// A simulation that came to its end.
#[derive(Debug)]
#[non_exhaustive]
pub struct Run<T> {
    /// What its main function returned.
    pub value: T,
    /// How many steps there were.
    pub steps: u64,
    /// How much virtual time passed.
    pub time: Duration,
    /// A digest of all that happened: the same in two runs of the same seed.
    pub digest: u64,
    /// All that happened, a line each, when it was [kept](Simulation::trace).
    pub trace: String,
}

impl Simulation {
    /// One whose chances are drawn from this seed.
    #[must_use]
    pub fn new(seed: u64) -> Simulation {
        Simulation {
            seed,
            steps_max: 1_000_000,
            time_max: Duration::from_secs(30 * 86_400),
            trace: false,
            watch: None,
        }
    }

    /// The most steps it may take; a million otherwise.
    #[must_use]
    pub fn steps_max(self, steps_max: u64) -> Simulation {
        Simulation { steps_max, ..self }
    }

    /// The most virtual time it may take; thirty days otherwise.
    #[must_use]
    pub fn time_max(self, time_max: Duration) -> Simulation {
        Simulation { time_max, ..self }
    }

    /// Whether to keep a line about everything that happens.
    #[must_use]
    pub fn trace(self, trace: bool) -> Simulation {
        Simulation { trace, ..self }
    }

    /// Calls this at every step; what it finds wrong ends the simulation. It waits for nothing, and calls
    /// nothing of this crate.
    #[must_use]
    pub fn watch(self, watch: impl FnMut() -> Result<(), String> + Send + 'static) -> Simulation {
        Simulation { watch: Some(Box::new(watch)), ..self }
    }

    /// Runs this function as the first task of the simulation, in the process "world", and all tasks that it starts.
    ///
    /// A task that waits outside of this crate for what another task would have to do stops everything: after two
    /// minutes of real time the program is aborted with a word on which it was.
    ///
    /// # Errors
    ///
    /// A [`Failure`]: nothing could go on, a limit was passed, the watcher found something, or a task panicked.
    pub fn run<T: Send>(self, main: impl FnOnce() -> T + Send) -> Result<Run<T>, Failure> {
        let mut state = State::new(self.seed, self.steps_max, self.time_max, self.trace);
        let (id, go) = state.add_task("main".into(), 0, None, Location::caller());
        let core = Arc::new(Core::new(state, self.watch));
        let result = Mutex::new(None);
        SIMULATIONS.fetch_add(1, Ordering::Relaxed);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                core.run(id, 0, go.clone(), main, &result);
                core.end(id);
            });
            let mut state = core.lock();
            if let Some(task) = state.tasks.get_mut(&id) {
                task.thread = Some(thread.thread().clone());
            }
            if let Some(baton) = state.pick().and_then(|main| state.baton(main)) {
                baton.hand_over();
            }
            let mut before = core.steps.load(Ordering::Relaxed);
            while !state.tasks.is_empty() {
                let waited = core.ended.wait_timeout(state, STUCK_AFTER);
                let timeout;
                (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
                let steps = core.steps.load(Ordering::Relaxed);
                if timeout.timed_out() && steps == before {
                    state.fail(What::Deadlock);
                    eprintln!("a task of the simulation waits outside of clockwork:");
                    eprintln!("{}", state.failure.as_ref().map(Failure::to_string).unwrap_or_default());
                    std::process::abort();
                }
                before = steps;
            }
        });
        SIMULATIONS.fetch_sub(1, Ordering::Relaxed);
        let mut state = core.lock();
        let (steps, time, digest) = (state.steps, state.now, state.trace.digest());
        let trace = state.trace.take_text();
        if let Some(failure) = state.failure.take() {
            return Err(Failure { trace, ..failure });
        }
        match result.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(Ok(value)) => Ok(Run { value, steps, time, digest, trace }),
            _ => unreachable!("the main task has ended, without a panic and without a crash"),
        }
    }
}
