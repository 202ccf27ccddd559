//! Threads, waits and time that a deterministic simulation can replace.
//!
//! The engine starts threads, waits and reads the clock only through this crate. In production the calls are the
//! standard library's: [`Monitor`] is a mutex and a condition variable, [`scope()`] is [`std::thread::scope`], and
//! [`now`] is [`Instant::now`]. In a simulation (feature `simulation`) each call is a point at which the simulator may
//! run another thread, time is virtual, and random numbers come from the seed ([`random_bytes`]).

#![forbid(unsafe_code)]

#[cfg(not(feature = "simulation"))]
mod absent;
mod monitor;
mod panic;
#[cfg(feature = "simulation")]
pub mod simulation;
mod thread;

use std::time::{Duration, Instant};

#[cfg(not(feature = "simulation"))]
use absent as hook;
#[cfg(feature = "simulation")]
use simulation::task as hook;

pub use monitor::{Guard, Monitor};
pub use panic::{Panic, catch};
#[cfg(feature = "simulation")]
pub use simulation::Simulation;
pub use thread::{Handle, Scope, scope};

/// The current time of a monotonic clock. Only differences between two results have a meaning.
#[must_use]
pub fn now() -> Instant {
    match hook::current() {
        Some(task) => task.now(),
        None => Instant::now(),
    }
}

/// Blocks the calling thread for at least `time`.
#[track_caller]
pub fn sleep(time: Duration) {
    match hook::current() {
        Some(task) => task.sleep(time),
        None => std::thread::sleep(time),
    }
}

/// Whether the calling thread is part of a simulation. Such a thread may block only in calls of this crate.
#[must_use]
pub fn in_simulation() -> bool {
    hook::current().is_some()
}

/// Random bytes that the simulation's seed determines. `None` outside of a simulation: the caller asks the system.
#[must_use]
pub fn random_bytes() -> Option<[u8; 16]> {
    hook::current().map(|task| task.random_bytes())
}

/// Ends every [`Monitor::wait_as_poll`] of the simulation. The caller has made a file descriptor ready that these
/// waits stand for, such as an eventfd. No-op outside of a simulation, where the kernel wakes a thread in `poll`.
#[track_caller]
pub fn wake_polls() {
    if let Some(task) = hook::current() {
        task.wake_polls();
    }
}

/// Ends every wait on every [`Monitor`] of the simulation. No-op outside of a simulation.
///
/// This also ends waits whose notification the program forgot, and so hides that defect. [`wake_polls`] ends only the
/// waits that a file descriptor would end.
#[track_caller]
pub fn wake_all() {
    if let Some(task) = hook::current() {
        task.wake_all();
    }
}
