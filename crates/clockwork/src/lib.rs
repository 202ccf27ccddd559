//! Threads, waits and time, which a simulation can take over.
//!
//! The engine waits, starts threads and reads the clock through this crate alone. In production these are
//! the standard library's own: [`Monitor`] is a mutex with its condition variable, [`scope()`] is
//! [`std::thread::scope`], [`now`] is [`Instant::now`]. In a simulation (the feature `simulation`) the same
//! calls are the points at which another thread may go on, time is virtual, and chance is the seed's ([`random_bytes`]).

#![forbid(unsafe_code)]

#[cfg(not(feature = "simulation"))]
mod absent;
mod monitor;
#[cfg(feature = "simulation")]
pub mod simulation;
mod thread;

use std::time::{Duration, Instant};

#[cfg(not(feature = "simulation"))]
use absent as hook;
#[cfg(feature = "simulation")]
use simulation::task as hook;

pub use monitor::{Guard, Monitor};
#[cfg(feature = "simulation")]
pub use simulation::Simulation;
pub use thread::{Handle, Scope, scope};

/// What time it is: monotonic, of use in differences only.
#[must_use]
pub fn now() -> Instant {
    match hook::current() {
        Some(task) => task.now(),
        None => Instant::now(),
    }
}

/// Waits for that long.
#[track_caller]
pub fn sleep(time: Duration) {
    match hook::current() {
        Some(task) => task.sleep(time),
        None => std::thread::sleep(time),
    }
}

/// Whether the calling thread belongs to a simulation, where nothing may wait but through this crate.
#[must_use]
pub fn in_simulation() -> bool {
    hook::current().is_some()
}

/// Random bytes that the seed determines, in a simulation; otherwise `None`, for the caller to ask the system.
#[must_use]
pub fn random_bytes() -> Option<[u8; 16]> {
    hook::current().map(|task| task.random_bytes())
}

/// In a simulation: everybody who waits on a [`Monitor`] looks again, because something has changed that no monitor
/// tells of. Otherwise nothing: whoever waits on a file descriptor is woken by it.
#[track_caller]
pub fn wake_all() {
    if let Some(task) = hook::current() {
        task.wake_all();
    }
}
