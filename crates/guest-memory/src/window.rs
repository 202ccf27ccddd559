//! [`Window`]: one mapping of the kernel's, of a piece of a file.

use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, LazyLock};

use limosa_protocol::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::count::Counted;
use crate::sigbus::{Cover, Slot};

/// Limit on this process's mappings of guest memory: a quarter of the system's limit
/// (`Documentation/admin-guide/sysctl/vm.rst: max_map_count`), so that its own allocations never fail because of them.
pub fn kernel_mappings_max() -> u64 {
    static MAX: LazyLock<u64> = LazyLock::new(|| {
        let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").ok();
        limit.and_then(|limit| limit.trim().parse::<u64>().ok()).unwrap_or(65530) / 4
    });
    *MAX
}

/// How many there are.
static WINDOWS: LazyLock<Arc<AtomicU64>> = LazyLock::new(Arc::default);

/// A file that is mapped, open once for all of its windows with one access mode.
#[derive(Debug)]
pub(crate) struct OpenFile {
    pub(crate) fd: Arc<OwnedFd>,
    /// Where it is counted.
    _counted: Option<Counted>,
}

impl OpenFile {
    pub(crate) fn new(fd: OwnedFd, counted: Option<Counted>) -> OpenFile {
        OpenFile { fd: Arc::new(fd), _counted: counted }
    }
}

/// Whole pages of a file, mapped shared.
pub(crate) struct Window {
    base: NonNull<u8>,
    /// Bytes mapped, whole pages.
    mapped: usize,
    /// Where in the file.
    offset: u64,
    protection: ProtFlags,
    flags: MapFlags,
    file: Arc<OpenFile>,
    slot: &'static Slot,
    has_huge_pages: bool,
    /// Where it is counted.
    counted: Vec<Counted>,
}

// SAFETY: the pointer is to shared memory that is only ever accessed through raw pointers, by any thread; the mapping
// lives as long as the value.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

/// What hugetlbfs says in statfs(2).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// What FUSE says.
const FUSE_MAGIC: u64 = 0x6573_5546;
/// What overlayfs says.
const OVERLAYFS_MAGIC: u64 = 0x794c_7630;

pub(crate) fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error().unsigned_abs())
}

/// The kind of file system that a file is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileSystem {
    Other,
    /// With pages of this many bytes.
    HugePages(u64),
    /// A file may be two: what was opened for reading before it was first written stays another.
    Overlay,
}

impl FileSystem {
    /// EINVAL for FUSE: its pages come from a process of the peer's choice, which may never answer; the access would hang,
    /// and with it whoever wants to unmap.
    pub(crate) fn of(fd: impl AsFd) -> Result<FileSystem, Errno> {
        let stat = rustix::fs::fstatfs(fd).map_err(errno)?;
        match stat.f_type as u64 {
            FUSE_MAGIC => Err(Errno::EINVAL),
            HUGETLBFS_MAGIC => Ok(FileSystem::HugePages(stat.f_bsize as u64)),
            OVERLAYFS_MAGIC => Ok(FileSystem::Overlay),
            _ => Ok(FileSystem::Other),
        }
    }

    pub(crate) fn page_bytes(self) -> u64 {
        match self {
            FileSystem::HugePages(bytes) => bytes,
            _ => rustix::param::page_size() as u64,
        }
    }
}

