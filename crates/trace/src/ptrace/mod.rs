//! A process and what it starts, by ptrace(2): calls on files of VFIO and iommufd and on data fds, and the messages on its
//! vfio-user sockets.
//!
//! Every thread stops before and after each of its system calls. Reads of its memory are bounded: a trace keeps no
//! more of a call than of a message ([`HEAD_BYTES_MAX`](crate::framer::HEAD_BYTES_MAX)), and of a transfer only framed bytes.

mod calls;
mod files;
mod os;
mod record;
mod sockets;
mod tracer;

use std::ffi::{CString, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use limosa_protocol::Errno;
use rustix::process::{Signal, pidfd_send_signal};

use crate::recorder::RecorderHandle;
use crate::seen::Seen;
use os::{Starting, Waiting, Waker};
use tracer::Tracer;

/// What is traced.
#[derive(Clone, Debug)]
pub enum Target {
    /// A process that runs.
    Process(i32),
    /// A program that is started, with its arguments; of these the first is its name.
    Command(Vec<OsString>),
}

/// How a trace ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// What was traced goes on without it.
    Detached,
    /// The process ended with this code.
    Exited(i32),
    /// A signal ended the process.
    Killed(i32),
}

/// Why nothing is traced.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such process.
    #[error("there is no process {0}")]
    NoProcess(i32),
    /// All of its threads have ended, and its parent has not waited for it yet.
    #[error("process {0} has ended already, and only its parent has not noticed; there is nothing to trace")]
    Ended(i32),
    /// The process is this one.
    #[error("process {0} is the one that traces; expected another one")]
    Itself(i32),
    /// Another process traces it already.
    #[error("process {pid} is traced by process {tracer} already; only one can: end that one first")]
    Traced {
        /// The process.
        pid: i32,
        /// The process that traces it.
        tracer: i32,
    },
    /// The system does not permit it.
    #[error(
        "process {0} may not be traced: that takes its user, or CAP_SYS_PTRACE; see ptrace_scope in ptrace(2) and the seccomp \
         filter of a container"
    )]
    NotPermitted(i32),
    /// There is no such program.
    #[error("there is no program {0:?} in PATH")]
    NoProgram(String),
    /// The program does not start.
    #[error(
        "{program} does not start: {}; expected a program that may be executed",
        std::io::Error::from_raw_os_error(errno.raw().cast_signed())
    )]
    NotStarted {
        /// The program.
        program: String,
        /// Why.
        errno: Errno,
    },
    /// A system call failed.
    #[error("{call} failed: {errno}")]
    Os {
        /// Which.
        call: &'static str,
        /// Why.
        errno: Errno,
    },
}

/// Ends a trace from another thread, and says what is traced.
#[derive(Clone, Debug, Default)]
pub struct Control(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    is_stopped: bool,
    tell: Option<OwnedFd>,
    command: Option<OwnedFd>,
}

impl Control {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is traced goes on without it.
    pub fn stop(&self) {
        let mut state = self.state();
        state.is_stopped = true;
        if let Some(tell) = &state.tell {
            // If there is no receiver, it has ended.
            let _ = rustix::io::write(tell, &[1]);
        }
    }

    /// Sends a signal to the command. `false` if it does not run, or nothing but a process is traced.
    pub fn signal(&self, signal: Signal) -> bool {
        self.state().command.as_ref().is_some_and(|command| pidfd_send_signal(command, signal).is_ok())
    }

    /// Wakes by this waker from now on. Returns whether the trace was stopped before.
    fn wake_by(&self, waker: &Waker) -> Result<bool, Error> {
        let tell = waker.tell().try_clone_to_owned();
        let mut state = self.state();
        state.tell = Some(tell.map_err(|_| Error::Os { call: "dup", errno: Errno::EMFILE })?);
        Ok(state.is_stopped)
    }
}

