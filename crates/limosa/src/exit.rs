//! Exit codes: their meaning, and the code of each error.

use std::fmt;
use std::io::IsTerminal;

use limosa_protocol::Errno;
use serde::Serialize;

use crate::output::Output;

/// The part of every help text that documents the exit codes.
pub const HELP: &str = "\
Exit codes:
  0  done
  1  failed; what it was about is as it was before, unless the message says otherwise
  2  wrong usage
  3  refused: the device or the peer cannot do this, the two sides do not fit, or the peer proves nothing
  4  not reachable: no such device or peer, in use, not permitted, gone, or connection lost
  5  in doubt: the source is stopped and does not know whether the destination runs, or the snapshot is there
  6  damaged: a file, object or stream is truncated, altered, of an unknown version or another than expected
  7  cancelled: the move was called off by SIGINT, SIGTERM, SIGHUP, SIGQUIT or SIGXCPU, and undone
  8  done, but not all of it: what was moved, saved, loaded or set is, and something behind it failed, which the
     message names: --on-start, a report, standard output, or devices that do not start
With --json, standard output is one document also after a failure: code, message and, where there is one, report.";

/// How the command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    Failed = 1,
    Usage = 2,
    Refused = 3,
    Unreachable = 4,
    InDoubt = 5,
    Damaged = 6,
    Cancelled = 7,
    DoneBut = 8,
}

/// An error with the exit code that it is to give, for causes that have no type of their own.
#[derive(Debug)]
pub struct Exit {
    pub code: Code,
    pub message: String,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Exit {}

/// An error with this code and message.
pub fn error(code: Code, message: impl Into<String>) -> anyhow::Error {
    Exit { code, message: message.into() }.into()
}

/// The error for what is done and not undone by what failed behind it. `done` is what: "moved".
pub fn but(done: impl fmt::Display, failures: &[String]) -> anyhow::Error {
    error(Code::DoneBut, format!("{done}, but {}", failures.join("; ")))
}

/// An error with what else is known: the report of the move that failed.
#[derive(Debug)]
struct Reported {
    error: anyhow::Error,
    report: serde_json::Value,
}

impl fmt::Display for Reported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for Reported {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.error)
    }
}

/// This error with a report, for the document of `--json`.
pub fn reported(error: anyhow::Error, report: &impl Serialize) -> anyhow::Error {
    match serde_json::to_value(report) {
        Ok(report) => Reported { error, report }.into(),
        Err(_) => error,
    }
}

/// What `--json` prints of a failure.
#[derive(Serialize)]
struct Failure<'a> {
    code: u8,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    report: Option<&'a serde_json::Value>,
}

/// Says how the command failed: to people on standard error and, with `--json`, in a document. Returns the code.
pub fn tell(error: &anyhow::Error, out: &Output) -> Code {
    let (code, message) = (code(error), message(error));
    tracing::debug!(?code, ?error, "failed");
    let report = error.downcast_ref::<Reported>().map(|reported| &reported.report);
    out.failure(&format!("limosa: {message}"), &Failure { code: code as u8, message, report });
    code
}

/// Says what is wrong with the command line.
pub fn tell_usage(error: &clap::Error, out: &Output) -> Code {
    let text = error.render();
    let message = text.to_string().trim().trim_start_matches("error: ").to_owned();
    let shown = match std::io::stderr().is_terminal() {
        true => text.ansi().to_string(),
        false => text.to_string(),
    };
    out.failure(shown.trim_end(), &Failure { code: Code::Usage as u8, message, report: None });
    Code::Usage
}

/// The exit code of an error: that of the innermost cause that has one.
pub fn code(error: &anyhow::Error) -> Code {
    error.chain().filter_map(of_cause).last().unwrap_or(Code::Failed)
}

fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<Code> {
    if let Some(exit) = cause.downcast_ref::<Exit>() {
        return Some(exit.code);
    }
    if let Some(error) = cause.downcast_ref::<limosa_migrate::Error>() {
        return of_move(error);
    }
    let client = cause.downcast_ref::<limosa_client::Error>()?;
    Some(match client {
        error if is_in_use(error) => Code::Unreachable,
        // The session, or all of the device, is gone.
        limosa_client::Error::Refused { errno: Errno::ENODEV, .. } => Code::Unreachable,
        limosa_client::Error::Refused { .. } => Code::Refused,
        limosa_client::Error::Usage { .. } => Code::Usage,
        limosa_client::Error::Os { errno, .. } if unreachable(*errno) => Code::Unreachable,
        error if error.is_connection_lost() => Code::Unreachable,
        _ => Code::Failed,
    })
}

/// Whether an error of opening a device says that somebody else has it open. EINVAL is the kernel's answer to a
/// second opening of a cdev.
pub fn is_in_use(error: &limosa_client::Error) -> bool {
    use limosa_client::Error;
    match error {
        Error::Os { errno: Errno::EBUSY, .. } => true,
        Error::Refused { request, errno, .. } => match *errno {
            Errno::EBUSY => {
                ["BIND_IOMMUFD", "GROUP_SET_CONTAINER", "GROUP_GET_DEVICE_FD"].contains(&&**request)
            }
            Errno::EINVAL => request == "BIND_IOMMUFD",
            _ => false,
        },
        _ => false,
    }
}

fn unreachable(errno: Errno) -> bool {
    let unreachable = [
        Errno::ENOENT,
        Errno::EACCES,
        Errno::EPERM,
        Errno::ECONNREFUSED,
        // In use, unplugged, or bound to a driver that is none of VFIO's.
        Errno::EBUSY,
        Errno::ENODEV,
        Errno::ENXIO,
    ];
    unreachable.contains(&errno)
}

fn of_move(error: &limosa_migrate::Error) -> Option<Code> {
    use limosa_migrate::Error;
    use limosa_stream::{AbortCode, Damage};
    Some(match error {
        Error::Incompatible { .. } | Error::Vmm { .. } | Error::NotConverging { .. } => Code::Refused,
        Error::Unauthenticated { .. } | Error::Stream { damage: Damage::Unproven { .. }, .. } => {
            Code::Refused
        }
        Error::Aborted { code: AbortCode::Incompatible, .. } => Code::Refused,
        // It is in use, or was silent or not heard for too long.
        Error::Aborted { code: AbortCode::NotTaken | AbortCode::TimeLimit, .. } => Code::Unreachable,
        Error::Aborted { code: AbortCode::Cancelled, .. } | Error::Cancelled => Code::Cancelled,
        Error::Stream { .. } => Code::Damaged,
        Error::Snapshot { name, error, .. } => return of_place(name, error),
        Error::Link { .. }
        | Error::TimedOut { .. }
        | Error::Suspended { .. }
        | Error::Idle { .. }
        | Error::TookTooLong { .. } => Code::Unreachable,
        // The device's own answer is the next cause.
        _ => return None,
    })
}

/// The code of an error of a snapshot's place. Its user has to repair a file; a store may be reachable again later.
fn of_place(name: &str, error: &std::io::Error) -> Option<Code> {
    use std::io::ErrorKind;
    Some(match error.kind() {
        ErrorKind::AlreadyExists => Code::Refused,
        ErrorKind::InvalidData => Code::Damaged,
        ErrorKind::ConnectionAborted | ErrorKind::TimedOut => Code::Unreachable,
        ErrorKind::NotFound | ErrorKind::PermissionDenied if name.starts_with("s3://") => Code::Unreachable,
        _ => return None,
    })
}

/// The error and its causes, in one line; text that a cause repeats is left out.
pub fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !message.contains(&cause) {
            message = format!("{message}: {cause}");
        }
    }
    message
}
