//! The machine around the devices, as far as the command can stop and start it: processes by signals, anything else by
//! commands of the user's.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use limosa_migrate::Vmm;
use limosa_stream::MigrationId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, test_kill_process};
use serde::{Deserialize, Serialize};

use crate::args::{Starting, Stopping};
use crate::exit::{self, Code};
use crate::moves::Sending;

/// How long a process may take to stop, or a command to end.
const STOP_MAX: Duration = Duration::from_secs(10);
/// How often a process that is told to stop is looked at. The kernel tells nobody but its parent.
const LOOK_EVERY: Duration = Duration::from_micros(200);

/// The guest's machine on one side.
#[derive(Default)]
pub struct Guest<'a> {
    processes: Vec<Process>,
    on_stop: Option<&'a str>,
    on_resume: Option<&'a str>,
    on_start: Option<&'a str>,
    noting: Option<Sending>,
    /// What would be said if the guest were to go on: processes that were stopped and are no more.
    lost: Vec<String>,
    failed: Mutex<Vec<String>>,
}

impl<'a> Guest<'a> {
    /// On the source. Nothing is stopped yet.
    pub fn source(stopping: &'a Stopping, noting: Option<Sending>) -> anyhow::Result<Guest<'a>> {
        let processes =
            stopping.stop_with.iter().map(|pid| Process::open(*pid)).collect::<anyhow::Result<_>>()?;
        let (on_stop, on_resume) = (stopping.on_stop.as_deref(), stopping.on_resume.as_deref());
        Ok(Guest { processes, on_stop, on_resume, noting, ..Guest::default() })
    }

    /// On a source whose process is gone: those that it stopped, and how a user lets the guest go on that was stopped by
    /// a command.
    pub fn stopped_before(stopped: &[Stopped], on_resume: Option<&'a str>) -> Guest<'a> {
        let mut guest = Guest { on_resume, ..Guest::default() };
        for stopped in stopped {
            match Process::find(stopped) {
                Ok(process) => guest.processes.push(process),
                Err(why) => guest.lost.push(why),
            }
        }
        guest
    }

    /// The processes that stand still with the guest.
    fn stopped(&self) -> impl Iterator<Item = &Process> {
        self.processes.iter().filter(|process| process.stopped.load(Ordering::Relaxed))
    }

    /// On the destination.
    pub fn destination(starting: &'a Starting) -> Guest<'a> {
        Guest { on_start: starting.on_start.as_deref(), ..Guest::default() }
    }

    /// What could not be done when it was too late to call the move off.
    pub fn failures(&self) -> Vec<String> {
        std::mem::take(&mut self.failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// What a person has to see to when the move is in doubt, for the end of a sentence.
    pub fn what_stays_stopped(&self) -> String {
        let stopped: Vec<_> = self.stopped().map(|process| process.pid.to_string()).collect();
        match stopped.as_slice() {
            [] => String::new(),
            pids => format!(
                "; with it process {} stays stopped, and is set going by `limosa resolve` if the move is undone, or by \
                 `kill -CONT`",
                pids.join(", ")
            ),
        }
    }

    fn too_late(&self, what: &str, command: &str, why: &str) {
        let failed = format!("{what} `{command}`: {why}");
        self.failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(failed);
    }
}

impl Vmm for Guest<'_> {
    fn stop(&self) -> Result<(), String> {
        if let Some(command) = self.on_stop {
            run(command).map_err(|why| format!("--on-stop `{command}`: {why}"))?;
        }
        // All are told before one is waited for.
        self.processes.iter().try_for_each(Process::stop)?;
        self.processes.iter().try_for_each(Process::wait_until_stopped)
    }

    fn committing(&self, id: MigrationId) -> Result<(), String> {
        let Some(noting) = &self.noting else { return Ok(()) };
        let stopped = self.stopped().map(Process::noted).collect::<Result<_, _>>()?;
        noting.note(id, stopped, self.on_stop.map(str::to_owned)).map(drop)
    }

    fn resume(&self) {
        self.failed
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .extend(self.lost.iter().cloned());
        for process in &self.processes {
            if let Err(why) = process.resume() {
                self.too_late("--stop-with", &process.pid.to_string(), &format!("it stays stopped: {why}"));
            }
        }
        if let Some(command) = self.on_resume
            && let Err(why) = run(command)
        {
            self.too_late("--on-resume", command, &format!("{why}; the guest may stand still"));
        }
    }

    fn start(&self) {
        if let Some(command) = self.on_start
            && let Err(why) = run(command)
        {
            self.too_late("--on-start", command, &format!("{why}; the devices run here, the guest may not"));
        }
    }
}

/// Runs a user's command to its end. What it prints goes to standard error.
fn run(command: &str) -> Result<(), String> {
    let stderr = io::stderr().as_fd().try_clone_to_owned().map_err(|error| error.to_string())?;
    let child = Command::new("/bin/sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        .stdout(Stdio::from(stderr))
        .spawn()
        .map_err(|error| format!("it cannot be run: {error}"))?;
    match ended(child).map_err(|error| error.to_string())? {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(format!("it failed: {status}")),
        None => Err(format!("it did not end within {STOP_MAX:?}, and was killed")),
    }
}

/// How it ended; `None` if it had to be killed.
fn ended(mut child: Child) -> io::Result<Option<std::process::ExitStatus>> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pidfd = pidfd_open(pid.ok_or(io::ErrorKind::InvalidData)?, PidfdFlags::empty())?;
    let limit = Timespec::try_from(STOP_MAX).map_err(io::Error::other)?;
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    if rustix::io::retry_on_intr(|| poll(&mut fds, Some(&limit)))? == 0 {
        child.kill()?;
        child.wait()?;
        return Ok(None);
    }
    child.wait().map(Some)
}

/// A process that is stopped with the guest, and no other one that comes to have its number.
struct Process {
    pid: i32,
    fd: OwnedFd,
    /// Whether it was told to stop here, and did not stand still before.
    stopped: AtomicBool,
}

impl Process {
    fn open(pid: i32) -> anyhow::Result<Process> {
        let fails = |error: rustix::io::Errno| {
            let hint = match error {
                rustix::io::Errno::SRCH => "; there is no such process",
                rustix::io::Errno::PERM => "; run limosa as its user or as root",
                _ => "",
            };
            exit::error(Code::Unreachable, format!("--stop-with {pid}: {error}{hint}"))
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

    /// One that was stopped by another process of the command.
    fn find(stopped: &Stopped) -> Result<Process, String> {
        let Stopped { pid, started, boot } = stopped;
        let gone = || format!("--stop-with {pid}: the process that was stopped with the guest is gone");
        let number = Pid::from_raw(*pid).ok_or_else(gone)?;
        let fd = pidfd_open(number, PidfdFlags::empty()).map_err(|_| gone())?;
        // It is looked at after the descriptor is had, which is that of no later process.
        if started_at(*pid).ok() != Some(*started) || boot_id().ok().as_ref() != Some(boot) {
            return Err(gone());
        }
        Ok(Process { pid: *pid, fd, stopped: AtomicBool::new(true) })
    }

    /// By what a later process of the command finds it.
    fn noted(&self) -> Result<Stopped, String> {
        let fails = |error: io::Error| format!("--stop-with {}: {error}", self.pid);
        let started = started_at(self.pid).map_err(fails)?;
        test_kill_process_by(&self.fd).map_err(fails)?;
        Ok(Stopped { pid: self.pid, started, boot: boot_id().map_err(fails)? })
    }

    fn stop(&self) -> Result<(), String> {
        // One that stands still already is left so.
        if self.is_stopped()? {
            return Ok(());
        }
        self.signal(Signal::STOP)?;
        self.stopped.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn wait_until_stopped(&self) -> Result<(), String> {
        let began = Instant::now();
        while !self.is_stopped()? {
            if began.elapsed() > STOP_MAX {
                return Err(format!("--stop-with {}: it did not stop within {STOP_MAX:?}", self.pid));
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), String> {
        match self.stopped.swap(false, Ordering::Relaxed) {
            true => self.signal(Signal::CONT),
            false => Ok(()),
        }
    }

    fn signal(&self, signal: Signal) -> Result<(), String> {
        pidfd_send_signal(&self.fd, signal).map_err(|error| format!("--stop-with {}: {error}", self.pid))
    }

    /// Whether every one of its threads stands still or is gone (`proc_pid_stat.5`: state).
    fn is_stopped(&self) -> Result<bool, String> {
        let folder = PathBuf::from(format!("/proc/{}/task", self.pid));
        let gone = |error: io::Error| format!("--stop-with {}: {error}; has it ended?", self.pid);
        for thread in std::fs::read_dir(folder).map_err(gone)? {
            let stat = match std::fs::read_to_string(thread.map_err(gone)?.path().join("stat")) {
                Ok(stat) => stat,
                // The thread has ended.
                Err(_) => continue,
            };
            // One that a debugger holds, `t`, may go on at any moment. The name before the state is in parentheses, and
            // may have any characters.
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            if !matches!(state, Some('T' | 'Z' | 'X')) {
                return Ok(false);
            }
        }
        // Nobody else has its number yet.
        test_kill_process_by(&self.fd).map_err(gone)?;
        Ok(true)
    }
}

/// A process that stands still: no other one has its number and began at the same time since the same boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    pub pid: i32,
    /// In clock ticks since the boot (`proc_pid_stat.5`: starttime).
    pub started: u64,
    pub boot: String,
}

fn started_at(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may have any characters; starttime is the 20th field behind it.
    let field = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(19));
    field.and_then(|ticks| ticks.parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// An error when the process is gone.
fn test_kill_process_by(pidfd: &OwnedFd) -> io::Result<()> {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    match rustix::io::retry_on_intr(|| poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })))? {
        0 => Ok(()),
        _ => Err(io::Error::from(rustix::io::Errno::SRCH)),
    }
}
