//! Capability chains: whatever bytes there are, nothing panics, nothing is endless; what is written
//! is read again.

use limosa_protocol::capability::{
    Capability, Chain, ChainError, IommuCapability, IommuInfo, IommuMigration, IovaRange, RegionCapability,
    RegionType, SparseMmapArea, capabilities, iommu_cap, mappable,
};
use limosa_protocol::info::{RegionFlags, RegionInfo};
use proptest::prelude::*;
use zerocopy::IntoBytes;

fn area(offset: u64, size: u64) -> SparseMmapArea {
    SparseMmapArea { offset, size }
}

/// A region of 64 KiB with these capabilities, as on the wire.
fn region(chain: &Chain) -> (RegionInfo, Vec<u8>) {
    let flags = (RegionFlags::MMAP | RegionFlags::CAPS).bits();
    let info = RegionInfo {
        argsz: chain.argsz(),
        flags,
        cap_offset: chain.offset(),
        size: 0x10000,
        ..RegionInfo::default()
    };
    (info, [info.as_bytes(), chain.bytes()].concat())
}

#[test]
fn what_is_written_is_read_again() {
    let mut chain = Chain::after(size_of::<RegionInfo>());
    let kind = RegionType { region_type: 1 << 31 | 0x8086, subtype: 1 };
    chain
        .sparse_mmap(&[area(0, 0x2000), area(0x4000, 0)])
        .region_type(kind)
        .msix_mappable()
        .push(77, 3, b"unknown");
    let (info, bytes) = region(&chain);
    assert_eq!((info.cap_offset, info.argsz as usize), (32, bytes.len()));
    let read: Vec<_> =
        capabilities(&bytes, info.cap_offset).map(|cap| cap.unwrap().region().unwrap()).collect();
    let RegionCapability::SparseMmap(areas) = read[0] else { panic!("{read:?}") };
    assert_eq!(areas.iter().collect::<Vec<_>>(), [area(0, 0x2000), area(0x4000, 0)]);
    assert_eq!(read[1], RegionCapability::Type(kind));
    assert_eq!(read[2], RegionCapability::MsixMappable);
    // A chain names no lengths: the alignment's padding belongs to the capability before it.
    assert_eq!(read[3], RegionCapability::Other(Capability { id: 77, version: 3, data: b"unknown\0" }));
    assert_eq!(read.len(), 4);
    assert_eq!(mappable(&info, &bytes), Ok(vec![(0, 0x2000)]));
}

#[test]
fn capabilities_begin_at_multiples_of_eight_bytes_after_any_structure() {
    for fixed in 16..40 {
        let mut chain = Chain::after(fixed);
        assert_eq!((chain.offset(), chain.argsz()), (0, fixed as u32), "no capability yet");
        chain.push(1, 1, &[1, 2, 3]).push(2, 1, &[]);
        let bytes = [&vec![0; fixed], chain.bytes()].concat();
        let read: Vec<_> = capabilities(&bytes, chain.offset()).map(Result::unwrap).collect();
        assert_eq!(read.iter().map(|cap| cap.id).collect::<Vec<_>>(), [1, 2]);
        for cap in read {
            assert_eq!((cap.data.as_ptr() as usize - bytes.as_ptr() as usize) % 8, 0);
        }
    }
}

#[test]
fn iommu_capabilities_are_read() {
    let mut chain = Chain::after(size_of::<IommuInfo>());
    let ranges = [IovaRange { start: 0, end: 0xfedf_ffff }, IovaRange { start: 0xfef0_0000, end: u64::MAX }];
    let migration =
        IommuMigration { pgsize_bitmap: 4096, max_dirty_bitmap_size: 1 << 28, ..Default::default() };
    chain.iova_ranges(&ranges).push(iommu_cap::MIGRATION, 1, migration.as_bytes());
    chain.push(iommu_cap::DMA_AVAIL, 1, &65535u32.to_ne_bytes());
    let bytes = [IommuInfo::default().as_bytes(), chain.bytes()].concat();
    let read: Vec<_> =
        capabilities(&bytes, chain.offset()).map(|cap| cap.unwrap().iommu().unwrap()).collect();
    let IommuCapability::IovaRanges(read_ranges) = read[0] else { panic!("{read:?}") };
    assert!(read_ranges.iter().eq(ranges));
    assert_eq!(read[1], IommuCapability::Migration(migration));
    let IommuCapability::DmaAvail(avail) = read[2] else { panic!("{read:?}") };
    assert_eq!(avail.avail, 65535);
}

fn ends(bytes: &[u8], first: u32) -> Vec<Result<Capability<'_>, ChainError>> {
    capabilities(bytes, first).collect()
}

