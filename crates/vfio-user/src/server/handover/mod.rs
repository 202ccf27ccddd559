//! Replacing a server by another process under its clients (`docs/switch-over.md`): [`SwitchOver`] is the old
//! server's side, [`Replacing`] the new server's.
//!
//! All devices of a process are handed over together. While they run, memory, its files, the listeners, and the state
//! of devices with PRE_COPY are transferred. Then every connection stops between two requests, without reading more
//! from its socket; each device is stopped and the rest of its state read, by the arcs of the migration protocol; and
//! the rest is transferred: connections with received and unanswered requests, interrupts, the dirty log.

mod connection;
mod copy;
mod deadline;
mod give;
mod later;
mod listener;
mod loading;
mod new;
mod offer;
mod outgoing;
mod record;
mod regions;
mod signals;
mod take;
mod wiring;
mod workers;

pub(super) use connection::{Adopted, Received};
pub use give::SwitchOver;
pub(super) use later::LaterMemory;
pub use take::{NewDevice, Replaced, Replacing};

use std::path::Path;
use std::time::Duration;

use limosa_switch_over::Refusal;

/// The most devices of a server that is replaced.
pub const DEVICES_MAX: usize = 256;

/// The devices have this much of the freeze to stop.
const STOP_LIMIT: Duration = Duration::from_secs(1);

/// A device that answers at its limit is heard within this time.
const ANSWER_LIMIT: Duration = Duration::from_millis(200);

/// A refusal that names its device by its socket. The number has a meaning only within the switch-over.
fn named(socket: &Path, refusal: Refusal) -> Refusal {
    match refusal.device {
        Some(_) => Refusal::new(format!("device {}: {}", socket.display(), refusal.reason)),
        None => refusal,
    }
}
