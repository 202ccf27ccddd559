//! The serial card of the Linux sample driver (`samples/vfio-mdev/mtty.c`): [`Mtty`] looks and behaves like an
//! mtty-1 or mtty-2, and reads and writes its data stream byte for byte. So a card can move from the kernel into a
//! process and back.
//!
//! Differences: a reset restores the initial state (mtty keeps registers and FIFO); a stopped card cannot be changed
//! (mtty can, and loses the writes); unused addresses read 0 (mtty returns contents of its stack); an interrupt that
//! may have been lost in a move is signalled again; INTx does not mask itself, and an interrupt that occurs while it is
//! masked is signalled later instead of lost.

mod config;
mod port;
mod stream;

use limosa_device::{Bus, Description, Fault, Irq, Region, Save, SimpleMigration, SimpleModel};
use limosa_protocol::feature::PrecopyInfo;
use limosa_protocol::info::{DeviceFlags, IrqFlags, RegionFlags};
use limosa_protocol::{Errno, MigrationFlags, pci_index};

use super::{PORTS_MAX, UartError};
use config::{CONFIG_BYTES, Config};
use port::{Port, REGISTERS};
use stream::Loader;

/// An mtty card.
///
/// Port *n* is BAR *n*. As mtty does it, an access is split into aligned pieces of 4, 2 and 1 bytes,
/// and the first byte of each piece alone means a register.
#[derive(Debug)]
pub struct Mtty {
    ports: Vec<Port>,
    config: Config,
    bus: Option<Bus>,
    running: bool,
    /// The stream so far, and how much of it was read.
    saving: Option<(Vec<u8>, usize)>,
    loading: Option<Loader>,
    /// A state was loaded, and its interrupts may never have been heard here.
    loaded: bool,
}

impl Mtty {
    /// A new card with one port or two.
    pub fn new(ports: usize) -> Result<Mtty, UartError> {
        if !(1..=PORTS_MAX).contains(&ports) {
            return Err(UartError::Ports(ports));
        }
        Ok(Mtty {
            ports: vec![Port::default(); ports],
            config: Config::new(ports),
            bus: None,
            running: true,
            saving: None,
            loading: None,
            loaded: false,
        })
    }

    fn signal(&self) {
        let Some(bus) = &self.bus else { return };
        let message = bus.interrupts.any_wired(pci_index::IRQ_MSI);
        bus.interrupts.raise(if message { pci_index::IRQ_MSI } else { pci_index::IRQ_INTX }, 0);
    }
}

/// Where the pieces of an access are in it, and which register each means.
fn pieces(offset: u64, bytes: usize) -> impl Iterator<Item = (usize, u64)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = bytes - at;
        let (here, offset) = (at, offset + at as u64);
        at += [4, 2, 1].into_iter().find(|size| left >= *size && offset.is_multiple_of(*size as u64))?;
        Some((here, offset % REGISTERS))
    })
}

impl SimpleModel for Mtty {
    fn description(&self) -> Description {
        let flags = RegionFlags::READ | RegionFlags::WRITE;
        let region = |size| Region { flags, size, ..Region::default() };
        let mut regions = vec![region(0); pci_index::NUM_REGIONS as usize];
        regions[..self.ports.len()].fill(region(REGISTERS));
        regions[pci_index::CONFIG as usize] = region(CONFIG_BYTES as u64);
        let mut irqs = vec![Irq::default(); pci_index::NUM_IRQS as usize];
        let line = IrqFlags::EVENTFD | IrqFlags::MASKABLE | IrqFlags::AUTOMASKED;
        irqs[pci_index::IRQ_INTX as usize] = Irq { flags: line, count: 1 };
        let message = IrqFlags::EVENTFD | IrqFlags::NORESIZE;
        irqs[pci_index::IRQ_MSI as usize] = Irq { flags: message, count: 1 };
        Description { flags: Some(DeviceFlags::RESET | DeviceFlags::PCI), regions, irqs }
    }

    fn attach(&mut self, bus: Bus) {
        self.bus = Some(bus);
    }

