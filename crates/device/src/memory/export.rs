//! Exporting the mappings and the log to another process that takes over the device: [`Mappings::export`],
//! [`Mappings::export_log`], [`Mappings::import_log`].

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use limosa_foreign_fd::{Foreign, ForeignFd};
use limosa_protocol::Errno;
use limosa_protocol::feature::DmaLoggingRange;
use limosa_protocol::info::DmaMapFlags;

use super::log::Log;
use super::table::Memory;
use super::{Backing, Mapping, Mappings, RemoteMemory};

/// An exported mapping.
#[derive(Clone, Debug)]
pub struct ExportedMapping {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// The device's access rights.
    pub flags: DmaMapFlags,
    /// How its memory is accessed.
    pub kind: MemoryKind,
    /// The file, for all kinds but [`MemoryKind::Remote`]. Mappings of the same file usually share one. Dropping the
    /// last reference may wait for the file system, since the client may have chosen the file.
    pub fd: Option<Arc<OwnedFd>>,
    /// Where the mapping starts in the file.
    pub offset: u64,
}

/// How a mapping's memory is accessed ([`Backing`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// [`Backing::File`] or [`Backing::AnyFile`].
    File,
    /// [`Backing::FileIo`].
    FileIo,
    /// [`Backing::Remote`].
    Remote,
}

impl ExportedMapping {
    /// The same mapping for another process, with its own fd. `any_file` and `remote` say which files the new owner
    /// accepts and how it reaches its client.
    pub fn to_mapping(&self, any_file: bool, remote: &Arc<dyn RemoteMemory>) -> io::Result<Mapping> {
        let fd = || -> io::Result<ForeignFd> {
            let fd = self.fd.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
            Ok(Foreign::new(fd.as_fd().try_clone_to_owned()?))
        };
        let offset = self.offset;
        let backing = match self.kind {
            MemoryKind::File if any_file => Backing::AnyFile { fd: fd()?, offset },
            MemoryKind::File => Backing::File { fd: fd()?, offset },
            MemoryKind::FileIo => Backing::FileIo { fd: fd()?, offset, any_file },
            MemoryKind::Remote => Backing::Remote(Arc::clone(remote)),
        };
        Ok(Mapping { iova: self.iova, size: self.size, flags: self.flags, backing })
    }
}

/// An exported dirty log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportedLog {
    /// Bytes.
    pub page_size: u64,
    /// Whether it covers everything, and grows with the mappings.
    pub everything: bool,
    /// The logged ranges, by address: whole pages, not adjacent.
    pub ranges: Vec<DmaLoggingRange>,
    /// The pages that were written and not reported.
    pub dirty: Vec<DirtyWords>,
}

/// A piece of a dirty log, with pages of one of its ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirtyWords {
    /// The address of bit 0's page.
    pub iova: u64,
    /// Number of pages.
    pub pages: u64,
    /// A bit for each page, in words of 64.
    pub words: Vec<u64>,
}

impl Mappings {
    /// The mappings, by address.
    pub fn export(&self) -> Vec<ExportedMapping> {
        let table = self.space.read_lock();
        let exported = |mapped: &super::table::Mapped| {
            let (kind, fd, offset) = match &mapped.memory {
                Memory::File(file) => {
                    let (fd, offset) = file.file();
                    (MemoryKind::File, Some(Arc::clone(fd)), offset)
                }
                Memory::FileIo(file) => {
                    let (fd, offset) = file.file();
                    (MemoryKind::FileIo, Some(Arc::clone(fd)), offset)
                }
                Memory::Remote(_) => (MemoryKind::Remote, None, 0),
            };
            let (iova, size, flags) = (mapped.iova, mapped.bytes(), mapped.flags);
            ExportedMapping { iova, size, flags, kind, fd, offset }
        };
        table.mappings.iter().map(exported).collect()
    }

    /// The log, if there is one; it is not cleared. The device has to be stopped, since later writes are not
    /// included.
    pub fn export_log(&self) -> Option<ExportedLog> {
        // Marks are made under the shared lock; under this exclusive one none is in progress.
        self.space.write_lock().log.as_ref().map(Log::export)
    }

    /// Starts logging with an exported log. EINVAL if logging is on, and for an invalid log: a page size that is
    /// not a power of two from 4 KiB to 1 GiB, ranges that are not whole pages, in order and not adjacent, dirty pages
    /// outside the ranges; E2BIG as for [`Mappings::logging_start`]; ENOMEM.
    ///
    /// A log of everything can be imported before or after the mappings are made: it covers all of them.
    pub fn import_log(&self, log: &ExportedLog) -> Result<(), Errno> {
        let mut imported = Log::import(log)?;
        let mut table = self.space.write_lock();
        if table.log.is_some() {
            return Err(Errno::EINVAL);
        }
        for mapped in &table.mappings {
            imported.cover(mapped.iova, mapped.last)?;
        }
        table.log = Some(imported);
        Ok(())
    }
}
