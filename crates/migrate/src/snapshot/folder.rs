//! The folder of a snapshot's file. It is opened once, before anything is written, and every name is relative to it, so
//! that a folder that is renamed or replaced meanwhile makes no difference.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, Dir, Mode, OFlags, RenameFlags, Stat, fsync, linkat, openat, renameat, renameat_with, statat,
    syncfs, unlinkat,
};
use rustix::io::{Errno, retry_on_intr};

/// The requests of a publication to a folder. A trait, so that tests can have each request fail.
pub(super) trait Folder: Send {
    /// Creates a file that was not there, readable and writable by its owner alone.
    fn create(&self, name: &OsStr) -> Result<File, Errno>;
    /// `renameat2`.
    fn rename(&self, from: &OsStr, to: &OsStr, flags: RenameFlags) -> Result<(), Errno>;
    /// `linkat`.
    fn link(&self, from: &OsStr, to: &OsStr) -> Result<(), Errno>;
    /// `unlinkat`.
    fn remove(&self, name: &OsStr) -> Result<(), Errno>;
    /// `fstatat`, which does not follow a symbolic link.
    fn stat(&self, name: &OsStr) -> Result<Stat, Errno>;
    /// Makes the folder's names durable. `file` is a file in it.
    fn sync(&self, file: &File) -> Result<(), Errno>;
}

/// A folder that is open.
pub(super) struct OpenFolder {
    fd: OwnedFd,
    /// A folder may be writable and not readable; then it has no descriptor that `fsync` takes.
    is_readable: bool,
}

impl OpenFolder {
    /// Opens the folder that the file of this path is in. No link of a process, such as `/proc/PID/cwd`, is followed.
    pub(super) fn of(path: &Path) -> io::Result<OpenFolder> {
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let opened = match limosa_host::open_folder(folder, true) {
            Err(error) if error.raw_os_error() == Some(Errno::ACCESS.raw_os_error()) => {
                limosa_host::open_folder(folder, false).map(|fd| OpenFolder { fd, is_readable: false })
            }
            opened => opened.map(|fd| OpenFolder { fd, is_readable: true }),
        };
        opened.map_err(|error| {
            io::Error::new(error.kind(), format!("its folder {}: {error}", folder.display()))
        })
    }

    /// The names in the folder that begin and end like this.
    pub(super) fn names(&self, prefix: &[u8], suffix: &[u8]) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.fd)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name.starts_with(prefix) && name.ends_with(suffix) {
                names.push(OsString::from_vec(name));
            }
        }
        Ok(names)
    }

    /// Opens a file; follows no symbolic link, and waits for no other end of a FIFO.
    pub(super) fn open(&self, name: &OsStr) -> Result<File, Errno> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        openat(&self.fd, name, flags, Mode::empty()).map(File::from)
    }
}

impl Folder for OpenFolder {
    fn create(&self, name: &OsStr) -> Result<File, Errno> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR).map(File::from)
    }

    fn rename(&self, from: &OsStr, to: &OsStr, flags: RenameFlags) -> Result<(), Errno> {
        match flags.is_empty() {
            true => renameat(&self.fd, from, &self.fd, to),
            false => renameat_with(&self.fd, from, &self.fd, to, flags),
        }
    }

    fn link(&self, from: &OsStr, to: &OsStr) -> Result<(), Errno> {
        linkat(&self.fd, from, &self.fd, to, AtFlags::empty())
    }

    fn remove(&self, name: &OsStr) -> Result<(), Errno> {
        unlinkat(&self.fd, name, AtFlags::empty())
    }

    fn stat(&self, name: &OsStr) -> Result<Stat, Errno> {
        statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)
    }

    fn sync(&self, file: &File) -> Result<(), Errno> {
        match self.is_readable {
            true => retry_on_intr(|| fsync(&self.fd)),
            // All of the file system, which has the folder.
            false => retry_on_intr(|| syncfs(file)),
        }
    }
}

/// Whether both are one file.
pub(super) fn is_same(one: &Stat, other: &Stat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}
