//! [`Counts`]: a machine's activity so far, for a server's metrics.
//!
//! Arcs are counted where they are walked, with the gate taken, and bytes once for each chunk of a session. Accesses
//! are not counted.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use limosa_protocol::State;
use limosa_protocol::fsm::Arc;

use super::Machine;

/// Counts of a machine's arcs, resets and session bytes since the machine was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Arcs that were tried at least once, in the order in which each was first tried.
    pub arcs: Vec<ArcCount>,
    /// Bytes read from saving sessions.
    pub saved_bytes: u64,
    /// Bytes written to loading sessions.
    pub loaded_bytes: u64,
}

/// The attempts to walk an arc.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ArcCount {
    /// The state in which it began.
    pub from: State,
    /// The state to which it leads.
    pub to: State,
    /// Successful attempts.
    pub walked: u64,
    /// Attempts that the model refused, or that broke the device.
    pub failed: u64,
    /// Total time in the model, including failures.
    pub time: Duration,
}

/// The counters of a machine.
#[derive(Default)]
pub(super) struct Counters {
    arcs: Mutex<Vec<ArcCount>>,
    pub(super) saved_bytes: AtomicU64,
    pub(super) loaded_bytes: AtomicU64,
}

impl Counters {
    /// An arc that began at `since` is over.
    pub(super) fn arc(&self, arc: Arc, since: Instant, walked: bool) {
        let took = since.elapsed();
        let mut arcs = self.arcs.lock().unwrap_or_else(PoisonError::into_inner);
        let at = arcs.iter().position(|count| (count.from, count.to) == (arc.from, arc.to));
        let at = at.unwrap_or_else(|| {
            let (walked, failed, time) = (0, 0, Duration::ZERO);
            arcs.push(ArcCount { from: arc.from, to: arc.to, walked, failed, time });
            arcs.len() - 1
        });
        let count = &mut arcs[at];
        *if walked { &mut count.walked } else { &mut count.failed } += 1;
        count.time += took;
    }
}

impl Machine {
    /// Counts since the machine was made. They do not include the past of a machine whose state was taken over or
    /// loaded.
    pub fn counts(&self) -> Counts {
        let Counters { arcs, saved_bytes, loaded_bytes } = &self.counters;
        Counts {
            arcs: arcs.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            saved_bytes: saved_bytes.load(Relaxed),
            loaded_bytes: loaded_bytes.load(Relaxed),
        }
    }
}
