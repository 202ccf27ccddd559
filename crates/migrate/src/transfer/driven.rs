//! [`DrivenDevice`]: a device that only the engine is to drive from state to state.
//!
//! Most arcs are legal from more than one state. A device that a guest resets during a move would go on without an error,
//! with a state that is not the one that was saved or loaded. So the engine compares the device's state before each arc,
//! and its reset count after each arc, if the device has one ([`DeviceExt::reset_count`]). Without a count, a reset between
//! the comparison and the arc is noticed only if the arc opens a second session.

use limosa_client::{DataStream, Device, DeviceExt};
use limosa_protocol::State;

use crate::devices::failed;
use crate::error::{Changed, Misbehaviour};
use crate::{Error, Result};

/// A device, and the state to which the engine has driven it.
pub(crate) struct DrivenDevice<'a> {
    device: &'a dyn Device,
    expected: State,
    /// The reset count at the start of the session; `None` without a session, or without a count.
    resets: Option<u64>,
    has_session: bool,
}

impl<'a> DrivenDevice<'a> {
    /// A device that was found in this state.
    pub(crate) fn new(device: &'a dyn Device, found: State) -> DrivenDevice<'a> {
        DrivenDevice { device, expected: found, resets: None, has_session: false }
    }

    pub(crate) fn device(&self) -> &'a dyn Device {
        self.device
    }

    /// Drives the device to a state. Returns the data stream of a session that this opens. An open session goes on.
    pub(crate) fn enter(&mut self, to: State) -> Result<Option<Box<dyn DataStream>>> {
        self.enter_with(to, || ())
    }

    /// The same. Calls `asks` just before the device is asked: from then on it may be in the new state.
    pub(crate) fn enter_with(
        &mut self,
        to: State,
        asks: impl FnOnce(),
    ) -> Result<Option<Box<dyn DataStream>>> {
        self.check_state()?;
        asks();
        let entered = self.device.set_state(to);
        let stream = entered.map_err(|error| failed(self.device, &format!("entering {to}"), error))?;
        self.expected = to;
        let saves = matches!(to, State::PreCopy | State::PreCopyP2p | State::StopCopy);
        match (&stream, saves || to == State::Resuming) {
            (Some(_), true) if self.has_session => return Err(self.changed(Changed::SecondSession(to))),
            (None, true) if !self.has_session => {
                let (device, how) = (self.device.name().into(), Misbehaviour::NoDataStream(to));
                return Err(Error::DeviceMisbehaved { device, how });
            }
            (Some(_), true) => {
                self.has_session = true;
                self.resets = self.count()?;
            }
            _ => self.check_resets()?,
        }
        Ok(stream)
    }

    /// Ends a session that has given no data, and drives the device back to the state in which it was found.
    pub(crate) fn end_session(&mut self, found: State) -> Result<()> {
        self.enter(found)?;
        *self = DrivenDevice::new(self.device, found);
        Ok(())
    }

    /// The state to which the engine has driven it.
    pub(crate) fn expected(&self) -> State {
        self.expected
    }

    /// Checks that only the engine has driven the device since its session opened.
    pub(crate) fn check(&self) -> Result<()> {
        self.check_state()?;
        self.check_resets()
    }

    /// The reason why a call on the device's stream failed. A session that a reset or another client has ended refuses its
    /// calls, and the errno does not say so. A device in ERROR has failed by itself.
    pub(crate) fn why(&self, doing: &str, error: limosa_client::Error) -> Error {
        let changed = if error.errno().is_some() { self.check().err() } else { None };
        match changed {
            Some(Error::DeviceChanged { found: Changed::State { found: State::Error, .. }, .. }) => {}
            Some(changed @ Error::DeviceChanged { .. }) => return changed,
            _ => {}
        }
        failed(self.device, doing, error)
    }

    /// The reset count at the start of the session.
    pub(crate) fn resets(&self) -> Option<u64> {
        self.resets
    }

    fn check_state(&self) -> Result<()> {
        let found = self.device.state().map_err(|error| failed(self.device, "reading its state", error))?;
        if found == self.expected {
            return Ok(());
        }
        Err(self.changed(Changed::State { expected: self.expected, found }))
    }

    fn check_resets(&self) -> Result<()> {
        let Some(before) = self.resets else { return Ok(()) };
        match self.count()? {
            Some(now) if now != before => Err(self.changed(Changed::Reset(now.wrapping_sub(before)))),
            _ => Ok(()),
        }
    }

    fn count(&self) -> Result<Option<u64>> {
        self.device.reset_count().map_err(|error| failed(self.device, "reading its count of resets", error))
    }

    fn changed(&self, found: Changed) -> Error {
        Error::DeviceChanged { device: self.device.name().into(), found }
    }
}
