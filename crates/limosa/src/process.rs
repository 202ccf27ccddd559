//! Processes that are stopped with a guest, and how a later process of the command finds them again.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, test_kill_process};
use serde::{Deserialize, Serialize};

use crate::exit::{self, Code};

/// How long a process may take to stop.
const STOP_MAX: Duration = Duration::from_secs(10);
/// The interval at which a process is checked that was told to stop or to end. The kernel notifies only its parent.
pub const LOOK_EVERY: Duration = Duration::from_micros(200);

/// A process that is stopped with the guest. A later process with the same number is a different one.
pub struct Process {
    pid: i32,
    fd: OwnedFd,
    /// Whether it was told to stop here, and was not stopped before.
    stopped: AtomicBool,
}

/// The identity of a stopped process: no other process has its number and the same start time in the same boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    pub pid: i32,
    /// In clock ticks since the boot (`proc_pid_stat.5`: starttime).
    pub started: u64,
    pub boot: String,
}

impl Process {
    /// The process that a user named.
    pub fn open(pid: i32) -> anyhow::Result<Process> {
        let fails = |error: rustix::io::Errno| {
            let what = match error {
                rustix::io::Errno::SRCH => {
                    "there is no such process; expected the number of the one that runs the guest".to_owned()
                }
                rustix::io::Errno::PERM => format!("{error}; run limosa as its user or as root"),
                _ => error.to_string(),
            };
            exit::error(Code::Unreachable, format!("--stop-with {pid}: {what}"))
        };
        let number = Pid::from_raw(pid).ok_or(rustix::io::Errno::SRCH).map_err(fails)?;
        if number == rustix::process::getpid() {
            let what =
                format!("--stop-with {pid}: this is limosa itself; expected the process that runs the guest");
            return Err(exit::error(Code::Usage, what));
        }
        let fd = pidfd_open(number, PidfdFlags::empty()).map_err(fails)?;
        test_kill_process(number).map_err(fails)?;
        Ok(Process { pid, fd, stopped: AtomicBool::new(false) })
    }

    /// A process that was stopped by another process of the command.
    pub fn find(stopped: &Stopped) -> Result<Process, String> {
        let Stopped { pid, started, boot } = stopped;
        let gone = || format!("--stop-with {pid}: the process that was stopped with the guest is gone");
        let number = Pid::from_raw(*pid).ok_or_else(gone)?;
        let fd = pidfd_open(number, PidfdFlags::empty()).map_err(|_| gone())?;
        // It is examined after the descriptor was opened, which cannot belong to a later process.
        if started_at(*pid).ok() != Some(*started) || boot_id().ok().as_ref() != Some(boot) {
            return Err(gone());
        }
        Ok(Process { pid: *pid, fd, stopped: AtomicBool::new(true) })
    }

    /// Its number, for messages.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it was stopped here.
    pub fn was_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// The identity by which a later process of the command finds it.
    pub fn noted(&self) -> Result<Stopped, String> {
        let fails = |error: io::Error| format!("--stop-with {}: {error}", self.pid);
        let started = started_at(self.pid).map_err(fails)?;
        is_alive(&self.fd).map_err(fails)?;
        Ok(Stopped { pid: self.pid, started, boot: boot_id().map_err(fails)? })
    }

    /// Tells it to stop, unless it is stopped already.
    pub fn stop(&self) -> Result<(), String> {
        if self.is_stopped()? {
            return Ok(());
        }
        // Whatever the outcome of the signal, it will be undone.
        self.stopped.store(true, Ordering::Relaxed);
        self.signal(Signal::STOP)
    }