/// Traces on the calling thread, until what is traced has ended, [`Control::stop`], or no sink is left. In the last case a
/// command runs to its end. The calling thread must have no children of its own, and should end soon after: the kernel then
/// detaches the threads that could not be stopped in time.
pub fn trace(target: &Target, recorder: &RecorderHandle, control: &Control) -> Result<Ended, Error> {
    let waker = Waker::start(None).map_err(|errno| Error::Os { call: "fork", errno })?;
    let was_stopped = control.wake_by(&waker)?;
    let when_deaf = control.clone();
    recorder.when_deaf(move || when_deaf.stop());
    let mut tracer = Tracer::new(recorder, waker);
    if was_stopped {
        return Ok(Ended::Detached);
    }
    match target {
        Target::Process(pid) => {
            attach(&mut tracer, *pid)?;
            // A caller that waits for this can begin with what it wants to trace.
            let time_ns = recorder.now_ns();
            let threads = match tracer.threads() {
                1 => "its one thread".to_owned(),
                threads => format!("{threads} threads"),
            };
            let text = format!("is traced from here on, with {threads}");
            recorder.record(Seen::Note { time_ns, pid: u32::try_from(*pid).ok(), text });
            Ok(tracer.run(*pid))
        }
        Target::Command(words) => {
            let (pid, starting, program) = start(&mut tracer, words)?;
            let process = os::pidfd(pid).map_err(|errno| Error::Os { call: "pidfd_open", errno })?;
            control.state().command = Some(process);
            let ended = tracer.run(pid);
            match starting.failed() {
                Some(errno) => Err(Error::NotStarted { program, errno }),
                None => Ok(ended),
            }
        }
    }
}

fn attach(tracer: &mut Tracer<'_>, pid: i32) -> Result<(), Error> {
    let Some((process, traced_by)) = files::status(pid) else { return Err(Error::NoProcess(pid)) };
    if process == std::process::id().cast_signed() {
        return Err(Error::Itself(pid));
    }
    if traced_by != 0 {
        return Err(not_permitted(pid));
    }
    // New threads may be created meanwhile; those of a traced thread are traced.
    let (mut found, mut has_ended) = (true, false);
    while found {
        found = false;
        for tid in files::threads(process) {
            if tracer.has(tid) {
                continue;
            }
            match os::seize(tid) {
                Ok(()) => {
                    tracer.add(tid, process, true);
                    found = true;
                    // If it is gone, its end is awaited.
                    let _ = os::interrupt(tid);
                }
                // It has ended, or is traced as the child of a traced thread.
                Err(_) if !tracer.is_empty() => {}
                // The main thread may have ended while others run (ptrace(2): not permitted).
                Err(Errno::EPERM) if files::has_ended(tid) => has_ended = true,
                Err(Errno::EPERM) => return Err(not_permitted(pid)),
                Err(_) => {}
            }
        }
    }
    match (tracer.is_empty(), has_ended) {
        (false, _) => Ok(()),
        (true, true) => Err(Error::Ended(pid)),
        (true, false) => Err(Error::NoProcess(pid)),
    }
}

/// Why the system refuses to let a process be traced.
fn not_permitted(pid: i32) -> Error {
    match files::status(pid) {
        Some((_, traced_by)) if traced_by != 0 => {
            // It is one of the tracer's threads.
            let tracer = files::status(traced_by).map_or(traced_by, |(process, _)| process);
            Error::Traced { pid, tracer }
        }
        _ => Error::NotPermitted(pid),
    }
}

/// Creates a process for the command, which is traced from its first call on.
fn start(tracer: &mut Tracer<'_>, words: &[OsString]) -> Result<(i32, Starting, String), Error> {
    let name = words.first().cloned().unwrap_or_default();
    let shown = name.to_string_lossy().into_owned();
    let program = find(Path::new(&name)).ok_or_else(|| Error::NoProgram(shown.clone()))?;
    let string = |bytes: Vec<u8>| {
        let what = || Error::NotStarted { program: shown.clone(), errno: Errno::EINVAL };
        CString::new(bytes).map_err(|_| what())
    };
    let path = string(program.into_os_string().into_vec())?;
    let args: Result<Vec<_>, _> = words.iter().map(|word| string(word.as_bytes().to_vec())).collect();
    let environment: Result<Vec<_>, _> = std::env::vars_os()
        .map(|(name, value)| string([name.as_bytes(), b"=", value.as_bytes()].concat()))
        .collect();
    let waiting = Waiting::start(&path, &args?, &environment?)
        .map_err(|errno| Error::NotStarted { program: shown.clone(), errno })?;
    let pid = waiting.pid;
    os::seize(pid).map_err(|errno| match errno {
        Errno::EPERM => not_permitted(pid),
        errno => Error::Os { call: "ptrace", errno },
    })?;
    tracer.add(pid, pid, false);
    let _ = os::interrupt(pid);
    Ok((pid, waiting.go(), shown))
}

/// Finds a program as execvp(3) does.
fn find(name: &Path) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    if name.as_os_str().as_bytes().contains(&b'/') {
        return Some(name.to_owned());
    }
    let is_program = |path: &PathBuf| {
        path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(is_program)
}
