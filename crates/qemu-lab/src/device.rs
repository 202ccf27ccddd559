//! A PCI device with what the ready models lack: MSI-X with several vectors, and a BAR of which a client may map parts.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use limosa_device::pci::{Bar, Function, FunctionState, Identity};
use limosa_device::saved::Section;
use limosa_device::{Bus, Description, Fault, Machine, RegionMapping, SimpleModel, Whole, WholeState};
use limosa_protocol::info::DeviceFlags;
use limosa_protocol::{Errno, pci_index};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// The registers of BAR 0, 64 bits each.
pub mod registers {
    /// Reads [`IDENT_VALUE`].
    pub const IDENT: u64 = 0x00;
    /// Memory.
    pub const SCRATCH: u64 = 0x08;
    /// Where a copy reads, as an IOVA.
    pub const DMA_SOURCE: u64 = 0x10;
    /// Where it writes.
    pub const DMA_TARGET: u64 = 0x18;
    /// How many bytes, at most [`DMA_BYTES_MAX`].
    pub const DMA_BYTES: u64 = 0x20;
    /// Written: [`COPY`], [`RAISE`], [`LOWER`], or [`MESSAGE`] and the number of a vector.
    pub const COMMAND: u64 = 0x28;
    /// The errno of the last command; 0 when it was done.
    pub const STATUS: u64 = 0x30;

    /// Copies guest memory.
    pub const COPY: u64 = 1;
    /// Raises vector 0, and the pin with it when no messages are wired.
    pub const RAISE: u64 = 2;
    /// Lowers it.
    pub const LOWER: u64 = 3;
    /// Sends the message of a vector.
    pub const MESSAGE: u64 = 0x100;

    /// What [`IDENT`] reads.
    pub const IDENT_VALUE: u64 = u64::from_le_bytes(*b"LIMOSAQT");
    /// The most bytes of a copy.
    pub const DMA_BYTES_MAX: u64 = 1 << 20;
}

use registers::*;

/// The BAR that a client may map parts of.
const MAPPED_BAR: u32 = 2;
const MAPPED_BYTES: u64 = 64 << 10;
/// What a client may map of it, as offset and bytes.
const MAPPED_AREAS: [(u64, u64); 2] = [(0, 0x2000), (0xc000, 0x1000)];
/// The BAR with the MSI-X table.
const TABLE_BAR: u32 = 4;
const PENDING: u64 = 0x1000;

/// The device.
pub struct TestDevice {
    function: Function,
    bus: Option<Bus>,
    values: [u64; 7],
    memory: Arc<File>,
    mapped_areas: &'static [(u64, u64)],
}

impl TestDevice {
    /// Its vendor and device IDs, as configuration space begins with them.
    pub const IDENTITY: u32 = 0x5154_4c4d;
    /// MSI-X vectors.
    pub const VECTORS: u16 = 8;

    /// A machine with it.
    pub fn machine() -> Arc<Machine> {
        Machine::simple(TestDevice::new(&MAPPED_AREAS))
    }

    /// A machine with one that has migration, and of which a client may map nothing.
    pub fn movable() -> Arc<Machine> {
        Machine::simple(Whole::new(TestDevice::new(&[])))
    }

    fn new(mapped_areas: &'static [(u64, u64)]) -> TestDevice {
        let memory = memfd_create("bar2", MemfdFlags::CLOEXEC).expect("a memfd");
        ftruncate(&memory, MAPPED_BYTES).expect("a memfd");
        let [vendor, device] = [Self::IDENTITY as u16, (Self::IDENTITY >> 16) as u16];
        let function =
            Function::builder(Identity { vendor, device, class: 0xff_0000, ..Identity::default() })
                .bar(0, Bar::Memory32 { bytes: 4096, prefetchable: false })
                .bar(MAPPED_BAR as usize, Bar::Memory32 { bytes: MAPPED_BYTES, prefetchable: false })
                .bar(TABLE_BAR as usize, Bar::Memory32 { bytes: 8192, prefetchable: false })
                .interrupt_pin()
                .msix(Self::VECTORS, (TABLE_BAR as usize, 0), (TABLE_BAR as usize, PENDING))
                .build();
        TestDevice { function, bus: None, values: [0; 7], memory: Arc::new(memory.into()), mapped_areas }
    }

    fn value(&mut self, register: u64) -> &mut u64 {
        &mut self.values[register as usize / 8]
    }

    fn command(&mut self, command: u64) -> Result<(), Errno> {
        let bus = self.bus.clone().ok_or(Errno::EIO)?;
        match command {
            COPY => {
                let bytes = *self.value(DMA_BYTES);
                if bytes > DMA_BYTES_MAX {
                    return Err(Errno::EINVAL);
                }
                let mut data = vec![0; bytes as usize];
                bus.memory.read(*self.value(DMA_SOURCE), &mut data)?;
                bus.memory.write(*self.value(DMA_TARGET), &data)
            }
            RAISE => {
                self.function.raise(0, &bus.interrupts);
                Ok(())
            }
            LOWER => {
                self.function.lower(0, &bus.interrupts);
                Ok(())
            }
            _ => {
                let vector = command.checked_sub(MESSAGE).filter(|vector| *vector < Self::VECTORS.into());
                let vector = vector.ok_or(Errno::EINVAL)? as u32;
                self.function.raise(vector, &bus.interrupts);
                self.function.lower(vector, &bus.interrupts);
                Ok(())
            }
        }
    }
}

