//! A new process that the old one starts in its place at SIGUSR2, with its own command line and the path by which it was started
//! itself, so that a version that was installed there since is used. It needs no right to attach to this process.

use std::ffi::OsString;
use std::fmt;
use std::os::fd::AsFd;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use limosa_switch_over::{Error, GiveLimits, GiveOptions, Given, Giver, give_to_child, start_child};
use limosa_vfio_user::server::ShutdownHandle;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// From the start of the process until it has said hello: it reads its command line and makes its devices meanwhile.
const HELLO_LIMIT: Duration = Duration::from_secs(60);
/// A process that has not taken over ends by itself within this time, or is killed.
const END_LIMIT: Duration = Duration::from_secs(2);

/// Why a new process does not serve.
pub enum Failed {
    NotStarted { program: OsString, error: std::io::Error },
    NotReplaced { pid: u32, error: Error, end: End },
}

/// The end of a process that did not take over.
pub enum End {
    Itself(ExitStatus),
    Killed,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failed::NotStarted { program, error } => {
                write!(f, "{} cannot be started: {error}", program.display())
            }
            Failed::NotReplaced { pid, error, end } => {
                write!(f, "{error}; the new process {pid} ")?;
                match end {
                    End::Itself(status) => write!(f, "has ended: {status}"),
                    End::Killed => write!(f, "had not ended, and was killed"),
                }
            }
        }
    }
}

/// Starts a new process, and hands over to it. Returns its number if it serves.
pub fn start_and_give(
    giver: &dyn Giver,
    options: &GiveOptions,
    stop: &ShutdownHandle,
) -> Result<(Given, u32), Failed> {
    let mut words = std::env::args_os();
    let program = words.next().unwrap_or_else(|| "limosa".into());
    let mut command = Command::new(&program);
    let (mut child, channel) =
        start_child(command.args(words)).map_err(|error| Failed::NotStarted { program, error })?;
    let pid = child.id();
    tracing::info!(pid, "SIGUSR2: a new process is started, which takes over");
    let limits = GiveLimits { hello: HELLO_LIMIT, ..options.limits };
    match give_to_child(channel, giver, &GiveOptions { limits, ..*options }, Some(stop.as_fd())) {
        Ok(given) => Ok((given, pid)),
        Err(error) => Err(Failed::NotReplaced { pid, error, end: end(&mut child) }),
    }
}

/// Waits for the end of a process that does not serve, and will not.
fn end(child: &mut Child) -> End {
    let ends = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).is_ok_and(|pidfd| {
        let limit = Timespec::try_from(END_LIMIT).unwrap_or_default();
        poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)).is_ok_and(|ready| ready > 0)
    });
    let killed = !ends && child.kill().is_ok();
    match child.wait() {
        Ok(status) if !killed => End::Itself(status),
        _ => End::Killed,
    }
}
