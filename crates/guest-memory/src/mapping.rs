//! A piece of a file, mapped shared, that may be cut short by whoever else has the file.

use std::os::fd::AsFd;
use std::ptr::{NonNull, copy_nonoverlapping};
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::fence;

use limosa_protocol::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::sigbus::Slot;

/// Bytes of a file, mapped shared into this process.
///
/// Other processes change them at any time; what is read is what was there at some moment. Reads and writes of 2, 4 or
/// 8 bytes at an offset that is a multiple of that happen at once, never in parts. A write is seen by others after
/// the writes before it, a read sees what is there after the reads before it: what rings with an index ask for.
///
/// When the file is cut short, accesses fail with EFAULT from the first on that touches what is gone, and the process
/// lives. For this the first mapping installs a handler for SIGBUS, which passes on what is not its own; threads
/// that use mappings must not block the signal.
///
/// The memory is not part of a core dump of this process (MADV_DONTDUMP).
#[derive(Debug)]
pub struct FileMapping {
    /// Where the caller's bytes start, `lead` bytes into what is mapped.
    start: NonNull<u8>,
    bytes: u64,
    lead: usize,
    /// Bytes mapped, whole pages.
    mapped: usize,
    readable: bool,
    writable: bool,
    slot: &'static Slot,
}

// SAFETY: the pointer is to shared memory that is only ever accessed through raw pointers, by any thread; the mapping
// lives as long as the value.
unsafe impl Send for FileMapping {}
// SAFETY: as above.
unsafe impl Sync for FileMapping {}

/// What hugetlbfs says in statfs(2).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// What FUSE says.
const FUSE_MAGIC: u64 = 0x6573_5546;

impl FileMapping {
    /// Maps `bytes` bytes of a file from `offset` on, which need not be a multiple of the page size. EINVAL for no
    /// bytes and for a file on FUSE, EOVERFLOW when offset and bytes do not fit together; else what mmap(2) says:
    /// EACCES when the file is not open for what is asked, ENODEV when it cannot be mapped, ENOMEM.
    pub fn new(
        fd: impl AsFd,
        offset: u64,
        bytes: u64,
        read: bool,
        write: bool,
    ) -> Result<FileMapping, Errno> {
        if bytes == 0 {
            return Err(Errno::EINVAL);
        }
        let errno = |error: rustix::io::Errno| Errno::from_raw(error.raw_os_error().unsigned_abs());
        let stat = rustix::fs::fstatfs(&fd).map_err(errno)?;
        if stat.f_type as u64 == FUSE_MAGIC {
            // Its pages come from a process of the peer's choice, which may never answer; the access would hang, and
            // with it whoever wants to unmap.
            return Err(Errno::EINVAL);
        }
        let page = if stat.f_type as u64 == HUGETLBFS_MAGIC {
            stat.f_bsize as u64
        } else {
            rustix::param::page_size() as u64
        };
        let lead = offset % page;
        let mapped = bytes.checked_add(lead).and_then(|bytes| bytes.checked_next_multiple_of(page));
        let mapped = mapped.ok_or(Errno::EOVERFLOW)?;
        offset.checked_add(mapped).filter(|end| *end <= i64::MAX as u64).ok_or(Errno::EOVERFLOW)?;
        let mapped = usize::try_from(mapped).map_err(|_| Errno::EOVERFLOW)?;
        let mut protection = ProtFlags::empty();
        protection.set(ProtFlags::READ, read);
        protection.set(ProtFlags::WRITE, write);
        // SAFETY: the kernel chooses where, so no memory that is in use changes.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), mapped, protection, MapFlags::SHARED, &fd, offset - lead)
        };
        let base = base.map_err(errno)?;
        let not_dumped = rustix::mm::Advice::LinuxDontDump;
        // The guest's secrets are not for a core dump of this process. The kernel refuses it to no mapping of a file.
        // SAFETY: the range was mapped just now; the advice changes nothing that can be read there.
        if let Err(error) = unsafe { rustix::mm::madvise(base, mapped, not_dumped) } {
            tracing::warn!(%error, "guest memory would be part of a core dump of this process");
        }
        // SAFETY: the range was mapped just now, nobody else knows it, and it is given back before it is unmapped.
        let slot = match unsafe { Slot::take(base as usize, mapped) } {
            Ok(slot) => slot,
            Err(error) => {
                // SAFETY: mapped above and not used by anybody.
                unsafe { rustix::mm::munmap(base, mapped) }.expect("a mapping can be unmapped");
                return Err(Errno::from_raw(error.raw_os_error().unwrap_or(5).unsigned_abs()));
            }
        };
        // SAFETY: `lead` is less than a page, and at least one page is mapped.
        let start = unsafe { base.cast::<u8>().add(lead as usize) };
        let start = NonNull::new(start).expect("a mapping that the kernel places is not at 0");
        let lead = lead as usize;
        Ok(FileMapping { start, bytes, lead, mapped, readable: read, writable: write, slot })
    }

    /// How many bytes are mapped for the caller.
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// Never: a mapping has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Reads. EFAULT outside the mapping, when it was not made for reading, and when the file was cut short; then
    /// `data` may have been changed.
    #[inline]
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let from = self.at(self.readable, offset, data.len())?;
        // SAFETY: `at` checked that the source lies in the mapping, which is readable; `data` is this thread's own memory, elsewhere.
        unsafe { copy_from_shared(from, data.as_mut_ptr(), data.len()) };
        if self.slot.is_torn() { Err(Errno::EFAULT) } else { Ok(()) }
    }

    /// Writes. EFAULT outside the mapping, when it was not made for writing, and when the file was cut short; then
    /// some of it may have been written. A write at the very moment of a truncation may succeed, and is then gone as if
    /// it had come before it.
    #[inline]
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let to = self.at(self.writable, offset, data.len())?;
        // SAFETY: as in `read`, the other way round.
        unsafe { copy_to_shared(data.as_ptr(), to, data.len()) };
        if self.slot.is_torn() { Err(Errno::EFAULT) } else { Ok(()) }
    }

    /// Brings in the pages of a range as reads of them would, or writes, all of them at once. It is a hint: what cannot be brought in
    /// (kernels before 5.14, a range outside the mapping, a file that was cut short) is left to the access.
    pub fn bring_in(&self, offset: u64, bytes: u64, to_write: bool) {
        let Some(end) = offset.checked_add(bytes).filter(|end| *end <= self.bytes) else { return };
        let page = rustix::param::page_size();
        // Of whole pages, and counted from the start of what is mapped.
        let first = (offset as usize + self.lead) / page * page;
        let length = (end as usize + self.lead - first).next_multiple_of(page).min(self.mapped - first);
        let advice = match to_write {
            true => rustix::mm::Advice::LinuxPopulateWrite,
            false => rustix::mm::Advice::LinuxPopulateRead,
        };
        // SAFETY: `lead` bytes before the start lies the start of the mapping.
        let base = unsafe { self.start.as_ptr().sub(self.lead) };
        // SAFETY: so many bytes, less than are mapped, lies the first byte of the range or of its page.
        let from = unsafe { base.add(first) };
        // SAFETY: the range lies in the mapping; bringing pages in changes nothing that can be read there.
        let _ = unsafe { rustix::mm::madvise(from.cast(), length, advice) };
    }

    #[inline]
    fn at(&self, allowed: bool, offset: u64, bytes: usize) -> Result<*mut u8, Errno> {
        let fits = offset.checked_add(bytes as u64).is_some_and(|end| end <= self.bytes);
        if !fits || !allowed || self.slot.is_torn() {
            return Err(Errno::EFAULT);
        }
        // SAFETY: offset is at most `self.bytes`, and so many bytes from `start` on are mapped.
        Ok(unsafe { self.start.as_ptr().add(offset as usize) })
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        self.slot.give_back();
        // SAFETY: `lead` bytes before the start lies the start of the mapping.
        let base = unsafe { self.start.as_ptr().sub(self.lead) };
        // SAFETY: mapped by `new` and by nobody else; no pointer to it outlives the value.
        if let Err(error) = unsafe { rustix::mm::munmap(base.cast(), self.mapped) } {
            tracing::error!(%error, "a mapping of guest memory cannot be unmapped");
        }
    }
}

