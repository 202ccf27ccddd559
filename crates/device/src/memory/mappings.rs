//! [`Mappings`]: guest memory as a device's client drives it.

use std::fmt;
use std::sync::Arc;

use limosa_foreign_fd::Foreign;
use limosa_guest_memory::FileMapping;
use limosa_protocol::Errno;
use limosa_protocol::bitmap::{Grid, words_for};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::logging::{RANGES_MAX, REPORT_PAGE_SIZE_MIN, check_report, check_start};

use super::log::{self, Log};
use super::table::{Mapped, Memory, Space};
use super::{Backing, Dma, Mapping};

/// Guest memory as a device's client drives it: it maps and unmaps, and asks the log for what the device wrote. The
/// device itself has a [`Dma`].
#[derive(Default)]
pub struct Mappings {
    space: Arc<Space>,
}

impl Mappings {
    /// The memory as the device reaches it.
    pub fn dma(&self) -> Dma {
        Dma::new(Arc::clone(&self.space))
    }

    /// Adds a mapping. EINVAL for a size of 0, an end beyond 2^64, no READ or WRITE flag; EEXIST for an overlap; ENOTSUP
    /// for a file that is not of the kind that its [`Backing`] names; E2BIG beyond [`MAPPINGS_MAX`] or [`MAPPED_BYTES_MAX`], or when everything is
    /// logged and the log cannot grow so much; the mmap's errno.
    pub fn map(&self, mapping: Mapping) -> Result<(), Errno> {
        let Mapping { iova, size, flags, backing } = mapping;
        let last = last_of(iova, size)?;
        if !flags.intersects(DmaMapFlags::READ | DmaMapFlags::WRITE) {
            return Err(Errno::EINVAL);
        }
        let is_file = !matches!(backing, Backing::Remote(_));
        self.space.read_lock().room_for(iova, last, is_file)?;
        let (read, write) = (flags.contains(DmaMapFlags::READ), flags.contains(DmaMapFlags::WRITE));
        let memory = match backing {
            Backing::File { fd, offset } => {
                let fd = fd.into_memory().map_err(|_| Errno::ENOTSUP)?;
                Memory::File(FileMapping::new(fd, offset, size, read, write)?)
            }
            Backing::AnyFile { fd, offset } => match fd.into_memory() {
                Ok(fd) => Memory::File(FileMapping::new(fd, offset, size, read, write)?),
                Err(fd) if fd.is_regular_file() => {
                    Memory::AnyFile(Foreign::new(FileMapping::new(&fd, offset, size, read, write)?))
                }
                Err(_) => return Err(Errno::ENOTSUP),
            },
            Backing::Remote(remote) => Memory::Remote(remote),
        };
        let mut table = self.space.write_lock();
        // The lock was not held while the file was mapped.
        let at = table.room_for(iova, last, is_file)?;
        if let Some(log) = &mut table.log {
            log.cover(iova, last)?;
        }
        table.mappings.insert(at, Mapped { iova, last, flags, memory });
        table.file_bytes += if is_file { size } else { 0 };
        Ok(())
    }

    /// Removes the mappings that lie wholly in the range, and returns how many bytes these had: 0 when none is there, as
    /// for the kernel's type1 (`vfio_iommu_type1.c: vfio_dma_do_unmap`). EINVAL when one lies partly in the range, and for
    /// a range that is empty or ends beyond 2^64; then nothing is unmapped.
    pub fn unmap(&self, iova: u64, size: u64) -> Result<u64, Errno> {
        self.unmap_with(iova, last_of(iova, size)?, |_| Ok(()))
    }

    /// The same, and sets the bits of the pages in the range that were written since the last report, as
    /// [`Mappings::logging_report`] does in one step with it; no write comes between the two. EINVAL unless logging
    /// is on. On an error nothing is unmapped and nothing taken from the log.
    pub fn unmap_report(
        &self,
        iova: u64,
        size: u64,
        page_size: u64,
        words: &mut [u64],
    ) -> Result<u64, Errno> {
        let last = last_of(iova, size)?;
        check_bitmap(size, page_size, words)?;
        self.unmap_with(iova, last, |log| {
            log.ok_or(Errno::EINVAL)?.report(iova, last, Grid { iova, page_size }, words);
            Ok(())
        })
    }

    /// Removes every mapping, and returns how many bytes these had, at most `u64::MAX`.
    pub fn unmap_all(&self) -> u64 {
        self.unmap_with(0, u64::MAX, |_| Ok(())).expect("no mapping lies partly in all addresses")
    }

