//! [`WayBack`]: how a device of a source returns to the state in which it was found, when the move is undone.

use limosa_client::{Device, DeviceExt};
use limosa_clockwork::catch;
use limosa_protocol::{MigrationFlags, State};

use crate::report::{Loss, Unrecovered};

/// A device on its way back.
pub(crate) struct WayBack<'d> {
    device: &'d dyn Device,
    found: State,
    /// Whether the engine has stopped the device.
    is_stopped: bool,
    /// How many times the device had been reset before the first look at its state; `None` if that is not known.
    resets: Option<u64>,
    /// How many times it had been reset when its session opened.
    resets_before: Option<u64>,
}

impl<'d> WayBack<'d> {
    pub(crate) fn new(device: &'d dyn Device, found: State, is_stopped: bool) -> WayBack<'d> {
        // A device that runs may be reset by its guest.
        let count = || catch(|| device.reset_count()).ok()?.ok()?;
        let resets = if is_stopped { count() } else { None };
        WayBack { device, found, is_stopped, resets, resets_before: None }
    }

    /// The same, of a device that had been reset this number of times when its session opened.
    pub(crate) fn with_resets_before(self, resets_before: Option<u64>) -> WayBack<'d> {
        WayBack { resets_before, ..self }
    }

    /// Drives a device that is stopped to RUNNING_P2P, if it has that state and was found running. If the engine has stopped
    /// the device and it runs, somebody else has reset it; unless its reset count says that it was not, and its server has
    /// led it back for its VMM.
    pub(crate) fn to_p2p(&self) -> Option<Unrecovered> {
        let (device, state) = (self.device, self.device.state().ok()?);
        if self.is_stopped && state.is_running() {
            if self.resets.is_some() && self.resets == self.resets_before {
                return None;
            }
            return self.lost(Loss::WasReset, format!("it is in {state}"));
        }
        let has_p2p = device.migration_flags().is_ok_and(|flags| flags.contains(MigrationFlags::P2P));
        if !state.is_running() && state != State::Error && has_p2p && self.found.is_running() {
            // If this fails, so does the next arc, which reports it.
            let _ = device.set_state(State::RunningP2p);
        }
        None
    }

    /// Drives the device to the state in which it was found, after a reset if it is in ERROR. The result says what was lost.
    pub(crate) fn to_the_end(&self) -> Option<Unrecovered> {
        let (device, state) = (self.device, self.found);
        let Err(error) = device.set_state(state) else { return self.reset_meanwhile() };
        match device.state() {
            Ok(State::Error) => {}
            Ok(found) => return self.lost(Loss::StaysIn { found, wanted: state }, error.to_string()),
            Err(_) => return self.lost(Loss::Unknown, error.to_string()),
        }
        match device.reset().and_then(|()| device.set_state(state).map(drop)) {
            Ok(()) => self.lost(Loss::StateLost, error.to_string()),
            Err(reset) => self.lost(Loss::StaysIn { found: State::Error, wanted: state }, reset.to_string()),
        }
    }

    /// Whether the device was reset since the first look at its state. The arcs are legal for a device that was.
    fn reset_meanwhile(&self) -> Option<Unrecovered> {
        let before = self.resets?;
        let resets = self.device.reset_count().ok()??.wrapping_sub(before);
        if resets == 0 {
            return None;
        }
        self.lost(Loss::WasReset, format!("reset {resets} times on its way back"))
    }

    fn lost(&self, loss: Loss, why: String) -> Option<Unrecovered> {
        Some(Unrecovered { device: self.device.name().into(), loss, why })
    }
}
