//! Guest memory as the device sees it: the mappings that a client made (`vfio-user.rst: VFIO_USER_DMA_MAP`), what the
//! device reads and writes there, and the log of what it wrote (`vfio.h: VFIO_DEVICE_FEATURE_DMA_LOGGING_START`).
//!
//! It is one table with two handles: a client drives it through [`Mappings`], a device reaches it through [`Dma`].
//! Accesses hold a lock that unmapping takes exclusively: once [`Mappings::unmap`] returns, nobody touches the
//! memory. The one exception is memory that is reached by messages: the lock is not held while an answer is awaited,
//! because whoever brings the answer may have to unmap first.

mod dma;
mod log;
mod mappings;
mod table;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

use limosa_foreign_fd::ForeignFd;
use limosa_protocol::Errno;
use limosa_protocol::info::DmaMapFlags;

pub use dma::Dma;
pub use log::PAGES_MAX as LOGGED_PAGES_MAX;
pub use mappings::Mappings;

/// How many mappings a client can have at a time: what QEMU announces as `max_dma_maps`.
pub const MAPPINGS_MAX: usize = 65535;

/// How many bytes of files a client can have mapped at a time: half of the smallest common address space, so that
/// no client can take all of it from the process.
pub const MAPPED_BYTES_MAX: u64 = 1 << 46;

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
