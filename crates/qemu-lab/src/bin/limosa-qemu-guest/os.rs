//! What needs the system directly: mounts, raw terminals, and mappings of registers and of memory that devices write.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::ptr::{NonNull, null, null_mut};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};

/// Bytes of a huge page, which lie one after the other in the machine's memory too.
pub(crate) const HUGE_BYTES: usize = 2 << 20;

/// Mounts a file system of this kind.
pub(crate) fn mount(kind: &str, target: &str) -> Result<(), String> {
    let [kind, target] = [kind, target].map(|text| CString::new(text).expect("no NUL in it"));
    // SAFETY: the strings end with NUL and outlive the call; there is no data.
    if unsafe { libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, null()) } == 0 {
        return Ok(());
    }
    Err(format!("mount of {kind:?}: {}", io::Error::last_os_error()))
}

/// Makes a terminal pass bytes as they are.
pub(crate) fn make_raw(terminal: &File) -> Result<(), String> {
    let failed = || format!("{terminal:?}: {}", io::Error::last_os_error());
    let mut settings = MaybeUninit::<libc::termios>::zeroed();
    // SAFETY: the fd is open, and there is room for the settings.
    if unsafe { libc::tcgetattr(terminal.as_raw_fd(), settings.as_mut_ptr()) } != 0 {
        return Err(failed());
    }
    // SAFETY: they are a plain structure, whose value zeros are too, and were filled in.
    let mut settings = unsafe { settings.assume_init() };
    // SAFETY: changes the structure that it is given.
    unsafe { libc::cfmakeraw(&mut settings) };
    settings.c_cflag |= libc::CLOCAL;
    // SAFETY: the fd is open, the settings are those that it had, changed.
    if unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, &settings) } != 0 {
        return Err(failed());
    }
    Ok(())
}

/// Memory or registers that others change too. It stays mapped until the process ends.
#[derive(Clone, Copy)]
pub(crate) struct Shared {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: every access is volatile and takes any value that it finds.
unsafe impl Send for Shared {}

impl Shared {
    /// The registers behind a file of sysfs.
    pub(crate) fn registers(file: &File, bytes: usize) -> Result<Shared, String> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a mapping at a place that the kernel chooses replaces nothing.
        let start = unsafe { mmap(null_mut(), bytes, protection, flags, file, 0) };
        Shared::new(start, bytes)
    }

    /// A huge page of zeros.
    pub(crate) fn huge_page() -> Result<Shared, String> {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::HUGETLB);
        // SAFETY: a mapping at a place that the kernel chooses replaces nothing.
        let start = unsafe { mmap_anonymous(null_mut(), HUGE_BYTES, protection, flags) };
        let page = Shared::new(start, HUGE_BYTES)?;
        // It is there once it is written.
        page.write_u64(0, 0);
        Ok(page)
    }

    fn new(start: rustix::io::Result<*mut std::ffi::c_void>, bytes: usize) -> Result<Shared, String> {
        let start = start.map_err(|error| format!("a mapping of {bytes} bytes: {error}"))?;
        Ok(Shared { start: NonNull::new(start.cast()).ok_or("a mapping at 0")?, bytes })
    }

    /// Where it is in the address space of this process.
    pub(crate) fn address(self) -> usize {
        self.start.as_ptr().addr()
    }

    pub(crate) fn read_u32(self, offset: usize) -> u32 {
        // SAFETY: `at` checks the bounds and the alignment; the mapping is never taken away.
        u32::from_le(unsafe { self.at::<u32>(offset).read_volatile() })
    }

    pub(crate) fn write_u32(self, offset: usize, value: u32) {
        // SAFETY: as in `read_u32`.
        unsafe { self.at::<u32>(offset).write_volatile(value.to_le()) };
    }

    pub(crate) fn read_u64(self, offset: usize) -> u64 {
        // SAFETY: as in `read_u32`.
        u64::from_le(unsafe { self.at::<u64>(offset).read_volatile() })
    }

    pub(crate) fn write_u64(self, offset: usize, value: u64) {
        // SAFETY: as in `read_u32`.
        unsafe { self.at::<u64>(offset).write_volatile(value.to_le()) };
    }

    /// A copy of a multiple of 8 bytes.
    pub(crate) fn copy(self, offset: usize, bytes: usize) -> Vec<u8> {
        (offset..offset + bytes).step_by(8).flat_map(|at| self.read_u64(at).to_le_bytes()).collect()
    }

    fn at<T>(self, offset: usize) -> *mut T {
        let is_inside = offset.checked_add(size_of::<T>()).is_some_and(|end| end <= self.bytes);
        assert!(
            is_inside && offset.is_multiple_of(size_of::<T>()),
            "no {}-byte word at {offset:#x}",
            size_of::<T>()
        );
        // SAFETY: the offset was checked to be within the mapping.
        unsafe { self.start.as_ptr().add(offset) }.cast()
    }
}
