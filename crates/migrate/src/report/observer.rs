//! [`Observer`]: a caller's view of a move in progress.

use limosa_stream::Totals;

use super::{Estimate, Phase};
use crate::protocol::Round;
use crate::vmm::Nobody;

/// Watches a move, for a progress bar.
///
/// The engine's threads make these calls and wait for them. An implementation must be short, and must neither call the
/// engine nor wait for anything that the engine does. [`Cancel::cancel`](crate::Cancel::cancel) may be called in any of
/// them. The engine holds no lock meanwhile. The `tracing` events carry the same information
/// (`docs/embedding.md: Events`).
pub trait Observer: Sync {
    /// A phase begins. Called by the thread that runs [`Source::send`](crate::Source::send) or
    /// [`Destination::receive`](crate::Destination::receive), or on the destination by a thread that reads a link;
    /// never by two at once. During the stop, the guest waits for this call too.
    fn phase(&self, phase: Phase) {
        let _ = phase;
    }

    /// What has been moved so far, about once for each MiB and at the beginning and end of a phase. Called by any
    /// thread that moves data, also by two at once, so that a later call may report slightly less.
    fn moved(&self, totals: Totals) {
        let _ = totals;
    }

    /// A round of pre-copy is over. A destination knows its number and the dirty memory only. From the same thread as
    /// [`Observer::phase`].
    fn round(&self, round: &Round) {
        let _ = round;
    }

    /// On the source after each round and its [`Observer::round`]: what is left, and how long that will take or that it
    /// will never end.
    fn estimate(&self, estimate: &Estimate) {
        let _ = estimate;
    }
}

impl Observer for Nobody {}
