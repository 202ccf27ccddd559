//! The requests of a container's log (`vfio.h: VFIO_IOMMU_DIRTY_PAGES`, `VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`).

use std::os::fd::AsFd;

use limosa_client::{Error, Result};
use limosa_protocol::Errno;
use limosa_protocol::bitmap::words_for;
use limosa_protocol::info::DmaUnmapFlags;

use super::super::intervals::Span;
use super::super::mappings::{NOTHING_THERE, unmap_request};
use super::super::refused;
use super::log::{Limits, Type1};
use super::{Container, IOMMU_UNMAP_DMA};
use crate::ioctl;

/// `vfio.h: VFIO_BASE + 17`.
const IOMMU_DIRTY_PAGES: u8 = 17;

/// `vfio.h: VFIO_IOMMU_DIRTY_PAGES_FLAG_*`.
const START: u32 = 1 << 0;
const STOP: u32 = 1 << 1;
const GET_BITMAP: u32 = 1 << 2;

/// `struct vfio_iommu_type1_dirty_bitmap` with its `struct vfio_iommu_type1_dirty_bitmap_get`.
#[repr(C)]
struct DirtyBitmapArgument {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
    bitmap: Bitmap,
}

/// `struct vfio_iommu_type1_dma_unmap` with its `struct vfio_bitmap`.
#[repr(C)]
struct UnmapArgument {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
    bitmap: Bitmap,
}

/// `struct vfio_bitmap`.
#[repr(C)]
struct Bitmap {
    pgsize: u64,
    size: u64,
    data: u64,
}

impl Type1 for Container {
    fn is_ours(&self) -> bool {
        self.is_ours
    }

    fn is_set(&self) -> bool {
        Container::is_set(self)
    }

    /// Has no effect on a log that is on already. The log ends with the container's last group.
    fn start_dirty(&self, name: &str) -> Result<Limits> {
        let Some(migration) = self.information()?.migration else {
            let hint =
                "the kernel's type1 IOMMU has no dirty tracking (Linux before 5.8, or iommufd in its place)";
            return Err(refused(name, "IOMMU_DIRTY_PAGES", Errno::ENOTSUP, hint));
        };
        let limits = Limits {
            page_size: 1 << migration.pgsize_bitmap.trailing_zeros().min(63),
            pages_max: migration.max_dirty_bitmap_size.saturating_mul(8),
        };
        if migration.pgsize_bitmap == 0 || limits.pages_max == 0 {
            let what = format!("dirty bitmaps of at most {} pages of no size", limits.pages_max);
            return Err(Error::Misbehaved { device: name.into(), what });
        }
        self.dirty_pages(START).map_err(|errno| {
            let hint = match errno {
                Errno::EACCES => "the container's IOMMU is of type1's first version; set VFIO_TYPE1v2_IOMMU",
                Errno::ENOMEM => "the kernel has no memory for its bitmaps",
                Errno::EINVAL => "a mapping is too large to be logged; map it in pieces",
                _ => "",
            };
            refused(name, "IOMMU_DIRTY_PAGES, START", errno, hint)
        })?;
        Ok(limits)
    }

    fn stop_dirty(&self, name: &str) -> Result<()> {
        match self.dirty_pages(STOP) {
            // It ended when the container lost its IOMMU.
            Err(Errno::EINVAL) => Ok(()),
            answer => answer.map_err(|errno| refused(name, "IOMMU_DIRTY_PAGES, STOP", errno, "")),
        }
    }

    fn read_dirty(&self, name: &str, span: Span, limits: Limits) -> Result<Vec<u64>> {
        let (iova, size) = (span.first, span.size());
        let (mut words, bitmap) = bitmap(span, limits)?;
        let argsz = size_of::<DirtyBitmapArgument>() as u32;
        let mut argument = DirtyBitmapArgument { argsz, flags: GET_BITMAP, iova, size, bitmap };
        argument.bitmap.data = words.as_mut_ptr() as u64;
        let pointer = (&raw mut argument).cast();
        // SAFETY: the argument is the command's, and the bitmap has as many bytes as it says.
        match unsafe { ioctl::call(self.fd.as_fd(), ioctl::vfio(IOMMU_DIRTY_PAGES), pointer) } {
            Ok(_) => Ok(words),
            Err(errno) => {
                let hint = match errno {
                    Errno::EINVAL => {
                        "the range has a mapping in part, its bitmap would be too large, or the container has lost \
                         its last device"
                    }
                    _ => "",
                };
                let request = format!("IOMMU_DIRTY_PAGES, GET_BITMAP of {size:#x} bytes at IOVA {iova:#x}");
                Err(refused(name, request, errno, hint))
            }
        }
    }

