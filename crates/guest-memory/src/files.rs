//! [`MappedFiles`]: the files of one client, each mapped once for all of its pieces.

use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use limosa_foreign_fd::{Foreign, ForeignFd};
use limosa_protocol::Errno;
use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, statx};
use rustix::process::{Resource, getrlimit};

use crate::FileMapping;
use crate::count::Counted;
use crate::window::{FileSystem, OpenFile, Window, errno};

/// Files that a client can have mapped at a time. Each takes an fd for each access mode, so there are fewer where the process
/// may have few fds (RLIMIT_NOFILE).
pub const FILES_MAX: u64 = 256;

/// Mappings of the kernel's that a client can have at a time. A file takes a few, however many pieces of it are mapped.
pub const WINDOWS_MAX: u64 = 1024;

/// Bytes that a client can have mapped at a time: half of the smallest common address space, so that no client can take
/// all of it from the process.
pub const MAPPED_BYTES_MAX: u64 = 1 << 46;

/// A window is as large as its file, in a power of two, up to this size. Files that are longer have several.
const WINDOW_BYTES_MAX: u64 = 1 << 40;

/// What windows may take that are larger than what was asked for.
const SPARE_BYTES_MAX: u64 = MAPPED_BYTES_MAX / 4;

/// The files of one client, mapped for a device.
///
/// A client may map a file in thousands of pieces, page by page, when its guest has an IOMMU; the kernel has a limit
/// for the mappings of a process. So each file is mapped in *windows*, and pieces share them: the first piece of a file
/// makes a window of the whole file, or of 1 TiB of a larger one. A file that grows gets another, at least twice as
/// large. A window has the access mode of its pieces, and is unmapped with the last of them.
///
/// A client's use is limited by [`FILES_MAX`], [`WINDOWS_MAX`], [`MAPPED_BYTES_MAX`] and
/// [`kernel_mappings_max`](crate::kernel_mappings_max). Files are identified by their device and inode numbers. A
/// client that can make two files with the same numbers accesses the wrong one of its own files; so a `MappedFiles`
/// must never serve two clients.
#[derive(Debug, Default)]
pub struct MappedFiles {
    /// Those that pieces may share; some may be gone.
    windows: Mutex<Vec<(Key, Weak<Foreign<Window>>)>>,
    /// Those that are open without a window; some may be gone.
    open: Mutex<Vec<(Key, Weak<OpenFile>)>>,
    file_count: Arc<AtomicU64>,
    window_count: Arc<AtomicU64>,
    bytes: Arc<AtomicU64>,
}

/// A file of a client's that is open and not mapped.
#[derive(Debug)]
pub struct ClientFile(Foreign<Arc<OpenFile>>);

impl ClientFile {
    /// Its fd.
    pub fn fd(&self) -> &Arc<OwnedFd> {
        &self.0.fd
    }
}

/// A file with one access mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    device: (u32, u32),
    inode: u64,
    is_writable: bool,
}

/// What a client asks for.
#[derive(Clone, Copy)]
struct Piece {
    offset: u64,
    bytes: u64,
    read: bool,
    write: bool,
}

impl MappedFiles {
    /// Maps `bytes` bytes of a file from `offset` on, which need not be a multiple of the page size. `may_block` says that
    /// unmapping and closing it may wait for its file system.
    ///
    /// EINVAL for no bytes and for a file on FUSE; EOVERFLOW when offset and bytes do not fit together; EACCES if the
    /// file is not open for this access; E2BIG beyond one of the limits; otherwise the errno of mmap(2).
    pub fn map(
        &self,
        fd: ForeignFd,
        offset: u64,
        bytes: u64,
        (read, write): (bool, bool),
        may_block: bool,
    ) -> Result<FileMapping, Errno> {
        let piece = Piece { offset, bytes, read, write };
        if bytes == 0 {
            return Err(Errno::EINVAL);
        }
        check_mode(&fd, piece)?;
        // Not `fstat`, which asks the file system.
        let wanted = StatxFlags::INO | StatxFlags::SIZE;
        let about = statx(&fd, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, wanted).map_err(errno)?;
        let device = (about.stx_dev_major, about.stx_dev_minor);
        let key = Key { device, inode: about.stx_ino, is_writable: write };
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let of_file = windows.iter().filter(|(other, _)| *other == key);
        let open: Vec<_> = of_file.filter_map(|(_, window)| window.upgrade()).collect();
        if let Some(window) = open.iter().find(|window| window.address_of(offset, bytes).is_some()) {
            return FileMapping::in_window(window, offset, bytes, read, write);
        }
        let file_system = FileSystem::of(&fd)?;
        let counted = Counted::new(&self.window_count, 1, WINDOWS_MAX)?;
        let file = match open.first() {
            Some(window) => Arc::clone(window.file()),
            None => {
                let counted = self.count_file()?;
                Arc::new(OpenFile::new(fd.into_inner(), Some(counted)))
            }
        };
        // An error below must not close the file here.
        let _closed_elsewhere = may_block.then(|| Foreign::new(Arc::clone(&file)));
        let window = self.window(file, piece, about.stx_size, file_system)?.counted(counted);
        let window = Arc::new(if may_block { Foreign::new(window) } else { Foreign::harmless(window) });
        if file_system != FileSystem::Overlay {
            windows.retain(|(_, window)| window.strong_count() > 0);
            windows.push((key, Arc::downgrade(&window)));
        }
        FileMapping::in_window(&window, offset, bytes, read, write)
    }

