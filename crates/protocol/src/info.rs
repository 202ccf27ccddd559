//! What a device says of itself (`vfio.h: VFIO_DEVICE_GET_INFO`, `VFIO_DEVICE_GET_REGION_INFO`,
//! `VFIO_DEVICE_GET_IRQ_INFO`, `VFIO_DEVICE_SET_IRQS`).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::feature::payload;

/// The most regions that a device is believed to have. A PCI function has nine, and what drivers add.
pub const REGIONS_MAX: u32 = 256;

/// The most interrupt indexes that a device is believed to have. A PCI function has five.
pub const IRQ_INDEXES_MAX: u32 = 256;

/// The most vectors of one interrupt index: those of MSI-X (PCI 3.0, 6.8.2).
pub const IRQ_VECTORS_MAX: u32 = 2048;

payload! {
    /// `struct vfio_device_info`, its first four fields: what vfio-user carries.
    DeviceInfo {
        /// Bytes of the structure, on output those that all of it needs.
        argsz: u32,
        /// [`DeviceFlags`].
        flags: u32,
        /// Regions, the highest index plus one.
        num_regions: u32,
        /// Interrupt indexes, the highest plus one.
        num_irqs: u32,
    }
}

bitflags::bitflags! {
    /// Flags of [`DeviceInfo`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct DeviceFlags: u32 {
        /// The device can be reset.
        const RESET = 1 << 0;
        /// A PCI device: the region and interrupt indexes of [`crate::pci_index`] hold.
        const PCI = 1 << 1;
        /// Capabilities follow the structure.
        const CAPS = 1 << 7;
        const _ = !0;
    }
}

payload! {
    /// `struct vfio_region_info`; capabilities follow at `cap_offset` when
    /// [`RegionFlags::CAPS`] is set and argsz has room.
    RegionInfo {
        /// Bytes of the structure with its capabilities.
        argsz: u32,
        /// [`RegionFlags`].
        flags: u32,
        /// The region's index.
        index: u32,
        /// Offset from this structure's start to the first capability, or 0.
        cap_offset: u32,
        /// Bytes; 0 for a region that is not there.
        size: u64,
        /// Where the region is in the device's fd: an offset for mmap (and pread on the kernel's).
        offset: u64,
    }
}

bitflags::bitflags! {
    /// Flags of [`RegionInfo`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct RegionFlags: u32 {
        /// Can be read.
        const READ = 1 << 0;
        /// Can be written.
        const WRITE = 1 << 1;
        /// Can be mapped, all of it or what a sparse-mmap capability names.
        const MMAP = 1 << 2;
        /// Has capabilities.
        const CAPS = 1 << 3;
        const _ = !0;
    }
}

payload! {
    /// `struct vfio_irq_info`.
    IrqInfo {
        /// 16.
        argsz: u32,
        /// [`IrqFlags`].
        flags: u32,
        /// The interrupt index.
        index: u32,
        /// Vectors within the index; 0 when there is none.
        count: u32,
    }
}

bitflags::bitflags! {
    /// Flags of [`IrqInfo`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct IrqFlags: u32 {
        /// Can be wired to eventfds.
        const EVENTFD = 1 << 0;
        /// Can be masked and unmasked.
        const MASKABLE = 1 << 1;
        /// Masks itself when it fires (level-triggered).
        const AUTOMASKED = 1 << 2;
        /// All vectors must be set up at once.
        const NORESIZE = 1 << 3;
        const _ = !0;
    }
}

payload! {
    /// `struct vfio_irq_set`, followed by its data.
    IrqSet {
        /// Bytes of the structure with its data.
        argsz: u32,
        /// [`IrqSetFlags`]: one kind of data and one action.
        flags: u32,
        /// The interrupt index.
        index: u32,
        /// First vector.
        start: u32,
        /// Vectors.
        count: u32,
    }
}

bitflags::bitflags! {
    /// Flags of [`IrqSet`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct IrqSetFlags: u32 {
        /// No data: the action holds for all the vectors named.
        const DATA_NONE = 1 << 0;
        /// One byte for each vector: act where it is not zero.
        const DATA_BOOL = 1 << 1;
        /// One eventfd for each vector, -1 to take it away.
        const DATA_EVENTFD = 1 << 2;
        /// Mask.
        const ACTION_MASK = 1 << 3;
        /// Unmask.
        const ACTION_UNMASK = 1 << 4;
        /// Trigger, or with eventfds wire the trigger.
        const ACTION_TRIGGER = 1 << 5;
    }
}

bitflags::bitflags! {
    /// What a device may do with a DMA mapping (`vfio.h: VFIO_DMA_MAP_FLAG_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct DmaMapFlags: u32 {
        /// The device may read.
        const READ = 1 << 0;
        /// The device may write.
        const WRITE = 1 << 1;
        const _ = !0;
    }
}

bitflags::bitflags! {
    /// Flags of an unmap (`vfio.h: VFIO_DMA_UNMAP_FLAG_*`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct DmaUnmapFlags: u32 {
        /// Return the dirty bitmap of the range.
        const GET_DIRTY_BITMAP = 1 << 0;
        /// Unmap everything; address and size are zero.
        const ALL = 1 << 1;
        const _ = !0;
    }
}

/// Region and interrupt indexes of PCI devices (`vfio.h: VFIO_PCI_*_INDEX`).
pub mod pci_index {
    /// First of the six BARs.
    pub const BAR0: u32 = 0;
    /// Last of the six BARs.
    pub const BAR5: u32 = 5;
    /// Expansion ROM.
    pub const ROM: u32 = 6;
    /// Configuration space.
    pub const CONFIG: u32 = 7;
    /// Legacy VGA.
    pub const VGA: u32 = 8;
    /// How many regions every PCI device has.
    pub const NUM_REGIONS: u32 = 9;
    /// Interrupt pin.
    pub const IRQ_INTX: u32 = 0;
    /// Message signalled interrupts.
    pub const IRQ_MSI: u32 = 1;
    /// The same, extended.
    pub const IRQ_MSIX: u32 = 2;
    /// Error.
    pub const IRQ_ERR: u32 = 3;
    /// Request to give the device back.
    pub const IRQ_REQ: u32 = 4;
    /// How many interrupt indexes every PCI device has.
    pub const NUM_IRQS: u32 = 5;
}
