//! [`Memory`]: a device whose region 0 is plain memory and all of its state.

use limosa_device::saved::Section;
use limosa_device::{Bus, Description, Fault, Irq, Region, SimpleModel, WholeState};
use limosa_protocol::Errno;
use limosa_protocol::info::{DeviceFlags, RegionFlags};

/// Plain memory in region 0. Within `limosa_device::Whole` it has migration, else none.
///
/// One with `OTHER_KIND` differs in the kind of its state alone, so that each refuses the state of the other.
pub struct Memory<const OTHER_KIND: bool = false> {
    bytes: Vec<u8>,
    flags: Option<DeviceFlags>,
    irqs: Vec<Irq>,
    refused: Option<Vec<u8>>,
}

impl<const OTHER_KIND: bool> Memory<OTHER_KIND> {
    /// A device with this number of bytes, all zero. Without a byte it has no region.
    pub fn new(bytes: usize) -> Self {
        Self::holding(vec![0; bytes])
    }

    /// A device with these bytes.
    pub fn holding(bytes: impl Into<Vec<u8>>) -> Self {
        Self { bytes: bytes.into(), flags: None, irqs: Vec::new(), refused: None }
    }

    /// Gives it interrupts, by index.
    pub fn with_irqs(mut self, irqs: Vec<Irq>) -> Self {
        self.irqs = irqs;
        self
    }

    /// Gives it flags.
    pub fn with_flags(mut self, flags: DeviceFlags) -> Self {
        self.flags = Some(flags);
        self
    }

    /// It refuses a state with these bytes.
    pub fn refusing(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.refused = Some(bytes.into());
        self
    }
}

impl<const OTHER_KIND: bool> SimpleModel for Memory<OTHER_KIND> {
    fn description(&self) -> Description {
        let (flags, size) = (RegionFlags::READ | RegionFlags::WRITE, self.bytes.len() as u64);
        let regions = if size == 0 { Vec::new() } else { vec![Region { flags, size, ..Region::default() }] };
        Description { flags: self.flags, regions, irqs: self.irqs.clone() }
    }

    fn attach(&mut self, _: Bus) {}

    fn region_read(&mut self, _: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.bytes[offset as usize..][..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.bytes[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.bytes.fill(0);
        Ok(())
    }
}

/// The bytes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Saved {
    #[prost(bytes = "vec", tag = "1")]
    bytes: Vec<u8>,
}

impl<const OTHER_KIND: bool> WholeState for Memory<OTHER_KIND> {
    type Saved = Saved;
    const KIND: &'static str = if OTHER_KIND { "test.other-memory" } else { "test.memory" };
    const SECTION: Section = Section::message("memory", 1);

    fn stop(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn to_saved(&self) -> Saved {
        Saved { bytes: self.bytes.clone() }
    }

    fn restore(&mut self, saved: Saved) -> Result<(), Errno> {
        if saved.bytes.len() != self.bytes.len() || self.refused.as_ref() == Some(&saved.bytes) {
            return Err(Errno::EINVAL);
        }
        self.bytes = saved.bytes;
        Ok(())
    }
}
