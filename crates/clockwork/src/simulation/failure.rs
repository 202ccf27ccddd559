//! Why a simulation failed, with what it takes to see it again.

use std::fmt;
use std::time::Duration;

/// What must not happen in a simulation, and did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum What {
    /// Every task waits for another one.
    Deadlock,
    /// There were more steps than the limit allows.
    Steps,
    /// Virtual time passed the limit.
    Time,
    /// The watcher found something wrong.
    Watch(String),
    /// A task panicked.
    Panic(String),
}

/// A simulation that failed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Failure {
    /// The seed; with the same program it leads here again.
    pub seed: u64,
    /// What went wrong.
    pub what: What,
    /// After how many steps.
    pub steps: u64,
    /// After how much virtual time.
    pub time: Duration,
    /// Every task, and what it waited for.
    pub tasks: Vec<String>,
    /// All that happened, when the trace was kept.
    pub trace: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Failure { seed, what, steps, time, tasks, .. } = self;
        write!(f, "seed {seed}: ")?;
        match what {
            What::Deadlock => write!(f, "nothing can ever go on")?,
            What::Steps => write!(f, "no end within the limit of steps")?,
            What::Time => write!(f, "no end within the limit of virtual time")?,
            What::Watch(what) => write!(f, "{what}")?,
            What::Panic(what) => write!(f, "a panic: {what}")?,
        }
        writeln!(f, " (step {steps}, {time:?})")?;
        tasks.iter().try_for_each(|task| writeln!(f, "  {task}"))
    }
}

impl std::error::Error for Failure {}
