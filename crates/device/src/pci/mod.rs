//! A PCI function: configuration space with capabilities, MSI-X table, and interrupts of the kind that the client
//! uses (`PCI Local Bus 3.0`, chapter 6; `PCI Express Base`, chapter 7; `vfio.h: VFIO_PCI_*_INDEX`).
//!
//! A model declares its function once, forwards accesses to the configuration region and to the BAR with the MSI-X
//! table, and raises and lowers its interrupts there:
//!
//! ```
//! use limosa_device::Wiring;
//! use limosa_device::pci::{Bar, Changes, Command, Function, Identity};
//!
//! let mut function = Function::builder(Identity { vendor: 0x1b36, device: 2, class: 0x07_0002, ..Identity::default() })
//!     .bar(0, Bar::Io { bytes: 8 })
//!     .interrupt_pin()
//!     .build();
//! let irqs = Wiring::new(&function.irqs()).interrupts();
//!
//! // The client enables I/O, and the device raises its interrupt.
//! let changes = function.config_write(4, &1u16.to_le_bytes(), &irqs)?;
//! assert!(changes.contains(Changes::COMMAND) && function.command().contains(Command::IO));
//! function.raise(0, &irqs);
//! # Ok::<(), limosa_protocol::Errno>(())
//! ```
//!
//! MSI and MSI-X in a VMM. A VMM emulates the guest's view of MSI and MSI-X itself and wires eventfds (SET_IRQS), so
//! the wiring decides which kind of interrupt is used: MSI-X if any of its vectors is wired, else MSI. If neither is
//! wired, the enable bits in the configuration space decide: a message is pending until the client wires its vector,
//! and shown in the MSI-X pending bits. Otherwise it is INTx, or, for a function without a pin, a pending message. Mask
//! bits are respected only if the client has written them: a VMM that emulates the MSI-X table (as QEMU does) never
//! writes the device's table, whose entries are all masked after a reset, and still gets every vector.
//!
//! When the client has wired or unwired vectors, the model is told ([`rewired`](crate::Model::rewired)) and calls
//! [`Function::settle`]: INTx rises or falls depending on the wiring of the other indexes.

mod builder;
mod config;
mod msix;
mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use limosa_protocol::info::{IrqFlags, RegionFlags};
use limosa_protocol::{Errno, pci_index};

use crate::{Interrupts, Irq, Region};
pub use builder::{Bar, FunctionBuilder, Identity};
pub use config::{Changes, Command};
use config::{Config, Layout};
use msix::MsixTable;
pub use state::FunctionState;

/// A PCI function of a device. A clone has the same state.
#[derive(Clone, Debug)]
pub struct Function {
    layout: Arc<Layout>,
    config: Config,
    msix: Option<MsixTable>,
    /// Bit *n*: the device has raised vector *n* and not lowered it.
    raised: Vec<u64>,
}

impl Function {
    /// Declares a function with a type 0 header.
    pub fn builder(identity: Identity) -> FunctionBuilder {
        FunctionBuilder::new(identity)
    }

    /// Bytes of the configuration space: 256, or 4096 for PCI Express.
    pub fn config_bytes(&self) -> u64 {
        self.config.bytes() as u64
    }

    /// The nine regions of a PCI device, for [`Description::regions`](crate::Description::regions): the declared BARs
    /// and the configuration space. The model may add mappings to its BARs.
    pub fn regions(&self) -> Vec<Region> {
        let mut regions = vec![Region::default(); pci_index::NUM_REGIONS as usize];
        let flags = RegionFlags::READ | RegionFlags::WRITE;
        for (region, bar) in regions.iter_mut().zip(&self.layout.bars) {
            if let Some(bar) = bar {
                *region = Region { flags, size: bar.bytes(), ..Region::default() };
            }
        }
        regions[pci_index::CONFIG as usize] =
            Region { flags, size: self.config_bytes(), ..Region::default() };
        regions
    }

