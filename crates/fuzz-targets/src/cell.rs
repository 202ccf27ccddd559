//! A device of eight bytes, for targets that need one.

use limosa_device::saved::Section;
use limosa_device::{Bus, Description, Fault, Region, SimpleModel, WholeState};
use limosa_protocol::Errno;
use limosa_protocol::info::RegionFlags;

#[derive(Default)]
pub(crate) struct Cell(u64);

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Saved {
    #[prost(uint64, tag = "1")]
    value: u64,
}

impl SimpleModel for Cell {
    fn description(&self) -> Description {
        let register = Region { flags: RegionFlags::READ | RegionFlags::WRITE, size: 8, ..Region::default() };
        Description { regions: vec![register], ..Description::default() }
    }

    fn attach(&mut self, _bus: Bus) {}

    fn region_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.0.to_le_bytes()[offset as usize..][..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let mut bytes = self.0.to_le_bytes();
        bytes[offset as usize..][..data.len()].copy_from_slice(data);
        self.0 = u64::from_le_bytes(bytes);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.0 = 0;
        Ok(())
    }
}

impl WholeState for Cell {
    type Saved = Saved;
    const KIND: &'static str = "fuzz.cell";
    const SECTION: Section = Section::message("cell", 1);

    fn stop(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn to_saved(&self) -> Saved {
        Saved { value: self.0 }
    }

    fn restore(&mut self, saved: Saved) -> Result<(), Errno> {
        self.0 = saved.value;
        Ok(())
    }
}
