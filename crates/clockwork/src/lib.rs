//! Threads, waits and time, which a simulation can take over.
//!
//! The engine waits, starts threads and reads the clock through this crate alone. In production these are
//! the standard library's own: [`Monitor`] is a mutex with its condition variable, [`scope`] is
//! [`std::thread::scope`], [`now`] is [`Instant::now`]. In a simulation the same calls are the points at
//! which another thread may go on, and time is virtual.

#![forbid(unsafe_code)]

mod monitor;
mod thread;

use std::time::{Duration, Instant};

pub use monitor::{Guard, Monitor};
pub use thread::{Handle, Scope, scope};

/// What time it is: monotonic, of use in differences only.
#[must_use]
pub fn now() -> Instant {
    Instant::now()
}

/// Waits for that long.
pub fn sleep(time: Duration) {
    std::thread::sleep(time);
}

/// Whether the calling thread belongs to a simulation, where nothing may wait but through this crate.
#[must_use]
pub fn in_simulation() -> bool {
    false
}

/// In a simulation: everybody who waits looks again, because something has changed that no [`Monitor`] tells of.
/// Otherwise nothing: whoever waits on a file descriptor is woken by it.
pub fn wake_all() {}
