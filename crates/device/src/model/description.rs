//! [`Description`]: the device as its client sees it (`vfio.h: VFIO_DEVICE_GET_INFO` and its siblings).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use limosa_protocol::info::{DeviceFlags, IrqFlags, RegionFlags};

/// The device as its client sees it.
#[derive(Clone, Debug, Default)]
pub struct Description {
    /// Usually RESET and PCI.
    pub flags: Option<DeviceFlags>,
    /// The regions, by index; [`Region::default`] for a missing one.
    pub regions: Vec<Region>,
    /// The interrupts, by index; [`Irq::default`] for a missing one.
    pub irqs: Vec<Irq>,
}

/// A region.
#[derive(Clone, Debug)]
pub struct Region {
    /// READ and WRITE; MMAP and CAPS are derived from `mapping`.
    pub flags: RegionFlags,
    /// Bytes; 0 for none.
    pub size: u64,
    /// The memory behind the region, if a client may map some of it.
    pub mapping: Option<RegionMapping>,
    /// Writes that a client may signal through an eventfd instead of a message.
    pub ioeventfds: Vec<IoEventFd>,
}

impl Default for Region {
    fn default() -> Region {
        Region { flags: RegionFlags::empty(), size: 0, mapping: None, ioeventfds: Vec::new() }
    }
}

/// Memory behind a region.
#[derive(Clone, Debug)]
pub struct RegionMapping {
    /// The file to map.
    pub fd: Arc<OwnedFd>,
    /// Where the region starts in it, in bytes; page-aligned.
    pub offset: u64,
    /// The parts that may be mapped, as (offset within the region, bytes), page-aligned; empty for
    /// all of the region.
    pub areas: Vec<(u64, u64)>,
}

/// A register whose writes are signalled through an eventfd (vfio-user's `DEVICE_GET_REGION_IO_FDS`).
#[derive(Clone, Debug)]
pub struct IoEventFd {
    /// Within the region, in bytes.
    pub offset: u64,
    /// Bytes written: 1, 2, 4 or 8.
    pub size: u64,
    /// The eventfd; the model waits on it.
    pub fd: Arc<OwnedFd>,
    /// Signal only when this value is written.
    pub datamatch: Option<u64>,
}

/// An interrupt index.
#[derive(Clone, Copy, Debug)]
pub struct Irq {
    /// EVENTFD and the rest.
    pub flags: IrqFlags,
    /// Vectors.
    pub count: u32,
}

impl Default for Irq {
    fn default() -> Irq {
        Irq { flags: IrqFlags::empty(), count: 0 }
    }
}
