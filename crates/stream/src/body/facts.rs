//! The facts about devices and memory that the two ends compare before anything moves (`docs/stream.md: OFFER`).

use serde::{Deserialize, Serialize};

/// The facts that a side knows of a device without opening a session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFacts {
    /// Its section in the stream.
    pub id: u32,
    /// Its name, for people.
    pub name: String,
    /// The kind of device, if its owner has set it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<String>,
    /// The flags of `VFIO_DEVICE_FEATURE_MIGRATION`.
    pub flags: u64,
    /// The estimate of `MIG_DATA_SIZE`, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_bytes: Option<u64>,
    /// The sizes of its regions, in bytes, by index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regions: Option<Vec<u64>>,
    /// The numbers of its interrupt vectors, by index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub irqs: Option<Vec<u32>>,
    /// Its identification in PCI configuration space.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci: Option<PciIds>,
    /// Whether it was in STOP when it was offered, and has to stay in STOP at the destination.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stopped: bool,
}

/// Identification in PCI configuration space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciIds {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Subsystem's vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem_device: u16,
    /// Class, subclass and programming interface.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

/// A region of guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFacts {
    /// Its section in the stream.
    pub id: u32,
    /// Its first address, as devices see it.
    pub address: u64,
    /// Its size in bytes.
    pub bytes: u64,
    /// The page size in bytes. All runs of pages begin and end on page boundaries.
    pub page_bytes: u64,
}

impl MemoryFacts {
    /// Whether both have addresses in common.
    pub fn overlaps(&self, other: &MemoryFacts) -> bool {
        let ends_before = |one: &MemoryFacts, other: &MemoryFacts| {
            u128::from(one.address) + u128::from(one.bytes) <= u128::from(other.address)
        };
        !ends_before(self, other) && !ends_before(other, self)
    }
}