    /// The five interrupt indexes of a PCI device, for [`Description::irqs`](crate::Description::irqs). The error
    /// interrupt exists because QEMU expects it; only the model triggers it.
    pub fn irqs(&self) -> Vec<Irq> {
        let message = IrqFlags::EVENTFD | IrqFlags::NORESIZE;
        // With NORESIZE a VMM has to unwire all vectors to wire another one.
        let resizable = IrqFlags::EVENTFD;
        let mut irqs = vec![Irq::default(); pci_index::NUM_IRQS as usize];
        if self.layout.has_pin {
            let flags = IrqFlags::EVENTFD | IrqFlags::MASKABLE | IrqFlags::AUTOMASKED;
            irqs[pci_index::IRQ_INTX as usize] = Irq { flags, count: 1 };
        }
        if let Some(msi) = &self.layout.msi {
            irqs[pci_index::IRQ_MSI as usize] = Irq { flags: message, count: msi.vectors };
        }
        if let Some(msix) = &self.layout.msix {
            irqs[pci_index::IRQ_MSIX as usize] = Irq { flags: resizable, count: u32::from(msix.vectors) };
        }
        irqs[pci_index::IRQ_ERR as usize] = Irq { flags: message, count: 1 };
        irqs
    }

    /// Reads configuration space, any bytes of it. EINVAL outside.
    pub fn config_read(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.config.read(offset, data)
    }

    /// Writes configuration space, any bytes of it: read-only bits stay, bits that are cleared by writing one are
    /// cleared. Returns the changes; interrupts are already updated. EINVAL outside.
    pub fn config_write(&mut self, offset: u64, data: &[u8], irqs: &Interrupts) -> Result<Changes, Errno> {
        let changes = self.config.write(&self.layout, offset, data)?;
        if changes.intersects(Changes::COMMAND | Changes::MSI | Changes::MSIX) {
            self.settle(irqs);
        }
        Ok(changes)
    }

    /// The COMMAND register.
    pub fn command(&self) -> Command {
        self.config.command()
    }

    /// The address in a BAR's register; 0 for a missing BAR.
    pub fn bar_address(&self, bar: usize) -> u64 {
        self.config.bar_address(&self.layout, bar)
    }

    /// Whether the client set the enable bit of MSI.
    pub fn msi_enabled(&self) -> bool {
        self.layout.msi.as_ref().is_some_and(|msi| self.config.msi_control(msi) & 1 != 0)
    }

    /// Whether the client set the enable bit of MSI-X.
    pub fn msix_enabled(&self) -> bool {
        self.layout.msix.as_ref().is_some_and(|msix| self.config.msix_control(msix) & (1 << 15) != 0)
    }

