//! The machine around the devices, as the engine asks it to stop and to go on: [`Vmm`].

use limosa_clockwork::catch;
use limosa_stream::MigrationId;

use crate::{Error, Result as MoveResult};

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
    /// where a process that is started anew finds it, for [`InDoubt::recover`](crate::InDoubt::recover). Also before
    /// the snapshot of a guest that stays stopped ([`AfterSave::Stop`](crate::AfterSave::Stop)) is published.
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

/// Nobody: a VMM that does nothing, and an observer that does not look.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nobody;

impl Vmm for Nobody {}

/// Calls a hook that may refuse. A panic in it is an error like a refusal.
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

/// Calls a hook that is only told; what it panics with, in words.
pub(crate) fn tell(what: &'static str, hook: impl FnOnce()) -> Result<(), String> {
    catch(hook).map_err(|panic| Error::panicked(what, &panic).to_string())
}
