//! Dirty pages from the page tables of an IOAS (`iommufd.h: IOMMU_HWPT_SET_DIRTY_TRACKING`,
//! `IOMMU_HWPT_GET_DIRTY_BITMAP`).
//!
//! A bitmap may be asked for of memory that is mapped without a hole. Linux does not refuse the others: it
//! answers up to the first hole, and says that all is well. So what is mapped must be known here. In an IOAS of a
//! caller's, who may have mapped memory himself, the kernel is asked, with a copy into an IOAS of no use otherwise
//! (`iommufd.h: IOMMU_IOAS_COPY`), which it does refuse when there is a hole.

use std::os::fd::AsFd;

use limosa_client::{Error, Result};
use limosa_protocol::Errno;
use limosa_protocol::logging::REPORT_PAGE_SIZE_MIN;

use super::super::{refused, usage};
use super::argument::{GetDirtyBitmap, IoasCopy, IoasUnmap, SetDirtyTracking, size};
use super::{Iommufd, MAP_FIXED_IOVA, MAP_READABLE, new_ioas, request};

/// Commands (`iommufd.h: IOMMUFD_CMD_*`).
const IOAS_COPY: u8 = 0x83;
const IOAS_UNMAP: u8 = 0x86;
const HWPT_SET_DIRTY_TRACKING: u8 = 0x8b;
const HWPT_GET_DIRTY_BITMAP: u8 = 0x8c;

/// `iommufd.h: IOMMU_HWPT_DIRTY_TRACKING_ENABLE`.
const DIRTY_TRACKING_ENABLE: u32 = 1;
/// `iommufd.h: IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR`.
const GET_DIRTY_BITMAP_NO_CLEAR: u32 = 1;

/// Bytes for each bit of the bitmaps that are asked for, whatever the page sizes of the IOMMU: the kernel does the
/// arithmetic.
pub(in super::super) const PAGE_SIZE: u64 = REPORT_PAGE_SIZE_MIN;

/// How often the kernel is asked what is mapped, for one report.
const QUESTIONS_MAX: usize = 10_000;

impl Iommufd {
    /// Turns dirty tracking on or off, in all page tables or in none.
    pub fn set_tracking(&self, name: &str, on: bool) -> Result<()> {
        let page_tables = self.page_tables();
        if on && page_tables.is_empty() {
            return Err(usage(name, "no IOMMU of its devices tracks dirty pages"));
        }
        for (at, table) in page_tables.iter().enumerate() {
            let Err(error) = self.track(name, table.id, on) else { continue };
            for table in page_tables[..at].iter().filter(|_| on) {
                if let Err(error) = self.track(name, table.id, false) {
                    tracing::warn!("dirty tracking goes on: {error}");
                }
            }
            return Err(error);
        }
        Ok(())
    }

    pub(super) fn track(&self, name: &str, hwpt: u32, on: bool) -> Result<()> {
        let flags = if on { DIRTY_TRACKING_ENABLE } else { 0 };
        let mut argument =
            SetDirtyTracking { size: size::<SetDirtyTracking>(), flags, hwpt_id: hwpt, reserved: 0 };
        // SAFETY: the argument is the command's, without addresses in it.
        unsafe { request(self.fd.as_fd(), HWPT_SET_DIRTY_TRACKING, &mut argument) }.map(drop).map_err(
            |errno| {
                let hint = match errno {
                    Errno::ENOTSUP => "the page table was allocated without dirty tracking",
                    Errno::ENOENT => "there is no such page table",
                    _ => "",
                };
                refused(name, format!("HWPT_SET_DIRTY_TRACKING of page table {hwpt}"), errno, hint)
            },
        )
    }

    /// Sets in `words` the pages of [`PAGE_SIZE`] that were written in memory that is mapped without a hole, and
    /// forgets them unless they are to be kept.
    pub fn read_dirty(
        &self,
        name: &str,
        iova: u64,
        length: u64,
        keep: bool,
        words: &mut [u64],
    ) -> Result<()> {
        let room = words.len() as u64 * 64;
        if length.div_ceil(PAGE_SIZE) > room {
            return Err(usage(name, format!("{room} bits for the pages of {length:#x} bytes")));
        }
        for table in self.page_tables().iter() {
            let mut argument = GetDirtyBitmap {
                size: size::<GetDirtyBitmap>(),
                hwpt_id: table.id,
                flags: if keep { GET_DIRTY_BITMAP_NO_CLEAR } else { 0 },
                reserved: 0,
                iova,
                length,
                page_size: PAGE_SIZE,
                data: words.as_mut_ptr() as u64,
            };
            // SAFETY: the argument is the command's, and `words` has a bit for every page, as was checked.
            let answer = unsafe { request(self.fd.as_fd(), HWPT_GET_DIRTY_BITMAP, &mut argument) };
            answer.map_err(|errno| {
                let request = format!("HWPT_GET_DIRTY_BITMAP of {length:#x} bytes at IOVA {iova:#x}");
                refused(name, request, errno, "")
            })?;
        }
        Ok(())
    }

    /// The parts of a range that are mapped, each without a hole.
    pub fn mapped(&self, name: &str, iova: u64, length: u64) -> Result<Vec<(u64, u64)>> {
        let scratch = new_ioas(self.fd.as_fd())?;
        let parts = self.mapped_by_copies(name, scratch, iova, length);
        self.destroy(scratch);
        parts
    }

    fn mapped_by_copies(&self, name: &str, scratch: u32, iova: u64, length: u64) -> Result<Vec<(u64, u64)>> {
        let mut parts: Vec<(u64, u64)> = Vec::new();
        // What is still to be asked, the lowest address last.
        let mut open = vec![(iova, length)];
        let mut questions = 0;
        while let Some((iova, length)) = open.pop() {
            questions += 1;
            if questions > QUESTIONS_MAX {
                let what =
                    format!("memory in too many pieces at IOVA {iova:#x}; map it through its AddressSpace");
                return Err(Error::Usage { device: name.into(), what });
            }
            if self.is_mapped(name, scratch, iova, length)? {
                match parts.last_mut() {
                    Some(part) if part.0 + part.1 == iova => part.1 += length,
                    _ => parts.push((iova, length)),
                }
            } else if length > PAGE_SIZE {
                let half = (length / 2).next_multiple_of(PAGE_SIZE);
                open.push((iova + half, length - half));
                open.push((iova, half));
            }
        }
        Ok(parts)
    }

    /// Whether a range is mapped without a hole.
    fn is_mapped(&self, name: &str, scratch: u32, iova: u64, length: u64) -> Result<bool> {
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