impl SimpleModel for TestDevice {
    fn description(&self) -> Description {
        let mut regions = self.function.regions();
        if !self.mapped_areas.is_empty() {
            regions[MAPPED_BAR as usize].mapping = Some(RegionMapping {
                fd: Arc::new(self.memory.try_clone().expect("an fd").into()),
                offset: 0,
                areas: self.mapped_areas.to_vec(),
            });
        }
        Description {
            flags: Some(DeviceFlags::RESET | DeviceFlags::PCI),
            regions,
            irqs: self.function.irqs(),
        }
    }

    fn attach(&mut self, bus: Bus) {
        self.bus = Some(bus);
    }

    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        match region {
            pci_index::CONFIG => self.function.config_read(offset, data),
            MAPPED_BAR => self.memory.read_exact_at(data, offset).map_err(|_| Errno::EIO),
            TABLE_BAR => {
                let bus = self.bus.as_ref().ok_or(Errno::EIO)?;
                self.function.bar_read(TABLE_BAR as usize, offset, data, &bus.interrupts);
                Ok(())
            }
            _ => {
                for (at, byte) in (offset..).zip(data) {
                    let value = match at & !7 {
                        IDENT => IDENT_VALUE,
                        at @ SCRATCH..=STATUS => *self.value(at),
                        _ => 0,
                    };
                    *byte = value.to_le_bytes()[(at % 8) as usize];
                }
                Ok(())
            }
        }
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let bus = self.bus.clone().ok_or(Errno::EIO)?;
        match region {
            pci_index::CONFIG => self.function.config_write(offset, data, &bus.interrupts).map(drop),
            MAPPED_BAR => self.memory.write_all_at(data, offset).map_err(|_| Errno::EIO),
            TABLE_BAR => {
                self.function.bar_write(TABLE_BAR as usize, offset, data, &bus.interrupts);
                Ok(())
            }
            _ => {
                let (register, within) = (offset & !7, (offset % 8) as usize);
                if !(SCRATCH..=COMMAND).contains(&register) || within + data.len() > 8 {
                    return Err(Errno::EINVAL);
                }
                let mut bytes = if register == COMMAND { [0; 8] } else { self.value(register).to_le_bytes() };
                bytes[within..within + data.len()].copy_from_slice(data);
                let value = u64::from_le_bytes(bytes);
                if register != COMMAND {
                    *self.value(register) = value;
                    return Ok(());
                }
                let status = self.command(value).err().map_or(0, |errno| u64::from(errno.raw()));
                *self.value(STATUS) = status;
                Ok(())
            }
        }
    }

    fn rewired(&mut self, _: u32) {
        if let Some(bus) = &self.bus {
            self.function.settle(&bus.interrupts);
        }
    }

    fn reset(&mut self) -> Result<(), Errno> {
        if let Some(bus) = &self.bus {
            self.function.reset(&bus.interrupts);
        }
        self.values = [0; 7];
        Ok(())
    }
}

/// All of the device.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Saved {
    #[prost(message, optional, tag = "1")]
    function: Option<FunctionState>,
    #[prost(fixed64, repeated, tag = "2")]
    values: Vec<u64>,
    #[prost(bytes = "vec", tag = "3")]
    memory: Vec<u8>,
}

impl WholeState for TestDevice {
    type Saved = Saved;
    const KIND: &'static str = "limosa.qemu-lab";
    const SECTION: Section = Section::message("device", 1);

    fn stop(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        self.rewired(0);
        Ok(())
    }

    fn to_saved(&self) -> Saved {
        let mut memory = vec![0; MAPPED_BYTES as usize];
        self.memory.read_exact_at(&mut memory, 0).expect("a memfd");
        // A message has 64 KiB at most, and what follows is zero.
        memory.truncate(memory.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
        let function = self.bus.as_ref().map(|bus| self.function.state(&bus.interrupts));
        Saved { function, values: self.values.to_vec(), memory }
    }

    fn restore(&mut self, saved: Saved) -> Result<(), Errno> {
        let state = saved.function.ok_or(Errno::EINVAL)?;
        let function = self.function.loaded("device", &state).map_err(|_| Errno::EINVAL)?;
        self.values = saved.values.try_into().map_err(|_| Errno::EINVAL)?;
        let mut memory = saved.memory;
        memory.resize(MAPPED_BYTES as usize, 0);
        self.memory.write_all_at(&memory, 0).map_err(|_| Errno::EIO)?;
        self.function = function;
        Ok(())
    }
}
