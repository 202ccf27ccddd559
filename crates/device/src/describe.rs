//! A device's [`Description`] in the standard's structures, for clients
//! (`vfio.h: VFIO_DEVICE_GET_INFO, VFIO_DEVICE_GET_REGION_INFO, VFIO_DEVICE_GET_IRQ_INFO`).

use limosa_protocol::Errno;
use limosa_protocol::info::{DeviceFlags, DeviceInfo, IrqInfo, RegionFlags, RegionInfo};

use crate::{Description, Region};

/// A region's information for a client.
#[derive(Debug)]
pub struct RegionView<'a> {
    /// Flags, size, and the offset for mmap. CAPS is not set, `cap_offset` is 0 and `argsz` is the size of the
    /// structure alone: the transport adds capabilities.
    pub info: RegionInfo,
    /// The parts that may be mapped, as (offset within the region, bytes); empty for all of a
    /// region with MMAP.
    pub areas: &'a [(u64, u64)],
}

impl Description {
    /// The device. Every device can be reset.
    pub fn device_info(&self) -> DeviceInfo {
        let flags = self.flags.unwrap_or(DeviceFlags::empty()) | DeviceFlags::RESET;
        DeviceInfo {
            argsz: size_of::<DeviceInfo>() as u32,
            flags: flags.bits(),
            num_regions: self.regions.len() as u32,
            num_irqs: self.irqs.len() as u32,
        }
    }

    /// A region; EINVAL beyond the last. A missing region has size 0.
    pub fn region_view(&self, index: u32) -> Result<RegionView<'_>, Errno> {
        let region: &Region = self.regions.get(index as usize).ok_or(Errno::EINVAL)?;
        let access = region.flags & (RegionFlags::READ | RegionFlags::WRITE);
        let mapping = region.mapping.as_ref();
        let flags = if mapping.is_some() { access | RegionFlags::MMAP } else { access };
        Ok(RegionView {
            info: RegionInfo {
                argsz: size_of::<RegionInfo>() as u32,
                flags: flags.bits(),
                index,
                cap_offset: 0,
                size: region.size,
                offset: mapping.map_or(0, |mapping| mapping.offset),
            },
            areas: mapping.map_or(&[], |mapping| &mapping.areas),
        })
    }

    /// An interrupt index; EINVAL beyond the last. A missing index has no vectors.
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, Errno> {
        let irq = self.irqs.get(index as usize).ok_or(Errno::EINVAL)?;
        Ok(IrqInfo { argsz: size_of::<IrqInfo>() as u32, flags: irq.flags.bits(), index, count: irq.count })
    }
}
