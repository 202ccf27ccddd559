//! The way back of a source: every device runs again as it did before, and no dirty page is lost.

use limosa_client::{Device, DeviceExt};
use limosa_protocol::{MigrationFlags, State};

use crate::devices::{MovedDevice, each};
use crate::memory::Memory;
use crate::memory::dirty::Dirty;

/// What a source must remember to go back.
#[derive(Default)]
pub(crate) struct Rollback {
    /// The state in which each device was found; empty for "it ran".
    pub(crate) found: Vec<State>,
    /// The logs, and what was harvested from them.
    pub(crate) dirty: Dirty,
    /// Whether anything was done to the devices that must be undone.
    pub(crate) touched: bool,
    /// How often the VMM was asked to slow its vCPUs down.
    pub(crate) throttled: u32,
    /// Whether the VMM has stopped its vCPUs.
    pub(crate) vmm_stopped: bool,
}

impl Rollback {
    fn found(&self, at: usize) -> State {
        self.found.get(at).copied().unwrap_or(State::Running)
    }

    /// Brings every device back to where it was found: those that are stopped first to RUNNING_P2P, all
    /// of them, then on. A device in ERROR is reset, which is all that can be done with it. Ends the
    /// logs. What could not be done is in the notes.
    pub(crate) fn undo(&mut self, devices: &[MovedDevice<'_>], memory: &mut Memory<'_>) -> Vec<String> {
        each(devices, |at, device| {
            let stopped = device.state().is_ok_and(|state| !state.is_running() && state != State::Error);
            let has_p2p = device.migration_flags().is_ok_and(|flags| flags.contains(MigrationFlags::P2P));
            if stopped && has_p2p && self.found(at).is_running() {
                // If it fails, so does the next step, which says so.
                let _ = device.set_state(State::RunningP2p);
            }
        });
        let done = each(devices, |at, device| return_to(device, self.found(at)));
        let mut notes: Vec<_> = done.into_iter().filter_map(Result::err).collect();
        self.dirty.stop(devices, memory, true, &mut notes);
        notes
    }
}

/// Drives a device to the state, by reset where nothing else helps.
fn return_to(device: &dyn Device, state: State) -> Result<(), String> {
    let name = device.name();
    let Err(error) = device.set_state(state) else { return Ok(()) };
    match device.state() {
        Ok(State::Error) => {}
        Ok(at) => return Err(format!("{name} stays in {at}, it should be in {state}: {error}")),
        Err(_) => return Err(format!("{name}: its state is not known, it should be in {state}: {error}")),
    }
    let reset = device.reset();
    match reset.and_then(|()| device.set_state(state).map(drop)) {
        Ok(()) => Err(format!("{name} was in ERROR and had to be reset: its state is lost ({error})")),
        Err(reset) => Err(format!("{name} is in ERROR and cannot be reset: {reset}")),
    }
}
