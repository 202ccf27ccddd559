//! Devices of the lab's own module, `lab/module`: its attributes, registers and DMA engine, and the bytes
//! that it makes. What they mean is in that folder's README.md.

use std::fs::File;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use limosa_client::{Device, DmaMap, DmaMemory};
use limosa_protocol::Errno;
use limosa_protocol::info::DmaMapFlags;
use limosa_vfio_kernel::{Door, KernelDevice, Options};

use crate::Mdev;

/// The parent of its devices, and the folder of their attributes.
const PARENT: &str = "limosa";

/// The names of its types, most able first.
pub const TYPES: [&str; 5] = ["limosa-full", "limosa-precopy", "limosa-p2p", "limosa-plain", "limosa-none"];

/// BAR0, with the registers.
pub const BAR0: u32 = 0;

/// BAR2: four pages of memory, part of the state.
pub const BAR2: u32 = 2;

/// The index of the level-triggered interrupt (`VFIO_PCI_INTX_IRQ_INDEX`).
pub const IRQ_INTX: u32 = 0;

/// The index of MSI-X (`VFIO_PCI_MSIX_IRQ_INDEX`).
pub const IRQ_MSIX: u32 = 2;

/// The index of the error interrupt (`VFIO_PCI_ERR_IRQ_INDEX`).
pub const IRQ_ERR: u32 = 3;

/// The index of the request to let go of the device (`VFIO_PCI_REQ_IRQ_INDEX`).
pub const IRQ_REQ: u32 = 4;

/// A register of BAR0, 64 bits wide; its value is its offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
#[allow(missing_docs, reason = "named and described in lab/module/README.md")]
pub enum Register {
    Id = 0x00,
    Version = 0x08,
    State = 0x10,
    StateBytes = 0x18,
    BlockBytes = 0x20,
    Blocks = 0x28,
    Check = 0x30,
    Seed = 0x38,
    Cursor = 0x40,
    Dirty = 0x48,
    Dirtied = 0x50,
    Irq = 0x58,
    DmaIova = 0x60,
    DmaBytes = 0x68,
    DmaSeed = 0x70,
    DmaCommand = 0x78,
    DmaStatus = 0x80,
    DmaCheck = 0x88,
    DmaPages = 0x90,
    Pinned = 0x98,
    Scratch = 0xc0,
}

/// What the DMA engine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Dma {
    /// Writes its pattern through pinned pages.
    Write = 1,
    /// Sums up memory through pinned pages.
    Read = 2,
    /// Unpins what was left pinned.
    Unpin = 3,
    /// Writes as the kernel writes to a process' memory, without pinning it.
    WriteByCpu = 0x11,
    /// Sums up memory without pinning it.
    ReadByCpu = 0x12,
    /// Writes, and leaves the pages pinned.
    WriteAndKeep = 0x21,
    /// Sums up memory, and leaves the pages pinned to be read.
    ReadAndKeep = 0x22,
}

/// A mediated device of the module's.
#[derive(Debug)]
pub struct ModuleDevice(Mdev);

impl Deref for ModuleDevice {
    type Target = Mdev;

    fn deref(&self) -> &Mdev {
        &self.0
    }
}

impl ModuleDevice {
    /// Makes one of a type out of [`TYPES`]; see [`Mdev::create`].
    pub fn create(name: &str) -> ModuleDevice {
        ModuleDevice(Mdev::create(PARENT, name))
    }

    /// Makes one whose state has this size, in bytes.
    pub fn with_state(name: &str, state_bytes: u64, block_bytes: u32) -> ModuleDevice {
        let device = ModuleDevice::create(name);
        // In this order, so that a large state never has many small blocks.
        device.wish("block_bytes", block_bytes);
        device.wish("state_bytes", state_bytes);
        device
    }

    /// Writes one of the tester's attributes.
    pub fn wish(&self, attribute: &str, value: impl ToString) {
        self.0.set(&format!("{PARENT}/{attribute}"), value);
    }

    /// Reads one of the tester's attributes.
    pub fn told(&self, attribute: &str) -> String {
        self.0.get(&format!("{PARENT}/{attribute}"))
    }

    /// Reads one that is a number.
    ///
    /// # Panics
    ///
    /// When it is none.
    pub fn number(&self, attribute: &str) -> u64 {
        let value = self.told(attribute);
        value.parse().unwrap_or_else(|_| panic!("{attribute} is `{value}`, no number"))
    }

