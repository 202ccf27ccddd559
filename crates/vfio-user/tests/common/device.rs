//! A device to be served: registers, a DMA engine, memory to map, interrupts and a state that moves.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use limosa_device::{
    Bus, Description, Fault, IoEventFd, Irq, Machine, Region, RegionMapping, Save, SimpleMigration,
    SimpleModel,
};
use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::info::{DeviceFlags, IrqFlags, RegionFlags};
use limosa_protocol::{Errno, MigrationFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// Plain memory, 1 MiB.
pub const BAR0: u32 = 0;
/// Can be mapped, its first and third page of four.
pub const BAR1: u32 = 1;
/// The DMA engine: 24 bytes at 0 are operation, IOVA and length of what to do with the 64 KiB behind it at 64 KiB.
pub const BAR2: u32 = 2;
/// Cannot be written.
pub const BAR3: u32 = 3;
/// Not there.
pub const BAR4: u32 = 4;
pub const CONFIG: u32 = 7;

pub const DMA_READ_NOW: u64 = 0;
pub const DMA_WRITE_NOW: u64 = 1;
/// On a thread of the device's own, which triggers MSI vector 0 when done and leaves the errno at 24.
pub const DMA_READ_LATER: u64 = 2;
pub const DMA_WRITE_LATER: u64 = 3;
/// Starts a thread as above and waits for it, within the write.
pub const DMA_READ_JOINED: u64 = 4;
/// Panics.
pub const PANIC: u64 = 99;

pub const INTX: u32 = 0;
pub const MSI: u32 = 1;
pub const MSIX: u32 = 2;

pub struct TestDevice {
    bus: Option<Bus>,
    bar0: Vec<u8>,
    engine: Arc<std::sync::Mutex<Engine>>,
    config: Vec<u8>,
    mapped: Arc<OwnedFd>,
    doorbell: Arc<OwnedFd>,
    state: Vec<u8>,
    state_bytes: usize,
    saved: usize,
    staging: Vec<u8>,
    lend_max: usize,
    lends_space: bool,
}

struct Engine {
    data: Vec<u8>,
    outcome: u32,
}

const ENGINE_DATA: u64 = 64 << 10;

impl TestDevice {
    pub fn new() -> TestDevice {
        let mapped = memfd_create("bar1", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&mapped, 16 << 10).unwrap();
        TestDevice {
            bus: None,
            bar0: vec![0; 1 << 20],
            engine: Arc::new(std::sync::Mutex::new(Engine { data: vec![0; 1 << 20], outcome: u32::MAX })),
            config: (0..=255).collect(),
            mapped: Arc::new(mapped),
            doorbell: Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap()),
            state: Vec::new(),
            state_bytes: 3 << 20,
            saved: 0,
            staging: Vec::new(),
            lend_max: usize::MAX,
            lends_space: true,
        }
    }

    /// A state of this many bytes, the same each time.
    pub fn state_bytes(mut self, bytes: usize) -> TestDevice {
        self.state_bytes = bytes;
        self
    }

    /// Lends its state in pieces of this many bytes.
    pub fn lend_max(mut self, bytes: usize) -> TestDevice {
        self.lend_max = bytes;
        self
    }

    /// Lends no memory to load into.
    pub fn lends_no_space(mut self) -> TestDevice {
        self.lends_space = false;
        self
    }

    pub fn machine(mut self) -> Arc<Machine> {
        self.state =
            (0..self.state_bytes).map(|i| ((i as u32).wrapping_mul(2654435761) >> 13) as u8).collect();
        Machine::simple(self)
    }

    fn bus(&self) -> &Bus {
        self.bus.as_ref().expect("attached")
    }

    fn dma(&mut self, operation: u64, iova: u64, bytes: u64) -> Result<(), Errno> {
        let bytes = usize::try_from(bytes).map_err(|_| Errno::EINVAL)?;
        if bytes > 1 << 20 {
            return Err(Errno::EINVAL);
        }
        let bus = self.bus().clone();
        let engine = Arc::clone(&self.engine);
        let run = move || {
            let mut engine = engine.lock().unwrap();
            let done = match operation {
                DMA_READ_NOW | DMA_READ_LATER | DMA_READ_JOINED => {
                    bus.memory.read(iova, &mut engine.data[..bytes])
                }
                _ => bus.memory.write(iova, &engine.data[..bytes]),
            };
            engine.outcome = done.err().map_or(0, Errno::raw);
            drop(engine);
            bus.interrupts.raise(MSI, 0);
            done
        };
        match operation {
            DMA_READ_NOW | DMA_WRITE_NOW => run(),
            DMA_READ_LATER | DMA_WRITE_LATER => {
                std::thread::spawn(run);
                Ok(())
            }
            DMA_READ_JOINED => std::thread::spawn(run).join().unwrap(),
            PANIC => panic!("as asked"),
            _ => Err(Errno::EINVAL),
        }
    }
}

