//! Capability chains.
//!
//! Input: the offset of the first capability (u32), then the information structure.

use limosa_protocol::capability::{
    Chain, IommuInfo, IovaRange, RegionType, SparseMmapArea, capabilities, iommu_cap, mappable,
};
use limosa_protocol::info::{RegionFlags, RegionInfo};
use zerocopy::{FromBytes, IntoBytes};

use crate::input::Input;

/// See the module.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let cap_offset: u32 = input.take();
    let info = input.0;
    let mut bytes = 0;
    for capability in capabilities(info, cap_offset).map_while(Result::ok) {
        bytes += 8 + capability.data.len();
        assert!(bytes <= info.len(), "capabilities overlap");
        // Each list is as long as the bytes allow, whatever it counts.
        if let Ok(region) = capability.region() {
            assert!(format!("{region:?}").len() <= 200 + 60 * capability.data.len());
        }
        let _ = capability.iommu();
    }
    let (mut region, _) = RegionInfo::read_from_prefix(info).unwrap_or_default();
    region.flags |= (RegionFlags::MMAP | RegionFlags::CAPS).bits();
    region.cap_offset = cap_offset;
    for (offset, bytes) in mappable(&region, info).unwrap_or_default() {
        assert!(bytes > 0 && offset.checked_add(bytes).is_some_and(|end| end <= region.size));
    }
}

/// See [`Target::seeds`](crate::Target::seeds).
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let input = |chain: &Chain, info: &[u8]| [chain.offset().as_bytes(), info, chain.bytes()].concat();
    let region = RegionInfo { size: 0x10000, ..RegionInfo::default() };
    let mut of_region = Chain::after(size_of::<RegionInfo>());
    of_region
        .sparse_mmap(&[
            SparseMmapArea { offset: 0, size: 0x2000 },
            SparseMmapArea { offset: 0x4000, size: 0x1000 },
        ])
        .region_type(RegionType { region_type: 1 << 31 | 0x8086, subtype: 2 })
        .msix_mappable();
    let mut of_iommu = Chain::after(size_of::<IommuInfo>());
    of_iommu.iova_ranges(&[IovaRange { start: 0, end: 0xfedf_ffff }]).push(iommu_cap::MIGRATION, 1, &[1; 24]);
    let mut endless = input(&of_region, region.as_bytes());
    endless[4 + 36..][..4].copy_from_slice(&32u32.to_ne_bytes());
    let mut short = Chain::after(size_of::<RegionInfo>());
    short.push(1, 1, &[0xff; 16]);
    vec![
        ("region", input(&of_region, region.as_bytes())),
        ("iommu", input(&of_iommu, IommuInfo::default().as_bytes())),
        ("names_itself", endless),
        ("counts_too_many", input(&short, region.as_bytes())),
        ("none", vec![0; 36]),
    ]
}