    /// Opens it, through a door or through whichever there is.
    ///
    /// # Panics
    ///
    /// When it cannot be opened.
    pub fn open(&self, door: impl Into<Option<Door>>) -> KernelDevice {
        let options = Options { door: door.into(), ..Options::default() };
        KernelDevice::open(self.uuid(), &options).unwrap_or_else(|error| panic!("{error}"))
    }
}

/// Reads a register.
///
/// # Panics
///
/// When the device refuses.
pub fn read(device: &impl Device, register: Register) -> u64 {
    let mut value = [0; 8];
    device
        .region_read(BAR0, register as u64, &mut value)
        .unwrap_or_else(|error| panic!("{register:?}: {error}"));
    u64::from_le_bytes(value)
}

/// Writes a register.
///
/// # Panics
///
/// When the device refuses.
pub fn write(device: &impl Device, register: Register, value: u64) {
    let written = device.region_write(BAR0, register as u64, &value.to_le_bytes());
    written.unwrap_or_else(|error| panic!("{register:?}: {error}"));
}

/// Gives the DMA engine a command, without a look at what comes of it.
pub fn command(device: &impl Device, dma: Dma, iova: u64, bytes: u64, seed: u64) {
    write(device, Register::DmaIova, iova);
    write(device, Register::DmaBytes, bytes);
    write(device, Register::DmaSeed, seed);
    write(device, Register::DmaCommand, dma as u64);
}

/// Has the DMA engine do something.
///
/// # Errors
///
/// What the engine says in its status register.
///
/// # Panics
///
/// When it does not obey at once: the device is not RUNNING.
pub fn dma(device: &impl Device, dma: Dma, iova: u64, bytes: u64, seed: u64) -> Result<(), Errno> {
    command(device, dma, iova, bytes, seed);
    assert_eq!(read(device, Register::DmaCommand), 0, "the command still waits");
    match read(device, Register::DmaStatus) as i64 {
        0 => Ok(()),
        status => Err(Errno::from_raw(status.unsigned_abs() as u32)),
    }
}

/// The module's bijection on 64 bits, out of which it makes its bytes.
pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What a DMA write leaves at `iova`.
pub fn pattern(seed: u64, iova: u64, bytes: u64) -> Vec<u8> {
    (iova..iova + bytes).step_by(8).flat_map(|at| mix(seed.wrapping_add(at)).to_le_bytes()).collect()
}

/// What a DMA read answers for these bytes.
///
/// # Panics
///
/// When they are no words of 8 bytes.
pub fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    assert!(rest.is_empty(), "{} bytes are no whole words", bytes.len());
    words.iter().fold(0, |sum, word| mix(sum ^ u64::from_le_bytes(*word)))
}

/// Memory of a guest: a file that devices write to.
#[derive(Debug)]
pub struct Guest {
    file: File,
    bytes: u64,
}

impl Guest {
    /// So many bytes of zeros.
    ///
    /// # Panics
    ///
    /// When there is no memory for them.
    pub fn new(bytes: u64) -> Guest {
        Guest { file: limosa_testing::memfd(bytes), bytes }
    }

    /// Gives all of it to a device, at `iova`.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn map(&self, device: &impl Device, iova: u64) {
        let memory = DmaMemory::File { fd: self.file.as_fd(), offset: 0 };
        let flags = DmaMapFlags::READ | DmaMapFlags::WRITE;
        let mapped = device.dma_map(&DmaMap { iova, size: self.bytes, flags, memory });
        mapped.unwrap_or_else(|error| panic!("{error}"));
    }

    /// Bytes of it.
    ///
    /// # Panics
    ///
    /// When there are none there.
    pub fn read(&self, at: u64, bytes: u64) -> Vec<u8> {
        let mut data = vec![0; bytes as usize];
        self.file.read_exact_at(&mut data, at).expect("bytes within the memory");
        data
    }

    /// Zeros again, in the same pages.
    ///
    /// # Panics
    ///
    /// When they cannot be written.
    pub fn clear(&self) {
        self.file.write_all_at(&vec![0; self.bytes as usize], 0).expect("zeros within the memory");
    }

    /// The numbers of the pages of 4 KiB that are not all zeros.
    pub fn written(&self) -> Vec<u64> {
        let pages = 0..self.bytes / 4096;
        pages.filter(|page| self.read(page * 4096, 4096).iter().any(|byte| *byte != 0)).collect()
    }
}
