//! [`Mappings`]: guest memory as a device's client maps it.

use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use limosa_foreign_fd::ForeignFd;
use limosa_guest_memory::MappedFiles;
use limosa_protocol::Errno;
use limosa_protocol::bitmap::{Grid, words_for};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::logging::{RANGES_MAX, REPORT_PAGE_SIZE_MIN, check_report, check_start};

use super::file_io::{self, FileIo};
use super::log::{self, Log};
use super::pin::UNMAP_WAIT;
use super::table::{Mapped, Memory, Space, Table};
use super::{Backing, Dma, Mapping};

/// Guest memory as a device's client maps it: it maps and unmaps, and reads the log of the device's writes. The
/// device itself has a [`Dma`].
pub struct Mappings {
    pub(super) space: Arc<Space>,
    /// The files of one client, as [`MappedFiles`] requires.
    files: RwLock<Arc<MappedFiles>>,
    unmap_wait_ns: AtomicU64,
}

impl Default for Mappings {
    fn default() -> Mappings {
        let unmap_wait_ns = AtomicU64::new(UNMAP_WAIT.as_nanos() as u64);
        Mappings { space: Arc::default(), files: RwLock::default(), unmap_wait_ns }
    }
}

impl Mappings {
    /// The memory as the device accesses it.
    pub fn dma(&self) -> Dma {
        Dma::new(Arc::clone(&self.space))
    }

    /// Number of mappings.
    pub fn count(&self) -> usize {
        self.space.read_lock().mappings.len()
    }

    /// Whether the log of the device's writes is on.
    pub fn is_logging(&self) -> bool {
        self.space.read_lock().log.is_some()
    }

    /// Adds a mapping. EINVAL for a size of 0, an end beyond 2^64, no READ or WRITE flag; EEXIST for an overlap;
    /// ENOTSUP for a file of another kind than its [`Backing`]; E2BIG beyond [`MAPPINGS_MAX`](super::MAPPINGS_MAX) or
    /// [`MAPPED_BYTES_MAX`](super::MAPPED_BYTES_MAX), or if everything is logged and the log cannot grow that much; the
    /// errno of mmap.
    pub fn map(&self, mapping: Mapping) -> Result<(), Errno> {
        let Mapping { iova, size, flags, backing } = mapping;
        let last = last_of(iova, size)?;
        if !flags.intersects(DmaMapFlags::READ | DmaMapFlags::WRITE) {
            return Err(Errno::EINVAL);
        }
        self.space.read_lock().room_for(iova, last)?;
        let files = Arc::clone(&self.files.read().unwrap_or_else(PoisonError::into_inner));
        let access = (flags.contains(DmaMapFlags::READ), flags.contains(DmaMapFlags::WRITE));
        let memory = match backing {
            Backing::File { fd, offset } => {
                let fd = ForeignFd::harmless(fd.into_memory().map_err(|_| Errno::ENOTSUP)?);
                Memory::File(files.map(fd, offset, size, access, false)?)
            }
            Backing::AnyFile { fd, offset } => match fd.into_memory() {
                Ok(fd) => {
                    let fd = ForeignFd::harmless(fd);
                    Memory::File(files.map(fd, offset, size, access, false)?)
                }
                Err(fd) if fd.is_regular_file() => Memory::File(files.map(fd, offset, size, access, true)?),
                Err(_) => return Err(Errno::ENOTSUP),
            },
            Backing::FileIo { fd, offset, any_file } => {
                let (fd, is_memory) = match fd.into_memory() {
                    Ok(fd) => (ForeignFd::harmless(fd), true),
                    Err(fd) if any_file && fd.is_regular_file() => (fd, false),
                    Err(_) => return Err(Errno::ENOTSUP),
                };
                file_io::check(&fd, offset, size, flags)?;
                Memory::FileIo(FileIo::new(files.open(fd, access, is_memory)?, offset))
            }
            Backing::Remote(remote) => Memory::Remote(remote),
        };
        let mut table = self.space.write_lock();
        // The lock was not held while the file was mapped.
        let at = table.room_for(iova, last)?;
        if let Some(log) = &mut table.log {
            log.cover(iova, last)?;
        }
        let (pins, is_leaving) = (Arc::default(), false);
        table.mappings.insert(at, Mapped { iova, last, flags, memory, pins, is_leaving });
        Ok(())
    }

    /// Removes the mappings that lie completely in the range, and returns their number of bytes: 0 if there are
    /// none, as with the kernel's type1 (`vfio_iommu_type1.c: vfio_dma_do_unmap`). EINVAL if a mapping lies partly in
    /// the range, and for a range that is empty or ends beyond 2^64; EBUSY if one is still pinned [`UNMAP_WAIT`] after
    /// the device was told ([`Dma::before_unmap`]). On an error nothing is unmapped.
    pub fn unmap(&self, iova: u64, size: u64) -> Result<u64, Errno> {
        self.unmap_with(iova, last_of(iova, size)?, false, |_| Ok(()))
    }

    /// The same, and in the same step sets the bits of the pages in the range that were written since the last
    /// report, as [`Mappings::logging_report`] does; no write comes between the two. EINVAL unless logging is on. On an
    /// error nothing is unmapped and the log is unchanged.
    pub fn unmap_report(
        &self,
        iova: u64,
        size: u64,
        page_size: u64,
        words: &mut [u64],
    ) -> Result<u64, Errno> {
        let last = last_of(iova, size)?;
        check_bitmap(size, page_size, words)?;
        // Also before the device is told.
        if self.space.read_lock().log.is_none() {
            return Err(Errno::EINVAL);
        }
        self.unmap_with(iova, last, false, |log| {
            log.ok_or(Errno::EINVAL)?.report(iova, last, Grid { iova, page_size }, words);
            Ok(())
        })
    }

