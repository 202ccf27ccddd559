//! [`PrivateFolder`]: small files in a folder that only their owner can write and read, such as the records of moves. A
//! file that another user could have written, read or locked is refused.

mod refusal;
#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use limosa_stream::MigrationId;
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, flock, fstat, fsync, open, openat, renameat,
    statat, unlinkat,
};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::geteuid;

pub(crate) use refusal::other_than_file;
use refusal::{check, denied, named, owners, too_long};

/// An open folder that belongs to this process' effective user and that no other user can write.
///
/// Every name is relative to the open folder, so that renaming or replacing the folder makes no difference. Symbolic
/// links in it are not followed, and only regular files of the same owner with mode 0600 are opened. So only this user
/// can hold a lock on a file, and a FIFO blocks nothing. Every error names the file or folder.
#[derive(Debug)]
pub struct PrivateFolder {
    fd: OwnedFd,
    path: PathBuf,
}

impl PrivateFolder {
    /// The most bytes that a file may have: 1 MiB.
    pub const FILE_BYTES_MAX: usize = 1 << 20;

    /// Opens the folder. If it does not exist, creates it and its parents with mode 0700.
    pub fn create(path: &Path) -> io::Result<PrivateFolder> {
        if let Some(folder) = PrivateFolder::open(path)? {
            return Ok(folder);
        }
        make(path).map_err(|error| named(path, error))?;
        let created = PrivateFolder::open(path)?;
        created.ok_or_else(|| named(path, io::Error::from(io::ErrorKind::NotFound)))
    }

