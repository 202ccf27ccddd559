//! Guest memory as the device sees it: the mappings that a client made (`vfio-user.rst: VFIO_USER_DMA_MAP`), what the
//! device reads and writes there, and the log of what it wrote (`vfio.h: VFIO_DEVICE_FEATURE_DMA_LOGGING_START`).
//!
//! Accesses hold a lock that unmapping takes exclusively: once [`GuestMemory::unmap`] returns, nobody touches the
//! memory. The one exception is memory that is reached by messages: the lock is not held while an answer is awaited,
//! because whoever brings the answer may have to unmap first.

mod log;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use limosa_protocol::Errno;
use limosa_protocol::bitmap::{Grid, words_for};
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::DmaMapFlags;
use limosa_protocol::logging::{RANGES_MAX, REPORT_PAGE_SIZE_MIN, check_report, check_start};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use limosa_foreign_fd::{Foreign, ForeignFd};
use limosa_guest_memory::FileMapping;
use log::Log;
pub use log::PAGES_MAX as LOGGED_PAGES_MAX;

/// How many mappings a client can have at a time: what QEMU announces as `max_dma_maps`.
pub const MAPPINGS_MAX: usize = 65535;

/// How many bytes of files a client can have mapped at a time: half of the smallest common address space, so that
/// no client can take all of it from the process.
pub const MAPPED_BYTES_MAX: u64 = 1 << 46;

/// The mappings that a client made for its device, and the log of what the device wrote.
#[derive(Default)]
pub struct GuestMemory {
    inner: RwLock<Inner>,
}

/// One mapping.
#[derive(Debug)]
pub struct Mapping {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// What the device may do.
    pub flags: DmaMapFlags,
    /// Where the memory is.
    pub backing: Backing,
}

/// Where a mapping's memory is.
pub enum Backing {
    /// In a memfd, or in a file on tmpfs or hugetlbfs, mapped shared: no access to it waits for anybody.
    File {
        /// The file.
        fd: ForeignFd,
        /// Where the mapping starts in it; need not be page-aligned.
        offset: u64,
    },
    /// In any regular file, mapped shared. An access waits for the file system: where the client may have chosen one
    /// whose server or daemon does not answer, it holds up the device and whoever wants to unmap, for good.
    AnyFile {
        /// The file.
        fd: ForeignFd,
        /// Where the mapping starts in it; need not be page-aligned.
        offset: u64,
    },
    /// With the client, reached by messages.
    Remote(Arc<dyn RemoteMemory>),
}

impl fmt::Debug for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Backing::File { fd, offset } => write!(f, "File({fd:?} at {offset:#x})"),
            Backing::AnyFile { fd, offset } => write!(f, "AnyFile({fd:?} at {offset:#x})"),
            Backing::Remote(_) => f.write_str("Remote"),
        }
    }
}

/// Reaches memory that the device cannot map: vfio-user's DMA_READ and DMA_WRITE. Addresses are IOVAs.
pub trait RemoteMemory: Send + Sync {
    /// Reads from the client's memory.
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno>;
    /// Writes to the client's memory.
    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno>;
}

#[derive(Default)]
struct Inner {
    /// By address; none overlaps another.
    mappings: Vec<Mapped>,
    /// The sum of the sizes of those that are files.
    file_bytes: u64,
    /// Which mapping was used last.
    hint: AtomicUsize,
    /// There while logging is on.
    log: Option<Log>,
}

struct Mapped {
    iova: u64,
    /// The last address, so that the end of the address space needs no 65th bit.
    last: u64,
    flags: DmaMapFlags,
    memory: Memory,
}

enum Memory {
    File(FileMapping),
    /// Unmapping it may wait for its file system.
    AnyFile(Foreign<FileMapping>),
    Remote(Arc<dyn RemoteMemory>),
}

