//! Memory in a file that is not mapped (libvfio-user's access mode FILE_IO of `vfio-user.rst: VFIO_USER_DMA_MAP`).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use limosa_foreign_fd::ForeignFd;
use limosa_guest_memory::ClientFile;
use limosa_protocol::Errno;
use limosa_protocol::info::DmaMapFlags;
use rustix::fs::{OFlags, fcntl_getfl};

/// A piece of a file, accessed by pread(2) and pwrite(2).
pub(super) struct FileIo {
    file: ClientFile,
    offset: u64,
}

impl FileIo {
    pub(super) fn new(file: ClientFile, offset: u64) -> FileIo {
        FileIo { file, offset }
    }

    pub(super) fn file(&self) -> (&Arc<OwnedFd>, u64) {
        (self.file.fd(), self.offset)
    }

    /// EFAULT beyond the end of the file, or if the file returns an error.
    pub(super) fn read(&self, offset: u64, mut data: &mut [u8]) -> Result<(), Errno> {
        let mut at = self.offset + offset;
        while !data.is_empty() {
            let bytes = match rustix::io::pread(&**self.file.fd(), &mut *data, at) {
                Err(rustix::io::Errno::INTR) => continue,
                done => done.ok().filter(|bytes| *bytes > 0).ok_or(Errno::EFAULT)?,
            };
            data = &mut data[bytes..];
            at += bytes as u64;
        }
        Ok(())
    }

    /// EFAULT if the file cannot be written.
    pub(super) fn write(&self, offset: u64, mut data: &[u8]) -> Result<(), Errno> {
        let mut at = self.offset + offset;
        while !data.is_empty() {
            let bytes = match rustix::io::pwrite(&**self.file.fd(), data, at) {
                Err(rustix::io::Errno::INTR) => continue,
                done => done.ok().filter(|bytes| *bytes > 0).ok_or(Errno::EFAULT)?,
            };
            data = &data[bytes..];
            at += bytes as u64;
        }
        Ok(())
    }
}

/// EACCES if the file is not open for this access; EINVAL for a file that is open for appending, where writes
/// ignore the offset; EOVERFLOW if the piece ends beyond the largest file size.
pub(super) fn check(fd: &ForeignFd, offset: u64, size: u64, flags: DmaMapFlags) -> Result<(), Errno> {
    let open = fcntl_getfl(fd).map_err(errno)?;
    let mode = open & OFlags::RWMODE;
    let refused = (flags.contains(DmaMapFlags::READ) && mode == OFlags::WRONLY)
        || (flags.contains(DmaMapFlags::WRITE) && mode == OFlags::RDONLY)
        || open.contains(OFlags::PATH);
    if refused {
        return Err(Errno::EACCES);
    }
    if flags.contains(DmaMapFlags::WRITE) && open.contains(OFlags::APPEND) {
        return Err(Errno::EINVAL);
    }
    offset.checked_add(size).filter(|end| *end <= i64::MAX as u64).map(drop).ok_or(Errno::EOVERFLOW)
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error().unsigned_abs())
}
