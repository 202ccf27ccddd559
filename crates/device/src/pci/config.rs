//! Configuration space: bytes, and for each bit whether the client or the device may change it
//! (`PCI Local Bus 3.0`, 6.1 and 6.2).

use limosa_protocol::Errno;

use super::builder::Bar;
use super::msix::MsixLayout;

pub(super) const COMMAND: usize = 0x04;
pub(super) const STATUS: usize = 0x06;
pub(super) const BAR0: usize = 0x10;
/// STATUS: the function wants an interrupt.
pub(super) const STATUS_INTERRUPT: u8 = 1 << 3;
/// Device Control: start a function-level reset, in the register's upper byte.
const INITIATE_FLR: u8 = 1 << 7;

bitflags::bitflags! {
    /// The COMMAND register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Command: u16 {
        /// The function answers in I/O space.
        const IO = 1 << 0;
        /// The function answers in memory space.
        const MEMORY = 1 << 1;
        /// The function may do DMA and send messages.
        const BUS_MASTER = 1 << 2;
        /// Parity errors are acted upon.
        const PARITY = 1 << 6;
        /// System errors are reported.
        const SERR = 1 << 8;
        /// INTx is not used.
        const INTX_DISABLE = 1 << 10;
        const _ = !0;
    }
}

bitflags::bitflags! {
    /// The changes by a write to configuration space.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Changes: u32 {
        /// COMMAND.
        const COMMAND = 1 << 0;
        /// The address of a BAR.
        const BARS = 1 << 1;
        /// The power state.
        const POWER = 1 << 2;
        /// MSI message control or mask bits.
        const MSI = 1 << 3;
        /// The MSI-X message control register.
        const MSIX = 1 << 4;
        /// The client started a function-level reset: the model has to reset itself and this function.
        const FLR = 1 << 5;
        /// Anything else.
        const OTHER = 1 << 6;
    }
}

/// Properties that are fixed when the function is built.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) initial: Box<[u8]>,
    /// Bits that the client can set and clear.
    pub(super) writable: Box<[u8]>,
    /// Bits that the client clears by writing one.
    pub(super) clears: Box<[u8]>,
    /// Bits that only the device changes.
    pub(super) volatile: Box<[u8]>,
    pub(super) bars: [Option<Bar>; 6],
    pub(super) has_pin: bool,
    pub(super) power: Option<usize>,
    pub(super) express: Option<usize>,
    pub(super) msi: Option<MsiLayout>,
    pub(super) msix: Option<MsixLayout>,
}

/// Offsets of the MSI registers.
#[derive(Clone, Copy, Debug)]
pub(super) struct MsiLayout {
    pub(super) at: usize,
    pub(super) bytes: usize,
    pub(super) vectors: u32,
    /// Mask bits and pending bits.
    pub(super) masks: usize,
    pub(super) pending: usize,
}

/// The current bytes.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Config {
    pub(super) now: Box<[u8]>,
}

impl Config {
    pub(super) fn new(layout: &Layout) -> Config {
        Config { now: layout.initial.clone() }
    }

    pub(super) fn bytes(&self) -> usize {
        self.now.len()
    }

    fn range(&self, offset: u64, len: usize) -> Result<std::ops::Range<usize>, Errno> {
        let start = usize::try_from(offset).map_err(|_| Errno::EINVAL)?;
        let end = start.checked_add(len).filter(|end| *end <= self.now.len()).ok_or(Errno::EINVAL)?;
        Ok(start..end)
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        data.copy_from_slice(&self.now[self.range(offset, data.len())?]);
        Ok(())
    }

    pub(super) fn write(&mut self, layout: &Layout, offset: u64, data: &[u8]) -> Result<Changes, Errno> {
        let mut changes = Changes::empty();
        for (at, data) in self.range(offset, data.len())?.zip(data) {
            let (writable, clears, old) = (layout.writable[at], layout.clears[at], self.now[at]);
            let mut new = ((old & !writable) | (data & writable)) & !(data & clears);
            if layout.express.is_some_and(|express| at == express + 9) && new & INITIATE_FLR != 0 {
                new &= !INITIATE_FLR;
                changes |= Changes::FLR;
            }
            self.now[at] = new;
            if new != old {
                changes |= layout.change_at(at);
            }
        }
        Ok(changes)
    }

