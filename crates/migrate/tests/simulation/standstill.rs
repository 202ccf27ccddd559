//! How long a guest may stand still (`docs/failure.md: Limits`), against how long it did.

use std::time::Duration;

use limosa_stream::DATA_BYTES_MAX;

use crate::plan::{COMMIT_MAX, Fault, Plan, SILENCE_MAX};

/// What an end takes beside waits for devices and for the other end.
const CONSTANT: Duration = Duration::from_secs(1);

/// From a fault that ends a move until the guest runs again, or is in doubt. `None` for a fault that does not end a move
/// at once, so that only the limit for all of them counts.
fn after(plan: &Plan, fault: Fault) -> Option<Duration> {
    let wait = match fault {
        Fault::Silence(..) | Fault::Stall(..) | Fault::Crash { silent: true, .. } => SILENCE_MAX,
        // It is seen when the frame is there.
        Fault::Flip(..) => plan.links.iter().map(|link| link.time(2 * DATA_BYTES_MAX as u64)).max()?,
        Fault::Cut(_)
        | Fault::Crash { silent: false, .. }
        | Fault::Cancel(_)
        | Fault::NoteFull
        | Fault::PrepareRefused
        | Fault::StopRefused
        | Fault::MemoryFails(_)
        | Fault::DeviceGone(..)
        | Fault::Device(..)
        | Fault::Panic(..) => Duration::ZERO,
        _ => return None,
    };
    Some(wait)
}

/// How long the guest may stand still after the last fault.
pub fn after_faults(plan: &Plan) -> Option<Duration> {
    let waits: Option<Vec<_>> = plan.faults.iter().map(|planned| after(plan, planned.fault)).collect();
    Some(waits?.into_iter().max()? + plan.undo_calls() + CONSTANT)
}

/// How long the guest may stand still, whatever goes wrong.
pub fn whatever_happens(plan: &Plan, standstill_max: Duration) -> Duration {
    standstill_max + COMMIT_MAX + plan.undo_calls() + CONSTANT
}
