//! The hooks of a move: [`Vmm`] stops and starts the machine, [`Observer`] watches.

use limosa_clockwork::catch;
use limosa_stream::{MigrationId, Totals};

use crate::report::{Estimate, Phase};
use crate::{Error, Result as MoveResult, Round};

/// The machine around the devices. The default of every method does nothing.
///
/// A panic in [`Vmm::stop`], [`Vmm::committing`] or [`Vmm::prepare`] counts as a refusal. In the other methods it becomes a
/// note in the report.
pub trait Vmm: Sync {
    /// On the source, if the guest dirties memory or devices faster than they are moved: slow the vCPUs down. `step`
    /// is 1 in the first call, and one more after each call that returned `true`. Returns `false` if the vCPUs cannot be
    /// slowed down further.
    ///
    /// A step of 0 lets the vCPUs run at full speed again. It comes at the end of a move, however the move ended, and only
    /// after other steps.
    fn throttle(&self, step: u32) -> bool {
        let _ = step;
        false
    }

    /// On the source, before devices stop: stop the vCPUs. The downtime begins with this call. An `Err` ends the move, and
    /// [`Vmm::resume`] is called.
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    /// On the source, after the destination has loaded everything and before it is told to run: note the move's id where a
    /// restarted process finds it, for [`InDoubt::recover`](crate::InDoubt::recover). This is part of the downtime. An
    /// `Err` ends the move.
    fn committing(&self, id: MigrationId) -> Result<(), String> {
        let _ = id;
        Ok(())
    }

    /// On the source, after a move was undone and the devices run again: let the vCPUs go on. It is called only if
    /// [`Vmm::stop`] was called, also if that refused.
    fn resume(&self) {}

    /// On the destination, after COMMIT and before the devices run. This is part of the downtime. An `Err` gives the guest
    /// back to the source.
    fn prepare(&self) -> Result<(), String> {
        Ok(())
    }

    /// On the destination, when the devices run: start the vCPUs. The downtime ends with this call.
    fn start(&self) {}
}

/// Watches a move, for a progress bar.
///
/// The engine's threads call these methods and wait for them. An implementation returns quickly. It does not call the engine,
/// except for [`Cancel::cancel`](crate::Cancel::cancel), and does not wait for anything that the engine does. The engine
/// holds no lock during a call. An observer that panics is not called again, and the move is undone if that is still
/// possible. The events of `tracing` tell the same (`docs/embedding.md: Events`).
pub trait Observer: Sync {
    /// A phase begins. Called by the thread that runs [`Source::send`](crate::Source::send) or
    /// [`Destination::receive`](crate::Destination::receive). From the stop on, the call is part of the downtime.
    fn phase(&self, phase: Phase) {
        let _ = phase;
    }

    /// The totals so far, about once for each MiB and at the beginning of each phase. Called by any thread that moves data,
    /// also by two at once, so that a later call may have slightly smaller totals.
    fn moved(&self, totals: Totals) {
        let _ = totals;
    }

    /// A round of memory, or a look at the devices, is over. A destination knows only its number and the dirty memory.
    /// Called by the same thread as [`Observer::phase`].
    fn round(&self, round: &Round) {
        let _ = round;
    }

    /// On the source, after each [`Observer::round`]: what is left, how long that will take, or that there is no end in
    /// sight.
    fn estimate(&self, estimate: &Estimate) {
        let _ = estimate;
    }
}

/// A VMM and an observer that do nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nobody;

impl Vmm for Nobody {}
impl Observer for Nobody {}

/// Calls a hook that may refuse. A panic is an error like a refusal.
pub(crate) fn ask(
    what: &'static str,
    doing: &'static str,
    hook: impl FnOnce() -> Result<(), String>,
) -> MoveResult<()> {
    match catch(hook) {
        Ok(done) => done.map_err(|reason| Error::Vmm { doing, reason }),
        Err(panic) => Err(Error::panicked(what, &panic)),
    }
}

/// Calls a hook that cannot refuse. A panic is returned as a text for a note.
pub(crate) fn tell(what: &'static str, hook: impl FnOnce()) -> Result<(), String> {
    catch(hook).map_err(|panic| Error::panicked(what, &panic).to_string())
}
