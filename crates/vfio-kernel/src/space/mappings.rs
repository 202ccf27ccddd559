//! What is mapped in an address space: kept to undo it, to make it again when a container gets another IOMMU, and
//! to ask for dirty pages in pieces that the kernel takes.

use std::collections::BTreeMap;

use limosa_client::{HostAddress, Result};
use limosa_protocol::Errno;
use limosa_protocol::info::DmaMapFlags;

use super::file::MappedFile;
use super::intervals::Span;
use super::refused;

/// Memory that was mapped in one call.
#[derive(Debug)]
pub(super) struct Mapping {
    /// Its first address, as devices see it.
    pub iova: u64,
    /// Bytes, so that it ends below 2^64 or there.
    pub size: u64,
    pub flags: DmaMapFlags,
    pub backing: Backing,
}

/// Where the memory of a mapping is.
#[derive(Debug)]
pub(super) enum Backing {
    /// At an address that the caller promised to keep.
    Address(HostAddress),
    /// In a file that was mapped here for it.
    Mapped(MappedFile),
    /// In a file that the kernel holds.
    Kernel,
}

impl Mapping {
    /// The address in this process that the kernel is to pin; 0 when there is none.
    pub fn address(&self) -> u64 {
        match &self.backing {
            Backing::Address(address) => address.get() as u64,
            Backing::Mapped(file) => file.address() as u64,
            Backing::Kernel => 0,
        }
    }

    /// Its addresses.
    pub fn span(&self) -> Span {
        Span { first: self.iova, last: self.iova + (self.size - 1) }
    }
}

/// All of them, by their first address. They do not overlap.
#[derive(Debug, Default)]
pub(super) struct Mappings(BTreeMap<u64, Mapping>);

impl Mappings {
    pub fn insert(&mut self, mapping: Mapping) {
        self.0.insert(mapping.iova, mapping);
    }

    pub fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.0.values()
    }

    /// Those that have a byte in the range, in order.
    pub fn touching(&self, range: Span) -> impl Iterator<Item = &Mapping> {
        let before = self.0.range(..range.first).next_back();
        let before = before.filter(|(_, mapping)| mapping.span().last >= range.first);
        before.into_iter().chain(self.0.range(range.first..=range.last)).map(|(_, mapping)| mapping)
    }

    pub fn overlaps(&self, range: Span) -> bool {
        self.touching(range).next().is_some()
    }

    /// Whether the range can be unmapped: it covers one mapping or several, and none in part.
    pub fn check_whole(&self, name: &str, range: Span) -> Result<()> {
        let refused = |errno, hint| Err(refused(name, unmap_request(range), errno, hint));
        if !self.overlaps(range) {
            return refused(Errno::ENOENT, NOTHING_THERE);
        }
        let is_whole = self.touching(range).all(|mapping| range.contains(mapping.span()));
        if is_whole { Ok(()) } else { refused(Errno::EINVAL, IN_PART) }
    }

    /// Forgets those that lie in the range.
    pub fn remove(&mut self, range: Span) {
        let inside = self.touching(range).filter(|mapping| range.contains(mapping.span()));
        let inside: Vec<u64> = inside.map(|mapping| mapping.iova).collect();
        for iova in inside {
            self.0.remove(&iova);
        }
    }
}

impl IntoIterator for Mappings {
    type Item = Mapping;
    type IntoIter = std::collections::btree_map::IntoValues<u64, Mapping>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_values()
    }
}

/// How messages name the unmapping of memory.
pub(super) fn unmap_request(range: Span) -> String {
    format!("unmapping {:#x} bytes at IOVA {:#x}", range.size(), range.first)
}

pub(super) const NOTHING_THERE: &str = "nothing is mapped there";
pub(super) const IN_PART: &str = "memory is unmapped in the pieces in which it was mapped";

#[cfg(test)]
impl Mappings {
    /// Memory of no place at these addresses, as (first, bytes).
    pub fn at(spans: &[(u64, u64)]) -> Mappings {
        let mut mappings = Mappings::default();
        for &(iova, size) in spans {
            mappings.insert(Mapping { iova, size, flags: DmaMapFlags::READ, backing: Backing::Kernel });
        }
        mappings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(iova: u64, size: u64) -> Span {
        Span::of(iova, size).unwrap()
    }

    fn touching(mappings: &Mappings, iova: u64, size: u64) -> Vec<u64> {
        mappings.touching(span(iova, size)).map(|mapping| mapping.iova).collect()
    }

    #[test]
    fn what_a_range_touches() {
        let top = u64::MAX - 0xfff;
        let mappings = Mappings::at(&[(0x1000, 0x2000), (0x3000, 0x1000), (0x8000, 0x1000), (top, 0x1000)]);
        assert_eq!(touching(&mappings, 0, 0x1000), []);
        assert_eq!(touching(&mappings, 0, 0x1001), [0x1000]);
        assert_eq!(touching(&mappings, 0x2fff, 1), [0x1000]);
        assert_eq!(touching(&mappings, 0x2fff, 2), [0x1000, 0x3000]);
        assert_eq!(touching(&mappings, 0x4000, 0x4000), []);
        assert_eq!(touching(&mappings, 0, u64::MAX), [0x1000, 0x3000, 0x8000, top]);
        assert_eq!(touching(&mappings, u64::MAX, 1), [top]);
    }

    #[test]
    fn a_mapping_is_taken_away_whole_or_not_at_all() {
        let mut mappings = Mappings::at(&[(0x1000, 0x2000), (0x3000, 0x1000)]);
        let errno = |iova, size| mappings.check_whole("dev", span(iova, size)).unwrap_err().errno();
        assert_eq!(errno(0x4000, 0x1000), Some(Errno::ENOENT));
        assert_eq!(errno(0x1000, 0x1000), Some(Errno::EINVAL));
        assert_eq!(errno(0x2000, 0x2000), Some(Errno::EINVAL));
        mappings.check_whole("dev", span(0x1000, 0x2000)).unwrap();
        mappings.check_whole("dev", span(0, u64::MAX)).unwrap();
        mappings.remove(span(0x2000, 0x2000));
        assert_eq!(touching(&mappings, 0, u64::MAX), [0x1000]);
    }
}