    /// Reads the part of a BAR access that lies in the MSI-X table or its pending bits into `data`; the rest of
    /// `data` stays as the model filled it in. Returns whether that was the whole access.
    pub fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8], irqs: &Interrupts) -> bool {
        let pending = || self.msix_pending(irqs);
        self.msix.as_ref().is_some_and(|msix| msix.read(bar, offset, data, pending))
    }

    /// Writes the part of a BAR access that lies in the MSI-X table or its pending bits (which are read-only).
    /// Returns whether that was the whole access.
    pub fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8], irqs: &Interrupts) -> bool {
        let all = self.msix.as_mut().is_some_and(|msix| msix.write(bar, offset, data));
        self.settle(irqs);
        all
    }

    /// The device raises an interrupt: sends a message, each time, if the client uses MSI-X or MSI; otherwise
    /// asserts INTx until all raised vectors are [lowered](Function::lower). If MSI has fewer vectors than the device,
    /// the excess vectors share the first. A message that is masked or whose vector is not wired is pending. Does
    /// nothing for an undeclared vector.
    pub fn raise(&mut self, vector: u32, irqs: &Interrupts) {
        if vector >= self.layout.vectors() {
            return;
        }
        self.raised[vector as usize / 64] |= 1 << (vector % 64);
        match self.messages(irqs) {
            Some(Messages::Msix) => self.raise_msix(vector, irqs),
            Some(Messages::Msi) => {
                let vector = if irqs.is_wired(pci_index::IRQ_MSI, vector) { vector } else { 0 };
                if self.config.msi_hold(&self.layout, vector) {
                    irqs.raise(pci_index::IRQ_MSI, vector);
                }
            }
            None => {}
        }
        self.settle_intx(irqs);
    }

    /// The cause of the interrupt is gone. Messages that were already sent are not affected.
    pub fn lower(&mut self, vector: u32, irqs: &Interrupts) {
        if let Some(word) = self.raised.get_mut(vector as usize / 64) {
            *word &= !(1 << (vector % 64));
        }
        self.settle_intx(irqs);
    }

    /// Whether an interrupt is raised.
    pub fn is_raised(&self, vector: u32) -> bool {
        self.raised.get(vector as usize / 64).is_some_and(|word| word >> (vector % 64) & 1 != 0)
    }

    /// Returns to the power-on state, with nothing raised.
    pub fn reset(&mut self, irqs: &Interrupts) {
        self.config = Config::new(&self.layout);
        if let Some(msix) = &mut self.msix {
            msix.reset();
        }
        self.raised.fill(0);
        irqs.forget_pending(pci_index::IRQ_MSI);
        irqs.forget_pending(pci_index::IRQ_MSIX);
        self.settle_intx(irqs);
    }

    /// Updates the interrupts to match the function's state: sends messages that are pending and no longer masked,
    /// and asserts or deasserts INTx. Call it when a [loaded](Function::loaded) state takes effect, and when the client
    /// has [wired](crate::Model::rewired) or unwired vectors.
    pub fn settle(&mut self, irqs: &Interrupts) {
        let masked = self.msix_masked();
        if let Some(msix) = &mut self.msix
            && !masked
        {
            msix.take_pending(|vector| irqs.raise(pci_index::IRQ_MSIX, vector));
        }
        self.config.msi_take_pending(&self.layout, |vector| irqs.raise(pci_index::IRQ_MSI, vector));
        self.settle_intx(irqs);
    }

    /// The kind of message that the client uses.
    fn messages(&self, irqs: &Interrupts) -> Option<Messages> {
        let (msix, msi) = (Some(Messages::Msix), Some(Messages::Msi));
        if irqs.any_wired(pci_index::IRQ_MSIX) {
            msix
        } else if irqs.any_wired(pci_index::IRQ_MSI) {
            msi
        } else if self.msix_enabled() {
            msix
        } else if self.msi_enabled() {
            msi
        } else if self.layout.has_pin {
            None
        } else {
            msix.filter(|_| self.msix.is_some()).or(msi)
        }
    }

    /// The MSI-X pending bits: messages that are masked in the table, and edges that were not signalled.
    fn msix_pending(&self, irqs: &Interrupts) -> Vec<u8> {
        let mut pending = self.msix.as_ref().map_or(vec![], |msix| msix.pending.clone());
        for vector in irqs.pending(pci_index::IRQ_MSIX) {
            if let Some(byte) = pending.get_mut(vector as usize / 8) {
                *byte |= 1 << (vector % 8);
            }
        }
        pending
    }

    fn raise_msix(&mut self, vector: u32, irqs: &Interrupts) {
        let masked = self.msix_masked();
        let held = self.msix.as_mut().is_some_and(|msix| msix.hold(vector, masked));
        if !held {
            irqs.raise(pci_index::IRQ_MSIX, vector);
        }
    }

    /// Whether the client masked all of MSI-X.
    fn msix_masked(&self) -> bool {
        self.layout.msix.as_ref().is_some_and(|msix| self.config.msix_control(msix) & (1 << 14) != 0)
    }

    fn settle_intx(&mut self, irqs: &Interrupts) {
        if !self.layout.has_pin {
            return;
        }
        let raised = self.raised.iter().any(|word| *word != 0);
        self.config.set_interrupt_status(raised);
        let held = raised && self.messages(irqs).is_none() && !self.command().contains(Command::INTX_DISABLE);
        irqs.set_level(pci_index::IRQ_INTX, 0, held);
    }
}

/// The kinds of messages.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Messages {
    Msi,
    Msix,
}
