//! A PCI function as firmware and drivers use it, by qtest (`PCI Local Bus 3.0`, chapter 6).

use crate::Qtest;

/// Where BARs are put: beyond the RAM of any machine here, below the I/O APIC.
const MEMORY: u64 = 0xe000_0000;
const MEMORY_EACH: u64 = 16 << 20;
const PORTS: u16 = 0xc000;

/// The input of the I/O APIC that the pins of all functions are routed to.
pub const PIN_LINE: u32 = 11;

/// COMMAND: ports, memory and bus mastering.
const COMMAND_ALL: u32 = 7;

/// A function on the first bus.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    slot: u8,
}

/// What a BAR was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bar {
    /// Ports.
    Ports {
        /// The first.
        base: u16,
        /// How many.
        bytes: u64,
    },
    /// Memory.
    Memory {
        /// Its address.
        base: u64,
        /// Bytes.
        bytes: u64,
    },
}

impl Bar {
    /// The address of a BAR in memory.
    ///
    /// # Panics
    ///
    /// For one in ports.
    pub fn memory(self) -> u64 {
        match self {
            Bar::Memory { base, .. } => base,
            Bar::Ports { .. } => panic!("{self:?} is not memory"),
        }
    }

    /// The first port of a BAR in ports.
    ///
    /// # Panics
    ///
    /// For one in memory.
    pub fn ports(self) -> u16 {
        match self {
            Bar::Ports { base, .. } => base,
            Bar::Memory { .. } => panic!("{self:?} is not ports"),
        }
    }
}

impl Function {
    /// The one in a slot, with its pin routed and COMMAND on; its BARs have no addresses yet.
    pub fn new(qtest: &mut Qtest, slot: u8) -> Function {
        // PIIX3, function 0 of slot 1: PIRQ A to D, as firmware routes them.
        Function { slot: 1 }.write(qtest, 0x60, 4, u32::from_ne_bytes([PIN_LINE as u8; 4]));
        Function { slot }
    }

    /// Reads its configuration space.
    pub fn read(self, qtest: &mut Qtest, offset: u16, bytes: usize) -> u32 {
        let port = self.select(qtest, offset);
        qtest.port_read(port, bytes)
    }

    /// Writes it.
    pub fn write(self, qtest: &mut Qtest, offset: u16, bytes: usize, value: u32) {
        let port = self.select(qtest, offset);
        qtest.port_write(port, bytes, value);
    }

    fn select(self, qtest: &mut Qtest, offset: u16) -> u16 {
        let address = 1 << 31 | u32::from(self.slot) << 11 | u32::from(offset & 0xfc);
        qtest.port_write(0xcf8, 4, address);
        0xcfc + (offset & 3)
    }

    /// Gives a BAR an address of its own.
    pub fn place(self, qtest: &mut Qtest, bar: u8) -> Bar {
        let register = 0x10 + 4 * u16::from(bar);
        let kind = self.read(qtest, register, 4);
        self.write(qtest, register, 4, !0);
        let low = self.read(qtest, register, 4);
        let index = u64::from(self.slot) * 6 + u64::from(bar);
        if kind & 1 != 0 {
            let base = PORTS + index as u16 * 64;
            self.write(qtest, register, 4, base.into());
            return Bar::Ports { base, bytes: u64::from(!(low & !3)) + 1 };
        }
        let base = MEMORY + (index % 12) * MEMORY_EACH;
        let mut mask = 0xffff_ffff_0000_0000 | u64::from(low & !0xf);
        if kind & 6 == 4 {
            self.write(qtest, register + 4, 4, !0);
            mask = u64::from(self.read(qtest, register + 4, 4)) << 32 | u64::from(low & !0xf);
            self.write(qtest, register + 4, 4, (base >> 32) as u32);
        }
        self.write(qtest, register, 4, base as u32);
        Bar::Memory { base, bytes: (!mask).wrapping_add(1) }
    }

    /// Lets it answer and master the bus.
    pub fn enable(self, qtest: &mut Qtest) {
        self.write(qtest, 4, 2, COMMAND_ALL);
    }

    /// Where a capability is.
    ///
    /// # Panics
    ///
    /// When the function does not have it.
    pub fn capability(self, qtest: &mut Qtest, id: u8) -> u16 {
        let mut at = self.read(qtest, 0x34, 1) as u16;
        while at != 0 {
            if self.read(qtest, at, 1) == u32::from(id) {
                return at;
            }
            at = self.read(qtest, at + 1, 1) as u16;
        }
        panic!("{self:?} has no capability {id:#x}");
    }

    /// Sends MSI messages to an address in memory.
    pub fn enable_msi(self, qtest: &mut Qtest, address: u64, data: u16) {
        let at = self.capability(qtest, 5);
        let is_64_bit = self.read(qtest, at + 2, 2) & 1 << 7 != 0;
        self.write(qtest, at + 4, 4, address as u32);
        if is_64_bit {
            self.write(qtest, at + 8, 4, (address >> 32) as u32);
        }
        self.write(qtest, at + if is_64_bit { 12 } else { 8 }, 2, data.into());
        self.write(qtest, at + 2, 2, 1);
    }

    /// The MSI-X table, in a BAR that was placed.
    pub fn msix(self, qtest: &mut Qtest, place: impl Fn(u8) -> Bar) -> Msix {
        let at = self.capability(qtest, 0x11);
        let offset = self.read(qtest, at + 4, 4);
        let table = place((offset & 7) as u8).memory() + u64::from(offset & !7);
        let vectors = (self.read(qtest, at + 2, 2) & 0x7ff) as u16 + 1;
        Msix { function: self, control: at + 2, table, vectors }
    }
}

/// MSI-X of a function (`PCI Local Bus 3.0`, 6.8.2).
#[derive(Clone, Copy, Debug)]
pub struct Msix {
    function: Function,
    control: u16,
    table: u64,
    /// How many it has.
    pub vectors: u16,
}

impl Msix {
    /// Turns it on or off.
    pub fn enable(self, qtest: &mut Qtest, on: bool) {
        self.function.write(qtest, self.control, 2, if on { 0x8000 } else { 0 });
    }

    /// Says where a vector's messages go, masked or not.
    pub fn set(self, qtest: &mut Qtest, vector: u16, address: u64, data: u32, is_masked: bool) {
        let entry = self.table + 16 * u64::from(vector);
        let words = [address as u32, (address >> 32) as u32, data, is_masked.into()];
        for (at, word) in (0..).step_by(4).zip(words) {
            qtest.register_write(entry + at, 4, word.into());
        }
    }

    /// Masks or unmasks a vector.
    pub fn mask(self, qtest: &mut Qtest, vector: u16, is_masked: bool) {
        qtest.register_write(self.table + 16 * u64::from(vector) + 12, 4, is_masked.into());
    }
}
