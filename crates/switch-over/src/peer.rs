//! [`Peer`]: the process at the other end of a UNIX socket, identified by a pidfd, which remains valid if the PID
//! is reused. Its fds are duplicated with `pidfd_getfd`, for which the kernel checks that this process may attach to
//! that one (ptrace(2), PTRACE_MODE_ATTACH_REALCREDS).

use std::io::{self, Error, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use limosa_host::User;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal};

use crate::channel::timeout;

/// A process that this one is connected to.
#[derive(Debug)]
pub struct Peer {
    pidfd: OwnedFd,
    pid: Pid,
    user: User,
}

impl Peer {
    /// The process that connected, or that called listen(2) or socketpair(2).
    ///
    /// Kernels before 6.5 have no SO_PEERPIDFD. There the socket tells only the PID, which another process may have by
    /// now. The caller has to compare something that only the right process can know, as [`take`](crate::take) compares
    /// the token.
    pub fn of(socket: impl AsFd) -> io::Result<Peer> {
        let credentials = socket_peercred(&socket)?;
        let (pid, user) = (credentials.pid, User(credentials.uid.as_raw()));
        let pidfd = match limosa_foreign_fd::peer_pidfd(&socket) {
            Err(Errno::NOPROTOOPT) => rustix::process::pidfd_open(pid, PidfdFlags::empty()),
            found => found,
        };
        let pidfd = pidfd.map_err(|errno| {
            let error = Error::from(errno);
            Error::new(error.kind(), format!("process {} cannot be looked up: {error}", pid.as_raw_pid()))
        })?;
        Ok(Peer { pidfd, pid, user })
    }

    /// Its number, for messages only.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_pid()
    }

    /// The user with whose rights it made the connection.
    pub fn user(&self) -> User {
        self.user
    }

    /// Whether it is this process itself.
    pub fn is_this_process(&self) -> bool {
        self.pid == rustix::process::getpid()
    }

    /// A duplicate of one of its fds. The message of `PermissionDenied` has the remedy.
    pub fn pull(&self, number: i32) -> io::Result<OwnedFd> {
        rustix::process::pidfd_getfd(&self.pidfd, number, PidfdGetfdFlags::empty())
            .map_err(|errno| self.explained(number, errno))
    }

    fn explained(&self, number: i32, errno: Errno) -> Error {
        let pid = self.pid();
        match errno {
            Errno::PERM | Errno::ACCESS => Error::new(
                ErrorKind::PermissionDenied,
                format!(
                    "the kernel does not let this process take fds of process {pid} (ptrace access): run the new server \
                     as root, or as the old one's user where kernel.yama.ptrace_scope is 0 and the old one may be dumped, \
                     or let the old one start it"
                ),
            ),
            Errno::SRCH => Error::new(ErrorKind::NotFound, format!("process {pid} has ended")),
            Errno::BADF => Error::new(
                ErrorKind::InvalidData,
                format!("process {pid} named fd {number}, which it does not have"),
            ),
            Errno::MFILE => Error::other(format!(
                "no room for fd {number} of process {pid}: raise the limit of open files (ulimit -n) of the new server"
            )),
            Errno::NOSYS => Error::new(
                ErrorKind::Unsupported,
                "the kernel has no pidfd_getfd (Linux before 5.6): let the old server start the new one",
            ),
            errno => {
                let error = Error::from(errno);
                Error::new(error.kind(), format!("fd {number} of process {pid} cannot be taken: {error}"))
            }
        }
    }

    /// Waits until it has ended, at most so long. Whether it has.
    pub fn wait(&self, limit: Duration) -> bool {
        let until = Instant::now().checked_add(limit);
        loop {
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match rustix::event::poll(&mut fds, timeout(until).as_ref()) {
                Ok(0) if until.is_some_and(|until| Instant::now() >= until) => return false,
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return true,
                Err(error) => {
                    tracing::error!(%error, pid = self.pid(), "a process cannot be waited for");
                    return false;
                }
            }
        }
    }

    /// Kills it. `InvalidInput` when it is this process.
    pub fn kill(&self) -> io::Result<()> {
        if self.is_this_process() {
            return Err(Error::new(ErrorKind::InvalidInput, "the old server is this process"));
        }
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            // It has ended.
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits until it has ended, and kills it when it has not after so long.
    pub fn see_off(&self, limit: Duration) -> io::Result<Ending> {
        /// A process that was killed ends, unless one of its files cannot be closed.
        const KILL_LIMIT: Duration = Duration::from_secs(5);
        if self.wait(limit) {
            return Ok(Ending::Ended);
        }
        self.kill()?;
        Ok(if self.wait(KILL_LIMIT) { Ending::Killed } else { Ending::Remains })
    }
}

impl AsFd for Peer {
    /// Readable once it has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// How the old process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It ended by itself, within its limit.
    Ended,
    /// Killed, as it had not ended within its limit.
    Killed,
    /// It was killed, but still exists, since one of its files cannot be closed. It no longer runs.
    Remains,
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use super::*;

    #[test]
    fn the_other_end_of_a_socket_is_a_process_with_fds() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap();
        assert!(peer.is_this_process());
        assert_eq!((peer.pid(), peer.user()), (std::process::id().cast_signed(), User::current()));
        let pulled = peer.pull(theirs.as_raw_fd()).unwrap();
        assert_ne!(pulled.as_raw_fd(), theirs.as_raw_fd());
        assert!(rustix::io::fcntl_getfd(&pulled).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn an_fd_that_is_not_there_is_named() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let error = Peer::of(&ours).unwrap().pull(999_999).unwrap_err();
        assert!(error.to_string().contains("fd 999999"), "{error}");
    }

    #[test]
    fn this_process_is_not_killed() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap();
        assert!(!peer.wait(Duration::ZERO));
        assert_eq!(peer.see_off(Duration::ZERO).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    /// A peer that is a child, which sleeps until it is killed.
    fn child_that_sleeps() -> (std::process::Child, Peer) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
        (child, Peer { pidfd, pid, user: User::current() })
    }

    #[test]
    fn a_process_that_does_not_end_is_killed() {
        let (mut child, peer) = child_that_sleeps();
        assert_eq!(peer.see_off(Duration::from_millis(10)).unwrap(), Ending::Killed);
        assert!(!child.wait().unwrap().success());
        assert_eq!(peer.see_off(Duration::from_millis(10)).unwrap(), Ending::Ended);
        assert_eq!(peer.pull(0).unwrap_err().kind(), ErrorKind::NotFound);
    }
}
