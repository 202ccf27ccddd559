//! A user's command around a move, such as `--on-stop`: run by the shell, in a process group of its own. Its processes are found
//! by that group, and processes that leave the group by a variable in their environment.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use limosa_stream::MigrationId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, pidfd_send_signal, waitid,
};

use crate::process::{self, LOOK_EVERY};

/// The variable.
const VARIABLE: &str = "LIMOSA_HOOK";
/// How long a command may take, and its processes to be gone once they are killed.
pub const HOOK_MAX: Duration = Duration::from_secs(10);

/// The treatment of processes that a hook has started and that outlive it, if the hook fails or takes too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leftovers {
    /// They are killed and have ended when this returns, so that they do no more work.
    Killed,
    /// They are left running: one of them may be the guest.
    Left,
}

/// Runs a command to its end. Its output goes to standard error.
pub fn run(command: &str, leftovers: Leftovers) -> Result<(), String> {
    run_within(command, leftovers, HOOK_MAX)
}

fn run_within(command: &str, leftovers: Leftovers, limit: Duration) -> Result<(), String> {
    let stderr = io::stderr().as_fd().try_clone_to_owned().map_err(|error| error.to_string())?;
    let mark = MigrationId::random().map_err(|error| error.to_string())?.to_string();
    let child = Command::new("/bin/sh")
        .args(["-c", command])
        .env(VARIABLE, &mark)
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::from(stderr))
        .spawn()
        .map_err(|error| format!("it cannot be run: {error}"))?;
    let ended = ended(child, &mark, leftovers, limit).map_err(|error| error.to_string())?;
    match (ended, leftovers) {
        (Some(status), _) if status.success() => Ok(()),
        (Some(status), _) => Err(format!("it failed: {status}")),
        (None, Leftovers::Killed) => {
            Err(format!("it did not end within {limit:?}, and was killed with what it had started"))
        }
        (None, Leftovers::Left) => Err(format!("it did not end within {limit:?}, and was killed")),
    }
}

/// How the command ended; `None` if it had to be killed.
fn ended(
    mut child: Child,
    mark: &str,
    leftovers: Leftovers,
    limit: Duration,
) -> io::Result<Option<ExitStatus>> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
    let has_ended = wait(pid, limit)?;
    if leftovers == Leftovers::Killed && !(has_ended && succeeded(pid)?) {
        // The shell is not reaped yet, so that no other group can have its number.
        let _ = kill_process_group(pid, Signal::KILL);
        child.wait()?;
        kill_all(pid, &format!("{VARIABLE}={mark}"))?;
    } else if !has_ended {
        child.kill()?;
    }
    let status = child.wait()?;
    Ok(has_ended.then_some(status))
}

/// Waits for the end of the shell, which is not reaped by this. Returns whether it came in time.
fn wait(pid: Pid, limit: Duration) -> io::Result<bool> {
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
    Ok(rustix::io::retry_on_intr(|| poll(&mut fds, Some(&limit)))? > 0)
}

fn succeeded(pid: Pid) -> io::Result<bool> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    let status = rustix::io::retry_on_intr(|| waitid(WaitId::Pid(pid), options))?;
    Ok(status.and_then(|status| status.exit_status()) == Some(0))
}

/// Kills the remaining processes of a command, until none is left. The kernel notifies only the parents of processes of their end.
fn kill_all(group: Pid, mark: &str) -> io::Result<()> {
    let began = Instant::now();
    loop {
        let left = process::left_of(group, mark)?;
        let Some((pid, _)) = left.first() else { return Ok(()) };
        if began.elapsed() > HOOK_MAX {
            let what = format!("it was killed, and its process {pid} did not end within {HOOK_MAX:?}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
        for (_, process) in &left {
            // It may have ended since, and it is waited for.
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(300);
    const LONG: Duration = Duration::from_secs(60);

    /// A command that starts a process which outlives it, and writes that process's number to a file.
    struct Outliving {
        folder: tempfile::TempDir,
        command: String,
    }

    impl Outliving {
        fn new(then: &str) -> Outliving {
            Outliving::by("", then)
        }

        /// The process is started by this program.
        fn by(program: &str, then: &str) -> Outliving {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("pid");
            // It is a grandchild of the shell, which no signal to the shell reaches.
            let command = format!("({program} sleep 1000 & echo $! > {}); {then}", file.display());
            Outliving { folder, command }
        }

        fn is_alive(&self) -> bool {
            let pid = std::fs::read_to_string(self.folder.path().join("pid")).unwrap();
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
            stat.is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
        }

        fn end(&self) {
            let pid = std::fs::read_to_string(self.folder.path().join("pid")).unwrap();
            let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }

    #[test]
    fn a_command_that_took_too_long_went_on_in_the_processes_that_it_had_started() {
        for program in ["", "nohup", "setsid"] {
            let outliving = Outliving::by(program, "sleep 1000; true");
            let why = run_within(&outliving.command, Leftovers::Killed, SHORT).unwrap_err();
            assert!(!outliving.is_alive(), "{program}: {why}");
            assert!(why.contains("within 300ms") && why.contains("what it had started"), "{why}");
        }
    }

    #[test]
    fn a_command_that_failed_went_on_in_the_processes_that_it_had_started() {
        for program in ["", "setsid"] {
            let outliving = Outliving::by(program, "exit 3");
            let why = run_within(&outliving.command, Leftovers::Killed, LONG).unwrap_err();
            assert!(!outliving.is_alive() && why.contains("exit status: 3"), "{program}: {why}");
        }
    }

    #[test]
    fn what_a_command_started_stays_if_it_may_be_the_guest_or_the_command_succeeds() {
        for (then, leftovers) in [("exit 3", Leftovers::Left), ("exit 0", Leftovers::Killed)] {
            let outliving = Outliving::new(then);
            let ran = run_within(&outliving.command, leftovers, LONG);
            assert_eq!(ran.is_ok(), then == "exit 0", "{ran:?}");
            assert!(outliving.is_alive(), "{then}");
            outliving.end();
        }
    }

    #[test]
    fn a_command_that_was_killed_says_so() {
        let why = run_within("kill -9 $$", Leftovers::Killed, LONG).unwrap_err();
        assert!(why.contains("signal: 9"), "{why}");
    }
}
