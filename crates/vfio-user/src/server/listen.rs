//! The socket's place in the file system: made, taken over from a server that died, and removed.

use std::fs::{self, File};
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use limosa_foreign_fd::Foreign;
use rustix::fs::FlockOperation;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// A socket's path. Removed when dropped, if it is still the same socket.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    device: u64,
    inode: u64,
}

/// Listens at a path. `AddrInUse` when a server listens there, `AlreadyExists` when something is
/// there that is not a socket; the socket of a server that is gone is replaced.
pub(super) fn listen(path: &Path) -> Result<(UnixListener, Place)> {
    // Two servers that find the same stale socket must not take each other's for it.
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = File::open(directory)?;
    rustix::fs::flock(&directory, FlockOperation::LockExclusive)?;
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            remove_stale(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    let found = fs::symlink_metadata(path)?;
    Ok((listener, Place { path: path.into(), device: found.dev(), inode: found.ino() }))
}

fn remove_stale(path: &Path) -> Result<()> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(Error::new(ErrorKind::AlreadyExists, "there is a file here that is not a socket"));
    }
    if is_alive(path)? {
        return Err(Error::new(ErrorKind::AddrInUse, "another server listens here"));
    }
    tracing::info!(path = %path.display(), "replacing the socket of a server that is gone");
    fs::remove_file(path)
}

/// Whether somebody listens: the kernel refuses a connection only where nobody does.
fn is_alive(path: &Path) -> Result<bool> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    // Whoever listens may have sent it something by the time that it is closed.
    let probe = Foreign::new(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?);
    match rustix::net::connect(probe.as_fd(), &SocketAddrUnix::new(path)?) {
        Err(rustix::io::Errno::CONNREFUSED | rustix::io::Errno::NOENT) => Ok(false),
        // EAGAIN: its queue is full.
        Ok(()) | Err(rustix::io::Errno::AGAIN) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

impl Place {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let same =
            fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == (self.device, self.inode));
        if same && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket could not be removed");
        }
    }
}
