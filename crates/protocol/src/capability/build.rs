//! Writing a capability chain.

use alloc::vec::Vec;

use zerocopy::IntoBytes;

use super::{CapHeader, IovaRange, ListHeader, RegionType, SparseMmapArea, iommu_cap, region_cap};

/// Capabilities begin at multiples of this many bytes, as in Linux.
const ALIGNMENT: usize = 8;

/// A chain that is being built.
///
/// ```
/// use limosa_protocol::capability::{Chain, SparseMmapArea};
/// use limosa_protocol::info::RegionInfo;
///
/// let mut chain = Chain::after(size_of::<RegionInfo>());
/// chain.sparse_mmap(&[SparseMmapArea { offset: 0x1000, size: 0x3000 }]);
/// let info = RegionInfo { cap_offset: chain.offset(), argsz: chain.argsz(), ..RegionInfo::default() };
/// assert_eq!((info.cap_offset, info.argsz), (32, 64));
/// // On the wire: the structure's 32 bytes, then those of the chain.
/// assert_eq!(chain.bytes().len(), 32);
/// ```
#[derive(Clone, Debug)]
pub struct Chain {
    /// Bytes of the information structure before the chain.
    fixed: usize,
    /// What follows it.
    bytes: Vec<u8>,
    /// Where in `bytes` the last capability's header is.
    last: Option<usize>,
}

impl Chain {
    /// An empty chain after an information structure of this many bytes.
    pub fn after(fixed_bytes: usize) -> Chain {
        Chain { fixed: fixed_bytes, bytes: Vec::new(), last: None }
    }

    /// The offset of the first capability from the start of the information structure, its
    /// *cap_offset*; 0 for an empty chain.
    pub fn offset(&self) -> u32 {
        match self.last {
            None => 0,
            Some(_) => self.fixed.next_multiple_of(ALIGNMENT) as u32,
        }
    }

    /// Bytes of structure and chain.
    pub fn argsz(&self) -> u32 {
        (self.fixed + self.bytes.len()) as u32
    }

    /// What follows the structure.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Adds a capability of any number, with its bytes after the header.
    ///
    /// # Panics
    ///
    /// If structure and chain together exceed the range of `u32`.
    pub fn push(&mut self, id: u16, version: u16, data: &[u8]) -> &mut Chain {
        let at = (self.fixed + self.bytes.len()).next_multiple_of(ALIGNMENT);
        let end = (at + size_of::<CapHeader>() + data.len()).next_multiple_of(ALIGNMENT);
        assert!(u32::try_from(end).is_ok(), "a capability chain of {end} bytes");
        if let Some(last) = self.last {
            let next = last + core::mem::offset_of!(CapHeader, next);
            self.bytes[next..next + 4].copy_from_slice(&(at as u32).to_ne_bytes());
        }
        self.last = Some(at - self.fixed);
        self.bytes.resize(at - self.fixed, 0);
        self.bytes.extend_from_slice(CapHeader { id, version, next: 0 }.as_bytes());
        self.bytes.extend_from_slice(data);
        self.bytes.resize(end - self.fixed, 0);
        self
    }

    /// Adds which parts of a region can be mapped (`VFIO_REGION_INFO_CAP_SPARSE_MMAP`).
    pub fn sparse_mmap(&mut self, areas: &[SparseMmapArea]) -> &mut Chain {
        self.list(region_cap::SPARSE_MMAP, areas.len(), areas.as_bytes())
    }

    /// Adds what a region is (`VFIO_REGION_INFO_CAP_TYPE`).
    pub fn region_type(&mut self, region_type: RegionType) -> &mut Chain {
        self.push(region_cap::TYPE, 1, region_type.as_bytes())
    }

    /// Adds that the MSI-X table can be mapped (`VFIO_REGION_INFO_CAP_MSIX_MAPPABLE`).
    pub fn msix_mappable(&mut self) -> &mut Chain {
        self.push(region_cap::MSIX_MAPPABLE, 1, &[])
    }

    /// Adds which addresses can be mapped (`VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE`).
    pub fn iova_ranges(&mut self, ranges: &[IovaRange]) -> &mut Chain {
        self.list(iommu_cap::IOVA_RANGE, ranges.len(), ranges.as_bytes())
    }

    fn list(&mut self, id: u16, count: usize, entries: &[u8]) -> &mut Chain {
        let mut data = Vec::with_capacity(size_of::<ListHeader>() + entries.len());
        data.extend_from_slice(ListHeader { count: count as u32, reserved: 0 }.as_bytes());
        data.extend_from_slice(entries);
        self.push(id, 1, &data)
    }
}