/// # Safety
///
/// `from` is valid for reads of `bytes` bytes of memory shared with anybody, `to` for writes; they do not overlap.
#[inline]
unsafe fn copy_from_shared(from: *const u8, to: *mut u8, bytes: usize) {
    macro_rules! whole {
        ($type:ty) => {{
            // SAFETY: by the contract valid for this many bytes, and the caller of the macro checked the alignment.
            let value = unsafe { from.cast::<$type>().read_volatile() };
            // SAFETY: by the contract.
            unsafe { to.cast::<$type>().write_unaligned(value) };
        }};
    }
    match bytes {
        1 => whole!(u8),
        2 if from.addr().is_multiple_of(2) => whole!(u16),
        4 if from.addr().is_multiple_of(4) => whole!(u32),
        8 if from.addr().is_multiple_of(8) => whole!(u64),
        // SAFETY: by the contract. Others may write the source meanwhile; it is never referred to, only copied.
        _ => unsafe { copy_nonoverlapping(from, to, bytes) },
    }
    fence(Acquire);
}

/// # Safety
///
/// `from` is valid for reads of `bytes` bytes, `to` for writes to memory shared with anybody; they do not overlap.
#[inline]
unsafe fn copy_to_shared(from: *const u8, to: *mut u8, bytes: usize) {
    fence(Release);
    macro_rules! whole {
        ($type:ty) => {{
            // SAFETY: by the contract.
            let value = unsafe { from.cast::<$type>().read_unaligned() };
            // SAFETY: by the contract valid for this many bytes, and the caller of the macro checked the alignment.
            unsafe { to.cast::<$type>().write_volatile(value) };
        }};
    }
    match bytes {
        1 => whole!(u8),
        2 if to.addr().is_multiple_of(2) => whole!(u16),
        4 if to.addr().is_multiple_of(4) => whole!(u32),
        8 if to.addr().is_multiple_of(8) => whole!(u64),
        // SAFETY: by the contract. Others may access the target meanwhile; it is never referred to, only copied.
        _ => unsafe { copy_nonoverlapping(from, to, bytes) },
    }
}
