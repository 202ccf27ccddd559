//! Capability chains (`vfio.h: struct vfio_info_cap_header`): what follows the structures of
//! region, device and IOMMU information. Read with bounds here, written by [`Chain`].
//!
//! Offsets count from the start of the information structure. A chain has no lengths: a capability extends to the next
//! one, or to the end of the information.

mod build;

use alloc::vec;
use alloc::vec::Vec;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::feature::payload;
use crate::info::{RegionFlags, RegionInfo};
use crate::{Errno, Records, range};
pub use build::Chain;

payload! {
    /// `struct vfio_info_cap_header`.
    CapHeader {
        /// Which capability; the meaning of a number depends on the information structure.
        id: u16,
        /// The version of its structure.
        version: u16,
        /// Where the next capability begins, or 0 after the last.
        next: u32,
    }
}

payload! {
    /// `struct vfio_region_sparse_mmap_area`.
    SparseMmapArea {
        /// Within the region, in bytes.
        offset: u64,
        /// Bytes.
        size: u64,
    }
}

payload! {
    /// `struct vfio_region_info_cap_type` after its header.
    RegionType {
        /// The type; with its highest bit set, the lower half is a PCI vendor's number.
        region_type: u32,
        /// The type's subtype.
        subtype: u32,
    }
}

payload! {
    /// `struct vfio_iommu_type1_info`; capabilities follow.
    IommuInfo {
        /// Bytes of the structure with its capabilities.
        argsz: u32,
        /// [`IommuInfoFlags`].
        flags: u32,
        /// The page sizes of the IOMMU: bit *n* for 2^*n* bytes.
        iova_pgsizes: u64,
        /// Offset to the first capability, or 0.
        cap_offset: u32,
        /// Zero.
        reserved: u32,
    }
}

bitflags::bitflags! {
    /// Flags of [`IommuInfo`].
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct IommuInfoFlags: u32 {
        /// `iova_pgsizes` is filled in.
        const PGSIZES = 1 << 0;
        /// Capabilities follow.
        const CAPS = 1 << 1;
        const _ = !0;
    }
}

payload! {
    /// `struct vfio_iova_range`.
    IovaRange {
        /// First address.
        start: u64,
        /// Last address.
        end: u64,
    }
}

payload! {
    /// `struct vfio_iommu_type1_info_cap_migration` after its header.
    IommuMigration {
        /// None is defined.
        flags: u32,
        /// What C leaves between the fields.
        reserved: u32,
        /// Page sizes for dirty bitmaps: bit *n* for 2^*n* bytes.
        pgsize_bitmap: u64,
        /// The largest dirty bitmap, in bytes.
        max_dirty_bitmap_size: u64,
    }
}

payload! {
    /// `struct vfio_iommu_type1_info_dma_avail` after its header.
    DmaAvail {
        /// How many more mappings can be made.
        avail: u32,
    }
}

payload! {
    /// What comes before the entries of a capability that is a list.
    ListHeader {
        /// How many entries follow.
        count: u32,
        /// Zero.
        reserved: u32,
    }
}

/// Capabilities of a region (`vfio.h: VFIO_REGION_INFO_CAP_*`).
pub mod region_cap {
    /// Which parts of the region can be mapped.
    pub const SPARSE_MMAP: u16 = 1;
    /// What the region is.
    pub const TYPE: u16 = 2;
    /// The MSI-X table can be mapped with the BAR that it lies in.
    pub const MSIX_MAPPABLE: u16 = 3;
}

/// Capabilities of an IOMMU (`vfio.h: VFIO_IOMMU_TYPE1_INFO_*`).
pub mod iommu_cap {
    /// Which addresses can be mapped.
    pub const IOVA_RANGE: u16 = 1;
    /// Dirty bitmaps.
    pub const MIGRATION: u16 = 2;
    /// How many mappings are left.
    pub const DMA_AVAIL: u16 = 3;
}

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A capability's header does not lie in the information.
    #[error("a capability at offset {offset} of {bytes} bytes")]
    OutOfBounds {
        /// Where it should begin.
        offset: u32,
        /// Bytes of the information.
        bytes: usize,
    },
    /// A capability names one that does not lie behind it.
    #[error("the capability at offset {offset} names a next one at {next}")]
    Backwards {
        /// Where the capability is.
        offset: u32,
        /// What it names.
        next: u32,
    },
    /// A capability is shorter than its structure, or than the entries that it counts.
    #[error("capability {id} ends after {bytes} bytes, within its structure")]
    Short {
        /// Which.
        id: u16,
        /// Bytes that it has without its header.
        bytes: usize,
    },
    /// An area that can be mapped lies outside its region.
    #[error("a mappable area of {size} bytes at {offset} in a region of {region_size} bytes")]
    AreaOutside {
        /// Within the region.
        offset: u64,
        /// Bytes.
        size: u64,
        /// Bytes of the region.
        region_size: u64,
    },
}

impl From<ChainError> for Errno {
    /// [`Errno::EINVAL`].
    fn from(_: ChainError) -> Errno {
        Errno::EINVAL
    }
}

/// One capability of a chain, of any number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability<'a> {
    /// Which.
    pub id: u16,
    /// The version of its structure.
    pub version: u16,
    /// Its bytes after the header.
    pub data: &'a [u8],
}

