//! The device that is measured when no other is named: a region of plain memory, a data stream
//! without an end, and a register that marks guest pages dirty without touching them.

use std::os::unix::net::UnixStream;

use limosa_device::{Bus, Description, Fault, Machine, Region, Save, SimpleMigration, SimpleModel};
use limosa_protocol::info::RegionFlags;
use limosa_protocol::{Errno, MigrationFlags};
use limosa_vfio_user::server::{Options, ShutdownHandle, serve_connection};

/// Bytes of region 0.
pub(crate) const MEMORY_BYTES: usize = 1 << 20;

/// Region 1, written with three u64: first IOVA, bytes, and a stride of pages of which the first is
/// marked.
pub(crate) const MARK_REGION: u32 = 1;

/// Bytes lent or taken at once, at most.
const STREAM_BYTES: usize = 4 << 20;

const PAGE_BYTES: u64 = 4096;

struct BenchDevice {
    memory: Vec<u8>,
    stream: Vec<u8>,
    bus: Option<Bus>,
}

impl SimpleModel for BenchDevice {
    fn description(&self) -> Description {
        let flags = RegionFlags::READ | RegionFlags::WRITE;
        let memory = Region { flags, size: MEMORY_BYTES as u64, ..Region::default() };
        let mark = Region { flags: RegionFlags::WRITE, size: 24, ..Region::default() };
        Description { regions: vec![memory, mark], ..Description::default() }
    }

    fn attach(&mut self, bus: Bus) {
        self.bus = Some(bus);
    }

    fn region_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.memory[offset as usize..][..data.len()]);
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        if region != MARK_REGION {
            self.memory[offset as usize..][..data.len()].copy_from_slice(data);
            return Ok(());
        }
        let words: &[u8; 24] = data.try_into().map_err(|_| Errno::EINVAL)?;
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| words[at * 8 + i]));
        let (iova, bytes, stride) = (word(0), word(1), word(2).max(1));
        let bus = self.bus.as_ref().ok_or(Errno::ENODEV)?;
        match stride {
            1 => bus.memory.mark_dirty(iova, bytes),
            _ => (0..bytes / PAGE_BYTES)
                .step_by(usize::try_from(stride).map_err(|_| Errno::EINVAL)?)
                .for_each(|page| bus.memory.mark_dirty(iova + page * PAGE_BYTES, PAGE_BYTES)),
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn SimpleMigration> {
        Some(self)
    }
}

impl SimpleMigration for BenchDevice {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY
    }

    fn stop(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn data_size(&self) -> u64 {
        u64::MAX
    }

    fn save_begin(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn save(&mut self, bytes_max: usize, _stopped: bool) -> Result<Save<'_>, Errno> {
        Ok(Save::Data(&self.stream[..bytes_max.min(STREAM_BYTES)]))
    }

    fn save_end(&mut self) {}

    fn load_begin(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn load(&mut self, _chunk: &[u8]) -> Result<(), Errno> {
        Ok(())
    }

    fn load_space(&mut self, bytes_max: usize) -> Option<&mut [u8]> {
        Some(&mut self.stream[..bytes_max.min(STREAM_BYTES)])
    }

    fn load_filled(&mut self, _bytes: usize) -> Result<(), Errno> {
        Ok(())
    }

    fn load_finish(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn load_abort(&mut self) {}
}

/// Serves one client.
pub(crate) fn serve(stream: UnixStream) -> anyhow::Result<()> {
    let device = BenchDevice { memory: vec![0; MEMORY_BYTES], stream: vec![0x5a; STREAM_BYTES], bus: None };
    serve_connection(stream, &Machine::simple(device), &Options::default(), &ShutdownHandle::new()?)?;
    Ok(())
}
