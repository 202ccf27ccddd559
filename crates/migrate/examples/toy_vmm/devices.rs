//! The devices: two behind vfio-user sockets, and the vCPU's registers.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use limosa_client::{Device, DmaMap, DmaMemory};
use limosa_device::saved::Section;
use limosa_device::{Bus, Description, Fault, Loopback, Machine, SimpleModel, Whole, WholeState};
use limosa_migrate::{MovedDevice, PAGE_BYTES};
use limosa_models::synthetic::{Synthetic, SyntheticConfig, registers};
use limosa_models::uart::{Line, Uart};
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::{Errno, pci_index};
use limosa_vfio_user::client::{self, Client};
use limosa_vfio_user::server::{self, Server};

use crate::Result;
use crate::guest::{Guest, PAGES, VCPU_PAGES};

/// A VMM must also move the state that is neither in memory nor in a device of another process: registers of vCPUs, an
/// interrupt controller, clocks. The engine moves devices, so this state is a device too, in the VMM's own process. It is
/// saved when everything has stopped, as sections with versions and checksums.
struct Registers(Arc<Guest>);

#[derive(Clone, PartialEq, prost::Message)]
struct SavedRegisters {
    #[prost(uint64, tag = "1")]
    count: u64,
}

impl SimpleModel for Registers {
    fn description(&self) -> Description {
        Description::default()
    }

    fn attach(&mut self, _bus: Bus) {}

    fn region_read(&mut self, _region: u32, _offset: u64, _data: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::EINVAL)
    }

    fn region_write(&mut self, _region: u32, _offset: u64, _data: &[u8]) -> Result<(), Errno> {
        Err(Errno::EINVAL)
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.0.vcpu().count = 0;
        Ok(())
    }
}

impl WholeState for Registers {
    type Saved = SavedRegisters;
    const KIND: &'static str = "toy-vmm.registers";
    const SECTION: Section = Section::message("registers", 1);

    // The vCPU is stopped and started by the hooks of [`Hooks`](crate::hooks::Hooks), before and after all devices.
    fn stop(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        Ok(())
    }

    fn to_saved(&self) -> SavedRegisters {
        SavedRegisters { count: self.0.vcpu().count }
    }

    fn restore(&mut self, saved: SavedRegisters) -> Result<(), Errno> {
        self.0.vcpu().count = saved.count;
        Ok(())
    }
}

/// The machine's devices. The engine sees all of them as [`Device`]; it would see a kernel VFIO device, opened by
/// `limosa-vfio-kernel` from the VMM's own file descriptors, in the same way.
pub struct Devices {
    synthetic: Client,
    uart: Client,
    registers: Loopback,
}

impl Devices {
    pub fn new(folder: &Path, guest: &Arc<Guest>, memory: &File) -> Result<Devices> {
        let config =
            SyntheticConfig { state_bytes: 4 << 20, dma_rate: 8 << 20, ..SyntheticConfig::default() };
        let synthetic = serve(folder.join("synthetic"), Box::new(Synthetic::new(config)?), memory)?;
        let uart = serve(folder.join("uart"), Box::new(Uart::new(vec![Line::Echo])?), memory)?;
        let registers = Loopback::new("registers", Machine::simple(Whole::new(Registers(guest.clone()))));
        Ok(Devices { synthetic, uart, registers })
    }

    /// The devices of a move, in an order that is the same on both sides.
    pub fn moved(&self) -> [MovedDevice<'_>; 3] {
        [&self.synthetic as &dyn Device, &self.uart, &self.registers].map(MovedDevice::new)
    }

    /// Turns on the DMA of the synthetic device, which writes to the upper half of the memory from then on.
    pub fn start_dma(&self) -> Result<()> {
        let window = [
            (registers::DMA_BASE, VCPU_PAGES * PAGE_BYTES),
            (registers::DMA_PAGES, PAGES - VCPU_PAGES),
            (registers::DMA_CONTROL, 1),
        ];
        for (register, value) in window {
            self.synthetic.region_write(pci_index::BAR0, register, &value.to_le_bytes())?;
        }
        Ok(())
    }

    /// Leaves a number in a register of each device, and finds there what it left the last time.
    pub fn ring(&self, count: u64) -> Result<()> {
        if !count.is_multiple_of(64) {
            return Ok(());
        }
        let last = (count - 64).to_le_bytes();
        let (mut scratch, mut byte) = ([0; 8], [0]);
        self.synthetic.region_read(pci_index::BAR0, registers::SCRATCH, &mut scratch)?;
        self.uart.region_read(pci_index::BAR0, 7, &mut byte)?;
        if scratch != last || byte[0] != last[1] {
            return Err(format!("the devices hold {scratch:?} and {byte:?}, not {last:?}").into());
        }
        self.synthetic.region_write(pci_index::BAR0, registers::SCRATCH, &count.to_le_bytes())?;
        self.uart.region_write(pci_index::BAR0, 7, &[count.to_le_bytes()[1]])?;
        Ok(())
    }
}

/// Serves a device on a thread, instead of in a process of its own, connects to it, and shares the memory with it.
fn serve(path: PathBuf, model: Box<dyn SimpleModel>, memory: &File) -> Result<Client> {
    let server = Server::bind(&path, Machine::simple(model), server::Options::default())?;
    std::thread::spawn(move || server.serve());
    let client = Client::connect(&path, client::Options::default())?;
    let backing = DmaMemory::File { fd: memory.as_fd(), offset: 0 };
    let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
    client.dma_map(&DmaMap { iova: 0, size: PAGES * PAGE_BYTES, flags, memory: backing })?;
    Ok(client)
}