impl GuestMemory {
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
        self.read_lock().room_for(iova, last, is_file)?;
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
        let mut inner = self.write_lock();
        // The lock was not held while the file was mapped.
        let at = inner.room_for(iova, last, is_file)?;
        if let Some(log) = &mut inner.log {
            log.cover(iova, last)?;
        }
        inner.mappings.insert(at, Mapped { iova, last, flags, memory });
        inner.file_bytes += if is_file { size } else { 0 };
        Ok(())
    }

    /// Removes the mappings that lie wholly in the range; EINVAL when one lies partly in it, or for a range that is
    /// empty or ends beyond 2^64; ENOENT when none is there.
    pub fn unmap(&self, iova: u64, size: u64) -> Result<(), Errno> {
        let last = last_of(iova, size)?;
        let mut inner = self.write_lock();
        let gone = inner.wholly_in(iova, last)?;
        let gone = inner.remove(gone);
        drop(inner);
        // Nobody can find them any more, so the lock is not held for the system calls.
        drop(gone);
        Ok(())
    }

    /// The same, and sets the bits of the pages in the range that were written since the last report, as
    /// [`GuestMemory::logging_report`] does in one step with it; no write comes between the two. EINVAL unless logging
    /// is on. On an error nothing is unmapped and nothing taken from the log.
    pub fn unmap_report(&self, iova: u64, size: u64, page_size: u64, words: &mut [u64]) -> Result<(), Errno> {
        let last = last_of(iova, size)?;
        check_bitmap(size, page_size, words)?;
        let mut inner = self.write_lock();
        let gone = inner.wholly_in(iova, last)?;
        let log = inner.log.as_mut().ok_or(Errno::EINVAL)?;
        log.report(iova, last, Grid { iova, page_size }, words);
        let gone = inner.remove(gone);
        drop(inner);
        drop(gone);
        Ok(())
    }

    /// Removes every mapping.
    pub fn unmap_all(&self) {
        let mut inner = self.write_lock();
        let all = 0..inner.mappings.len();
        let gone = inner.remove(all);
        drop(inner);
        drop(gone);
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
        let mut inner = self.write_lock();
        if inner.log.is_some() {
            return Err(Errno::EINVAL);
        }
        inner.log = Some(if everything {
            Log::new(page_size, true, inner.mappings.iter().map(|mapped| (mapped.iova, mapped.last)))?
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
        let log = self.write_lock().log.take();
        // The lock is not held while the bitmaps are freed.
        log.map(drop).ok_or(Errno::EINVAL)
    }

    /// Whether a report of this range would be answered; reports of its parts then cannot fail. EINVAL unless logging
    /// is on, for an empty range, and for a page size that is no power of two or below 4 KiB; EOVERFLOW for a range
    /// that ends at or beyond 2^64. The range need not be logged, mapped or aligned.
    pub fn logging_check(&self, iova: u64, length: u64, page_size: u64) -> Result<(), Errno> {
        check_report(iova, length, page_size)?;
        if self.read_lock().log.is_some() { Ok(()) } else { Err(Errno::EINVAL) }
    }

    /// Sets the bits of the pages written since the last report and clears them in the log; bit *n* is for the
    /// `page_size` bytes from `iova + n * page_size` on, and no bit is cleared. A page of the log that lies only partly
    /// in the range is reported and stays in the log, for the report of its other part. Errors as for
    /// [`GuestMemory::logging_check`], and EINVAL for too few words.
    pub fn logging_report(
        &self,
        iova: u64,
        length: u64,
        page_size: u64,
        words: &mut [u64],
    ) -> Result<(), Errno> {
        check_report(iova, length, page_size)?;
        check_bitmap(length, page_size, words)?;
        let mut inner = self.write_lock();
        let log = inner.log.as_mut().ok_or(Errno::EINVAL)?;
        log.report(iova, iova + (length - 1), Grid { iova, page_size }, words);
        Ok(())
    }

    /// The device reads memory: EFAULT where nothing is mapped, or not for reading, or where the file behind it was
    /// cut short; ranges may span mappings. What was read before the error is in `data`.
    pub fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        let mut inner = self.read_lock();
        let (mut iova, mut rest) = (iova, data);
        while !rest.is_empty() {
            let mapped = inner.find(iova, DmaMapFlags::READ)?;
            let (piece, after) = rest.split_at_mut(mapped.reach(iova, rest.len()));
            match &mapped.memory {
                Memory::File(file) => file.read(iova - mapped.iova, piece)?,
                Memory::AnyFile(file) => file.read(iova - mapped.iova, piece)?,
                Memory::Remote(remote) => {
                    let remote = remote.clone();
                    drop(inner);
                    remote.read(iova, piece)?;
                    inner = self.read_lock();
                }
            }
            iova = next(iova, piece.len(), after.is_empty())?;
            rest = after;
        }
        Ok(())
    }

    /// The device writes memory; the pages go to the log when it is on. Errors as for [`GuestMemory::read`]; what was
    /// written before the error stays written.
    pub fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        let mut inner = self.read_lock();
        let (mut iova, mut rest) = (iova, data);
        while !rest.is_empty() {
            let mapped = inner.find(iova, DmaMapFlags::WRITE)?;
            let (piece, after) = rest.split_at(mapped.reach(iova, rest.len()));
            let done = match &mapped.memory {
                Memory::File(file) => file.write(iova - mapped.iova, piece),
                Memory::AnyFile(file) => file.write(iova - mapped.iova, piece),
                Memory::Remote(remote) => {
                    let remote = remote.clone();
                    // An unmap that takes the log with it may come before the answer.
                    inner.mark(iova, piece.len());
                    drop(inner);
                    let done = remote.write(iova, piece);
                    inner = self.read_lock();
                    done
                }
            };
            // After the write, for a report between the two would take a mark whose data is not there yet; and when
            // it failed, for a part may have been written.
            inner.mark(iova, piece.len());
            done?;
            iova = next(iova, piece.len(), after.is_empty())?;
            rest = after;
        }
        Ok(())
    }

    /// Puts a range into the log, if it is on: for a device that writes memory by other means than
    /// [`GuestMemory::write`], such as hardware or a helper process with a mapping of its own. To be called after the
    /// write. What lies beyond the end of the address space is ignored.
    pub fn mark_dirty(&self, iova: u64, bytes: u64) {
        let bytes = bytes.min((u64::MAX - iova).saturating_add(1));
        if bytes > 0 {
            self.read_lock().mark(iova, usize::try_from(bytes).unwrap_or(usize::MAX));
        }
    }

    /// Reads a structure, such as a descriptor. Errors as for [`GuestMemory::read`].
    pub fn read_obj<T: FromBytes + IntoBytes>(&self, iova: u64) -> Result<T, Errno> {
        let mut object = T::new_zeroed();
        self.read(iova, object.as_mut_bytes())?;
        Ok(object)
    }

    /// Writes a structure. Errors as for [`GuestMemory::write`].
    pub fn write_obj<T: IntoBytes + Immutable>(&self, iova: u64, object: &T) -> Result<(), Errno> {
        self.write(iova, object.as_bytes())
    }

    // No code under this lock leaves a change half done when it panics, so a poisoned one is as good as any.
    fn read_lock(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_lock(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// The mapping with an address that allows what is asked.
    #[inline]
    fn find(&self, iova: u64, flags: DmaMapFlags) -> Result<&Mapped, Errno> {
        let hint = self.hint.load(Relaxed);
        let mapped = match self.mappings.get(hint) {
            Some(mapped) if (mapped.iova..=mapped.last).contains(&iova) => mapped,
            _ => self.search(iova)?,
        };
        if mapped.flags.contains(flags) { Ok(mapped) } else { Err(Errno::EFAULT) }
    }

    #[cold]
    fn search(&self, iova: u64) -> Result<&Mapped, Errno> {
        let at = self.first_ending_at(iova);
        let mapped = self.mappings.get(at).filter(|mapped| mapped.iova <= iova).ok_or(Errno::EFAULT)?;
        self.hint.store(at, Relaxed);
        Ok(mapped)
    }

    /// The index of the first mapping that ends at or after an address.
    fn first_ending_at(&self, iova: u64) -> usize {
        self.mappings.partition_point(|mapped| mapped.last < iova)
    }

    #[inline]
    fn mark(&self, iova: u64, bytes: usize) {
        if let Some(log) = &self.log {
            log.mark(iova, bytes);
        }
    }

    /// Where a new mapping goes.
    fn room_for(&self, iova: u64, last: u64, is_file: bool) -> Result<usize, Errno> {
        let at = self.first_ending_at(iova);
        if self.mappings.get(at).is_some_and(|after| after.iova <= last) {
            return Err(Errno::EEXIST);
        }
        // A file of 2^64 bytes there is not, so this does not overflow where it matters.
        let file_bytes = self.file_bytes.saturating_add(last - iova);
        if self.mappings.len() >= MAPPINGS_MAX || (is_file && file_bytes >= MAPPED_BYTES_MAX) {
            return Err(Errno::E2BIG);
        }
        Ok(at)
    }

    /// The indexes of the mappings in a range. EINVAL when one is partly in it, ENOENT when none is.
    fn wholly_in(&self, iova: u64, last: u64) -> Result<std::ops::Range<usize>, Errno> {
        let first = self.first_ending_at(iova);
        let end = first + self.mappings[first..].partition_point(|mapped| mapped.iova <= last);
        let found = &self.mappings[first..end];
        if found.first().ok_or(Errno::ENOENT)?.iova < iova || found[found.len() - 1].last > last {
            return Err(Errno::EINVAL);
        }
        Ok(first..end)
    }

    fn remove(&mut self, range: std::ops::Range<usize>) -> Vec<Mapped> {
        let gone: Vec<Mapped> = self.mappings.drain(range).collect();
        let file_bytes = |mapped: &Mapped| match &mapped.memory {
            Memory::File(file) => file.len(),
            Memory::AnyFile(file) => file.len(),
            Memory::Remote(_) => 0,
        };
        self.file_bytes -= gone.iter().map(file_bytes).sum::<u64>();
        gone
    }
}

impl Mapped {
    /// How many of `bytes` bytes from an address on lie in the mapping.
    #[inline]
    fn reach(&self, iova: u64, bytes: usize) -> usize {
        // One less than the bytes on both sides, for the mapping of all 2^64.
        (bytes as u64 - 1).min(self.last - iova) as usize + 1
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

/// The address after a piece. EFAULT when more is to come and the address space ends there.
#[inline]
fn next(iova: u64, bytes: usize, done: bool) -> Result<u64, Errno> {
    if done { Ok(iova) } else { iova.checked_add(bytes as u64).ok_or(Errno::EFAULT) }
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory")
            .field("mappings", &self.read_lock().mappings.len())
            .finish_non_exhaustive()
    }
}
