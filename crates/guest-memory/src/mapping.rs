//! A piece of a file, mapped shared, whose pages may go away at any time.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::{NonNull, copy_nonoverlapping};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::atomic::fence;

use limosa_foreign_fd::Foreign;
use limosa_protocol::Errno;

use crate::pinned::{Keeper, PinnedBytes};
use crate::sigbus::Slot;
use crate::window::{FileSystem, OpenFile, Window};

/// Bytes of a file, mapped shared into this process.
///
/// Other processes change them at any time. Aligned reads and writes of 2, 4 or 8 bytes are atomic. Other processes see
/// writes in order, and reads are performed in order, as needed for rings with an index.
///
/// An access fails with EFAULT if one of its pages is missing: the file was truncated, no huge page was free, the
/// memory failed. The process survives, other accesses are unaffected, and the next access to that page succeeds if the
/// page is there by then. For this the first mapping installs a handler for SIGBUS, which forwards other signals;
/// threads that use mappings must not block SIGBUS.
///
/// The memory is not part of a core dump of this process (MADV_DONTDUMP).
#[derive(Debug)]
pub struct FileMapping {
    /// Where the caller's bytes start in the window.
    start: NonNull<u8>,
    bytes: u64,
    is_readable: bool,
    is_writable: bool,
    /// The window's.
    slot: &'static Slot,
    window: Arc<Foreign<Window>>,
}

// SAFETY: the pointer is to shared memory that is only ever accessed through raw pointers, by any thread; the window that it
// points into lives as long as the value.
unsafe impl Send for FileMapping {}
// SAFETY: as above.
unsafe impl Sync for FileMapping {}

