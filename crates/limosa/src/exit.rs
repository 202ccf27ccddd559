//! Exit codes: their meaning, and the code of each error.

use std::fmt;
use std::io;

use limosa_protocol::Errno;
use serde::Serialize;

use crate::output::Output;
use crate::terminal;

/// An exit code and what it says: the one list behind the help, the manual pages and `docs/command.md`.
pub struct Meaning {
    pub code: u8,
    pub meaning: &'static str,
    /// The outcome for the source of a move.
    pub source: &'static str,
}

const AS_BEFORE: &str = "runs as before";

/// Every exit code.
pub const MEANINGS: [Meaning; 11] = [
    Meaning { code: 0, meaning: "done", source: "stopped, the guest is elsewhere; after `save` as before" },
    Meaning {
        code: 1,
        meaning: "failed: a device, memory, a disk, the other side",
        source: "runs as before, unless the message says otherwise",
    },
    Meaning {
        code: 2,
        meaning: "wrong usage: the command line, or a file that an option names, is invalid",
        source: "not touched",
    },
    Meaning {
        code: 3,
        meaning: "refused: a device or the other side cannot do this, the two do not match, the other side sent no \
                  proof, the file or object exists already, a hook refused, the move does not converge",
        source: AS_BEFORE,
    },
    Meaning {
        code: 4,
        meaning: "not reachable: no such file, folder, device, program or peer; permission denied, in use, gone, connection \
                  lost, not authenticated",
        source: AS_BEFORE,
    },
    Meaning {
        code: 5,
        meaning: "in doubt: it is unknown whether the other side runs, or whether the snapshot exists; `limosa \
                  resolve` finds out",
        source: "**stopped**",
    },
    Meaning {
        code: 6,
        meaning: "damaged: a file, object or stream is truncated, altered, of an unknown version or not the expected \
                  one",
        source: AS_BEFORE,
    },
    Meaning {
        code: 7,
        meaning: "cancelled by SIGINT, SIGTERM, SIGHUP, SIGQUIT or SIGXCPU, and undone",
        source: AS_BEFORE,
    },
    Meaning {
        code: 8,
        meaning: "done, but a later step failed, which the message names: `--on-start`, a report, standard output, \
                  devices that do not start",
        source: "as with 0",
    },
    Meaning {
        code: 9,
        meaning: "done, with findings: `doctor` has warnings, or `bench compare` has differences",
        source: "not touched",
    },
    Meaning { code: 10, meaning: "not ready: `doctor` found an obstacle to a move", source: "not touched" },
];

/// The part of every help text that documents the exit codes.
pub fn help() -> String {
    let mut help = String::from("Exit codes:\n");
    for Meaning { code, meaning, .. } in &MEANINGS {
        help += &format!("  {code:<2} {}\n", meaning.replace('`', ""));
    }
    help + "With --json, standard output is one document also after a failure: code, message and, where there is one, report."
}

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
    Noteworthy = 9,
    NotReady = 10,
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

/// The error for a success that is followed by failures which do not undo it. `done` names it: "moved".
pub fn but(done: impl fmt::Display, failures: &[String]) -> anyhow::Error {
    error(Code::DoneBut, format!("{done}, but {}", failures.join("; ")))
}

/// An error with the report of the failed move.
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
    let shown = match terminal::is_coloured() {
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
    if let Some(error) = cause.downcast_ref::<io::Error>() {
        return of_path(error);
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

/// Whether an error of opening a device means that another process has it open. EINVAL is the kernel's answer to a
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
        // In use, unplugged, or bound to a driver that is not a VFIO driver.
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
        Error::Snapshot { error, .. } => return of_path(error),
        Error::Link { .. }
        | Error::TimedOut { .. }
        | Error::Suspended { .. }
        | Error::Idle { .. }
        | Error::TookTooLong { .. } => Code::Unreachable,
        // The device's own answer is the next cause.
        _ => return None,
    })
}

/// The code of an error about a path or an address, if the error says enough.
fn of_path(error: &io::Error) -> Option<Code> {
    use io::ErrorKind;
    Some(match error.kind() {
        ErrorKind::NotFound
        | ErrorKind::PermissionDenied
        | ErrorKind::NotADirectory
        | ErrorKind::IsADirectory
        | ErrorKind::InvalidFilename
        | ErrorKind::ConnectionAborted
        | ErrorKind::TimedOut => Code::Unreachable,
        ErrorKind::AlreadyExists => Code::Refused,
        ErrorKind::InvalidData => Code::Damaged,
        // A socket, or a device that does not exist.
        _ if error.raw_os_error() == i32::try_from(Errno::ENXIO.raw()).ok() => Code::Unreachable,
        _ => return None,
    })
}

