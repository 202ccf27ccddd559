//! Guest memory as the device sees it: a client's mappings (`vfio-user.rst: VFIO_USER_DMA_MAP`), the device's reads
//! and writes, and the log of its writes (`vfio.h: VFIO_DEVICE_FEATURE_DMA_LOGGING_START`).
//!
//! It is one table with two handles: a client changes it through [`Mappings`], a device accesses it through [`Dma`].
//! Accesses hold a lock that unmapping takes exclusively: once [`Mappings::unmap`] returns, no thread uses the memory.
//! The only exception is memory that is accessed by messages: the lock is not held while waiting for an answer, because
//! the thread that receives the answer may have to unmap first.

mod dma;
mod export;
mod file_io;
mod log;
mod mappings;
mod pin;
mod table;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use limosa_foreign_fd::ForeignFd;
use limosa_protocol::Errno;
use limosa_protocol::info::DmaMapFlags;

pub use dma::Dma;
pub use export::{DirtyWords, ExportedLog, ExportedMapping, MemoryKind};
pub use limosa_guest_memory::MAPPED_BYTES_MAX;
pub use log::PAGES_MAX as LOGGED_PAGES_MAX;
pub use mappings::Mappings;
pub use pin::{Pin, UNMAP_WAIT};

/// Limit on a client's mappings: the value that QEMU announces as `max_dma_maps`.
pub const MAPPINGS_MAX: usize = 65535;

/// One mapping.
#[derive(Debug)]
pub struct Mapping {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// The device's access rights.
    pub flags: DmaMapFlags,
    /// Where the memory is.
    pub backing: Backing,
}

/// Where a mapping's memory is.
pub enum Backing {
    /// In a memfd, or in a file on tmpfs or hugetlbfs, mapped shared. An access never waits for another process.
    File {
        /// The file.
        fd: ForeignFd,
        /// Where the mapping starts in it; need not be page-aligned.
        offset: u64,
    },
    /// In any regular file, mapped shared. An access waits for the file system: if its server or daemon does not
    /// answer, the access blocks the device and every unmap for good.
    AnyFile {
        /// The file.
        fd: ForeignFd,
        /// Where the mapping starts in it; need not be page-aligned.
        offset: u64,
    },
    /// In a file, accessed by pread(2) and pwrite(2): for files that cannot or should not be mapped. Each access is
    /// a system call.
    FileIo {
        /// The file.
        fd: ForeignFd,
        /// Where the mapping starts in it.
        offset: u64,
        /// Also accept a regular file that is not memory, such as `/proc/PID/mem`. Accesses may then wait as for
        /// [`Backing::AnyFile`].
        any_file: bool,
    },
    /// In the client's process, accessed by messages.
    Remote(Arc<dyn RemoteMemory>),
}

impl fmt::Debug for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Backing::File { fd, offset } => write!(f, "File({fd:?} at {offset:#x})"),
            Backing::AnyFile { fd, offset } => write!(f, "AnyFile({fd:?} at {offset:#x})"),
            Backing::FileIo { fd, offset, .. } => write!(f, "FileIo({fd:?} at {offset:#x})"),
            Backing::Remote(_) => f.write_str("Remote"),
        }
    }
}

/// Accesses memory that the device cannot map: vfio-user's DMA_READ and DMA_WRITE. Addresses are IOVAs.
pub trait RemoteMemory: Send + Sync {
    /// Reads from the client's memory.
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno>;
    /// Writes to the client's memory.
    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno>;
}