    /// A card that does not run is not changed by what is read of it.
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        if region == pci_index::CONFIG {
            return self.config.read(offset, data);
        }
        let port = self.ports.get_mut(region as usize).ok_or(Errno::EINVAL)?;
        let mut still = port.clone();
        let port = if self.running { port } else { &mut still };
        data.fill(0);
        let mut signals = false;
        for (at, register) in pieces(offset, data.len()) {
            let (value, signal) = port.read(register);
            data[at] = value;
            signals |= signal;
        }
        if signals && self.running {
            self.signal();
        }
        Ok(())
    }

    /// EBUSY for a port of a card that does not run.
    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        if region == pci_index::CONFIG {
            return self.config.write(offset, data);
        }
        let port = self.ports.get_mut(region as usize).ok_or(Errno::EINVAL)?;
        if !self.running {
            return Err(Errno::EBUSY);
        }
        let signals = pieces(offset, data.len())
            .fold(false, |signals, (at, register)| port.write(register, data[at]) | signals);
        if signals {
            self.signal();
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Errno> {
        self.ports.fill(Port::default());
        self.config = Config::new(self.ports.len());
        (self.saving, self.loading) = (None, None);
        (self.running, self.loaded) = (true, false);
        Ok(())
    }

    fn migration(&mut self) -> Option<&mut dyn SimpleMigration> {
        Some(self)
    }
}

impl SimpleMigration for Mtty {
    /// It does no DMA, and has nothing to stop.
    fn flags(&self) -> MigrationFlags {
        MigrationFlags::STOP_COPY | MigrationFlags::P2P | MigrationFlags::PRE_COPY
    }

    fn stop(&mut self) -> Result<(), Fault> {
        self.running = false;
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        self.running = true;
        if std::mem::take(&mut self.loaded) && self.ports.iter().any(Port::interrupts) {
            self.signal();
        }
        Ok(())
    }

    fn save_begin(&mut self) -> Result<(), Fault> {
        self.saving = Some((stream::header(self.ports.len()), 0));
        if self.running { Ok(()) } else { self.save_final() }
    }

    fn save(&mut self, bytes_max: usize, stopped: bool) -> Result<Save<'_>, Errno> {
        let (stream, at) = self.saving.as_mut().ok_or(Errno::EIO)?;
        let from = *at;
        *at = stream.len().min(from.saturating_add(bytes_max));
        Ok(match (from == *at, stopped) {
            (false, _) => Save::Data(&stream[from..*at]),
            (true, false) => Save::NothingForNow,
            (true, true) => Save::End,
        })
    }

    fn save_final(&mut self) -> Result<(), Fault> {
        let (stream, _) = self.saving.as_mut().ok_or(Fault::Refused(Errno::EIO))?;
        stream::push_ports(stream, &self.ports);
        Ok(())
    }

    fn save_end(&mut self) {
        self.saving = None;
    }

    fn precopy_info(&mut self, _reinit: bool) -> PrecopyInfo {
        let left = self.saving.as_ref().map_or(0, |(stream, at)| stream.len() - at);
        PrecopyInfo { initial_bytes: left as u64, ..PrecopyInfo::default() }
    }

    fn data_size(&self) -> u64 {
        stream::bytes_of(self.ports.len()) as u64
    }

    fn load_begin(&mut self) -> Result<(), Fault> {
        self.loading = Some(Loader::new(self.ports.len()));
        Ok(())
    }

    fn load(&mut self, chunk: &[u8]) -> Result<(), Errno> {
        self.loading.as_mut().ok_or(Errno::EIO)?.push(chunk).map_err(|refusal| refusal.log())
    }

    fn load_finish(&mut self) -> Result<(), Fault> {
        let loader = self.loading.as_ref().ok_or(Fault::Broken(Errno::EIO))?;
        self.ports = loader.finish().map_err(|refusal| Fault::Refused(refusal.log()))?;
        (self.loading, self.loaded) = (None, true);
        Ok(())
    }

    fn load_abort(&mut self) {
        self.loading = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_is_split_as_mtty_splits_it() {
        let split = |offset, bytes| pieces(offset, bytes).collect::<Vec<_>>();
        assert_eq!(split(0, 8), [(0, 0), (4, 4)]);
        assert_eq!(split(1, 7), [(0, 1), (1, 2), (3, 4)]);
        assert_eq!(split(2, 3), [(0, 2), (2, 4)]);
        assert_eq!(split(5, 1), [(0, 5)]);
    }
}
