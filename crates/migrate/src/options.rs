//! What a caller may choose, and what it may hook into: [`Options`], [`Vmm`], [`Observer`].

use std::num::NonZeroU32;
use std::time::Duration;

use crate::Round;
use crate::report::{Estimate, Phase};
use limosa_stream::{Compression, MigrationId, Totals};

/// What a caller may choose. The default suits a machine in one rack.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether devices that have PRE_COPY use it. Some device servers cannot load what they gave out
    /// in PRE_COPY; without it they still move, with a longer stop.
    pub precopy: bool,
    /// The most links that a move goes over, 1 to [`LINKS_MAX`](limosa_stream::LINKS_MAX): the source opens them, and
    /// the destination takes no more. Of use only where further ones can be had: see
    /// [`Source::send_over`](crate::Source::send_over).
    pub links: NonZeroU32,
    /// Whether the source uses only as many of them as make it faster, by what it measures while memory moves. Otherwise
    /// it uses all.
    pub links_measured: bool,
    /// How a source compresses memory and devices' data, on links and in what it saves; what would not become shorter
    /// goes as it is. A destination takes either. It pays on links that are slower than a core compresses.
    pub compress: Option<Compression>,
    /// On the destination: how many bytes of devices' data may have come and not be loaded, of all devices together.
    /// Each may have an equal part of it, [`WINDOW_BYTES_MIN`](limosa_stream::WINDOW_BYTES_MIN) at least and 4 MiB at
    /// most: less costs speed where the way to the source takes long.
    pub windows_bytes: u64,
    /// When pre-copy stops.
    pub convergence: crate::Convergence,
    /// How long the other side may say nothing. It says that it is alive four times a second, or as often within its own
    /// limit: one below a second has to be the same on both sides.
    pub silence_max: Duration,
    /// How long the other side may take, though alive, to answer an offer or to load.
    pub load_max: Duration,
    /// How long the destination holds for COMMIT, and the source waits for RUNNING.
    pub commit_max: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            precopy: true,
            links: NonZeroU32::MIN,
            links_measured: false,
            compress: None,
            windows_bytes: 32 << 20,
            convergence: crate::Convergence::default(),
            silence_max: Duration::from_secs(30),
            load_max: Duration::from_secs(600),
            commit_max: Duration::from_secs(30),
        }
    }
}

/// The machine around the devices. Every method does nothing unless it is written.
pub trait Vmm: Sync {
    /// On the source, when what the guest dirties cannot be moved fast enough: slow its vCPUs down. `step` counts
    /// these calls from 1; 0 lets them run at full speed again, after the move whatever became of it, and comes
    /// only after others. `false` when they cannot be slowed down further.
    fn throttle(&self, step: u32) -> bool {
        let _ = step;
        false
    }

    /// On the source, before devices stop: stop the vCPUs. An `Err` calls the move off.
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    /// On the source, when the destination has loaded and before it is told to run: note the move's id
    /// where a process that is started anew finds it, for [`InDoubt::recover`](crate::InDoubt::recover).
    /// The guest stands still meanwhile. An `Err` calls the move off.
    fn committing(&self, id: MigrationId) -> Result<(), String> {
        let _ = id;
        Ok(())
    }

    /// On the source, after a move was undone and the devices run again: let the vCPUs go on. Called
    /// only after [`Vmm::stop`] was, also when that refused.
    fn resume(&self) {}

    /// On the destination, after COMMIT and before devices run. An `Err` gives the machine back to
    /// the source.
    fn prepare(&self) -> Result<(), String> {
        Ok(())
    }

    /// On the destination, when the devices run: start the vCPUs.
    fn start(&self) {}
}

/// Watches a move, for a progress bar.
///
/// The calls come from the engine's own threads, which wait for them: they are short, and neither call the engine nor wait
/// for what the engine does. [`Cancel::cancel`](crate::Cancel::cancel) may be called in any of them. No lock of the
/// engine's is rollback meanwhile. What they say is also in the events of `tracing` (`docs/embedding.md: Events`).
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

/// Nobody: a VMM that does nothing, and an observer that does not look.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nobody;

impl Vmm for Nobody {}
impl Observer for Nobody {}
