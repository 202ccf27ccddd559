//! Handing over a listening socket, and the paths that identify devices.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf, absolute};

use limosa_switch_over::{Item, Refusal};

use super::record::{self, broken, decode, kind};

/// A listening socket that was handed over.
pub(super) struct CameListener {
    pub(super) record: record::Listener,
    pub(super) socket: UnixListener,
}

impl CameListener {
    /// The path at which it listens, if known.
    pub(super) fn at(&self) -> Option<PathBuf> {
        let bound = || self.socket.local_addr().ok().and_then(|at| at.as_pathname().map(Path::to_owned));
        self.record.path.as_ref().map(|(path, _)| path.clone()).or_else(bound)
    }

    /// LISTENER, checked.
    pub(super) fn of(mut item: Item) -> Result<CameListener, Refusal> {
        let record: record::Listener = decode(&item)?;
        let wrong = |what: &str| broken(kind::LISTENER, item.device, &what);
        let fd = item.fds.pop().ok_or_else(|| wrong("no socket"))?;
        let socket = fd.into_unix_stream().map_err(|_| wrong("a file that is no UNIX socket"))?;
        if !rustix::net::sockopt::socket_acceptconn(&*socket).unwrap_or(false) {
            return Err(wrong("a socket that does not listen"));
        }
        Ok(CameListener { record, socket: UnixListener::from(OwnedFd::from(socket.into_inner())) })
    }

    /// Whether this path leads to it.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        match &self.record.path {
            Some((_, identity)) => {
                std::fs::symlink_metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == *identity)
            }
            // A socket that its process did not make has nothing but an address.
            None => self
                .at()
                .and_then(|theirs| absolute(theirs).ok())
                .is_some_and(|theirs| is_same(path, &theirs)),
        }
    }
}

/// Whether two paths, each seen from its own process, are the same. Links are not followed.
pub(super) fn is_same(ours: &Path, theirs: &Path) -> bool {
    absolute(ours).ok().as_deref() == Some(theirs)
}
