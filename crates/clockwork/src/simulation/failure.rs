//! [`Failure`]: why a simulation failed, and the seed that reproduces it.

use std::fmt;
use std::time::Duration;

/// The kinds of failure of a simulation.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum What {
    /// Every task waits, and no wait has a time at which it ends.
    Deadlock,
    /// The simulation exceeded [`Simulation::steps_max`](super::Simulation::steps_max).
    Steps,
    /// Virtual time exceeded [`Simulation::time_max`](super::Simulation::time_max).
    Time,
    /// The function of [`Simulation::watch`](super::Simulation::watch) returned this error.
    Watch(String),
    /// A task panicked with this message and did not catch the panic.
    Panic(String),
}

/// A simulation that failed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Failure {
    /// The seed. The same program fails with it in the same way.
    pub seed: u64,
    /// The kind of failure.
    pub what: What,
    /// Number of steps before the failure.
    pub steps: u64,
    /// Virtual time from the start of the simulation to the failure.
    pub time: Duration,
    /// A line for each task: its name, what it waited for, and the source location of its call.
    pub tasks: Vec<String>,
    /// The trace, if [`Simulation::trace`](super::Simulation::trace) enabled it. Otherwise empty.
    pub trace: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failure { seed, what, steps, time, tasks, .. } = self;
        write!(f, "seed {seed}: ")?;
        match what {
            What::Deadlock => write!(f, "deadlock: every task waits")?,
            What::Steps => write!(f, "more steps than the limit")?,
            What::Time => write!(f, "more virtual time than the limit")?,
            What::Watch(what) => write!(f, "{what}")?,
            What::Panic(what) => write!(f, "a task panicked: {what}")?,
        }
        writeln!(f, " (step {steps}, {time:?})")?;
        tasks.iter().try_for_each(|task| writeln!(f, "  {task}"))
    }
}

impl std::error::Error for Failure {}