#[test]
fn a_chain_that_leads_backwards_or_outside_ends_with_an_error() {
    let mut bytes = [0u8; 64];
    let header =
        |bytes: &mut [u8], at: usize, next: u32| bytes[at + 4..at + 8].copy_from_slice(&next.to_ne_bytes());

    assert_eq!(ends(&bytes, 57), [Err(ChainError::OutOfBounds { offset: 57, bytes: 64 })]);
    assert_eq!(ends(&bytes, u32::MAX), [Err(ChainError::OutOfBounds { offset: u32::MAX, bytes: 64 })]);
    for next in [1, 16, 23] {
        header(&mut bytes, 16, next);
        assert_eq!(
            ends(&bytes, 16),
            [Err(ChainError::Backwards { offset: 16, next })],
            "to itself, back, or into itself"
        );
    }
    header(&mut bytes, 16, 65);
    assert_eq!(ends(&bytes, 16), [Err(ChainError::OutOfBounds { offset: 65, bytes: 64 })]);
    header(&mut bytes, 16, 60);
    let read = ends(&bytes, 16);
    assert!(read[0].is_ok());
    assert_eq!(read[1..], [Err(ChainError::OutOfBounds { offset: 60, bytes: 64 })]);
}

#[test]
fn counts_and_areas_beyond_the_bytes_or_the_region_are_refused() {
    let mut chain = Chain::after(size_of::<RegionInfo>());
    chain.push(1, 1, &[0xff; 24]);
    let (info, bytes) = region(&chain);
    assert_eq!(mappable(&info, &bytes), Err(ChainError::Short { id: 1, bytes: 24 }));

    let mut chain = Chain::after(size_of::<RegionInfo>());
    chain.sparse_mmap(&[area(0xf000, 0x1001)]);
    let (info, bytes) = region(&chain);
    let outside = ChainError::AreaOutside { offset: 0xf000, size: 0x1001, region_size: 0x10000 };
    assert_eq!(mappable(&info, &bytes), Err(outside));

    let mut chain = Chain::after(size_of::<RegionInfo>());
    chain.sparse_mmap(&[area(u64::MAX, 2)]);
    let (info, bytes) = region(&chain);
    assert!(matches!(mappable(&info, &bytes), Err(ChainError::AreaOutside { .. })));
}

#[test]
fn a_region_is_mapped_whole_unless_a_capability_narrows_it() {
    let mut chain = Chain::after(size_of::<RegionInfo>());
    chain.msix_mappable();
    let (mut info, bytes) = region(&chain);
    assert_eq!(mappable(&info, &bytes), Ok(vec![(0, 0x10000)]));
    info.flags = RegionFlags::MMAP.bits();
    assert_eq!(mappable(&info, &bytes[..32]), Ok(vec![(0, 0x10000)]));
    info.flags = RegionFlags::CAPS.bits();
    assert_eq!(mappable(&info, &bytes), Ok(vec![]));
}

proptest! {
    #[test]
    fn no_bytes_make_a_reader_panic_or_go_on_forever(
        bytes in prop::collection::vec(prop_oneof![Just(0u8), 0u8..80, any::<u8>()], 0..80),
        first in prop_oneof![0u32..90, any::<u32>()],
        size: u64,
    ) {
        let mut end = 0;
        for capability in capabilities(&bytes, first) {
            let Ok(capability) = capability else { break };
            let start = capability.data.as_ptr() as usize - bytes.as_ptr() as usize;
            prop_assert!(start >= end + 8 && start + capability.data.len() <= bytes.len());
            end = start + capability.data.len();
            let _ = (capability.region(), capability.iommu());
        }
        let flags = (RegionFlags::MMAP | RegionFlags::CAPS).bits();
        let info = RegionInfo { flags, cap_offset: first, size, ..RegionInfo::default() };
        if let Ok(areas) = mappable(&info, &bytes) {
            prop_assert!(areas.iter().all(|(offset, bytes)| offset + bytes <= size));
        }
    }

    #[test]
    fn chains_of_any_capabilities_are_read_as_written(
        fixed in 16usize..48,
        caps in prop::collection::vec((any::<u16>(), any::<u16>(), prop::collection::vec(any::<u8>(), 0..40)), 0..8),
    ) {
        let mut chain = Chain::after(fixed);
        for (id, version, data) in &caps {
            chain.push(*id, *version, data);
        }
        let bytes = [&vec![0; fixed], chain.bytes()].concat();
        prop_assert_eq!(chain.argsz() as usize, bytes.len());
        let read: Vec<_> = capabilities(&bytes, chain.offset()).map(Result::unwrap).collect();
        prop_assert_eq!(read.len(), caps.len());
        for (cap, (id, version, data)) in read.iter().zip(&caps) {
            prop_assert_eq!((cap.id, cap.version), (*id, *version));
            prop_assert_eq!(&cap.data[..data.len()], &data[..]);
            prop_assert!(cap.data.len() - data.len() < 8 && cap.data[data.len()..].iter().all(|byte| *byte == 0));
        }
    }
}