/// The code of an error of a file that a command names itself in its message.
pub fn of_file(error: &io::Error) -> Code {
    of_path(error).unwrap_or(Code::Failed)
}

/// The error and its causes, in one line; text that a cause repeats is left out, and so is the name with which a cause begins as
/// the message does. In the end an option that helps, where there is one.
pub fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if message.contains(&cause) {
            continue;
        }
        let cause = match cause.split_once(": ") {
            Some((name, rest)) if begins_with_name(&message, name) => rest,
            _ => &cause,
        };
        message = format!("{message}: {cause}");
    }
    match error.chain().find_map(|cause| remedy(cause.downcast_ref()?)) {
        Some(remedy) => format!("{message}; {remedy}"),
        None => message,
    }
}

/// Whether a message begins with this name.
fn begins_with_name(message: &str, name: &str) -> bool {
    message.strip_prefix(name).is_some_and(|rest| rest.starts_with(": ") || rest.starts_with(' '))
}

/// The option of the command with which a move may succeed that failed with this error.
fn remedy(error: &limosa_migrate::Error) -> Option<&'static str> {
    use limosa_migrate::{Error, Obstacle};
    match error {
        Error::NotConverging { obstacle: Obstacle::Standstill { .. }, .. } | Error::StoodStill { .. } => {
            Some("--standstill allows a longer one")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of `docs/command.md`.
    fn table() -> String {
        let row =
            |Meaning { code, meaning, source }: &Meaning| format!("| {code} | {meaning} | {source} |\n");
        format!(
            "| code | meaning | the source |\n|---|---|---|\n{}",
            MEANINGS.iter().map(row).collect::<String>()
        )
    }

    #[test]
    fn the_documented_exit_codes_are_those_of_the_command() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/command.md");
        // A packaged crate has no pages beside it.
        let Ok(text) = std::fs::read_to_string(page) else { return };
        let table = table();
        assert!(text.contains(&table), "docs/command.md lacks this table:\n{table}");
    }

    #[test]
    fn a_name_was_said_by_the_message_and_by_its_cause() {
        let error = anyhow::anyhow!("net.sock: SET refused: EIO").context("net.sock: RUNNING -> STOP failed");
        assert_eq!(message(&error), "net.sock: RUNNING -> STOP failed: SET refused: EIO");
        let error =
            anyhow::anyhow!("net.sock: connecting: refused").context("net.sock cannot be opened (is it up?)");
        assert_eq!(message(&error), "net.sock cannot be opened (is it up?): connecting: refused");
        let error = anyhow::anyhow!("net.sock: gone").context("net.sock2 cannot be opened");
        assert_eq!(message(&error), "net.sock2 cannot be opened: net.sock: gone");
        let error = anyhow::anyhow!("disk.sock: SET refused").context("net.sock: STOP failed");
        assert_eq!(message(&error), "net.sock: STOP failed: disk.sock: SET refused");
    }

    #[test]
    fn every_code_is_documented_in_its_order() {
        let codes: Vec<u8> = MEANINGS.iter().map(|meaning| meaning.code).collect();
        assert_eq!(codes, (0..=Code::NotReady as u8).collect::<Vec<_>>());
    }

    #[test]
    fn one_cause_has_one_code_at_every_depth() {
        let of = |kind: io::ErrorKind| {
            let alone = anyhow::Error::from(io::Error::from(kind));
            let told = anyhow::Error::from(io::Error::from(kind)).context("x cannot be read");
            let saved =
                limosa_migrate::Error::Snapshot { name: "x".into(), doing: "reading it", error: kind.into() };
            [code(&alone), code(&told), code(&saved.into()), of_file(&kind.into())]
        };
        assert_eq!(of(io::ErrorKind::NotFound), [Code::Unreachable; 4]);
        assert_eq!(of(io::ErrorKind::PermissionDenied), [Code::Unreachable; 4]);
        assert_eq!(of(io::ErrorKind::AlreadyExists), [Code::Refused; 4]);
        assert_eq!(of(io::ErrorKind::StorageFull), [Code::Failed; 4]);
    }
}
