//! Layouts and constants against `vfio-bindings`, which is generated from Linux' `vfio.h`.

use limosa_protocol::capability::{
    CapHeader, DmaAvail, IommuInfo, IommuInfoFlags, IommuMigration, IovaRange, ListHeader, RegionType,
    SparseMmapArea, iommu_cap, region_cap,
};
use limosa_protocol::feature::*;
use limosa_protocol::info::*;
use limosa_protocol::{FeatureHeader, FeatureIndex, FeatureOp, MigrationFlags, State, logging, pci_index};
use vfio_bindings::bindings::vfio as linux;

/// Compares where the fields lie and how long they are. Ours begin `from` bytes into Linux'
/// structure, and their end is Linux' field `until`, or Linux' own end.
macro_rules! same_layout {
    ($ours:ty, $linux:ty $(; from $from:ident)?, $($field:ident = $theirs:ident),+; $($until:ident)?) => {{
        let from = 0 $(+ $from)?;
        $(
            assert_eq!(
                std::mem::offset_of!($ours, $field) + from,
                std::mem::offset_of!($linux, $theirs),
                "{}.{}", stringify!($ours), stringify!($field),
            );
            assert_eq!(
                field_size(|value: &$ours| &value.$field),
                field_size(|value: &$linux| &value.$theirs),
                "{}.{}", stringify!($ours), stringify!($field),
            );
        )+
        let end = [$(std::mem::offset_of!($linux, $until),)? size_of::<$linux>()][0];
        assert_eq!(size_of::<$ours>() + from, end, "size of {}", stringify!($ours));
    }};
}

fn field_size<S, T>(_: impl Fn(&S) -> &T) -> usize {
    size_of::<T>()
}

#[test]
fn structures_lie_as_in_linux() {
    same_layout!(FeatureHeader, linux::vfio_device_feature, argsz = argsz, flags = flags; data);
    same_layout!(FeatureMigration, linux::vfio_device_feature_migration, flags = flags;);
    same_layout!(FeatureMigState, linux::vfio_device_feature_mig_state,
        device_state = device_state, data_fd = data_fd;);
    same_layout!(FeatureLowPowerEntryWithWakeup, linux::vfio_device_low_power_entry_with_wakeup,
        wakeup_eventfd = wakeup_eventfd, reserved = reserved;);
    same_layout!(FeatureDmaLoggingControl, linux::vfio_device_feature_dma_logging_control,
        page_size = page_size, num_ranges = num_ranges, reserved = __reserved; ranges);
    same_layout!(DmaLoggingRange, linux::vfio_device_feature_dma_logging_range, iova = iova, length = length;);
    same_layout!(FeatureDmaLoggingReport, linux::vfio_device_feature_dma_logging_report,
        iova = iova, length = length, page_size = page_size; bitmap);
    same_layout!(FeatureMigDataSize, linux::vfio_device_feature_mig_data_size,
        stop_copy_length = stop_copy_length;);
    same_layout!(FeatureBusMaster, linux::vfio_device_feature_bus_master, op = op;);
    same_layout!(FeatureDmaBuf, linux::vfio_device_feature_dma_buf,
        region_index = region_index, open_flags = open_flags, flags = flags, nr_ranges = nr_ranges; dma_ranges);
    same_layout!(RegionDmaRange, linux::vfio_region_dma_range, offset = offset, length = length;);
    same_layout!(PrecopyInfo, linux::vfio_precopy_info,
        argsz = argsz, flags = flags, initial_bytes = initial_bytes, dirty_bytes = dirty_bytes;);
    same_layout!(DeviceInfo, linux::vfio_device_info,
        argsz = argsz, flags = flags, num_regions = num_regions, num_irqs = num_irqs; cap_offset);
    same_layout!(RegionInfo, linux::vfio_region_info, argsz = argsz, flags = flags, index = index,
        cap_offset = cap_offset, size = size, offset = offset;);
    same_layout!(IrqInfo, linux::vfio_irq_info, argsz = argsz, flags = flags, index = index, count = count;);
    same_layout!(IrqSet, linux::vfio_irq_set,
        argsz = argsz, flags = flags, index = index, start = start, count = count; data);
}

