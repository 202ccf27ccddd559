//! [`Context`]: what all parts of one side of a move refer to.

use crate::devices::MovedDevice;
use crate::report::{Recorder, Side};
use crate::{Cancel, Observer, Options};

/// The options, the report and the cancel handle of one side.
pub(crate) struct Context<'a> {
    pub(crate) options: &'a Options,
    pub(crate) recorder: Recorder<'a>,
    /// Ends every wait until the commit.
    pub(crate) cancel: Option<&'a Cancel>,
}

impl<'a> Context<'a> {
    pub(crate) fn new(
        side: Side,
        devices: &[MovedDevice<'_>],
        options: &'a Options,
        observer: &'a dyn Observer,
        cancel: Option<&'a Cancel>,
    ) -> Context<'a> {
        let names = devices.iter().map(|moved| moved.device.name().into());
        Context { options, recorder: Recorder::new(side, options, observer, names), cancel }
    }
}
