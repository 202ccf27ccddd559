//! [`PinnedBytes`]: guest memory by its address, for system calls that move data to or from it.

use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use limosa_foreign_fd::Foreign;
use limosa_protocol::Errno;

use crate::sigbus::Slot;
use crate::window::Window;

/// A range of a [`FileMapping`](crate::FileMapping), or of a mapping of the caller ([`PinnedBytes::new`]), that stays mapped as
/// long as this exists, even after the mapping is dropped.
///
/// Its address is for system calls: readv(2), writev(2), io_uring. These fail with EFAULT if a page is missing. Other
/// processes and threads change the bytes at any time, so a reference to them must never be made.
#[derive(Clone)]
pub struct PinnedBytes {
    pub(crate) start: NonNull<u8>,
    pub(crate) bytes: usize,
    pub(crate) is_readable: bool,
    pub(crate) is_writable: bool,
    pub(crate) keeper: Keeper,
}

/// Keeps a range mapped.
#[derive(Clone)]
pub(crate) enum Keeper {
    /// A window, whose pages may go away.
    Window {
        /// The window's epoch at the beginning.
        since: usize,
        slot: &'static Slot,
        window: Arc<Foreign<Window>>,
    },
    /// An object of the caller's, which is only dropped.
    Owner { _owner: Arc<dyn Send + Sync> },
}

// SAFETY: the pointer is to shared memory that is only ever accessed through raw pointers, by any thread; the window or the owner
// that keeps it mapped lives as long as the value, and any thread can use and drop it.
unsafe impl Send for PinnedBytes {}
// SAFETY: as above.
unsafe impl Sync for PinnedBytes {}

/// Pieces that one system call takes (`limits.h: IOV_MAX`).
const PIECES_MAX: usize = 1024;

impl std::fmt::Debug for PinnedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PinnedBytes({:#x} bytes at {:p})", self.bytes, self.start)
    }
}

impl PinnedBytes {
    /// A range of a mapping of the caller's own, which `owner` keeps mapped. The owner is dropped with the last clone of the range, when
    /// everything that the range was pinned for is done.
    ///
    /// A page of such a range that goes away is not survived: a system call fails with EFAULT, and a copy ends the process, as the
    /// caller's own accesses do.
    ///
    /// # Safety
    ///
    /// From `start` on, `bytes` bytes are mapped until `owner` is dropped, readable if `read` and writable if `write`. Nobody has a
    /// reference to them meanwhile, only raw pointers.
    pub unsafe fn new(
        start: NonNull<u8>,
        bytes: usize,
        read: bool,
        write: bool,
        owner: Arc<dyn Send + Sync>,
    ) -> PinnedBytes {
        let keeper = Keeper::Owner { _owner: owner };
        PinnedBytes { start, bytes, is_readable: read, is_writable: write, keeper }
    }

    /// Where the bytes are.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Whether all pages were there since the range was pinned: EFAULT when another access found one missing, and the data of
    /// a system call may have gone nowhere. To be asked once the system call is done.
    pub fn check(&self) -> Result<(), Errno> {
        match &self.keeper {
            Keeper::Window { since, slot, window } if !slot.is_undisturbed(*since) => {
                window.settled(*since, self.start.as_ptr(), self.bytes)
            }
            Keeper::Window { .. } | Keeper::Owner { .. } => Ok(()),
        }
    }

    /// Reads from a file, from `offset` on, into ranges in order, like preadv(2): possibly fewer bytes than they hold,
    /// and 0 at the end of the file. EFAULT if one was not pinned for writing, or a page is missing.
    pub fn read_from(ranges: &[PinnedBytes], file: impl AsFd, offset: u64) -> Result<usize, Errno> {
        let parts = parts(ranges, |range| range.is_writable)?;
        let (fd, offset) = (file.as_fd().as_raw_fd(), offset.try_into().map_err(|_| Errno::EINVAL)?);
        // SAFETY: each part is mapped and writable until the ranges are dropped; whatever is written there, nobody has a
        // reference to it.
        moved(ranges, || unsafe { libc::preadv64(fd, parts.as_ptr(), parts.len() as i32, offset) })
    }

    /// Writes ranges to a file, from `offset` on, in order, like pwritev(2): possibly fewer bytes than they hold.
    /// EFAULT if one was not pinned for reading, or a page is missing.
    pub fn write_to(ranges: &[PinnedBytes], file: impl AsFd, offset: u64) -> Result<usize, Errno> {
        let parts = parts(ranges, |range| range.is_readable)?;
        let (fd, offset) = (file.as_fd().as_raw_fd(), offset.try_into().map_err(|_| Errno::EINVAL)?);
        // SAFETY: each part is mapped and readable until the ranges are dropped.
        moved(ranges, || unsafe { libc::pwritev64(fd, parts.as_ptr(), parts.len() as i32, offset) })
    }
}

fn parts(
    ranges: &[PinnedBytes],
    is_allowed: impl Fn(&PinnedBytes) -> bool,
) -> Result<Vec<libc::iovec>, Errno> {
    let part = |range: &PinnedBytes| {
        let part = libc::iovec { iov_base: range.start.as_ptr().cast(), iov_len: range.bytes };
        is_allowed(range).then_some(part).ok_or(Errno::EFAULT)
    };
    ranges.iter().take(PIECES_MAX).map(part).collect()
}

/// Makes a system call until no signal ends it early.
fn moved(ranges: &[PinnedBytes], call: impl Fn() -> isize) -> Result<usize, Errno> {
    loop {
        if let Ok(bytes) = usize::try_from(call()) {
            ranges.iter().try_for_each(PinnedBytes::check)?;
            return Ok(bytes);
        }
        match std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO) {
            libc::EINTR => {}
            errno => return Err(Errno::from_raw(errno.unsigned_abs())),
        }
    }
}
