//! [`Descriptor`]: a descriptor of a process, named by a path in `/proc`. It is duplicated with `pidfd_getfd`,
//! which returns another descriptor of the same open file, with the access mode of that process. Opening the path
//! instead would reopen the file with this process's own rights: another process could then have any file read or
//! overwritten that it has opened with O_PATH, for which it needs no access to the file.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, fcntl_getfl, open, statx};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use crate::User;

/// A descriptor of a process: `/proc/PID/fd/N`, or `/proc/self/fd/N` and `/dev/fd/N`, one of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The process; `None` for this one.
    pid: Option<Pid>,
    fd: i32,
}

/// A descriptor that was borrowed from a process, which keeps its own. Both are of one open file: they share its position
/// and flags.
#[derive(Debug)]
pub struct Borrowed {
    fd: OwnedFd,
    /// Whether it can be read from.
    pub readable: bool,
    /// Whether it can be written to.
    pub writable: bool,
}

impl AsFd for Borrowed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Borrowed> for OwnedFd {
    fn from(borrowed: Borrowed) -> OwnedFd {
        borrowed.fd
    }
}

impl Descriptor {
    /// The descriptor that a name says, if it has exactly one of the forms. Links to it are followed by
    /// [`resolve`](crate::resolve).
    pub fn parse(name: &str) -> Option<Descriptor> {
        match name.strip_prefix("/dev/fd/") {
            Some(fd) => Some(Descriptor { pid: None, fd: number(fd)? }),
            None => {
                let (pid, fd) = name.strip_prefix("/proc/")?.split_once("/fd/")?;
                Descriptor::of(pid, fd)
            }
        }
    }

    /// Of a process as its folder in `/proc` is called.
    pub(crate) fn of(process: &str, fd: &str) -> Option<Descriptor> {
        let pid = match process {
            "self" | "thread-self" => None,
            process => Some(Pid::from_raw(number(process)?)?),
        };
        Some(Descriptor { pid, fd: number(fd)? })
    }

    /// Its process, as it is called in `/proc`.
    pub fn process(&self) -> String {
        self.pid.map_or("self".into(), |pid| pid.as_raw_nonzero().to_string())
    }

    /// Its number in its process.
    pub fn number(&self) -> i32 {
        self.fd
    }

    /// Duplicates it. `NotFound` if there is no such process or descriptor, `PermissionDenied` if this process may
    /// not access that one (ptrace(2)), `InvalidInput` if it was opened with O_PATH, which gives no access.
    pub fn borrow(&self) -> io::Result<Borrowed> {
        let (process, number) = (self.process(), self.fd);
        let failed = |kind: ErrorKind, what: String| io::Error::new(kind, what);
        let explained = |errno: Errno| match errno {
            Errno::SRCH | Errno::NOENT => {
                failed(ErrorKind::NotFound, format!("there is no process {process}"))
            }
            Errno::BADF => failed(ErrorKind::NotFound, format!("process {process} has no fd {number}")),
            Errno::PERM | Errno::ACCESS => failed(
                ErrorKind::PermissionDenied,
                match User::current() {
                    User::ROOT => format!(
                        "root may not borrow an fd of process {process} here: this process lacks CAP_SYS_PTRACE, or a \
                         container or a security module forbids it"
                    ),
                    _ => format!(
                        "no permission to borrow an fd of process {process}: run as root, or as its user where \
                         kernel.yama.ptrace_scope is 0 and the process may be dumped"
                    ),
                },
            ),
            errno => {
                let error = io::Error::from(errno);
                let what = format!("fd {number} of process {process} cannot be borrowed: {error}");
                failed(error.kind(), what)
            }
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = open(format!("/proc/{process}/fd"), flags, Mode::empty()).map_err(explained)?;
        let pidfd = pidfd_open(self.pid.unwrap_or_else(getpid), PidfdFlags::empty()).map_err(explained)?;
        let fd = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).map_err(explained)?;
        // The folder stays that of the process which had the number when it was opened, and has no more names once that
        // process is gone. So a process that was given the number in between is found out here, and so is one of another
        // PID namespace.
        if identity(&fd, "").map_err(explained)?
            != identity(&folder, &number.to_string()).map_err(explained)?
        {
            let what = format!("fd {number} of process {process} changed while it was borrowed");
            return Err(failed(ErrorKind::InvalidInput, what));
        }
        let flags = fcntl_getfl(&fd).map_err(explained)?;
        if flags.contains(OFlags::PATH) {
            let what = format!(
                "process {process} holds it by O_PATH, which gives no access to what is in it; expected a descriptor \
                 that is open for reading or writing"
            );
            return Err(failed(ErrorKind::InvalidInput, what));
        }
        let mode = flags & OFlags::ACCMODE;
        let (readable, writable) = (mode != OFlags::WRONLY, mode != OFlags::RDONLY);
        Ok(Borrowed { fd, readable, writable })
    }
}

