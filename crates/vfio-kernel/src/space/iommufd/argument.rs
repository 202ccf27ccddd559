//! The arguments of iommufd's commands (`iommufd.h`). Each begins with its own size, or as VFIO calls it, argsz.

/// `struct iommu_destroy`.
#[derive(Default)]
#[repr(C)]
pub struct Destroy {
    pub size: u32,
    pub id: u32,
}

/// `struct iommu_ioas_alloc`.
#[derive(Default)]
#[repr(C)]
pub struct IoasAlloc {
    pub size: u32,
    pub flags: u32,
    pub out_ioas_id: u32,
}

/// `struct iommu_ioas_iova_ranges`.
#[derive(Default)]
#[repr(C)]
pub struct IoasIovaRanges {
    pub size: u32,
    pub ioas_id: u32,
    pub num_iovas: u32,
    pub reserved: u32,
    pub allowed_iovas: u64,
    pub out_iova_alignment: u64,
}

/// `struct iommu_ioas_map`.
#[derive(Default)]
#[repr(C)]
pub struct IoasMap {
    pub size: u32,
    pub flags: u32,
    pub ioas_id: u32,
    pub reserved: u32,
    pub user_va: u64,
    pub length: u64,
    pub iova: u64,
}

/// `struct iommu_ioas_map_file`.
#[derive(Default)]
#[repr(C)]
pub struct IoasMapFile {
    pub size: u32,
    pub flags: u32,
    pub ioas_id: u32,
    pub fd: i32,
    pub start: u64,
    pub length: u64,
    pub iova: u64,
}

/// `struct iommu_ioas_unmap`.
#[derive(Default)]
#[repr(C)]
pub struct IoasUnmap {
    pub size: u32,
    pub ioas_id: u32,
    pub iova: u64,
    pub length: u64,
}

/// `struct iommu_hwpt_alloc`.
#[derive(Default)]
#[repr(C)]
pub struct HwptAlloc {
    pub size: u32,
    pub flags: u32,
    pub dev_id: u32,
    pub pt_id: u32,
    pub out_hwpt_id: u32,
    pub reserved: u32,
    pub data_type: u32,
    pub data_len: u32,
    pub data_uptr: u64,
    pub fault_id: u32,
    pub reserved2: u32,
}

/// `struct iommu_hw_info`.
#[derive(Default)]
#[repr(C)]
pub struct HwInfo {
    pub size: u32,
    pub flags: u32,
    pub dev_id: u32,
    pub data_len: u32,
    pub data_uptr: u64,
    pub out_data_type: u32,
    pub out_max_pasid_log2: u8,
    pub reserved: [u8; 3],
    pub out_capabilities: u64,
}

/// `struct vfio_device_bind_iommufd`, without the token that came later.
#[derive(Default)]
#[repr(C)]
pub struct BindIommufd {
    pub argsz: u32,
    pub flags: u32,
    pub iommufd: i32,
    pub out_devid: u32,
}

/// `struct vfio_device_attach_iommufd_pt`, without the PASID that came later.
#[derive(Default)]
#[repr(C)]
pub struct AttachIommufdPt {
    pub argsz: u32,
    pub flags: u32,
    pub pt_id: u32,
}

/// `struct iommu_ioas_copy`.
#[derive(Default)]
#[repr(C)]
pub struct IoasCopy {
    pub size: u32,
    pub flags: u32,
    pub dst_ioas_id: u32,
    pub src_ioas_id: u32,
    pub length: u64,
    pub dst_iova: u64,
    pub src_iova: u64,
}

/// `struct iommu_hwpt_set_dirty_tracking`.
#[derive(Default)]
#[repr(C)]
pub struct SetDirtyTracking {
    pub size: u32,
    pub flags: u32,
    pub hwpt_id: u32,
    pub reserved: u32,
}

/// `struct iommu_hwpt_get_dirty_bitmap`.
#[derive(Default)]
#[repr(C)]
pub struct GetDirtyBitmap {
    pub size: u32,
    pub hwpt_id: u32,
    pub flags: u32,
    pub reserved: u32,
    pub iova: u64,
    pub length: u64,
    pub page_size: u64,
    pub data: u64,
}

/// The size that an argument names.
pub const fn size<T>() -> u32 {
    size_of::<T>() as u32
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use vfio_bindings::bindings::vfio;

    use super::*;

    /// Sizes and offsets that the uAPI has on every 64-bit machine; no crate of bindings has iommufd's.
    #[test]
    fn arguments_are_laid_out_as_in_the_uapi() {
        assert_eq!(size::<Destroy>(), 8);
        assert_eq!((size::<IoasAlloc>(), offset_of!(IoasAlloc, out_ioas_id)), (12, 8));
        assert_eq!((size::<IoasIovaRanges>(), offset_of!(IoasIovaRanges, allowed_iovas)), (32, 16));
        assert_eq!(
            (size::<IoasMap>(), offset_of!(IoasMap, user_va), offset_of!(IoasMap, iova)),
            (40, 16, 32)
        );
        assert_eq!((size::<IoasMapFile>(), offset_of!(IoasMapFile, fd)), (40, 12));
        assert_eq!((offset_of!(IoasMapFile, start), offset_of!(IoasMapFile, iova)), (16, 32));
        assert_eq!(
            (size::<IoasUnmap>(), offset_of!(IoasUnmap, iova), offset_of!(IoasUnmap, length)),
            (24, 8, 16)
        );
        assert_eq!(
            (size::<IoasCopy>(), offset_of!(IoasCopy, length), offset_of!(IoasCopy, src_iova)),
            (40, 16, 32)
        );
        assert_eq!((size::<HwptAlloc>(), offset_of!(HwptAlloc, out_hwpt_id)), (48, 16));
        assert_eq!((offset_of!(HwptAlloc, data_uptr), offset_of!(HwptAlloc, fault_id)), (32, 40));
        assert_eq!((size::<HwInfo>(), offset_of!(HwInfo, data_uptr)), (40, 16));
        assert_eq!((offset_of!(HwInfo, out_data_type), offset_of!(HwInfo, out_capabilities)), (24, 32));
        assert_eq!((size::<SetDirtyTracking>(), offset_of!(SetDirtyTracking, hwpt_id)), (16, 8));
        assert_eq!((size::<GetDirtyBitmap>(), offset_of!(GetDirtyBitmap, hwpt_id)), (48, 4));
        assert_eq!((offset_of!(GetDirtyBitmap, page_size), offset_of!(GetDirtyBitmap, data)), (32, 40));
    }

    /// Ours end where those of the first kernels that had them did.
    #[test]
    fn arguments_of_vfio_begin_as_its_bindings() {
        type Bind = vfio::vfio_device_bind_iommufd;
        assert_eq!(size_of::<BindIommufd>(), offset_of!(Bind, token_uuid_ptr));
        assert_eq!(offset_of!(BindIommufd, iommufd), offset_of!(Bind, iommufd));
        assert_eq!(offset_of!(BindIommufd, out_devid), offset_of!(Bind, out_devid));
        type Attach = vfio::vfio_device_attach_iommufd_pt;
        assert_eq!(size_of::<AttachIommufdPt>(), offset_of!(Attach, pasid));
        assert_eq!(offset_of!(AttachIommufdPt, pt_id), offset_of!(Attach, pt_id));
    }
}