impl SimpleModel for TestDevice {
    fn description(&self) -> Description {
        let rw = RegionFlags::READ | RegionFlags::WRITE;
        let mut regions = vec![Region::default(); 9];
        regions[BAR0 as usize] = Region {
            flags: rw,
            size: 1 << 20,
            mapping: None,
            ioeventfds: vec![
                IoEventFd { offset: 0x100, size: 4, fd: Arc::clone(&self.doorbell), datamatch: None },
                IoEventFd { offset: 0x104, size: 4, fd: Arc::clone(&self.doorbell), datamatch: Some(7) },
            ],
        };
        let mapping =
            RegionMapping { fd: Arc::clone(&self.mapped), offset: 0, areas: vec![(0, 4096), (8192, 4096)] };
        regions[BAR1 as usize] =
            Region { flags: rw, size: 16 << 10, mapping: Some(mapping), ioeventfds: vec![] };
        regions[BAR2 as usize] = Region { flags: rw, size: 2 << 20, mapping: None, ioeventfds: vec![] };
        regions[BAR3 as usize] =
            Region { flags: RegionFlags::READ, size: 4096, mapping: None, ioeventfds: vec![] };
        regions[CONFIG as usize] = Region { flags: rw, size: 256, mapping: None, ioeventfds: vec![] };
        let eventfd = IrqFlags::EVENTFD;
        Description {
            flags: Some(DeviceFlags::PCI | DeviceFlags::RESET),
            regions,
            irqs: vec![
                Irq { flags: eventfd | IrqFlags::MASKABLE | IrqFlags::AUTOMASKED, count: 1 },
                Irq { flags: eventfd | IrqFlags::MASKABLE, count: 4 },
                Irq { flags: eventfd, count: 8 },
                Irq::default(),
                Irq::default(),
            ],
        }
    }

    fn attach(&mut self, bus: Bus) {
        self.bus = Some(bus);
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let at = offset as usize;
        match region {
            BAR0 => data.copy_from_slice(&self.bar0[at..at + data.len()]),
            BAR1 => rustix::io::pread(&self.mapped, data, offset).map(drop).map_err(|_| Errno::EIO)?,
            BAR2 => {
                let engine = self.engine.lock().unwrap();
                match offset {
                    24 if data.len() == 4 => data.copy_from_slice(&engine.outcome.to_ne_bytes()),
                    ENGINE_DATA.. => {
                        let at = (offset - ENGINE_DATA) as usize;
                        data.copy_from_slice(engine.data.get(at..at + data.len()).ok_or(Errno::EINVAL)?);
                    }
                    _ => return Err(Errno::EIO),
                }
            }
            BAR3 => data.fill(3),
            CONFIG => data.copy_from_slice(&self.config[at..at + data.len()]),
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let at = offset as usize;
        match region {
            BAR0 => self.bar0[at..at + data.len()].copy_from_slice(data),
            BAR1 => rustix::io::pwrite(&self.mapped, data, offset).map(drop).map_err(|_| Errno::EIO)?,
            BAR2 if offset == 0 && data.len() == 24 => {
                let word = |at: usize| u64::from_ne_bytes(data[at..at + 8].try_into().unwrap());
                return self.dma(word(0), word(8), word(16));
            }
            BAR2 if offset >= ENGINE_DATA => {
                let at = (offset - ENGINE_DATA) as usize;
                let mut engine = self.engine.lock().unwrap();
                engine.data.get_mut(at..at + data.len()).ok_or(Errno::EINVAL)?.copy_from_slice(data);
            }
            CONFIG => self.config[at..at + data.len()].copy_from_slice(data),
            _ => return Err(Errno::EINVAL),
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.bar0.fill(0);
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn SimpleMigration> {
        Some(self)
    }
}

/// Half of the state is pre-copy data, the other half comes when stopped.
impl SimpleMigration for TestDevice {
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY
    }
    fn stop(&mut self) -> Result<(), Fault> {
        Ok(())
    }
    fn start(&mut self) -> Result<(), Fault> {
        Ok(())
    }
    fn save_begin(&mut self) -> Result<(), Fault> {
        self.saved = 0;
        Ok(())
    }
    fn save(&mut self, bytes_max: usize, stopped: bool) -> Result<Save<'_>, Errno> {
        let end = if stopped { self.state.len() } else { self.state.len() / 2 };
        let bytes = bytes_max.min(self.lend_max).min(end - self.saved);
        if bytes == 0 {
            return Ok(if stopped { Save::End } else { Save::NothingForNow });
        }
        self.saved += bytes;
        Ok(Save::Data(&self.state[self.saved - bytes..self.saved]))
    }
    fn save_end(&mut self) {}
    fn precopy_info(&mut self, _reinit: bool) -> PrecopyInfo {
        let initial_bytes = (self.state.len() / 2 - self.saved) as u64;
        PrecopyInfo { argsz: 24, flags: 0, initial_bytes, dirty_bytes: 0 }
    }
    fn data_size(&self) -> u64 {
        self.state.len() as u64
    }
    fn load_begin(&mut self) -> Result<(), Fault> {
        self.staging = vec![0; self.state.len()];
        self.saved = 0;
        Ok(())
    }
    fn load(&mut self, chunk: &[u8]) -> Result<(), Errno> {
        let to = self.staging.get_mut(self.saved..self.saved + chunk.len()).ok_or(Errno::EINVAL)?;
        to.copy_from_slice(chunk);
        self.saved += chunk.len();
        Ok(())
    }
    fn load_space(&mut self, bytes_max: usize) -> Option<&mut [u8]> {
        if !self.lends_space {
            return None;
        }
        let left = self.staging.len() - self.saved;
        Some(&mut self.staging[self.saved..][..left.min(bytes_max)])
    }
    fn load_filled(&mut self, bytes: usize) -> Result<(), Errno> {
        self.saved += bytes;
        Ok(())
    }
    fn load_finish(&mut self) -> Result<(), Fault> {
        if self.saved != self.state.len() {
            return Err(Fault::Refused(Errno::EINVAL));
        }
        self.state = std::mem::take(&mut self.staging);
        Ok(())
    }
    fn load_abort(&mut self) {
        self.staging = Vec::new();
    }
}