    pub(super) fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.now[at], self.now[at + 1]])
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from(self.u16_at(at)) | u32::from(self.u16_at(at + 2)) << 16
    }

    pub(super) fn command(&self) -> Command {
        Command::from_bits_retain(self.u16_at(COMMAND))
    }

    pub(super) fn bar_address(&self, layout: &Layout, bar: usize) -> u64 {
        let low = || u64::from(self.u32_at(BAR0 + 4 * bar));
        match layout.bars.get(bar) {
            Some(Some(Bar::Io { .. })) => low() & !3,
            Some(Some(Bar::Memory32 { .. })) => low() & !15,
            Some(Some(Bar::Memory64 { .. })) => {
                (low() & !15) | u64::from(self.u32_at(BAR0 + 4 * bar + 4)) << 32
            }
            _ => 0,
        }
    }

    pub(super) fn set_interrupt_status(&mut self, raised: bool) {
        self.now[STATUS] &= !STATUS_INTERRUPT;
        self.now[STATUS] |= if raised { STATUS_INTERRUPT } else { 0 };
    }

    pub(super) fn msi_control(&self, msi: &MsiLayout) -> u16 {
        self.u16_at(msi.at + 2)
    }

    pub(super) fn msix_control(&self, msix: &MsixLayout) -> u16 {
        self.u16_at(msix.at + 2)
    }

    /// Whether an MSI vector is not masked; a masked vector becomes pending.
    pub(super) fn msi_hold(&mut self, layout: &Layout, vector: u32) -> bool {
        let Some(MsiLayout { masks, pending, .. }) = layout.msi.filter(|_| vector < 32) else { return true };
        let open = self.u32_at(masks) >> vector & 1 == 0;
        if !open {
            self.now[pending + vector as usize / 8] |= 1 << (vector % 8);
        }
        open
    }

    /// Makes a vector of MSI pending.
    pub(super) fn msi_put_pending(&mut self, layout: &Layout, vector: u32) {
        if let Some(msi) = layout.msi.filter(|_| vector < 32) {
            self.now[msi.pending + vector as usize / 8] |= 1 << (vector % 8);
        }
    }

    /// Passes the MSI vectors that are pending and not masked, and clears their pending bits.
    pub(super) fn msi_take_pending(&mut self, layout: &Layout, mut fire: impl FnMut(u32)) {
        let Some(MsiLayout { masks, pending, .. }) = layout.msi else { return };
        let masked = self.u32_at(masks);
        let now = self.u32_at(pending);
        self.now[pending..pending + 4].copy_from_slice(&(now & masked).to_le_bytes());
        (0..32).filter(|vector| (now & !masked) >> vector & 1 != 0).for_each(&mut fire);
    }
}

impl Layout {
    /// The number of vectors that the device can raise: the largest number among INTx, MSI and MSI-X.
    pub(super) fn vectors(&self) -> u32 {
        let msi = self.msi.as_ref().map_or(0, |msi| msi.vectors);
        let msix = self.msix.as_ref().map_or(0, |msix| u32::from(msix.vectors));
        msi.max(msix).max(u32::from(self.has_pin))
    }

    fn change_at(&self, at: usize) -> Changes {
        let within =
            |from: Option<usize>, bytes: usize| from.is_some_and(|from| (from..from + bytes).contains(&at));
        if (COMMAND..COMMAND + 2).contains(&at) {
            Changes::COMMAND
        } else if (BAR0..BAR0 + 24).contains(&at) {
            Changes::BARS
        } else if within(self.power, 8) {
            Changes::POWER
        } else if self.msi.as_ref().is_some_and(|msi| within(Some(msi.at), msi.bytes)) {
            Changes::MSI
        } else if within(self.msix.as_ref().map(|msix| msix.at), 12) {
            Changes::MSIX
        } else {
            Changes::OTHER
        }
    }
}

impl std::fmt::Debug for Config {
    /// Prints only the common registers; all bytes would fill pages.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config").field("bytes", &self.now.len()).field("command", &self.command()).finish()
    }
}
