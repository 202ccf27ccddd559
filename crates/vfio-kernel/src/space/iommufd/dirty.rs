//! The requests of a log of page tables (`iommufd.h: IOMMU_HWPT_SET_DIRTY_TRACKING`, `IOMMU_HWPT_GET_DIRTY_BITMAP`).

use std::os::fd::AsFd;

use limosa_client::Result;
use limosa_protocol::Errno;

use super::super::intervals::Span;
use super::super::{refused, usage};
use super::argument::{GetDirtyBitmap, IoasCopy, IoasUnmap, SetDirtyTracking, size};
use super::log::{PAGE_SIZE, PageTables};
use super::{IOAS_UNMAP, Iommufd, MAP_FIXED_IOVA, MAP_READABLE, new_ioas, request};

/// Commands (`iommufd.h: IOMMUFD_CMD_*`).
const IOAS_COPY: u8 = 0x83;
const HWPT_SET_DIRTY_TRACKING: u8 = 0x8b;
const HWPT_GET_DIRTY_BITMAP: u8 = 0x8c;

/// `iommufd.h: IOMMU_HWPT_DIRTY_TRACKING_ENABLE`.
const DIRTY_TRACKING_ENABLE: u32 = 1;
/// `iommufd.h: IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR`.
const GET_DIRTY_BITMAP_NO_CLEAR: u32 = 1;

impl PageTables for Iommufd {
    fn tables(&self) -> Vec<u32> {
        self.page_tables().iter().map(|table| table.id).collect()
    }

    fn is_ours(&self) -> bool {
        self.is_ours
    }

    fn alignment(&self) -> Result<u64> {
        self.iova_ranges().map(|ranges| ranges.alignment)
    }

    fn track(&self, name: &str, table: u32, on: bool) -> Result<()> {
        let flags = if on { DIRTY_TRACKING_ENABLE } else { 0 };
        let mut argument =
            SetDirtyTracking { size: size::<SetDirtyTracking>(), flags, hwpt_id: table, reserved: 0 };
        // SAFETY: the argument is the command's, without addresses in it.
        unsafe { request(self.fd.as_fd(), HWPT_SET_DIRTY_TRACKING, &mut argument) }.map(drop).map_err(
            |errno| {
                let hint = match errno {
                    Errno::ENOTSUP => "the page table was allocated without dirty tracking",
                    Errno::ENOENT => "there is no such page table",
                    _ => "",
                };
                refused(name, format!("HWPT_SET_DIRTY_TRACKING of page table {table}"), errno, hint)
            },
        )
    }

    fn read(&self, name: &str, table: u32, span: Span, keep: bool, words: &mut [u64]) -> Result<()> {
        let (iova, length, room) = (span.first, span.size(), words.len() as u64 * 64);
        if span.pages(PAGE_SIZE) > room {
            return Err(usage(name, format!("{room} bits for the pages of {length:#x} bytes")));
        }
        let mut argument = GetDirtyBitmap {
            size: size::<GetDirtyBitmap>(),
            hwpt_id: table,
            flags: if keep { GET_DIRTY_BITMAP_NO_CLEAR } else { 0 },
            reserved: 0,
            iova,
            length,
            page_size: PAGE_SIZE,
            data: words.as_mut_ptr() as u64,
        };
        // SAFETY: the argument is the command's, and `words` has a bit for every page, as was checked.
        let answer = unsafe { request(self.fd.as_fd(), HWPT_GET_DIRTY_BITMAP, &mut argument) };
        answer.map(drop).map_err(|errno| {
            let request = format!("HWPT_GET_DIRTY_BITMAP of {length:#x} bytes at IOVA {iova:#x}");
            refused(name, request, errno, "")
        })
    }

    /// By copies into an IOAS of no use otherwise (`iommufd.h: IOMMU_IOAS_COPY`), which the kernel does refuse when there
    /// is a hole.
    fn with_questions<T>(
        &self,
        name: &str,
        ask: impl FnOnce(&mut dyn FnMut(Span) -> Result<bool>) -> Result<T>,
    ) -> Result<T> {
        let scratch = new_ioas(self.fd.as_fd())?;
        let answer = ask(&mut |span| self.is_mapped(name, scratch, span));
        self.destroy(scratch);
        answer
    }

    fn unmap(&self, name: &str, range: Span) -> Result<()> {
        Iommufd::unmap(self, name, range)
    }
}

impl Iommufd {
    fn is_mapped(&self, name: &str, scratch: u32, span: Span) -> Result<bool> {
        let (iova, length) = (span.first, span.size());
        if length == u64::MAX {
            // All addresses there are; no request can name them.
            return Ok(false);
        }
        let mut copy = IoasCopy {
            size: size::<IoasCopy>(),
            flags: MAP_FIXED_IOVA | MAP_READABLE,
            dst_ioas_id: scratch,
            src_ioas_id: self.ioas,
            length,
            dst_iova: iova,
            src_iova: iova,
        };
        let refused = |request: &str, errno| {
            refused(name, format!("{request} of {length:#x} bytes at IOVA {iova:#x}"), errno, "")
        };
        // SAFETY: the argument is the command's, without addresses of this process in it, and no device is attached
        // to the IOAS that is written to.
        match unsafe { request(self.fd.as_fd(), IOAS_COPY, &mut copy) } {
            Ok(_) => {}
            Err(Errno::ENOENT) => return Ok(false),
            Err(errno) => return Err(refused("IOAS_COPY", errno)),
        }
        let mut unmap = IoasUnmap { size: size::<IoasUnmap>(), ioas_id: scratch, iova, length };
        // SAFETY: the argument is the command's, without addresses of this process in it.
        unsafe { request(self.fd.as_fd(), IOAS_UNMAP, &mut unmap) }
            .map_err(|errno| refused("IOAS_UNMAP", errno))?;
        Ok(true)
    }
}