impl Window {
    /// The whole pages of a piece of a file, as offset and bytes. EOVERFLOW when they do not fit into a file.
    pub(crate) fn range_for(offset: u64, bytes: u64, page_bytes: u64) -> Result<(u64, u64), Errno> {
        let start = offset - offset % page_bytes;
        let end = offset.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(page_bytes));
        let end = end.filter(|end| *end <= i64::MAX as u64).ok_or(Errno::EOVERFLOW)?;
        Ok((start, end - start))
    }

    /// Maps whole pages of a file. `is_reserved` is whether huge pages are set aside for it now. E2BIG beyond
    /// [`kernel_mappings_max`]; else what mmap(2) says.
    pub(crate) fn new(
        file: Arc<OpenFile>,
        (offset, bytes): (u64, u64),
        page_bytes: u64,
        (read, write): (bool, bool),
        is_reserved: bool,
    ) -> Result<Window, Errno> {
        let mapped = usize::try_from(bytes).map_err(|_| Errno::EOVERFLOW)?;
        let mut protection = ProtFlags::empty();
        protection.set(ProtFlags::READ, read);
        protection.set(ProtFlags::WRITE, write);
        let mut flags = MapFlags::SHARED;
        flags.set(MapFlags::NORESERVE, !is_reserved);
        let counted = Counted::new(&WINDOWS, 1, kernel_mappings_max())?;
        // SAFETY: the kernel chooses where, so no memory that is in use changes.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), mapped, protection, flags, &*file.fd, offset) };
        let base = base.map_err(errno)?;
        not_dumped(base, mapped);
        // SAFETY: the range was mapped just now, nobody else knows it, and it is given back before it is unmapped.
        let slot = match unsafe { Slot::take(base as usize, mapped, page_bytes as usize) } {
            Ok(slot) => slot,
            Err(error) => {
                // SAFETY: mapped above and not used by anybody.
                unsafe { rustix::mm::munmap(base, mapped) }.expect("a mapping can be unmapped");
                return Err(Errno::from_raw(error.raw_os_error().unwrap_or(5).unsigned_abs()));
            }
        };
        let base = NonNull::new(base.cast()).expect("a mapping that the kernel places is not at 0");
        let has_huge_pages = page_bytes > rustix::param::page_size() as u64;
        Ok(Window {
            base,
            mapped,
            offset,
            protection,
            flags,
            file,
            slot,
            has_huge_pages,
            counted: vec![counted],
        })
    }

    pub(crate) fn file(&self) -> &Arc<OpenFile> {
        &self.file
    }

    pub(crate) fn slot(&self) -> &'static Slot {
        self.slot
    }

    /// Gives up what it is counted by when it is unmapped.
    pub(crate) fn counted(mut self, counted: Counted) -> Window {
        self.counted.push(counted);
        self
    }

    /// The address of a piece of the file, if all of it lies in the window.
    pub(crate) fn address_of(&self, offset: u64, bytes: u64) -> Option<NonNull<u8>> {
        let from = offset.checked_sub(self.offset)?;
        from.checked_add(bytes).filter(|end| *end <= self.mapped as u64)?;
        // SAFETY: no more than is mapped.
        Some(unsafe { self.base.add(from as usize) })
    }

    /// The offset in the file of an address in the window.
    pub(crate) fn offset_of(&self, address: NonNull<u8>) -> u64 {
        self.offset + (address.addr().get() - self.base.addr().get()) as u64
    }

    /// After an access that something disturbed: EFAULT if one of its pages was not there. Puts the window in order.
    #[cold]
    pub(crate) fn settled(&self, since: usize, start: *mut u8, bytes: usize) -> Result<(), Errno> {
        let was_covered = self.slot.was_covered(since, start.addr(), start.addr() + bytes);
        self.uncover();
        if was_covered { Err(Errno::EFAULT) } else { Ok(()) }
    }

    /// Maps the file where covers are. Whether a page is there again is for the next access to find out: the size of a file
    /// says nothing of a page whose memory failed.
    #[cold]
    pub(crate) fn uncover(&self) -> usize {
        self.slot.settle(|cover| self.map_again(cover))
    }

    fn map_again(&self, cover: &Cover) -> bool {
        let (start, bytes) = (cover.start as *mut _, cover.end - cover.start);
        let offset = self.offset + (cover.start - self.base.addr().get()) as u64;
        // hugetlbfs makes a file longer that is mapped beyond its end, and what a peer truncated is to stay so. Until the file
        // is long enough, the cover stays.
        if self.has_huge_pages
            && !rustix::fs::fstat(&*self.file.fd)
                .is_ok_and(|stat| offset + bytes as u64 <= stat.st_size as u64)
        {
            return false;
        }
        let flags = self.flags | MapFlags::FIXED;
        // SAFETY: covers are whole pages of this window, which replace what the handler put there; accesses to it go through
        // raw pointers and expect any bytes.
        match unsafe { rustix::mm::mmap(start, bytes, self.protection, flags, &*self.file.fd, offset) } {
            Ok(_) => {
                not_dumped(start, bytes);
                true
            }
            Err(error) => {
                tracing::error!(%error, bytes, "guest memory cannot be mapped again");
                false
            }
        }
    }

    /// Advises the kernel on the pages of a range in the window; what it says is of no consequence.
    pub(crate) fn advise(&self, start: *mut u8, bytes: usize, advice: Advice) {
        let page = rustix::param::page_size();
        let first = (start.addr() - self.base.addr().get()) / page * page;
        let end = (start.addr() + bytes - self.base.addr().get()).next_multiple_of(page).min(self.mapped);
        // SAFETY: less than is mapped.
        let from = unsafe { self.base.add(first) };
        // SAFETY: the range lies in the window; the callers' advice changes nothing that can be read there.
        let _ = unsafe { rustix::mm::madvise(from.as_ptr().cast(), end - first, advice) };
    }
}

/// The guest's secrets are not for a core dump of this process. The kernel refuses that to no mapping of a file.
fn not_dumped(start: *mut std::ffi::c_void, bytes: usize) {
    // SAFETY: the callers mapped the range just now; the advice changes nothing that can be read there.
    if let Err(error) = unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxDontDump) } {
        tracing::warn!(%error, "guest memory would be part of a core dump of this process");
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.slot.give_back();
        // SAFETY: mapped by `new` and by nobody else; no pointer to it outlives the value.
        if let Err(error) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.mapped) } {
            tracing::error!(%error, "a mapping of guest memory cannot be unmapped");
        }
    }
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Window({:#x} bytes at {:#x} of {:?})", self.mapped, self.offset, self.file.fd)
    }
}
