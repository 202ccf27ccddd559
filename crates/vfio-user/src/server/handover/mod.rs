//! A server that another process replaces under its running clients (`docs/switch-over.md`): [`SwitchOver`] gives, and
//! [`Replacing`] takes.
//!
//! The devices of a process go together. While they run, memory, its files, the listeners, and the state of devices with PRE_COPY
//! go over. Then every connection stops between two requests, with nothing more read from its socket, each device is stopped and
//! what is left of its state read by the arcs of the migration protocol, and the rest goes: connections with what was received
//! and not answered, interrupts, the dirty log.

mod connection;
mod copy;
mod give;
mod record;
mod take;

pub(super) use connection::{Adopted, Received};
pub use give::SwitchOver;
pub(super) use take::LaterMemory;
pub use take::{Replaced, Replacing};

use std::time::Duration;

/// A device has this much of the freeze to stop.
const STOP_LIMIT: Duration = Duration::from_secs(1);
