//! Declares a function: header, BARs and capabilities (`PCI Local Bus 3.0`, 6.2 and 6.7; `PCI Express Base`, 7.8).

use std::sync::Arc;

use super::Function;
use super::config::{BAR0, COMMAND, Command, Config, Layout, MsiLayout, STATUS, STATUS_INTERRUPT};
use super::msix::{MsixLayout, MsixTable};

const CONVENTIONAL_BYTES: usize = 256;
const EXPRESS_BYTES: usize = 4096;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const FIRST_EXTENDED: usize = 0x100;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;

/// The identity in a function's configuration space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class code, 24 bits: base class, sub-class, programming interface.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// A base address register, with the size of what it addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bar {
    /// I/O space: a power of two from 4 to 256.
    Io {
        /// Bytes.
        bytes: u64,
    },
    /// Memory below 4 GiB: a power of two from 16 to 2^31.
    Memory32 {
        /// Bytes.
        bytes: u64,
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// Memory anywhere, with the next register as the upper half: a power of two from 16 to 2^62.
    Memory64 {
        /// Bytes.
        bytes: u64,
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

impl Bar {
    /// Bytes that it addresses.
    pub fn bytes(&self) -> u64 {
        match *self {
            Bar::Io { bytes } | Bar::Memory32 { bytes, .. } | Bar::Memory64 { bytes, .. } => bytes,
        }
    }
}

/// Collects the parts of a function. The methods panic on invalid parts: mistakes of a model's author, which show
/// the first time that it runs.
#[derive(Debug)]
pub struct FunctionBuilder {
    initial: Vec<u8>,
    writable: Vec<u8>,
    clears: Vec<u8>,
    volatile: Vec<u8>,
    bars: [Option<Bar>; 6],
    has_pin: bool,
    power: Option<usize>,
    express: Option<usize>,
    msi: Option<MsiLayout>,
    msix: Option<MsixLayout>,
    /// Offset of the pointer to the next capability, and offset of the next capability.
    link: usize,
    next: usize,
    /// The same for extended ones.
    extended: Option<usize>,
    extended_next: usize,
}

impl FunctionBuilder {
    pub(super) fn new(identity: Identity) -> FunctionBuilder {
        let zero = || vec![0; CONVENTIONAL_BYTES];
        let mut builder = FunctionBuilder {
            initial: zero(),
            writable: zero(),
            clears: zero(),
            volatile: zero(),
            bars: [None; 6],
            has_pin: false,
            power: None,
            express: None,
            msi: None,
            msix: None,
            link: CAPABILITIES,
            next: FIRST_CAPABILITY,
            extended: None,
            extended_next: FIRST_EXTENDED,
        };
        builder.set(0x00, &identity.vendor.to_le_bytes());
        builder.set(0x02, &identity.device.to_le_bytes());
        assert!(identity.class < 1 << 24, "a class code has 24 bits");
        builder.set(0x08, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        builder.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        builder.set(0x2e, &identity.subsystem.to_le_bytes());
        let command = Command::BUS_MASTER | Command::PARITY | Command::SERR;
        builder.allow(COMMAND, &command.bits().to_le_bytes());
        // Errors that the function saw: parity, aborts, system error.
        builder.clears[STATUS + 1] = 0xf9;
        // Cache line size and interrupt line are notes for the software.
        builder.allow(0x0c, &[0xff]);
        builder.allow(INTERRUPT_LINE, &[0xff]);
        builder
    }

    /// A BAR, 0 to 5. Panics on an invalid size, and if the register is in use or there is none for the upper half.
    pub fn bar(mut self, bar: usize, kind: Bar) -> Self {
        let (bytes, bytes_max, kind_bits, enable) = match kind {
            Bar::Io { bytes } => (bytes, 256, 1, Command::IO),
            Bar::Memory32 { bytes, prefetchable } => {
                (bytes, 1 << 31, if prefetchable { 8 } else { 0 }, Command::MEMORY)
            }
            Bar::Memory64 { bytes, prefetchable } => {
                (bytes, 1 << 62, if prefetchable { 12 } else { 4 }, Command::MEMORY)
            }
        };
        let bytes_min = if matches!(kind, Bar::Io { .. }) { 4 } else { 16 };
        assert!(
            bytes.is_power_of_two() && (bytes_min..=bytes_max).contains(&bytes),
            "BAR {bar} of {bytes} bytes"
        );
        let at = BAR0 + 4 * bar;
        let mask = !(bytes - 1);
        let registers = if matches!(kind, Bar::Memory64 { .. }) { 2 } else { 1 };
        assert!(bar + registers <= 6, "there is no BAR {bar} and {registers} registers");
        let free = (bar..bar + registers).all(|bar| self.writable[BAR0 + 4 * bar + 3] == 0);
        assert!(free, "BAR {bar} is taken");
        self.set(at, &[kind_bits]);
        self.allow(at, &mask.to_le_bytes()[..4 * registers]);
        let command =
            u16::from_le_bytes([self.writable[COMMAND], self.writable[COMMAND + 1]]) | enable.bits();
        self.allow(COMMAND, &command.to_le_bytes());
        self.bars[bar] = Some(kind);
        self
    }

    /// INTx, on pin A.
    pub fn interrupt_pin(mut self) -> Self {
        self.has_pin = true;
        self.set(INTERRUPT_PIN, &[1]);
        self.volatile[STATUS] |= STATUS_INTERRUPT;
        self.writable[COMMAND + 1] |= (Command::INTX_DISABLE.bits() >> 8) as u8;
        self
    }

    /// Power management: D0 and D3hot, which keeps the registers.
    pub fn power_management(mut self) -> Self {
        assert!(self.power.is_none(), "power management is there");
        // PMC: version 3. PMCSR: no soft reset; the power state can be written.
        let at = self.capability(0x01, &[0x03, 0, 0x08, 0, 0, 0], &[0, 0, 0x03, 0, 0, 0]);
        self.power = Some(at);
        self
    }

    /// MSI with 1, 2, 4, 8, 16 or 32 vectors, 64-bit addresses and a mask for each vector.
    pub fn msi(mut self, vectors: u32) -> Self {
        assert!(self.msi.is_none(), "MSI is there");
        assert!(vectors.is_power_of_two() && vectors <= 32, "MSI with {vectors} vectors");
        let (mut body, mut writable) = ([0; 22], [0; 22]);
        body[0] = (vectors.trailing_zeros() << 1) as u8 | 1 << 7;
        body[1] = 1;
        writable[0] = 0x71;
        writable[2..10].copy_from_slice(&(!3u64).to_le_bytes());
        writable[10..12].fill(0xff);
        let masks = if vectors == 32 { !0 } else { (1u32 << vectors) - 1 };
        writable[14..18].copy_from_slice(&masks.to_le_bytes());
        let at = self.capability(0x05, &body, &writable);
        self.volatile[at + 20..at + 24].fill(0xff);
        self.msi = Some(MsiLayout { at, bytes: 24, vectors, masks: at + 16, pending: at + 20 });
        self
    }

    /// MSI-X with 1 to 2048 vectors. The table, 16 bytes a vector, and the pending bits, 8 bytes for each 64 vectors or
    /// part of them, are at (BAR, offset), the offsets multiples of 8. Panics if they overlap or exceed their BAR,
    /// which has to be declared before.
    pub fn msix(mut self, vectors: u16, table: (usize, u64), pending: (usize, u64)) -> Self {
        assert!(self.msix.is_none(), "MSI-X is there");
        assert!((1..=2048).contains(&vectors), "MSI-X with {vectors} vectors");
        let mut layout = MsixLayout { at: 0, vectors, table, pending };
        for ((bar, offset), bytes) in [(table, layout.table_bytes()), (pending, layout.pending_bytes())] {
            let size = self.bars.get(bar).copied().flatten().map_or(0, |bar| bar.bytes());
            let fits =
                offset % 8 == 0 && offset.checked_add(bytes).is_some_and(|end| end <= size.min(1 << 32));
            assert!(fits, "MSI-X outside of BAR {bar}");
        }
        let apart =
            table.1 + layout.table_bytes() <= pending.1 || pending.1 + layout.pending_bytes() <= table.1;
        assert!(table.0 != pending.0 || apart, "MSI-X table over its pending bits");
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
        for (at, (bar, offset)) in [(2, table), (6, pending)] {
            body[at..at + 4].copy_from_slice(&(offset as u32 | bar as u32).to_le_bytes());
        }
        layout.at = self.capability(0x11, &body, &[0, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0]);
        self.msix = Some(layout);
        self
    }

    /// PCI Express: an endpoint of one lane that can be reset on its own ([`Changes::FLR`](super::Changes::FLR)), with
    /// 4096 bytes of configuration space.
    pub fn express(mut self) -> Self {
        assert!(self.express.is_none(), "PCI Express is there");
        for bytes in [&mut self.initial, &mut self.writable, &mut self.clears, &mut self.volatile] {
            bytes.resize(EXPRESS_BYTES, 0);
        }
        let (mut body, mut writable) = ([0; 58], [0; 58]);
        // Offsets in the body are two less than in the capability.
        body[0] = 2; // capabilities: version 2, an endpoint
        body[2..6].copy_from_slice(&(1u32 << 28 | 1 << 15).to_le_bytes()); // device: FLR, role-based errors
        writable[6..8].copy_from_slice(&0xffff_u16.to_le_bytes()); // device control
        body[6..8].copy_from_slice(&0x2810_u16.to_le_bytes()); // relaxed ordering, no snoop, 512-byte reads
        body[10..14].copy_from_slice(&0x0011_u32.to_le_bytes()); // link: 2.5 GT/s, one lane
        writable[14] = 0xc3; // link control: ASPM, common clock, extended synch
        body[16..18].copy_from_slice(&0x0011_u16.to_le_bytes()); // link status: as above
        writable[38..40].copy_from_slice(&0x001f_u16.to_le_bytes()); // device control 2: completion timeout
        body[34..38].copy_from_slice(&0x0010_u32.to_le_bytes()); // device 2: the timeout can be disabled
        body[46] = 1; // link control 2: 2.5 GT/s
        let at = self.capability(0x10, &body, &writable);
        self.clears[at + 10] = 0x0f; // device status: errors seen
        self.express = Some(at);
        self
    }

    /// A vendor's capability of `body` after its length byte, with the bits of `writable` writable.
    pub fn vendor(mut self, body: &[u8], writable: &[u8]) -> Self {
        assert_eq!(body.len(), writable.len(), "a mask for each byte");
        let length = u8::try_from(body.len() + 3).expect("a capability has at most 255 bytes");
        self.capability(0x09, &[&[length], body].concat(), &[&[0], writable].concat());
        self
    }

    /// An extended capability of `body` after its 4-byte header, with the bits of `writable` writable. Panics without
    /// [`FunctionBuilder::express`] before it, and if there is no space left.
    pub fn extended(mut self, id: u16, version: u8, body: &[u8], writable: &[u8]) -> Self {
        assert!(self.express.is_some(), "extended capabilities are PCI Express's");
        assert_eq!(body.len(), writable.len(), "a mask for each byte");
        let at = self.extended_next;
        let end = (at + 4 + body.len()).next_multiple_of(4);
        assert!(version < 16 && end <= EXPRESS_BYTES, "no room for extended capability {id:#x}");
        self.set(at, &(u32::from(id) | u32::from(version) << 16).to_le_bytes());
        self.set(at + 4, body);
        self.allow(at + 4, writable);
        if let Some(former) = self.extended.replace(at) {
            let next = (at as u16) << 4;
            self.initial[former + 2] |= next as u8;
            self.initial[former + 3] = (next >> 8) as u8;
        }
        self.extended_next = end;
        self
    }

    /// The function, as it is at power-on.
    pub fn build(self) -> Function {
        let msix = self.msix.as_ref().map(MsixTable::new);
        let layout = Layout {
            initial: self.initial.into(),
            writable: self.writable.into(),
            clears: self.clears.into(),
            volatile: self.volatile.into(),
            bars: self.bars,
            has_pin: self.has_pin,
            power: self.power,
            express: self.express,
            msi: self.msi,
            msix: self.msix,
        };
        let config = Config::new(&layout);
        let raised = vec![0; layout.vectors().div_ceil(64) as usize];
        Function { layout: Arc::new(layout), config, msix, raised }
    }

    /// Links in a capability with `body` after its ID and next pointer. Returns its offset.
    fn capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next;
        let end = (at + 2 + body.len()).next_multiple_of(4);
        assert!(end <= CONVENTIONAL_BYTES, "no room for capability {id:#x}");
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        self.set(self.link, &[at as u8]);
        self.initial[STATUS] |= 1 << 4;
        (self.link, self.next) = (at + 1, end);
        at
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.initial[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }
}
