//! Guest memory as the device sees it. SEAM: signatures agreed, bodies to be written.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use limosa_protocol::Errno;
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::DmaMapFlags;

/// The mappings that a client made for its device, and the log of what the device wrote.
#[derive(Debug, Default)]
pub struct GuestMemory {}

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
    /// In a file, mapped shared.
    File {
        /// The file.
        fd: OwnedFd,
        /// Where the mapping starts in it; need not be page-aligned.
        offset: u64,
    },
    /// With the client, reached by messages.
    Remote(Arc<dyn RemoteMemory>),
}

impl std::fmt::Debug for Backing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Backing::File { fd, offset } => write!(f, "File({fd:?} at {offset:#x})"),
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

impl GuestMemory {
    /// Adds a mapping. EINVAL for a size of 0, an end beyond 2^64, no READ or WRITE flag; EEXIST for an overlap;
    /// E2BIG beyond the limit of mappings; the mmap's errno.
    pub fn map(&self, _mapping: Mapping) -> Result<(), Errno> {
        todo!()
    }
    /// Removes the mappings that lie wholly in the range; EINVAL when one lies partly in it, ENOENT when none is there.
    pub fn unmap(&self, _iova: u64, _size: u64) -> Result<(), Errno> {
        todo!()
    }
    /// The same, and sets the bits of the pages written since the last report; EINVAL unless logging is on.
    pub fn unmap_report(
        &self,
        _iova: u64,
        _size: u64,
        _page_size: u64,
        _words: &mut [u64],
    ) -> Result<(), Errno> {
        todo!()
    }
    /// Removes every mapping.
    pub fn unmap_all(&self) {
        todo!()
    }
    /// Starts logging. Returns the page size chosen.
    pub fn logging_start(&self, _page_size_hint: u64, _ranges: &[DmaLoggingRange]) -> Result<u64, Errno> {
        todo!()
    }
    /// Stops logging; EINVAL unless it is on.
    pub fn logging_stop(&self) -> Result<(), Errno> {
        todo!()
    }
    /// Whether a report of this range would be answered; reports of its parts then cannot fail.
    pub fn logging_check(&self, _iova: u64, _length: u64, _page_size: u64) -> Result<(), Errno> {
        todo!()
    }
    /// Sets the bits of pages written since the last report and clears them in the log.
    pub fn logging_report(
        &self,
        _iova: u64,
        _length: u64,
        _page_size: u64,
        _words: &mut [u64],
    ) -> Result<(), Errno> {
        todo!()
    }
    /// The device reads memory: EFAULT where nothing is mapped, or not for reading; ranges may span mappings.
    pub fn read(&self, _iova: u64, _data: &mut [u8]) -> Result<(), Errno> {
        todo!()
    }
    /// The device writes memory; the pages go to the log when it is on.
    pub fn write(&self, _iova: u64, _data: &[u8]) -> Result<(), Errno> {
        todo!()
    }
}
