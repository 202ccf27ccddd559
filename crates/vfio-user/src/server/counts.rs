//! A server's statistics for metrics: its clients, by role, and their requests.
//!
//! A request costs one addition to a counter, for which no thread waits.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use limosa_device::Machine;

use super::doors::Doors;
use crate::codec::Command;

/// Numbers of messages that have a counter; the last one counts all others.
const COMMANDS: usize = 19;

/// The counters of a server.
#[derive(Debug)]
pub(super) struct Counters {
    requests: [AtomicU64; COMMANDS + 1],
    pub(super) refused: AtomicU64,
    pub(super) connections: AtomicU64,
}

impl Default for Counters {
    fn default() -> Counters {
        Counters {
            requests: [const { AtomicU64::new(0) }; COMMANDS + 1],
            refused: AtomicU64::new(0),
            connections: AtomicU64::new(0),
        }
    }
}

impl Counters {
    /// A request has come.
    pub(super) fn request(&self, command: Command) {
        self.requests[usize::from(command.0).min(COMMANDS)].fetch_add(1, Relaxed);
    }
}

/// The clients of a device, by role.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Clients {
    /// The VMM.
    pub vmm: usize,
    /// Clients that prepare to become the VMM after it.
    pub next: usize,
    /// Control clients.
    pub control: usize,
    /// Those that wait for the VMM's place.
    pub waiting: usize,
    /// Clients that have not sent VERSION.
    pub undecided: usize,
}

/// A view of a server that outlives it, for metrics.
#[derive(Clone)]
pub struct Statistics {
    machine: Arc<Machine>,
    doors: Arc<Doors>,
    socket: Option<PathBuf>,
}

impl std::fmt::Debug for Statistics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Statistics").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Statistics {
    pub(super) fn new(machine: &Arc<Machine>, doors: &Arc<Doors>, socket: Option<PathBuf>) -> Statistics {
        Statistics { machine: Arc::clone(machine), doors: Arc::clone(doors), socket }
    }

    /// The device.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Where the server listens; `None` for a socket without a path.
    pub fn socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    /// The clients that are connected now.
    pub fn clients(&self) -> Clients {
        self.doors.clients()
    }

    /// Connections so far, those that another process has served included.
    pub fn connections(&self) -> u64 {
        self.doors.counters.connections.load(Relaxed)
    }

    /// Requests so far, by the name of the message; `unknown` for those that the specification does not assign.
    pub fn requests(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let name = |number: usize| match number {
            COMMANDS => "unknown",
            number => {
                u16::try_from(number).ok().and_then(|number| Command(number).name()).unwrap_or("unknown")
            }
        };
        let requests = self.doors.counters.requests.iter().enumerate();
        // Number 0 is no message: it is one of the unknown.
        let counts = requests.map(move |(number, count)| (name(number), count.load(Relaxed)));
        let (unknown, known): (Vec<_>, Vec<_>) = counts.partition(|(name, _)| *name == "unknown");
        let unknown = unknown.into_iter().map(|(_, count)| count).sum();
        known.into_iter().chain([("unknown", unknown)])
    }

    /// Requests that were refused so far.
    pub fn refused(&self) -> u64 {
        self.doors.counters.refused.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_of_the_specification_has_a_counter_of_its_own() {
        let counters = Counters::default();
        for command in Command::ALL {
            assert!(usize::from(command.0) < COMMANDS, "{command}");
            counters.request(*command);
            assert_eq!(counters.requests[usize::from(command.0)].load(Relaxed), 1, "{command}");
        }
        counters.request(Command(u16::MAX));
        assert_eq!(counters.requests[COMMANDS].load(Relaxed), 1);
    }
}