    /// Opens the folder; `None` if it does not exist.
    ///
    /// A folder that belongs to another user or that others may write is [`io::ErrorKind::PermissionDenied`].
    pub fn open(path: &Path) -> io::Result<Option<PrivateFolder>> {
        let fd = match open_folder(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|error| named(path, error))?,
        };
        let folder = PrivateFolder { fd, path: path.into() };
        let stat = fstat(&folder.fd).map_err(|errno| named(path, errno.into()))?;
        let mode = stat.st_mode & 0o7777;
        if stat.st_uid != geteuid().as_raw() {
            let what = format!("{}: chown it, or use another folder", owners(&stat));
            return Err(named(path, denied(what)));
        }
        if mode & 0o022 != 0 {
            let what =
                format!("others may write to it (mode {mode:04o}): chmod 700 it, or use another folder");
            return Err(named(path, denied(what)));
        }
        Ok(Some(folder))
    }

    /// The path by which the folder was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of files that end like this, hidden ones left out.
    pub fn names(&self, suffix: &str) -> io::Result<Vec<OsString>> {
        let failed = |errno: Errno| named(&self.path, errno.into());
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.fd).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_bytes().to_vec();
            if !name.starts_with(b".") && name.ends_with(suffix.as_bytes()) {
                names.push(OsString::from_vec(name));
            }
        }
        Ok(names)
    }

    /// Opens a file to be read and written; `None` if it does not exist.
    ///
    /// Anything but a regular file is [`io::ErrorKind::InvalidInput`], and so is a file of more than
    /// [`PrivateFolder::FILE_BYTES_MAX`] bytes. A file that belongs to another user or that others may open is
    /// [`io::ErrorKind::PermissionDenied`].
    pub fn file(&self, name: impl AsRef<OsStr>) -> io::Result<Option<File>> {
        let name = name.as_ref();
        let path = self.path.join(name);
        // Opening a device or the like may do something, so it is looked at first.
        let look = statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW);
        let opened = look.map_err(io::Error::from).and_then(|stat| {
            check(&stat)?;
            let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = File::from(openat(&self.fd, name, flags, Mode::empty())?);
            check(&fstat(&file)?)?;
            Ok(file)
        });
        match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => opened.map(Some).map_err(|error| named(&path, error)),
        }
    }

    /// Reads a file that was opened here, from its beginning.
    pub fn read(&self, name: impl AsRef<OsStr>, file: &File) -> io::Result<Vec<u8>> {
        let failed = |error| named(&self.path.join(name.as_ref()), error);
        let mut bytes = Vec::new();
        let mut from: &File = file;
        from.rewind().map_err(failed)?;
        from.take(Self::FILE_BYTES_MAX as u64).read_to_end(&mut bytes).map_err(failed)?;
        Ok(bytes)
    }

    /// Creates a file with mode 0600; `None` if there is one of this name. Neither the file nor its name is durable before
    /// [`PrivateFolder::sync`].
    pub fn create_file(&self, name: impl AsRef<OsStr>) -> io::Result<Option<File>> {
        let name = name.as_ref();
        match self.create_new(name) {
            Err(Errno::EXIST) => Ok(None),
            created => {
                created.map(|fd| Some(fd.into())).map_err(|errno| named(&self.path.join(name), errno.into()))
            }
        }
    }

    fn create_new(&self, name: &OsStr) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR)
    }

    /// Writes a whole file, which appears under its name in one step, replaces another one of this name, and is durable when
    /// this returns. It is locked by this process (`flock`) until the returned file is closed.
    pub fn write(&self, name: impl AsRef<OsStr>, bytes: &[u8]) -> io::Result<File> {
        let name = name.as_ref();
        let failed = |error: io::Error| named(&self.path.join(name), error);
        if bytes.len() > Self::FILE_BYTES_MAX {
            return Err(failed(too_long(bytes.len() as u64)));
        }
        let hidden = OsString::from_vec([b".", name.as_bytes(), b".partial"].concat());
        // Of a process that died.
        self.remove(&hidden)?;
        let mut file =
            self.create_file(&hidden)?.ok_or_else(|| failed(io::ErrorKind::AlreadyExists.into()))?;
        let written = (|| {
            flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            file.write_all(bytes)?;
            self.sync(&file)?;
            renameat(&self.fd, &hidden, &self.fd, name)?;
            synced(retry_on_intr(|| fsync(&self.fd)))
        })();
        match written {
            Ok(()) => Ok(file),
            Err(error) => {
                // The error that matters is the first. After the rename there is nothing to remove.
                let _ = self.remove(&hidden);
                Err(failed(error))
            }
        }
    }

    /// Checks that there is room for this number of further files of `bytes` bytes each, by writing them. Nothing is left of
    /// them. An error names the folder.
    pub fn check_room(&self, files: usize, bytes: usize) -> io::Result<()> {
        let id = MigrationId::random()?;
        let content = vec![1; bytes];
        let write = |number: usize| -> io::Result<File> {
            let name = format!(".{id}-{number}.room");
            let mut file = File::from(self.create_new(OsStr::new(&name))?);
            // It keeps its room as long as it is open.
            unlinkat(&self.fd, &name, AtFlags::empty())?;
            file.write_all(&content)?;
            retry_on_intr(|| fsync(&file))?;
            Ok(file)
        };
        let held: io::Result<Vec<File>> = (0..files).map(write).collect();
        held.map(drop).map_err(|error| named(&self.path, error))
    }

    /// Makes the contents of a file in the folder durable, and all names in the folder.
    pub fn sync(&self, file: &File) -> io::Result<()> {
        retry_on_intr(|| fsync(file))?;
        synced(retry_on_intr(|| fsync(&self.fd)))
    }

    /// Removes a file. Returns whether there was one.
    pub fn remove(&self, name: impl AsRef<OsStr>) -> io::Result<bool> {
        let name = name.as_ref();
        match unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(named(&self.path.join(name), errno.into())),
        }
    }

    /// When a file was written last, in seconds and nanoseconds since 1970. `None` if there is no regular file of this name.
    pub(crate) fn written_at(&self, name: &OsStr) -> Option<(i64, i64)> {
        let stat = statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        let is_file = other_than_file(&stat).is_none();
        is_file.then_some((stat.st_mtime as i64, stat.st_mtime_nsec as i64))
    }
}

/// Opens a folder. A symbolic link is followed if root or this process's user has made it.
fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let refused = match open(path, flags | OFlags::NOFOLLOW, Mode::empty()) {
        Err(errno @ (Errno::LOOP | Errno::NOTDIR)) => errno,
        opened => return Ok(opened?),
    };
    let link = statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(link.st_mode) != FileType::Symlink {
        return Err(refused.into());
    }
    if link.st_uid != 0 && link.st_uid != geteuid().as_raw() {
        return Err(denied(format!("it is a symbolic link, and {}: use another folder", owners(&link))));
    }
    Ok(open(path, flags, Mode::empty())?)
}

/// Creates a folder and those above it, durably.
fn make(path: &Path) -> io::Result<()> {
    let missing: Vec<&Path> =
        (path.ancestors()).take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists()).collect();
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    for folder in missing {
        let above = folder.parent().filter(|above| !above.as_os_str().is_empty());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // One that may not be read cannot be synced.
        if let Ok(above) = open(above.unwrap_or(Path::new(".")), flags, Mode::empty()) {
            synced(retry_on_intr(|| fsync(above.as_fd())))?;
        }
    }
    Ok(())
}

/// Some file systems have no `fsync` for folders, and then nothing can be done. Any other error is one.
fn synced(result: Result<(), Errno>) -> io::Result<()> {
    match result {
        Err(Errno::INVAL | Errno::NOTSUP) => Ok(()),
        result => Ok(result?),
    }
}
