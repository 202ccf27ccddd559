//! A simulation of threads. The threads are real, but only one of them runs at a time, in an order that a seed
//! determines, under a virtual clock.
//!
//! At each call of this crate the simulator may let another task (a thread of the simulation) run, and chooses it at
//! random. When all tasks wait, the clock jumps to the earliest deadline. When there is no deadline either, the
//! simulation has failed, and the [`Failure`] lists what each task waits for. The same seed gives the same run, as long
//! as the program
//!
//! - waits, starts threads and reads the clock only through this crate,
//! - holds no lock of another kind across a call of this crate,
//! - makes no decision that depends on an address, a random number of the system or the order of a hash map.
//!
//! Tasks belong to [`Process`]es. The tasks of a process [crash](Process::crash) together, and the process can be
//! started again.
//!
//! A program must survive spurious wake-ups, but a spurious wake-up also hides a forgotten notification. So half of the
//! seeds have none, and the others end one wait in 16 to one in 4096 spuriously.
//!
//! ```
//! use std::time::Duration;
//! use limosa_clockwork::{Monitor, Simulation, scope, sleep};
//!
//! let run = Simulation::new(7).run(|| {
//!     let flag = Monitor::new(false);
//!     scope(|scope| {
//!         scope.spawn("sender", || {
//!             sleep(Duration::from_secs(3600));
//!             *flag.lock() = true;
//!             flag.notify_all();
//!         });
//!         let mut is_set = flag.lock();
//!         while !*is_set {
//!             (is_set, _) = flag.wait(is_set, None);
//!         }
//!     });
//! });
//! assert!(run.unwrap().time >= Duration::from_secs(3600));
//! ```

mod baton;
mod failure;
mod process;
mod random;
mod state;
pub(crate) mod task;
mod trace;
mod waiting;

use std::panic::Location;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use failure::{Failure, What};
pub use process::{Process, crashing, elapsed, note, random};
pub use task::is_crash;

use baton::Baton;
use state::{Defects, Settings, State};
use task::{Core, SIMULATIONS, Watch};

/// Longest real time that a task may run without a call of this crate. A task that takes longer is assumed to block
/// outside of this crate, where no other task can wake it.
const STUCK_AFTER: Duration = Duration::from_secs(120);

/// The settings of a simulation.
pub struct Simulation {
    seed: u64,
    settings: Settings,
    trace: bool,
    watch: Option<Watch>,
    defects: Defects,
}

/// The result of a simulation that did not fail.
#[derive(Debug)]
#[non_exhaustive]
pub struct Run<T> {
    /// The result of the main function.
    pub value: T,
    /// Number of steps.
    pub steps: u64,
    /// Virtual time that passed.
    pub time: Duration,
    /// A digest of all events. Two runs of the same seed have the same digest.
    pub digest: u64,
    /// A line for each event, if [`Simulation::trace`] enabled it. Otherwise empty.
    pub trace: String,
}

impl Simulation {
    /// A simulation in which `seed` determines every random choice.
    #[must_use]
    pub fn new(seed: u64) -> Simulation {
        let settings = Settings {
            steps_max: 1_000_000,
            time_max: Duration::from_secs(30 * 86_400),
            spurious_one_in: state::draw_spurious_one_in(seed),
        };
        Simulation { seed, settings, trace: false, watch: None, defects: Defects::default() }
    }

    /// Largest number of steps; more are a failure. The default is a million.
    #[must_use]
    pub fn steps_max(mut self, steps_max: u64) -> Simulation {
        self.settings.steps_max = steps_max;
        self
    }

    /// Longest virtual time; more is a failure. The default is thirty days.
    #[must_use]
    pub fn time_max(mut self, time_max: Duration) -> Simulation {
        self.settings.time_max = time_max;
        self
    }

    /// The rate of spurious wake-ups: on average one wait in this number ends without a notification; `None` for no
    /// wait. The default depends on the seed: `None` for half of the seeds, 16 to 4096 for the others.
    #[must_use]
    pub fn spurious_one_in(mut self, spurious_one_in: Option<u64>) -> Simulation {
        self.settings.spurious_one_in = spurious_one_in;
        self
    }

    /// Whether to keep the trace, a line for each event.
    #[must_use]
    pub fn trace(self, trace: bool) -> Simulation {
        Simulation { trace, ..self }
    }

    /// Gives the program a defect: the calls of [`Monitor::notify_all`](crate::Monitor::notify_all) in this line of the
    /// file whose name ends so have no effect. A test that its seeds find the defect leaves spurious wake-ups out.
    #[must_use]
    pub fn forgetting_notifications(mut self, file: impl Into<String>, line: u32) -> Simulation {
        self.defects.forgotten = Some((file.into(), line));
        self
    }

    /// Gives the program a defect: [`catch`](crate::catch) catches no panic.
    #[must_use]
    pub fn letting_panics_escape(mut self) -> Simulation {
        self.defects.panics_escape = true;
        self
    }

    /// Calls `watch` at every step. An error that it returns fails the simulation. The function must not block. Its
    /// calls of this crate are outside of the simulation.
    #[must_use]
    pub fn watch(self, watch: impl FnMut() -> Result<(), String> + Send + 'static) -> Simulation {
        Simulation { watch: Some(Box::new(watch)), ..self }
    }

    /// Runs `main` as the first task of the simulation, in the process "world", and all tasks that it starts.
    ///
    /// A task that blocks outside of this crate stops the simulation. After two minutes of real time without a step,
    /// the program prints the tasks and aborts.
    ///
    /// # Errors
    ///
    /// A [`Failure`]: a deadlock, an exceeded limit, an error of the watching function, or a panic of a task.
    pub fn run<T: Send>(self, main: impl FnOnce() -> T + Send) -> Result<Run<T>, Failure> {
        let mut state = State::new(self.seed, self.settings, self.trace);
        state.defects = self.defects;
        let id = state.next_id();
        let go = Arc::new(AtomicBool::new(false));
        let core = Arc::new(Core::new(state, self.watch));
        let result = Mutex::new(None);
        SIMULATIONS.fetch_add(1, Ordering::Relaxed);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                core.run(id, 0, go.clone(), main, &result);
                core.end(id);
            });
            let baton = Baton::new(go.clone(), thread.thread().clone());
            let mut state = core.lock();
            state.add_task(id, "main", 0, None, baton, Location::caller());
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
                    eprintln!("a task of the simulation blocks outside of limosa-clockwork:");
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