impl FileMapping {
    /// Maps `bytes` bytes of a file from `offset` on, which need not be a multiple of the page size. EINVAL for no
    /// bytes and for a file on FUSE, EOVERFLOW when offset and bytes do not fit together; E2BIG when this process has
    /// too many mappings of guest memory ([`kernel_mappings_max`](crate::kernel_mappings_max)); otherwise the errno of
    /// mmap(2): EACCES if the file is not open for this access, ENODEV if it cannot be mapped, ENOMEM.
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
        let page_bytes = FileSystem::of(&fd)?.page_bytes();
        let fd = fd.as_fd().try_clone_to_owned().map_err(|_| Errno::EMFILE)?;
        let range = Window::range_for(offset, bytes, page_bytes)?;
        let window = Window::new(Arc::new(OpenFile::new(fd, None)), range, page_bytes, (read, write), true)?;
        FileMapping::in_window(&Arc::new(Foreign::harmless(window)), offset, bytes, read, write)
    }

    /// A part of a window that holds it.
    pub(crate) fn in_window(
        window: &Arc<Foreign<Window>>,
        offset: u64,
        bytes: u64,
        is_readable: bool,
        is_writable: bool,
    ) -> Result<FileMapping, Errno> {
        let start = window.address_of(offset, bytes).ok_or(Errno::EFAULT)?;
        let slot = window.slot();
        Ok(FileMapping { start, bytes, is_readable, is_writable, slot, window: Arc::clone(window) })
    }

    /// How many bytes are mapped for the caller.
    pub fn len(&self) -> u64 {
        self.bytes
    }

    /// Never: a mapping has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The file, and where in it the mapping starts. All mappings that share a window of the kernel's share the fd too.
    pub fn file(&self) -> (&Arc<OwnedFd>, u64) {
        (&self.window.file().fd, self.window.offset_of(self.start))
    }

    /// Keeps a range mapped while its address is used. EFAULT outside the mapping, and if the mapping does not
    /// allow this access.
    pub fn pin(&self, offset: u64, bytes: usize, read: bool, write: bool) -> Result<PinnedBytes, Errno> {
        let fits = offset.checked_add(bytes as u64).is_some_and(|end| end <= self.bytes);
        if !fits || (read && !self.is_readable) || (write && !self.is_writable) {
            return Err(Errno::EFAULT);
        }
        // SAFETY: offset is at most `self.bytes`, and so many bytes from `start` on are mapped.
        let start = unsafe { self.start.add(offset as usize) };
        let (since, slot, window) = (self.epoch(), self.slot, Arc::clone(&self.window));
        let keeper = Keeper::Window { since, slot, window };
        Ok(PinnedBytes { start, bytes, is_readable: read, is_writable: write, keeper })
    }

    /// Reads. EFAULT outside the mapping, if it does not allow reading, and if a page is missing; then `data` may
    /// have been changed.
    #[inline]
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.access(self.is_readable, offset, data.len(), |from| {
            // SAFETY: `access` checked that the source lies in the window, which is readable; `data` is this thread's own memory, elsewhere.
            unsafe { copy_from_shared(from, data.as_mut_ptr(), data.len()) }
        })
    }

    /// Writes. EFAULT outside the mapping, if it does not allow writing, and if a page is missing; then a part may
    /// have been written. A write concurrent with a truncation may succeed, and is then lost as if it had come before.
    #[inline]
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.access(self.is_writable, offset, data.len(), |to| {
            // SAFETY: as in `read`, the other way round.
            unsafe { copy_to_shared(data.as_ptr(), to, data.len()) }
        })
    }

    /// Calls `copy` with the address of a range that is mapped, and says whether all of it was there meanwhile.
    #[inline]
    pub(crate) fn access(
        &self,
        is_allowed: bool,
        offset: u64,
        bytes: usize,
        copy: impl FnOnce(*mut u8),
    ) -> Result<(), Errno> {
        let fits = offset.checked_add(bytes as u64).is_some_and(|end| end <= self.bytes);
        if !fits || !is_allowed {
            return Err(Errno::EFAULT);
        }
        // SAFETY: offset is at most `self.bytes`, and so many bytes from `start` on are mapped.
        let at = unsafe { self.start.as_ptr().add(offset as usize) };
        let since = self.epoch();
        copy(at);
        if self.slot.is_undisturbed(since) { Ok(()) } else { self.window.settled(since, at, bytes) }
    }

    /// What an access compares before and after it; even, unless pages cannot be mapped again.
    #[inline]
    fn epoch(&self) -> usize {
        match self.slot.epoch() {
            epoch if epoch.is_multiple_of(2) => epoch,
            _ => self.window.uncover(),
        }
    }

    /// Asks which pages of the system's size, from an offset on that is the start of one, are in memory: mincore(2). Returns false where
    /// the system does not tell; then `pages` means nothing. A page that is not in memory may be in the file all the same.
    pub fn in_memory(&self, offset: u64, pages: &mut [u8]) -> bool {
        let page = rustix::param::page_size();
        let end = (pages.len() as u64).checked_mul(page as u64).and_then(|bytes| offset.checked_add(bytes));
        if end.is_none_or(|end| end > self.bytes) {
            return false;
        }
        // SAFETY: offset is at most `self.bytes`, and so many bytes from `start` on are mapped.
        let from = unsafe { self.start.as_ptr().add(offset as usize) };
        // SAFETY: the range is mapped, and `pages` has a byte for each of its pages, which the kernel writes.
        let told = unsafe { libc::mincore(from.cast(), pages.len() * page, pages.as_mut_ptr()) };
        told == 0
    }

    /// Faults in all pages of a range at once, as reads or writes would. It is a hint: pages that cannot be faulted
    /// in (kernels before 5.14, a range outside the mapping, a truncated file) are left to the access.
    pub fn bring_in(&self, offset: u64, bytes: u64, to_write: bool) {
        let Some(end) = offset.checked_add(bytes).filter(|end| *end <= self.bytes) else { return };
        if bytes == 0 {
            return;
        }
        let advice = match to_write {
            true => rustix::mm::Advice::LinuxPopulateWrite,
            false => rustix::mm::Advice::LinuxPopulateRead,
        };
        // SAFETY: offset is at most `self.bytes`, and so many bytes from `start` on are mapped.
        let from = unsafe { self.start.as_ptr().add(offset as usize) };
        self.window.advise(from, (end - offset) as usize, advice);
    }
}

/// Whether this system has no swap now, so that shared memory is nowhere but in memory (sysinfo(2)).
pub fn has_no_swap() -> bool {
    let mut info = std::mem::MaybeUninit::<libc::sysinfo>::zeroed();
    // SAFETY: the kernel fills in the structure, for which there is room.
    let told = unsafe { libc::sysinfo(info.as_mut_ptr()) };
    // SAFETY: all zeroes is a value of this plain structure, and so is what the kernel has written.
    told == 0 && unsafe { info.assume_init() }.totalswap == 0
}

/// # Safety
///
/// `from` is valid for reads of `bytes` bytes of memory shared with anybody, `to` for writes; they do not overlap.
#[inline]
pub(crate) unsafe fn copy_from_shared(from: *const u8, to: *mut u8, bytes: usize) {
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
pub(crate) unsafe fn copy_to_shared(from: *const u8, to: *mut u8, bytes: usize) {
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
