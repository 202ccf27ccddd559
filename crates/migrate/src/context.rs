//! [`Context`]: what all parts of one side of a move refer to.

use crate::devices::MovedDevice;
use crate::report::{Recorder, Side};
use crate::{Cancel, Observer, Options};

/// The options, the report and the cancel handle of one side.
pub(crate) struct Context<'a> {
    /// The names of the devices, in the order of the offer.
    pub(crate) names: Vec<String>,
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
        let names: Vec<String> = devices.iter().map(|moved| moved.device.name().into()).collect();
        let recorder = Recorder::new(side, options, observer, names.iter().cloned());
        Context { names, options, recorder, cancel }
    }
}