#[test]
fn capabilities_lie_as_in_linux() {
    const HEADER: usize = size_of::<CapHeader>();
    same_layout!(CapHeader, linux::vfio_info_cap_header, id = id, version = version, next = next;);
    same_layout!(SparseMmapArea, linux::vfio_region_sparse_mmap_area, offset = offset, size = size;);
    same_layout!(ListHeader, linux::vfio_region_info_cap_sparse_mmap; from HEADER,
        count = nr_areas, reserved = reserved; areas);
    same_layout!(RegionType, linux::vfio_region_info_cap_type; from HEADER,
        region_type = type_, subtype = subtype;);
    same_layout!(IommuInfo, linux::vfio_iommu_type1_info, argsz = argsz, flags = flags,
        iova_pgsizes = iova_pgsizes, cap_offset = cap_offset, reserved = pad;);
    same_layout!(IovaRange, linux::vfio_iova_range, start = start, end = end;);
    same_layout!(ListHeader, linux::vfio_iommu_type1_info_cap_iova_range; from HEADER,
        count = nr_iovas, reserved = reserved; iova_ranges);
    same_layout!(IommuMigration, linux::vfio_iommu_type1_info_cap_migration; from HEADER,
        flags = flags, pgsize_bitmap = pgsize_bitmap, max_dirty_bitmap_size = max_dirty_bitmap_size;);
    same_layout!(DmaAvail, linux::vfio_iommu_type1_info_dma_avail; from HEADER, avail = avail;);
    assert_eq!(u32::from(region_cap::SPARSE_MMAP), linux::VFIO_REGION_INFO_CAP_SPARSE_MMAP);
    assert_eq!(u32::from(region_cap::TYPE), linux::VFIO_REGION_INFO_CAP_TYPE);
    assert_eq!(u32::from(region_cap::MSIX_MAPPABLE), linux::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE);
    assert_eq!(u32::from(iommu_cap::IOVA_RANGE), linux::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE);
    assert_eq!(u32::from(iommu_cap::MIGRATION), linux::VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION);
    assert_eq!(u32::from(iommu_cap::DMA_AVAIL), linux::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL);
}

#[test]
fn states_are_numbered_as_in_linux() {
    let numbers = [
        (State::Error, linux::vfio_device_mig_state_VFIO_DEVICE_STATE_ERROR),
        (State::Stop, linux::vfio_device_mig_state_VFIO_DEVICE_STATE_STOP),
        (State::Running, linux::vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING),
        (State::StopCopy, linux::vfio_device_mig_state_VFIO_DEVICE_STATE_STOP_COPY),
        (State::Resuming, linux::vfio_device_mig_state_VFIO_DEVICE_STATE_RESUMING),
        (State::RunningP2p, linux::vfio_device_mig_state_VFIO_DEVICE_STATE_RUNNING_P2P),
        (State::PreCopy, linux::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY),
        (State::PreCopyP2p, linux::vfio_device_mig_state_VFIO_DEVICE_STATE_PRE_COPY_P2P),
    ];
    for (state, number) in numbers {
        assert_eq!(state.raw(), number, "{state}");
    }
    assert_eq!(State::COUNT as u32, linux::vfio_device_mig_state_VFIO_DEVICE_STATE_NR);
    assert_eq!(MigrationFlags::STOP_COPY.bits(), linux::VFIO_MIGRATION_STOP_COPY.into());
    assert_eq!(MigrationFlags::P2P.bits(), linux::VFIO_MIGRATION_P2P.into());
    assert_eq!(MigrationFlags::PRE_COPY.bits(), linux::VFIO_MIGRATION_PRE_COPY.into());
}

#[test]
fn features_are_numbered_as_in_linux() {
    let numbers = [
        (FeatureIndex::PCI_VF_TOKEN, linux::VFIO_DEVICE_FEATURE_PCI_VF_TOKEN),
        (FeatureIndex::MIGRATION, linux::VFIO_DEVICE_FEATURE_MIGRATION),
        (FeatureIndex::MIG_DEVICE_STATE, linux::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE),
        (FeatureIndex::LOW_POWER_ENTRY, linux::VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY),
        (FeatureIndex::LOW_POWER_ENTRY_WITH_WAKEUP, linux::VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP),
        (FeatureIndex::LOW_POWER_EXIT, linux::VFIO_DEVICE_FEATURE_LOW_POWER_EXIT),
        (FeatureIndex::DMA_LOGGING_START, linux::VFIO_DEVICE_FEATURE_DMA_LOGGING_START),
        (FeatureIndex::DMA_LOGGING_STOP, linux::VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP),
        (FeatureIndex::DMA_LOGGING_REPORT, linux::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT),
        (FeatureIndex::MIG_DATA_SIZE, linux::VFIO_DEVICE_FEATURE_MIG_DATA_SIZE),
        (FeatureIndex::BUS_MASTER, linux::VFIO_DEVICE_FEATURE_BUS_MASTER),
        (FeatureIndex::DMA_BUF, linux::VFIO_DEVICE_FEATURE_DMA_BUF),
        (FeatureIndex::MIG_PRECOPY_INFO_V2, linux::VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2),
    ];
    for (index, number) in numbers {
        assert_eq!(u32::from(index.0), number, "{index}");
    }
    assert_eq!(FeatureOp::GET.bits(), linux::VFIO_DEVICE_FEATURE_GET);
    assert_eq!(FeatureOp::SET.bits(), linux::VFIO_DEVICE_FEATURE_SET);
    assert_eq!(FeatureOp::PROBE.bits(), linux::VFIO_DEVICE_FEATURE_PROBE);
    assert_eq!(!FeatureOp::all().bits() & 0x7ffff, linux::VFIO_DEVICE_FEATURE_MASK);
    assert_eq!(PrecopyFlags::REINIT.bits(), linux::VFIO_PRECOPY_INFO_REINIT);
    assert_eq!(linux::VFIO_DEVICE_FEATURE_CLEAR_MASTER, 0);
    assert_eq!(linux::VFIO_DEVICE_FEATURE_SET_MASTER, 1);
    assert_eq!(size_of::<FeaturePciVfToken>(), 16, "vfio.h gives it in words only");
    assert_eq!(logging::RANGES_MAX, 256);
}

