//! [`MeteredLink`]: a link that counts its traffic for the report.

use std::io::{IoSlice, IoSliceMut};

use limosa_guest_memory::{PinnedBytes, SendPart};

use crate::link::{Link, LinkError, Wait, forward_link};
use crate::report::LinkMeter;

/// A link that counts its bytes, and the time spent in its reads and writes.
pub(crate) struct MeteredLink<'a> {
    inner: &'a dyn Link,
    meter: LinkMeter,
}

impl<'a> MeteredLink<'a> {
    pub(crate) fn new(inner: &'a dyn Link, recorder: &crate::report::Recorder<'_>) -> MeteredLink<'a> {
        let meter = recorder.link(inner.peer());
        MeteredLink { inner, meter }
    }
}

impl Link for MeteredLink<'_> {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let began = limosa_clockwork::now();
        self.inner.write(slices, wait).inspect(|bytes| self.meter.sent(*bytes, began))
    }

    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        let began = limosa_clockwork::now();
        self.inner.read(into, wait).inspect(|bytes| self.meter.received(*bytes, began))
    }

    fn read_parts(&self, into: &mut [IoSliceMut<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let began = limosa_clockwork::now();
        self.inner.read_parts(into, wait).inspect(|bytes| self.meter.received(*bytes, began))
    }

    fn read_to_memory(
        &self,
        memory: &PinnedBytes,
        from: usize,
        behind: &mut [u8],
        wait: Wait<'_>,
    ) -> Result<usize, LinkError> {
        let began = limosa_clockwork::now();
        let read = self.inner.read_to_memory(memory, from, behind, wait);
        read.inspect(|bytes| self.meter.received(*bytes, began))
    }

    fn write_parts(&self, parts: &[SendPart<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        let began = limosa_clockwork::now();
        self.inner.write_parts(parts, wait).inspect(|bytes| self.meter.sent(*bytes, began))
    }

    forward_link!(|this| this.inner);
}
