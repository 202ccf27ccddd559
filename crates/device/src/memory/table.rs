//! The data behind [`Dma`](super::Dma) and [`Mappings`](super::Mappings): the mappings by address, and the log.

use std::ops::{Deref, Range};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use limosa_guest_memory::{FileMapping, ManyReaders, ReadGuard, WriteGuard};
use limosa_protocol::Errno;
use limosa_protocol::info::DmaMapFlags;

use super::file_io::FileIo;
use super::log::Log;
use super::pin::Leaving;
use super::{MAPPINGS_MAX, RemoteMemory};

/// The table, its lock, and the data for waiting for pins.
#[derive(Default)]
pub(super) struct Space {
    table: ManyReaders<Table>,
    pub(super) leaving: Leaving,
}

impl Space {
    #[inline(always)]
    pub(super) fn read_lock(&self) -> Reading<'_> {
        Reading(self.table.read())
    }

    pub(super) fn write_lock(&self) -> WriteGuard<'_, Table> {
        self.table.write()
    }
}

/// The table, locked for reading.
pub(super) struct Reading<'a>(ReadGuard<'a, Table>);

impl Deref for Reading<'_> {
    type Target = Table;

    #[inline]
    fn deref(&self) -> &Table {
        &self.0
    }
}

impl Reading<'_> {
    /// The mapping that contains an address and allows this access.
    #[inline]
    pub(super) fn find(&self, iova: u64, flags: DmaMapFlags) -> Result<&Mapped, Errno> {
        let mapped = match self.mappings.get(self.0.hints()[0].load(Relaxed)) {
            Some(mapped) if (mapped.iova..=mapped.last).contains(&iova) => mapped,
            _ => self.search(iova)?,
        };
        if mapped.flags.contains(flags) { Ok(mapped) } else { Err(Errno::EFAULT) }
    }

    #[cold]
    fn search(&self, iova: u64) -> Result<&Mapped, Errno> {
        let at = self.first_ending_at(iova);
        let mapped = self.mappings.get(at).filter(|mapped| mapped.iova <= iova).ok_or(Errno::EFAULT)?;
        self.0.hints()[0].store(at, Relaxed);
        Ok(mapped)
    }

    /// The mapped file that contains a whole range, and the offset in it, if it is in the mapping that this thread
    /// used last and allows the access. This is the fast path of nearly all accesses.
    #[inline(always)]
    pub(super) fn at_hand(&self, iova: u64, bytes: usize, flags: DmaMapFlags) -> Option<(&FileMapping, u64)> {
        let mapped = self.mappings.get(self.0.hints()[0].load(Relaxed))?;
        let offset = iova.checked_sub(mapped.iova)?;
        let Memory::File(file) = &mapped.memory else { return None };
        // A range that leaves the mapping takes the slow path.
        let fits = offset.checked_add(bytes as u64)? <= file.len();
        (fits && mapped.flags.contains(flags)).then_some((file, offset))
    }

    /// Marks pages that the device wrote, if there is a log.
    #[inline]
    pub(super) fn mark(&self, iova: u64, bytes: usize) {
        if let Some(log) = &self.log {
            log.mark(iova, bytes, &self.0.hints()[1]);
        }
    }
}

#[derive(Default)]
pub(super) struct Table {
    /// By address; none overlaps another.
    pub(super) mappings: Vec<Mapped>,
    /// `Some` while logging is on.
    pub(super) log: Option<Log>,
}

pub(super) struct Mapped {
    pub(super) iova: u64,
    /// The last address; the end of the address space would need a 65th bit.
    pub(super) last: u64,
    pub(super) flags: DmaMapFlags,
    pub(super) memory: Memory,
    /// Number of pins.
    pub(super) pins: Arc<AtomicUsize>,
    /// It is about to be unmapped, and can no longer be pinned.
    pub(super) is_leaving: bool,
}

pub(super) enum Memory {
    File(FileMapping),
    FileIo(FileIo),
    Remote(Arc<dyn RemoteMemory>),
}

impl Table {
    /// The index of the first mapping that ends at or after an address.
    fn first_ending_at(&self, iova: u64) -> usize {
        self.mappings.partition_point(|mapped| mapped.last < iova)
    }

    /// The index for a new mapping.
    pub(super) fn room_for(&self, iova: u64, last: u64) -> Result<usize, Errno> {
        let at = self.first_ending_at(iova);
        if self.mappings.get(at).is_some_and(|after| after.iova <= last) {
            return Err(Errno::EEXIST);
        }
        if self.mappings.len() >= MAPPINGS_MAX {
            return Err(Errno::E2BIG);
        }
        Ok(at)
    }

    /// The indexes of the mappings in a range. EINVAL if one lies partly in it.
    pub(super) fn wholly_in(&self, iova: u64, last: u64) -> Result<Range<usize>, Errno> {
        let range = self.touching(iova, last);
        let found = &self.mappings[range.clone()];
        let is_cut = found.first().is_some_and(|mapped| mapped.iova < iova)
            || found.last().is_some_and(|mapped| mapped.last > last);
        if is_cut { Err(Errno::EINVAL) } else { Ok(range) }
    }

    /// The indexes of the mappings that overlap a range.
    pub(super) fn touching(&self, iova: u64, last: u64) -> Range<usize> {
        let first = self.first_ending_at(iova);
        first..first + self.mappings[first..].partition_point(|mapped| mapped.iova <= last)
    }

    pub(super) fn remove(&mut self, range: Range<usize>) -> Vec<Mapped> {
        self.mappings.drain(range).collect()
    }
}

impl Mapped {
    /// Its size, as its client named it.
    pub(super) fn bytes(&self) -> u64 {
        // A client cannot name 2^64.
        (self.last - self.iova).saturating_add(1)
    }

    /// The number of the `bytes` bytes from an address on that lie in the mapping.
    #[inline]
    pub(super) fn reach(&self, iova: u64, bytes: usize) -> usize {
        // Compare sizes minus one, for the mapping of all 2^64 bytes.
        (bytes as u64 - 1).min(self.last - iova) as usize + 1
    }
}
