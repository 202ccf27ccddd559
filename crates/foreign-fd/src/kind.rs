//! What kind of file an fd is of. None of these looks calls into the file system behind it, whose daemon may be the
//! peer's (`fstat` and `fstatfs` would).

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{AtFlags, FileType, StatxFlags, fcntl_get_seals, readlink, statx};
use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::{Foreign, ForeignFd};

impl ForeignFd {
    /// The fd of an eventfd; `Err` with the fd for any other file. Closing an eventfd never blocks.
    pub fn into_eventfd(self) -> Result<OwnedFd, ForeignFd> {
        if self.is_eventfd() { Ok(self.into_inner()) } else { Err(self) }
    }

    /// The fd of memory: a memfd, or a file on tmpfs or hugetlbfs itself; `Err` with the fd for any other file. Closing
    /// or unmapping memory never blocks, nor does an access to a mapping of it.
    ///
    /// Detected by its seals (`fcntl(2): F_GET_SEALS`), which no other file has. A file on an overlay of a tmpfs has
    /// none.
    pub fn into_memory(self) -> Result<OwnedFd, ForeignFd> {
        if fcntl_get_seals(&*self).is_ok() { Ok(self.into_inner()) } else { Err(self) }
    }

    /// The socket, if it is a UNIX stream socket; `Err` with the fd for any other file. The peer still chooses what is
    /// sent to it, so the socket is [`Foreign`] too.
    pub fn into_unix_stream(self) -> Result<Foreign<UnixStream>, ForeignFd> {
        let is_unix = sockopt::socket_domain(&*self) == Ok(AddressFamily::UNIX)
            && sockopt::socket_type(&*self) == Ok(SocketType::STREAM);
        if is_unix { Ok(Foreign::new(UnixStream::from(self.into_inner()))) } else { Err(self) }
    }

    /// Whether it is of an eventfd.
    pub fn is_eventfd(&self) -> bool {
        // Not by fdinfo: for some kinds of file the kernel takes a lock to print it, which the peer may hold.
        match readlink(format!("/proc/self/fd/{}", self.as_raw_fd()), Vec::new()) {
            Ok(target) => target.as_bytes() == b"anon_inode:[eventfd]",
            // In a sandbox without /proc: an anonymous inode has no file type.
            Err(rustix::io::Errno::NOENT) => self.file_type() == Some(FileType::Unknown),
            Err(_) => false,
        }
    }

    /// Whether it is of a regular file, on whatever file system.
    pub fn is_regular_file(&self) -> bool {
        self.file_type() == Some(FileType::RegularFile)
    }

    /// The type as the kernel knows it already.
    fn file_type(&self) -> Option<FileType> {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        // The mode is filled in also where nothing is asked for.
        let known = statx(&**self, "", flags, StatxFlags::empty()).ok()?;
        Some(FileType::from_raw_mode(known.stx_mode.into()))
    }
}