    /// Waits until it is stopped.
    pub fn wait_until_stopped(&self) -> Result<(), String> {
        let began = Instant::now();
        while !self.is_stopped()? {
            if began.elapsed() > STOP_MAX {
                return Err(format!("--stop-with {}: it did not stop within {STOP_MAX:?}", self.pid));
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// Resumes it, if it was stopped by [`Process::stop`]. After a failure it still counts as stopped.
    pub fn resume(&self) -> Result<(), String> {
        if self.was_stopped() {
            self.signal(Signal::CONT)?;
            self.stopped.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether it has ended.
    pub fn is_gone(&self) -> bool {
        is_alive(&self.fd).is_err()
    }

    fn signal(&self, signal: Signal) -> Result<(), String> {
        pidfd_send_signal(&self.fd, signal).map_err(|error| format!("--stop-with {}: {error}", self.pid))
    }

    /// Whether every one of its threads is stopped or gone (`proc_pid_stat.5`: state).
    pub fn is_stopped(&self) -> Result<bool, String> {
        let folder = PathBuf::from(format!("/proc/{}/task", self.pid));
        let gone = |error: io::Error| match hint_of_proc() {
            "" => format!("--stop-with {}: {error}; has it ended?", self.pid),
            hint => format!("--stop-with {}: {error}{hint}", self.pid),
        };
        for thread in std::fs::read_dir(folder).map_err(gone)? {
            // It may have ended since.
            let Some(fields) = fields(&thread.map_err(gone)?.path().join("stat")) else { continue };
            // A process that a debugger holds (`t`) may continue at any moment.
            if !matches!(fields.state, 'T' | 'Z' | 'X') {
                return Ok(false);
            }
        }
        // No other process has its number yet.
        is_alive(&self.fd).map_err(gone)?;
        Ok(true)
    }
}

/// What `/proc/PID/stat` says (`proc_pid_stat.5`).
struct Fields {
    state: char,
    group: i32,
    started: u64,
}

fn fields(path: &Path) -> Option<Fields> {
    // The name may have any bytes.
    let stat = std::fs::read(path).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?.chars().next()?;
    let group = fields.nth(1)?.parse().ok()?;
    let started = fields.nth(16)?.parse().ok()?;
    Some(Fields { state, group, started })
}

fn started_at(pid: i32) -> io::Result<u64> {
    let fields = fields(&PathBuf::from(format!("/proc/{pid}/stat")));
    fields.map(|fields| fields.started).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Limit on the bytes of an environment that are read.
const ENVIRONMENT_MAX: u64 = 4 << 20;

/// All processes that have not ended and are of this group, or have this variable with its value in the environment with which
/// their program was started.
pub fn left_of(group: Pid, variable: &str) -> io::Result<Vec<(i32, OwnedFd)>> {
    let mut left = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // Opened before /proc is read, so that the entries cannot be those of a later process with this PID.
        let Some(fd) = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else {
            continue;
        };
        let Some(found) = fields(&entry.path().join("stat")) else { continue };
        let is_of_group = found.group == group.as_raw_nonzero().get();
        let has_ended = matches!(found.state, 'Z' | 'X') || is_alive(&fd).is_err();
        if !has_ended && (is_of_group || has_variable(&entry.path().join("environ"), variable)) {
            left.push((pid, fd));
        }
    }
    Ok(left)
}

fn has_variable(environment: &Path, variable: &str) -> bool {
    let mut all = Vec::new();
    // That of another user may not be readable.
    let read = File::open(environment).and_then(|file| file.take(ENVIRONMENT_MAX).read_to_end(&mut all));
    read.is_ok() && all.split(|byte| *byte == 0).any(|found| found == variable.as_bytes())
}

/// The end of a message about a file in `/proc`, if there is none.
fn hint_of_proc() -> &'static str {
    match Path::new("/proc/self").exists() {
        true => "",
        false => "; /proc is not mounted here, mount it",
    }
}

/// The kernel's id of this boot.
pub fn boot_id() -> io::Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let read = std::fs::read_to_string(path);
    let id =
        read.map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}{}", hint_of_proc())))?;
    Ok(id.trim().to_owned())
}

/// An error when the process is gone.
fn is_alive(pidfd: &OwnedFd) -> io::Result<()> {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    match rustix::io::retry_on_intr(|| poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })))? {
        0 => Ok(()),
        _ => Err(io::Error::from(rustix::io::Errno::SRCH)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_the_group_and_the_start_of_a_process_are_read_whatever_its_name_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stat");
        let rest = "S 1 77 3 0 -1 4194560 1 0 0 0 2 3 0 0 20 0 1 0 123456 0 0";
        for name in ["sleep", "a) T 1 2", "a b", "\u{fffd}"] {
            std::fs::write(&path, format!("9 ({name}) {rest}")).unwrap();
            let found = fields(&path).unwrap();
            assert_eq!((found.state, found.group, found.started), ('S', 77, 123_456), "{name}");
        }
        std::fs::write(&path, b"9 (\xff\xfe) S 1 77").unwrap();
        assert!(fields(&path).is_none(), "it is cut off");
        assert!(started_at(std::process::id().try_into().unwrap()).unwrap() > 0);
    }
}