/// Walks the chain that begins at `cap_offset` of an information structure; `info` is all of that
/// structure. No capability for an offset of 0. After an error there is nothing more.
///
/// Each capability must lie behind the one that names it, as in Linux, so that no chain is endless.
pub fn capabilities(info: &[u8], cap_offset: u32) -> Capabilities<'_> {
    Capabilities { info, offset: cap_offset }
}

/// Iterator over a chain, see [`capabilities`].
#[derive(Clone, Debug)]
pub struct Capabilities<'a> {
    info: &'a [u8],
    /// Where the next one begins, or 0.
    offset: u32,
}

impl<'a> Iterator for Capabilities<'a> {
    type Item = Result<Capability<'a>, ChainError>;

    fn next(&mut self) -> Option<Self::Item> {
        let offset = core::mem::take(&mut self.offset);
        if offset == 0 {
            return None;
        }
        let out_of_bounds = ChainError::OutOfBounds { offset, bytes: self.info.len() };
        let rest = self.info.get(offset as usize..).unwrap_or_default();
        let Ok((CapHeader { id, version, next }, data)) = CapHeader::read_from_prefix(rest) else {
            return Some(Err(out_of_bounds));
        };
        if next == 0 {
            return Some(Ok(Capability { id, version, data }));
        }
        let Some(bytes) = next.checked_sub(offset).and_then(|step| step.checked_sub(8)) else {
            return Some(Err(ChainError::Backwards { offset, next }));
        };
        let Some(data) = data.get(..bytes as usize) else {
            return Some(Err(ChainError::OutOfBounds { offset: next, bytes: self.info.len() }));
        };
        self.offset = next;
        Some(Ok(Capability { id, version, data }))
    }
}

/// A capability of a region.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RegionCapability<'a> {
    /// Which parts can be mapped.
    SparseMmap(Records<'a, SparseMmapArea>),
    /// What the region is.
    Type(RegionType),
    /// The MSI-X table can be mapped.
    MsixMappable,
    /// One that this crate does not know.
    Other(Capability<'a>),
}

/// A capability of an IOMMU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum IommuCapability<'a> {
    /// Which addresses can be mapped.
    IovaRanges(Records<'a, IovaRange>),
    /// Dirty bitmaps.
    Migration(IommuMigration),
    /// How many mappings are left.
    DmaAvail(DmaAvail),
    /// One that this crate does not know.
    Other(Capability<'a>),
}

impl<'a> Capability<'a> {
    /// The capability as one of a region. [`ChainError::Short`] if it has too few bytes.
    pub fn region(self) -> Result<RegionCapability<'a>, ChainError> {
        Ok(match self.id {
            region_cap::SPARSE_MMAP => RegionCapability::SparseMmap(self.list()?),
            region_cap::TYPE => RegionCapability::Type(self.fixed()?),
            region_cap::MSIX_MAPPABLE => RegionCapability::MsixMappable,
            _ => RegionCapability::Other(self),
        })
    }

    /// The capability as one of an IOMMU. [`ChainError::Short`] if it has too few bytes.
    pub fn iommu(self) -> Result<IommuCapability<'a>, ChainError> {
        Ok(match self.id {
            iommu_cap::IOVA_RANGE => IommuCapability::IovaRanges(self.list()?),
            iommu_cap::MIGRATION => IommuCapability::Migration(self.fixed()?),
            iommu_cap::DMA_AVAIL => IommuCapability::DmaAvail(self.fixed()?),
            _ => IommuCapability::Other(self),
        })
    }

    fn short(&self) -> ChainError {
        ChainError::Short { id: self.id, bytes: self.data.len() }
    }

    fn fixed<T: FromBytes>(&self) -> Result<T, ChainError> {
        T::read_from_prefix(self.data).map(|(fixed, _)| fixed).map_err(|_| self.short())
    }

    fn list<T: FromBytes + KnownLayout + Immutable + Copy>(&self) -> Result<Records<'a, T>, ChainError> {
        let (header, entries) = ListHeader::read_from_prefix(self.data).map_err(|_| self.short())?;
        Records::read(entries, header.count).ok_or(self.short())
    }
}

/// The parts of a region that can be mapped, as (offset within the region, bytes): none when the
/// region lacks [`RegionFlags::MMAP`], all of it when no capability narrows it. `bytes` is the
/// whole information structure, with its capabilities.
///
/// Empty areas are left out. Fails when the chain is broken or an area lies outside the region.
pub fn mappable(info: &RegionInfo, bytes: &[u8]) -> Result<Vec<(u64, u64)>, ChainError> {
    let flags = RegionFlags::from_bits_retain(info.flags);
    if !flags.contains(RegionFlags::MMAP) || info.size == 0 {
        return Ok(Vec::new());
    }
    let whole = vec![(0, info.size)];
    if !flags.contains(RegionFlags::CAPS) {
        return Ok(whole);
    }
    let mut sparse = None;
    for capability in capabilities(bytes, info.cap_offset) {
        if let RegionCapability::SparseMmap(areas) = capability?.region()? {
            sparse = Some(areas);
        }
    }
    let Some(areas) = sparse else { return Ok(whole) };
    let areas = areas.iter().filter(|area| area.size > 0).map(|SparseMmapArea { offset, size }| {
        if range::contains((0, info.size), (offset, size)) {
            Ok((offset, size))
        } else {
            Err(ChainError::AreaOutside { offset, size, region_size: info.size })
        }
    });
    areas.collect()
}