/// The file that a descriptor, or a name in a folder, leads to. What is known of it does: a file system in user space is not
/// asked, as it might never answer.
fn identity(folder: &impl AsFd, name: &str) -> Result<(u32, u32, u64), Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = statx(folder, name, flags, StatxFlags::INO)?;
    Ok((found.stx_dev_major, found.stx_dev_minor, found.stx_ino))
}

/// A number as the kernel prints it: without sign or leading zeros.
fn number(text: &str) -> Option<i32> {
    let number: i32 = text.parse().ok()?;
    (number.to_string() == text && number >= 0).then_some(number)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn descriptors_of_processes_have_names() {
        let pid = |raw| Some(Pid::from_raw(raw).unwrap());
        assert_eq!(Descriptor::parse("/proc/17/fd/3"), Some(Descriptor { pid: pid(17), fd: 3 }));
        assert_eq!(Descriptor::parse("/proc/self/fd/0"), Some(Descriptor { pid: None, fd: 0 }));
        assert_eq!(Descriptor::parse("/dev/fd/10"), Some(Descriptor { pid: None, fd: 10 }));
        for name in [
            "",
            "/proc/",
            "/proc/17",
            "/proc/17/fd/",
            "/proc/17/fd/-1",
            "/proc/17/fd/03",
            "/proc/0/fd/1",
            "/proc/-1/fd/1",
            "/proc/x/fd/1",
            "/dev/fd/",
            "/dev/fd/x",
            "proc/17/fd/3",
            "/proc/17/fd/99999999999",
            "/proc/17/fdinfo/3",
        ] {
            assert_eq!(Descriptor::parse(name), None, "{name}");
        }
    }

    #[test]
    fn a_descriptor_is_borrowed_with_the_access_that_it_has() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "text").unwrap();
        let how = |read, write| File::options().read(read).write(write).open(&path).unwrap();
        for (read, write) in [(true, false), (false, true), (true, true)] {
            let file = how(read, write);
            let named = Descriptor { pid: Some(getpid()), fd: file.as_raw_fd() };
            let borrowed = named.borrow().unwrap();
            assert_eq!((borrowed.readable, borrowed.writable), (read, write));
            let mut text = String::new();
            let found = File::from(OwnedFd::from(borrowed)).read_to_string(&mut text);
            assert_eq!(found.is_ok(), read, "{found:?}");
        }
    }

    #[test]
    fn a_descriptor_that_gives_no_access_is_refused() {
        let path = open("/proc/self/status", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let refused = Descriptor { pid: None, fd: path.as_raw_fd() }.borrow().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        assert!(refused.to_string().contains("O_PATH"), "{refused}");
    }

    #[test]
    fn what_is_not_there_is_named() {
        let none = Descriptor { pid: None, fd: 999_999 }.borrow().unwrap_err();
        assert_eq!(none.kind(), ErrorKind::NotFound);
        assert!(none.to_string().contains("has no fd 999999"), "{none}");
        let none = Descriptor { pid: Pid::from_raw(i32::MAX), fd: 0 }.borrow().unwrap_err();
        assert!(none.to_string().contains("there is no process 2147483647"), "{none}");
    }
}