    /// Keeps a file open that is not mapped. Files that are memory are shared; any other counts towards
    /// [`FILES_MAX`] each time. EACCES if memory is not open for this access; E2BIG beyond the limit.
    pub fn open(
        &self,
        fd: ForeignFd,
        (read, write): (bool, bool),
        is_memory: bool,
    ) -> Result<ClientFile, Errno> {
        if !is_memory {
            let counted = self.count_file()?;
            let file = Arc::new(OpenFile::new(fd.into_inner(), Some(counted)));
            return Ok(ClientFile(Foreign::new(file)));
        }
        check_mode(&fd, Piece { offset: 0, bytes: 0, read, write })?;
        let about = rustix::fs::fstat(&fd).map_err(errno)?;
        let device = (rustix::fs::major(about.st_dev), rustix::fs::minor(about.st_dev));
        let key = Key { device, inode: about.st_ino, is_writable: write };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) =
            open.iter().filter(|(other, _)| *other == key).find_map(|(_, file)| file.upgrade())
        {
            return Ok(ClientFile(Foreign::harmless(file)));
        }
        let counted = self.count_file()?;
        let file = Arc::new(OpenFile::new(fd.into_inner(), Some(counted)));
        open.retain(|(_, file)| file.strong_count() > 0);
        open.push((key, Arc::downgrade(&file)));
        Ok(ClientFile(Foreign::harmless(file)))
    }

    /// A window that holds a piece of a file, larger than it where that can be had.
    fn window(
        &self,
        file: Arc<OpenFile>,
        piece: Piece,
        file_bytes: u64,
        file_system: FileSystem,
    ) -> Result<Window, Errno> {
        let page_bytes = file_system.page_bytes();
        let asked = Window::range_for(piece.offset, piece.bytes, page_bytes)?;
        let new = |range: (u64, u64), is_reserved| {
            let bytes_max = if range == asked { MAPPED_BYTES_MAX } else { SPARE_BYTES_MAX };
            let bytes = Counted::new(&self.bytes, range.1, bytes_max)?;
            // One that is only written is mapped for both, so that it shares with those that are also read.
            let mode = (piece.read || piece.write, piece.write);
            Window::new(Arc::clone(&file), range, page_bytes, mode, is_reserved)
                .map(|window| window.counted(bytes))
        };
        let wide = match file_system {
            // A mapping beyond its end would make the file longer, and huge pages are set aside for what was asked alone.
            FileSystem::HugePages(_) if asked.0 + asked.1 <= file_bytes => Some((0, file_bytes)),
            FileSystem::HugePages(_) => None,
            _ => aligned(asked, file_bytes),
        };
        let wide = wide.filter(|wide| *wide != asked && wide.1 <= WINDOW_BYTES_MAX);
        wide.and_then(|wide| new(wide, false).ok()).map_or_else(|| new(asked, true), Ok)
    }

    fn count_file(&self) -> Result<Counted, Errno> {
        let fds = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        Counted::new(&self.file_count, 1, FILES_MAX.min(fds / 4))
    }
}

/// The power of two of bytes, as many as the file has or more, at a multiple of themselves, that hold a piece.
fn aligned((offset, bytes): (u64, u64), file_bytes: u64) -> Option<(u64, u64)> {
    let size = file_bytes.max(offset + bytes).min(WINDOW_BYTES_MAX).next_power_of_two();
    let start = offset & !(size - 1);
    (offset + bytes <= start + size && start + size <= i64::MAX as u64).then_some((start, size))
}

/// What mmap(2) would say of the fd that came with this piece: EACCES unless the file is open for what is asked.
fn check_mode(fd: &ForeignFd, piece: Piece) -> Result<(), Errno> {
    let flags = fcntl_getfl(fd).map_err(errno)?;
    let mode = flags & OFlags::RWMODE;
    let is_fit = if piece.write { mode == OFlags::RDWR } else { mode != OFlags::WRONLY };
    if is_fit && !flags.contains(OFlags::PATH) { Ok(()) } else { Err(Errno::EACCES) }
}
