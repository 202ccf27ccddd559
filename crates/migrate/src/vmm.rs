//! The machine around the devices, as the engine asks it to stop and to go on: [`Vmm`].

use limosa_clockwork::catch;

use crate::{CommitNote, Error, Result as MoveResult};

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

    /// On the source, before devices stop: stop the vCPUs, if they do not stand still already. The downtime begins with this
    /// call. An `Err` ends the move, and [`Vmm::resume`] is called.
    fn stop(&self) -> Result<(), String> {
        Ok(())
    }

    /// On the source, when the destination has loaded and before it is told to run: keep the note where a restarted
    /// process finds it, for [`InDoubt::recover`](crate::InDoubt::recover), and where only the machine's owner can read
    /// it. Also before the snapshot of a guest that stays stopped ([`AfterSave::Stop`](crate::AfterSave::Stop)) is
    /// published. The guest stands still meanwhile. An `Err` calls the move off.
    fn committing(&self, note: &CommitNote) -> Result<(), String> {
        let _ = note;
        Ok(())
    }

    /// On the source, when a move is undone, before its devices return to their state: undo what [`Vmm::committing`]
    /// did to them. It is called however far the move came, also by [`Source::resolve`](crate::Source::resolve) and
    /// [`Source::decide`](crate::Source::decide), and after a save whose guest goes on.
    fn undoing(&self) {}

    /// On the source, after a move was undone and the devices run again: resume the vCPUs that [`Vmm::stop`] has
    /// stopped, and no others. Called only if [`Vmm::stop`] was called, even if that refused.
    fn resume(&self) {}

    /// On the destination, after COMMIT and before the devices run. This is part of the downtime. An `Err` gives the guest
    /// back to the source.
    fn prepare(&self) -> Result<(), String> {
        Ok(())
    }

    /// On the destination, when the devices run: start the vCPUs. The downtime ends with this call. It is not called where
    /// nothing is to run ([`Received::Stopped`](crate::Received::Stopped)), and neither is [`Vmm::prepare`].
    fn start(&self) {}
}

/// A VMM that does nothing, and an observer that ignores what it is told.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nobody;

impl Vmm for Nobody {}

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