    fn unmap_with(
        &self,
        iova: u64,
        last: u64,
        report: impl FnOnce(Option<&mut Log>) -> Result<(), Errno>,
    ) -> Result<u64, Errno> {
        let mut table = self.space.write_lock();
        let gone = table.wholly_in(iova, last)?;
        report(table.log.as_mut())?;
        let gone = table.remove(gone);
        drop(table);
        // Nobody can find them any more, so the lock is not held for the system calls.
        Ok(gone.iter().fold(0, |bytes: u64, mapped| bytes.saturating_add(mapped.bytes())))
    }

    /// Starts logging, of the ranges named or, when none is, of everything. Returns the page size chosen, in bytes:
    /// the hint, if it is 4 KiB to 1 GiB, else 4 KiB. EINVAL when logging is on, for a hint that is no power of two,
    /// and for ranges that are empty, overlap or are not aligned to the hint; EOVERFLOW for one that ends at or beyond
    /// 2^64; E2BIG for more than [`RANGES_MAX`] of them, or for more than [`LOGGED_PAGES_MAX`] pages; ENOMEM.
    pub fn logging_start(&self, page_size_hint: u64, ranges: &[DmaLoggingRange]) -> Result<u64, Errno> {
        let everything = ranges.is_empty();
        if !page_size_hint.is_power_of_two() {
            return Err(Errno::EINVAL);
        }
        if !everything {
            check_start(page_size_hint, ranges, RANGES_MAX)?;
        }
        let page_size = log::page_size_for(page_size_hint);
        let mut table = self.space.write_lock();
        if table.log.is_some() {
            return Err(Errno::EINVAL);
        }
        table.log = Some(if everything {
            Log::new(page_size, true, table.mappings.iter().map(|mapped| (mapped.iova, mapped.last)))?
        } else {
            Log::new(
                page_size,
                false,
                ranges.iter().map(|range| (range.iova, range.iova + (range.length - 1))),
            )?
        });
        Ok(page_size)
    }

    /// Stops logging; EINVAL unless it is on.
    pub fn logging_stop(&self) -> Result<(), Errno> {
        let log = self.space.write_lock().log.take();
        // The lock is not held while the bitmaps are freed.
        log.map(drop).ok_or(Errno::EINVAL)
    }

    /// Whether a report of this range would be answered; reports of its parts then cannot fail. EINVAL unless logging
    /// is on, for an empty range, and for a page size that is no power of two or below 4 KiB; EOVERFLOW for a range
    /// that ends at or beyond 2^64. The range need not be logged, mapped or aligned.
    pub fn logging_check(&self, iova: u64, length: u64, page_size: u64) -> Result<(), Errno> {
        check_report(iova, length, page_size)?;
        if self.space.read_lock().log.is_some() { Ok(()) } else { Err(Errno::EINVAL) }
    }

    /// Sets the bits of the pages written since the last report and clears them in the log; bit *n* is for the
    /// `page_size` bytes from `iova + n * page_size` on, and no bit is cleared. A page of the log that lies only partly
    /// in the range is reported and stays in the log, for the report of its other part. Errors as for
    /// [`Mappings::logging_check`], and EINVAL for too few words.
    pub fn logging_report(
        &self,
        iova: u64,
        length: u64,
        page_size: u64,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        check_report(iova, length, page_size)?;
        check_bitmap(length, page_size, words)?;
        let mut table = self.space.write_lock();
        let log = table.log.as_mut().ok_or(Errno::EINVAL)?;
        log.report(iova, iova + (length - 1), Grid { iova, page_size }, words);
        Ok(())
    }
}

/// The last address of a range. EINVAL when it is empty or ends beyond 2^64.
fn last_of(iova: u64, size: u64) -> Result<u64, Errno> {
    iova.checked_add(size.checked_sub(1).ok_or(Errno::EINVAL)?).ok_or(Errno::EINVAL)
}

/// EINVAL for a page size that no report can have, and for too few words for a bitmap of a range.
fn check_bitmap(length: u64, page_size: u64, words: &[u64]) -> Result<(), Errno> {
    let fits = page_size >= REPORT_PAGE_SIZE_MIN
        && page_size.is_power_of_two()
        && words_for(length.div_ceil(page_size)) <= words.len();
    if fits { Ok(()) } else { Err(Errno::EINVAL) }
}

impl fmt::Debug for Mappings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mappings")
            .field("mappings", &self.space.read_lock().mappings.len())
            .finish_non_exhaustive()
    }
}
