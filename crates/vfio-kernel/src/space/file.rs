//! Files as memory of devices: whether the kernel pins their pages itself, and else their mapping in this process.

use std::ffi::c_void;
use std::os::fd::BorrowedFd;

use limosa_client::{DmaMap, Error, Result};
use limosa_protocol::info::DmaMapFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::usage;
use crate::ioctl::errno;

/// The file systems (`linux/magic.h`) whose files `IOMMU_IOAS_MAP_FILE` pins: those of memfds, of hugetlbfs and of
/// DMA buffers. With other files it succeeds as well as long as no IOMMU needs the pages, and the device's first
/// access fails.
const PINNABLE: [u64; 3] = [0x0102_1994, 0x9584_58f6, 0x444d_4142];

/// Whether `IOMMU_IOAS_MAP_FILE` can be trusted with the file.
pub(super) fn can_be_pinned_as_file(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fstatfs(fd).is_ok_and(|found| PINNABLE.contains(&(found.f_type as u64)))
}

/// A part of a file, mapped into this process and accessed by devices alone. It is not part of a core dump.
#[derive(Debug)]
pub(super) struct MappedFile {
    address: usize,
    bytes: usize,
}

impl MappedFile {
    /// Maps the memory that the kernel is to pin.
    pub fn new(name: &str, fd: BorrowedFd<'_>, offset: u64, map: &DmaMap<'_>) -> Result<MappedFile> {
        let page_bytes = rustix::param::page_size() as u64;
        if !offset.is_multiple_of(page_bytes) {
            let what = format!("memory at offset {offset:#x} of a file, expected a multiple of {page_bytes}");
            return Err(usage(name, what));
        }
        let too_big = || usage(name, format!("a mapping of {:#x} bytes", map.size));
        let bytes = usize::try_from(map.size).map_err(|_| too_big())?;
        let mut access = ProtFlags::READ;
        access.set(ProtFlags::WRITE, map.flags.contains(DmaMapFlags::WRITE));
        // SAFETY: a new mapping, where the kernel finds room for it. No reference to it is ever made.
        let mapped =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, access, MapFlags::SHARED, fd, offset) };
        let address = mapped.map_err(|error| Error::Os {
            device: name.into(),
            what: format!("mapping {bytes:#x} bytes at offset {offset:#x} of a file for it"),
            errno: errno(error),
            hint: "".into(),
        })?;
        // SAFETY: the range was mapped just now; the advice changes nothing that can be read there.
        if let Err(error) = unsafe { rustix::mm::madvise(address, bytes, Advice::LinuxDontDump) } {
            tracing::warn!("memory of {name} would be part of a core dump of this process: {error}");
        }
        Ok(MappedFile { address: address.addr(), bytes })
    }

    /// Where it was mapped to.
    pub fn address(&self) -> usize {
        self.address
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        let address = self.address as *mut c_void;
        // SAFETY: what `new` mapped, all of it and once. Only devices know the address, and whoever drops this has
        // taken the memory away from them, or never gave it to them.
        if let Err(error) = unsafe { rustix::mm::munmap(address, self.bytes) } {
            tracing::warn!("{:#x} bytes stay mapped: {error}", self.bytes);
        }
    }
}
