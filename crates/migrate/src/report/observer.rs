//! [`Observer`]: a caller's view of a move that is under way.

use limosa_stream::Totals;

use super::{Estimate, Phase};
use crate::protocol::Round;
use crate::vmm::Nobody;

/// Watches a move, for a progress bar.
///
/// The calls come from the engine's own threads, which wait for them: they are short, and neither call the engine nor wait
/// for what the engine does. [`Cancel::cancel`](crate::Cancel::cancel) may be called in any of them. No lock of the
/// engine's is held meanwhile. What they say is also in the events of `tracing` (`docs/embedding.md: Events`).
pub trait Observer: Sync {
    /// A phase begins. From the one thread that runs [`Source::send`](crate::Source::send) or
    /// [`Destination::receive`](crate::Destination::receive), or on the destination from one that reads a link; never
    /// from two at once. During the stop the guest waits for this, too.
    fn phase(&self, phase: Phase) {
        let _ = phase;
    }

    /// What has been moved so far, about once for each MiB and at the beginning and end of a phase. From any thread that
    /// moves data, also from two at once, so that a later call may tell of slightly less.
    fn moved(&self, totals: Totals) {
        let _ = totals;
    }

    /// A round of pre-copy is over. A destination knows its number and the dirty memory only. From the same thread as
    /// [`Observer::phase`].
    fn round(&self, round: &Round) {
        let _ = round;
    }

    /// On the source after each round, behind [`Observer::round`]: what is left, how long that will take, or that it will
    /// not come to an end.
    fn estimate(&self, estimate: &Estimate) {
        let _ = estimate;
    }
}

impl Observer for Nobody {}