    fn unmap_dirty(&self, name: &str, span: Span, limits: Limits) -> Result<Vec<u64>> {
        let (iova, size) = (span.first, span.size());
        let (mut words, bitmap) = bitmap(span, limits)?;
        let flags = DmaUnmapFlags::GET_DIRTY_BITMAP.bits();
        let mut argument =
            UnmapArgument { argsz: size_of::<UnmapArgument>() as u32, flags, iova, size, bitmap };
        argument.bitmap.data = words.as_mut_ptr() as u64;
        let pointer = (&raw mut argument).cast();
        let request = || unmap_request(span) + " with its dirty bitmap";
        // SAFETY: the argument is the command's, and the bitmap has as many bytes as it says.
        match unsafe { ioctl::call(self.fd.as_fd(), ioctl::vfio(IOMMU_UNMAP_DMA), pointer) } {
            Ok(_) if argument.size == 0 => Err(refused(name, request(), Errno::ENOENT, NOTHING_THERE)),
            Ok(_) => Ok(words),
            Err(errno) => Err(refused(name, request(), errno, "")),
        }
    }

    fn unmap(&self, name: &str, span: Span) -> Result<()> {
        Container::unmap(self, name, span)
    }
}

impl Container {
    fn dirty_pages(&self, flags: u32) -> Result<(), Errno> {
        let mut argument = [2 * size_of::<u32>() as u32, flags];
        let pointer = argument.as_mut_ptr().cast();
        // SAFETY: the argument is the command's, which ends after its flags.
        unsafe { ioctl::call(self.fd.as_fd(), ioctl::vfio(IOMMU_DIRTY_PAGES), pointer) }.map(drop)
    }
}

/// Room for the bitmap of a range, and its description for the kernel without the address. The bitmap is zeroed,
/// because the kernel only sets bits.
fn bitmap(span: Span, limits: Limits) -> Result<(Vec<u64>, Bitmap)> {
    let pages = span.pages(limits.page_size);
    if pages > limits.pages_max {
        let what = format!("a dirty bitmap of {pages} pages, the kernel allows {}", limits.pages_max);
        return Err(Error::Usage { device: "container".into(), what });
    }
    let words = vec![0; words_for(pages)];
    let bitmap = Bitmap { pgsize: limits.page_size, size: size_of_val(words.as_slice()) as u64, data: 0 };
    Ok((words, bitmap))
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use vfio_bindings::bindings::vfio;

    use super::*;

    #[test]
    fn arguments_are_those_of_the_bindings() {
        type Header = vfio::vfio_iommu_type1_dirty_bitmap;
        type Get = vfio::vfio_iommu_type1_dirty_bitmap_get;
        assert_eq!(size_of::<Header>() + size_of::<Get>(), size_of::<DirtyBitmapArgument>());
        let offsets = (offset_of!(DirtyBitmapArgument, iova), offset_of!(DirtyBitmapArgument, bitmap));
        assert_eq!(offsets, (size_of::<Header>(), size_of::<Header>() + offset_of!(Get, bitmap)));
        assert_eq!(size_of::<Bitmap>(), size_of::<vfio::vfio_bitmap>());
        assert_eq!(offset_of!(Bitmap, data), offset_of!(vfio::vfio_bitmap, data));
        type Unmap = vfio::vfio_iommu_type1_dma_unmap;
        assert_eq!(offset_of!(UnmapArgument, bitmap), offset_of!(Unmap, data));
        assert_eq!(offset_of!(UnmapArgument, size), offset_of!(Unmap, size));
        assert_eq!(START, vfio::VFIO_IOMMU_DIRTY_PAGES_FLAG_START);
        assert_eq!(STOP, vfio::VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP);
        assert_eq!(GET_BITMAP, vfio::VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP);
        let unmap = DmaUnmapFlags::GET_DIRTY_BITMAP.bits();
        assert_eq!(unmap, vfio::VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP);
    }

    #[test]
    fn a_bitmap_of_more_pages_than_the_kernel_takes_is_not_allocated() {
        let limits = Limits { page_size: 4096, pages_max: 1 << 31 };
        assert!(bitmap(Span { first: 0, last: u64::MAX }, limits).is_err());
        let (words, bitmap) = bitmap(Span { first: 4096, last: 66 * 4096 - 1 }, limits).unwrap();
        assert_eq!((words.len(), bitmap.size, bitmap.pgsize), (2, 16, 4096));
    }
}
