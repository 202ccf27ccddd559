//! [`Process`]: a process of this host, and not only its number, which the kernel gives to another process later.

use std::io::{self, Error, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A process of this host.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    /// `None` where the kernel gives none: Linux before 5.3, and for the other end of a socket before 6.5.
    pidfd: Option<OwnedFd>,
    /// When it was started, in ticks since boot (`proc_pid_stat(5): starttime`). `None` where a pidfd says more.
    started: Option<u64>,
}

impl Process {
    /// The process that has this PID now, in this process's PID namespace. `NotFound` if there is none.
    pub fn with_pid(pid: i32) -> io::Result<Process> {
        let none = || Error::new(ErrorKind::NotFound, format!("there is no process {pid}"));
        let number = if pid > 0 { Pid::from_raw(pid) } else { None }.ok_or_else(none)?;
        let pidfd = match pidfd_open(number, PidfdFlags::empty()) {
            Ok(pidfd) => Some(pidfd),
            Err(Errno::NOSYS | Errno::PERM) => None,
            Err(Errno::SRCH | Errno::INVAL) => return Err(none()),
            Err(errno) => return Err(errno.into()),
        };
        let started = Some(started(pid).map_err(|_| none())?);
        let process = Process { pid, pidfd, started };
        if process.is_alive() { Ok(process) } else { Err(none()) }
    }

    /// The process that made the connection at the other end of a UNIX socket.
    ///
    /// Kernels before 6.5 have no SO_PEERPIDFD. There it is the process that has the peer's PID now.
    pub fn at_other_end(socket: impl AsFd) -> io::Result<Process> {
        let pid = socket_peercred(&socket)?.pid.as_raw_pid();
        match limosa_foreign_fd::peer_pidfd(&socket) {
            Ok(pidfd) => Ok(Process { pid, pidfd: Some(pidfd), started: None }),
            Err(Errno::NOPROTOOPT) => Ok(Process { pid, pidfd: None, started: Some(started(pid)?) }),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Its number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        match &self.pidfd {
            Some(pidfd) => {
                poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&Timespec::default())) == Ok(0)
            }
            None => started(self.pid).ok() == self.started,
        }
    }

    /// Whether both are one process, which has not ended.
    ///
    /// Two pidfds with the same PID whose processes are alive at the same time refer to one process, since a PID is not
    /// reused before its process has ended. Without pidfds the start times are compared.
    pub fn is(&self, other: &Process) -> bool {
        let by_pidfd = self.pidfd.is_some() && other.pidfd.is_some();
        self.pid == other.pid
            && (by_pidfd || self.started() == other.started())
            && self.is_alive()
            && other.is_alive()
    }

    fn started(&self) -> Option<u64> {
        self.started.or_else(|| started(self.pid).ok())
    }
}

fn started(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name of the program, in parentheses, can have both spaces and parentheses.
    let after_name = stat.rsplit_once(") ").map(|(_, rest)| rest);
    let field = after_name.and_then(|rest| rest.split(' ').nth(19)).and_then(|field| field.parse().ok());
    field.ok_or_else(|| Error::new(ErrorKind::InvalidData, format!("/proc/{pid}/stat is not understood")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::process::{Command, Stdio};

    use super::*;

    fn this() -> i32 {
        std::process::id() as i32
    }

    #[test]
    fn a_process_is_told_from_one_that_has_ended_and_from_others() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id() as i32;
        let process = Process::with_pid(pid).unwrap();
        let again = Process::with_pid(pid).unwrap();
        let itself = Process::with_pid(this()).unwrap();
        assert!(process.is(&again) && again.is(&process));
        assert!(!process.is(&itself));
        let by_time = Process { pid, pidfd: None, started: again.started };
        let of_another_time = Process { pid, pidfd: None, started: again.started.map(|ticks| ticks + 1) };
        assert!(process.is(&by_time) && by_time.is(&process));
        assert!(!process.is(&of_another_time) && !of_another_time.is_alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!process.is_alive() && !process.is(&again) && !by_time.is_alive());
        assert_eq!(Process::with_pid(pid).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn the_other_end_of_a_socket_is_the_process_that_made_it() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = Process::at_other_end(&one).unwrap();
        assert!(peer.is(&Process::with_pid(this()).unwrap()));
        assert_eq!(peer.pid(), this());
    }

    #[test]
    fn no_number_of_a_process_is_refused() {
        for wrong in [0, -1, i32::MIN, i32::MAX] {
            assert_eq!(Process::with_pid(wrong).unwrap_err().kind(), ErrorKind::NotFound, "{wrong}");
        }
    }
}