#[test]
fn information_flags_are_those_of_linux() {
    assert_eq!(DeviceFlags::RESET.bits(), linux::VFIO_DEVICE_FLAGS_RESET);
    assert_eq!(DeviceFlags::PCI.bits(), linux::VFIO_DEVICE_FLAGS_PCI);
    assert_eq!(DeviceFlags::CAPS.bits(), linux::VFIO_DEVICE_FLAGS_CAPS);
    assert_eq!(RegionFlags::READ.bits(), linux::VFIO_REGION_INFO_FLAG_READ);
    assert_eq!(RegionFlags::WRITE.bits(), linux::VFIO_REGION_INFO_FLAG_WRITE);
    assert_eq!(RegionFlags::MMAP.bits(), linux::VFIO_REGION_INFO_FLAG_MMAP);
    assert_eq!(RegionFlags::CAPS.bits(), linux::VFIO_REGION_INFO_FLAG_CAPS);
    assert_eq!(IrqFlags::EVENTFD.bits(), linux::VFIO_IRQ_INFO_EVENTFD);
    assert_eq!(IrqFlags::MASKABLE.bits(), linux::VFIO_IRQ_INFO_MASKABLE);
    assert_eq!(IrqFlags::AUTOMASKED.bits(), linux::VFIO_IRQ_INFO_AUTOMASKED);
    assert_eq!(IrqFlags::NORESIZE.bits(), linux::VFIO_IRQ_INFO_NORESIZE);
    assert_eq!(IrqSetFlags::DATA_NONE.bits(), linux::VFIO_IRQ_SET_DATA_NONE);
    assert_eq!(IrqSetFlags::DATA_BOOL.bits(), linux::VFIO_IRQ_SET_DATA_BOOL);
    assert_eq!(IrqSetFlags::DATA_EVENTFD.bits(), linux::VFIO_IRQ_SET_DATA_EVENTFD);
    assert_eq!(IrqSetFlags::ACTION_MASK.bits(), linux::VFIO_IRQ_SET_ACTION_MASK);
    assert_eq!(IrqSetFlags::ACTION_UNMASK.bits(), linux::VFIO_IRQ_SET_ACTION_UNMASK);
    assert_eq!(IrqSetFlags::ACTION_TRIGGER.bits(), linux::VFIO_IRQ_SET_ACTION_TRIGGER);
    assert_eq!(DmaMapFlags::READ.bits(), linux::VFIO_DMA_MAP_FLAG_READ);
    assert_eq!(DmaMapFlags::WRITE.bits(), linux::VFIO_DMA_MAP_FLAG_WRITE);
    assert_eq!(DmaUnmapFlags::GET_DIRTY_BITMAP.bits(), linux::VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP);
    assert_eq!(DmaUnmapFlags::ALL.bits(), linux::VFIO_DMA_UNMAP_FLAG_ALL);
    assert_eq!(IommuInfoFlags::PGSIZES.bits(), linux::VFIO_IOMMU_INFO_PGSIZES);
    assert_eq!(IommuInfoFlags::CAPS.bits(), linux::VFIO_IOMMU_INFO_CAPS);
}

#[test]
fn indexes_of_pci_devices_are_those_of_linux() {
    assert_eq!(pci_index::BAR0, linux::VFIO_PCI_BAR0_REGION_INDEX);
    assert_eq!(pci_index::BAR5, linux::VFIO_PCI_BAR5_REGION_INDEX);
    assert_eq!(pci_index::ROM, linux::VFIO_PCI_ROM_REGION_INDEX);
    assert_eq!(pci_index::CONFIG, linux::VFIO_PCI_CONFIG_REGION_INDEX);
    assert_eq!(pci_index::VGA, linux::VFIO_PCI_VGA_REGION_INDEX);
    assert_eq!(pci_index::NUM_REGIONS, linux::VFIO_PCI_NUM_REGIONS);
    assert_eq!(pci_index::IRQ_INTX, linux::VFIO_PCI_INTX_IRQ_INDEX);
    assert_eq!(pci_index::IRQ_MSI, linux::VFIO_PCI_MSI_IRQ_INDEX);
    assert_eq!(pci_index::IRQ_MSIX, linux::VFIO_PCI_MSIX_IRQ_INDEX);
    assert_eq!(pci_index::IRQ_ERR, linux::VFIO_PCI_ERR_IRQ_INDEX);
    assert_eq!(pci_index::IRQ_REQ, linux::VFIO_PCI_REQ_IRQ_INDEX);
    assert_eq!(pci_index::NUM_IRQS, linux::VFIO_PCI_NUM_IRQS);
}