    /// Removes every mapping, and returns their number of bytes, at most `u64::MAX`. EBUSY as for
    /// [`Mappings::unmap`].
    pub fn unmap_all(&self) -> Result<u64, Errno> {
        self.unmap_with(0, u64::MAX, false, |_| Ok(()))
    }

    /// Removes every mapping because the client is gone. The device is told and gets [`UNMAP_WAIT`] to drop its
    /// pins; memory that it pins for longer stays mapped in this process for that time, without an address.
    pub fn clear(&self) {
        if let Err(errno) = self.unmap_with(0, u64::MAX, true, |_| Ok(())) {
            tracing::error!(%errno, "the mappings of a client that is gone stay");
        }
    }

    /// Replaces these mappings by another client's in one step, so that no access of the device falls between the
    /// two. Pinned memory stays mapped in this process until the pins are dropped; the device is told right afterwards
    /// to drop them ([`Dma::before_unmap`]). If a log of everything cannot grow to the new mappings, it ends: its
    /// reports fail, so no page is lost unnoticed.
    pub(crate) fn replace(&self, by: Mappings) {
        let _turn = self.space.leaving.turn();
        let theirs = std::mem::take(&mut by.space.write_lock().mappings);
        let mut table = self.space.write_lock();
        let gone = std::mem::replace(&mut table.mappings, theirs);
        let Table { mappings, log } = &mut *table;
        let covered =
            log.as_mut().map(|log| log.cover_all(mappings.iter().map(|mapped| (mapped.iova, mapped.last))));
        let lost = covered.and_then(Result::err).map(|errno| (errno, log.take()));
        drop(table);
        if let Some((errno, _log)) = &lost {
            tracing::error!(%errno, "the dirty log ends, since it cannot cover the memory of the device's next client");
        }
        let theirs = by.files.into_inner().unwrap_or_else(PoisonError::into_inner);
        *self.files.write().unwrap_or_else(PoisonError::into_inner) = theirs;
        self.space.leaving.announce(0, u64::MAX);
        drop((gone, lost));
    }

    /// Changes how long an unmap waits for pins.
    pub fn set_unmap_wait(&self, limit: Duration) {
        self.unmap_wait_ns.store(u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    fn unmap_with(
        &self,
        iova: u64,
        last: u64,
        also_pinned: bool,
        report: impl FnOnce(Option<&mut Log>) -> Result<(), Errno>,
    ) -> Result<u64, Errno> {
        let _turn = self.space.leaving.turn();
        // Refuse invalid requests before the device is told.
        self.space.read_lock().wholly_in(iova, last)?;
        self.space.leaving.announce(iova, (last - iova).saturating_add(1));
        let mut table = self.space.write_lock();
        let gone = table.wholly_in(iova, last)?;
        let pinned = table.leave(gone);
        if !pinned.is_empty() {
            drop(table);
            self.space.leaving.wait(&pinned, Duration::from_nanos(self.unmap_wait_ns.load(Relaxed)));
            table = self.space.write_lock();
        }
        // Mappings that were added to the range meanwhile are removed too.
        let gone = table.wholly_in(iova, last).and_then(|gone| {
            if !also_pinned && table.is_pinned(gone.clone()) {
                return Err(Errno::EBUSY);
            }
            report(table.log.as_mut()).map(|()| gone)
        });
        let gone = gone.inspect_err(|_| table.stay(iova, last))?;
        let gone = table.remove(gone);
        drop(table);
        // They are no longer reachable, so the lock is not held for the system calls.
        Ok(gone.iter().fold(0, |bytes: u64, mapped| bytes.saturating_add(mapped.bytes())))
    }

    /// Starts logging the given ranges or, if there are none, everything. Returns the chosen page size in bytes:
    /// the hint, if it is 4 KiB to 1 GiB, else 4 KiB. EINVAL if logging is on, for a hint that is not a power of two,
    /// and for ranges that are empty, overlap or are not aligned to the hint; EOVERFLOW for one that ends at or beyond
    /// 2^64; E2BIG for more than [`RANGES_MAX`] of them, or for more than [`LOGGED_PAGES_MAX`](super::LOGGED_PAGES_MAX)
    /// pages; ENOMEM.
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

    /// Whether a report of this range would succeed; reports of its parts then cannot fail. EINVAL unless logging
    /// is on, for an empty range, and for a page size that is not a power of two or below 4 KiB; EOVERFLOW for a range
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

    /// Sets the bits of the pages that may have been written since the last report, and clears nothing, neither in the log nor in
    /// `words` (`docs/vfio-user-extensions.md: DIRTY_BLOCKS`). The log is looked at in blocks of 4096 of its pages. Errors as for
    /// [`Mappings::logging_report`].
    pub fn logging_look(
        &self,
        iova: u64,
        length: u64,
        page_size: u64,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        check_report(iova, length, page_size)?;
        check_bitmap(length, page_size, words)?;
        let table = self.space.read_lock();
        let log = table.log.as_ref().ok_or(Errno::EINVAL)?;
        log.look(iova, iova + (length - 1), Grid { iova, page_size }, words);
        Ok(())
    }
}

/// The last address of a range. EINVAL when it is empty or ends beyond 2^64.
fn last_of(iova: u64, size: u64) -> Result<u64, Errno> {
    iova.checked_add(size.checked_sub(1).ok_or(Errno::EINVAL)?).ok_or(Errno::EINVAL)
}

/// EINVAL for an invalid page size, and for too few words for the range's bitmap.
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
