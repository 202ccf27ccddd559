//! `limosa switch-over`: starts the process that takes a server's place, and says how that went.
//!
//! The new server tells it by the document that `limosa serve --json` prints on its standard output: what it took over, or
//! why it did not. A new server that gives up or dies says nothing of the old one, so that one is asked itself.

use std::io::{ErrorKind, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use limosa_switch_over::{Answer, Peer, ask};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use super::serve::Listening;
use crate::args;
use crate::exit::{self, Code};
use crate::output::{Output, plain};

/// To connect to the old server.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// The old server says whether it serves within this time: more than a freeze and its end take together.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// A server that took the place of the old one listens within this time.
const OTHER_LIMIT: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// The longest document of a new server.
const DOCUMENT_BYTES_MAX: usize = 1 << 20;

/// The document of the new server.
#[derive(Deserialize)]
#[serde(untagged)]
enum Said {
    Serves(Listening),
    Failed { code: u8, message: String },
}

/// The state of both processes after a failure, as far as it is known.
#[derive(Serialize)]
struct Known {
    old_pid: i32,
    /// Whether the old server serves; null if that is not known.
    old_serves: Option<bool>,
    new_pid: u32,
    /// The new server's exit code, if its process has ended by itself.
    new_code: Option<i32>,
}

pub fn run(args: &args::SwitchOver, out: &Output) -> anyhow::Result<()> {
    let old = Old::find(&args.path)?;
    let mut new = New::start(args)?;
    let said = new.listen(Instant::now() + args.limit);
    let why = match said {
        Ok(Said::Serves(listening)) => match &listening.took_over {
            Some(took_over) => {
                out.result(&listening, |to| took_over.print(to))?;
                return match &took_over.takeover_failed {
                    None => Ok(()),
                    Some(error) => Err(exit::but(
                        "the new server serves",
                        &[format!("no other can replace it: {}", plain(error))],
                    )),
                };
            }
            None => "the new server took over from nobody; expected --take-from in its command".to_owned(),
        },
        Ok(Said::Failed { code, message }) => {
            format!("the new server gave up with code {code}: {}", plain(&message))
        }
        Err(why) => why,
    };
    let new_ended = new.ended();
    let serves = old.serves();
    let known = Known {
        old_pid: old.peer.pid(),
        old_serves: serves,
        new_pid: new.child.id(),
        new_code: new_ended.and_then(|status| status.code()),
    };
    // The process that took its place, if that is another one than this command has started.
    let other = if serves == Some(false) && new_ended.is_some() { old.replaced_by() } else { None };
    let (old, new) = (known.old_pid, known.new_pid);
    let (code, what) = match (serves, new_ended) {
        (Some(true), Some(_)) => (Code::Failed, format!("the old server, process {old}, serves as before")),
        (Some(true), None) => (
            Code::InDoubt,
            format!(
                "the old server, process {old}, serves; process {new} has not ended and may still replace it"
            ),
        ),
        (Some(false), None) => (
            Code::InDoubt,
            format!("the old server, process {old}, serves no more; look whether process {new} does"),
        ),
        (Some(false), Some(_)) if other.is_some() => (
            Code::Refused,
            format!(
                "another switch-over came first: process {} serves in place of process {old}",
                other.unwrap_or_default()
            ),
        ),
        (Some(false), Some(_)) => (
            Code::InDoubt,
            format!("the old server, process {old}, serves no more, and neither does process {new}"),
        ),
        (None, _) => (
            Code::InDoubt,
            format!(
                "the old server, process {old}, lives and does not answer: it is in another switch-over, or hangs; look at its log"
            ),
        ),
    };
    Err(exit::reported(exit::error(code, format!("{what}: {why}")), &known))
}

/// The server that is to be replaced.
struct Old<'a> {
    path: &'a Path,
    peer: Peer,
}

impl Old<'_> {
    fn find(path: &Path) -> anyhow::Result<Old<'_>> {
        let answer = ask(path, CONNECT_LIMIT).map_err(|error| {
            let hint = match error.kind() {
                ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                    "; expected a server with --takeover and this path"
                }
                ErrorKind::PermissionDenied => "; run this as the server's user or as root",
                _ => "",
            };
            exit::error(Code::Unreachable, format!("{}: {error}{hint}", path.display()))
        })?;
        let refused = |peer: Peer, what: &str| {
            let (path, pid) = (path.display(), peer.pid());
            Err(exit::error(Code::Unreachable, format!("{path}: process {pid} {what}; nothing was started")))
        };
        match answer {
            Answer::Serves(peer) => Ok(Old { path, peer }),
            Answer::NoDoor(peer) => refused(
                peer,
                "lets nobody take over here; expected the --takeover path of a server of this user, not a device's socket",
            ),
            Answer::Silent(peer) => refused(
                peer,
                "does not answer: it is in another switch-over, or hangs; try again when that is over",
            ),
        }
    }

    /// Whether it serves. A server that does, and has finished or undone its last switch-over, greets every client that
    /// connects. A server that was replaced ends.
    fn serves(&self) -> Option<bool> {
        let until = Instant::now() + ANSWER_LIMIT;
        if self.greets(until) {
            return Some(true);
        }
        let left = until.saturating_duration_since(Instant::now());
        self.peer.wait(left).then_some(false)
    }

    fn greets(&self, until: Instant) -> bool {
        let left = until.saturating_duration_since(Instant::now());
        // Another server may listen there by now.
        matches!(ask(self.path, left), Ok(Answer::Serves(peer)) if peer.pid() == self.peer.pid())
    }

    /// The process that serves in place of one that has ended. It listens here once it has seen that end.
    fn replaced_by(&self) -> Option<i32> {
        let until = Instant::now() + OTHER_LIMIT;
        loop {
            match ask(self.path, until.saturating_duration_since(Instant::now())) {
                Ok(Answer::Serves(peer)) if peer.pid() != self.peer.pid() => return Some(peer.pid()),
                _ if Instant::now() >= until => return None,
                _ => std::thread::sleep(LOOK_EVERY),
            }
        }
    }
}

fn is_readable(fd: impl std::os::fd::AsFd, until: Instant) -> bool {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or_default();
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            ready => return ready.is_ok_and(|ready| ready > 0),
        }
    }
}

/// The process that is to take its place. It outlives this one.
struct New {
    child: Child,
    stdout: ChildStdout,
}

impl New {
    fn start(args: &args::SwitchOver) -> anyhow::Result<New> {
        let program = &args.command[0];
        let mut command = Command::new(program);
        command.args(&args.command[1..]);
        let has = |option: &str| {
            let with_value = format!("{option}=");
            args.command
                .iter()
                .any(|arg| arg.to_str().is_some_and(|arg| arg == option || arg.starts_with(&with_value)))
        };
        if !has("--take-from") {
            command.arg("--take-from").arg(&args.path);
        }
        if !has("--json") {
            command.arg("--json");
        }
        if let Some(log) = &args.log {
            let opened = std::fs::File::options().append(true).create(true).open(log).map_err(|error| {
                let what = format!(
                    "--log {}: {error}; expected a file to append to; nothing was started",
                    log.display()
                );
                exit::error(Code::Unreachable, what)
            })?;
            command.stderr(opened);
        }
        let started = command
            // A signal from the terminal, which ends this command, does not reach it.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = started.map_err(|error| {
            exit::error(
                Code::Failed,
                format!("{} cannot be started: {error}; nothing has changed", program.display()),
            )
        })?;
        let stdout = child.stdout.take().context("the new server has no standard output")?;
        Ok(New { child, stdout })
    }

    /// Its document; why there is none.
    fn listen(&mut self, until: Instant) -> Result<Said, String> {
        let mut document = Vec::new();
        let mut piece = [0; 4096];
        loop {
            if !is_readable(&self.stdout, until) {
                return Err("the new server has said nothing within --limit".into());
            }
            let count = self.stdout.read(&mut piece).unwrap_or(0);
            document.extend_from_slice(&piece[..count]);
            match serde_json::Deserializer::from_slice(&document).into_iter().next() {
                Some(Ok(said)) => return Ok(said),
                Some(Err(error)) if !error.is_eof() => {
                    let start = String::from_utf8_lossy(&document);
                    let start: String = start.chars().take(80).collect();
                    return Err(format!(
                        "expected the document of limosa serve --json on standard output, found `{}`",
                        plain(&start)
                    ));
                }
                _ if count == 0 => return Err(self.how_it_ended()),
                _ if document.len() > DOCUMENT_BYTES_MAX => {
                    return Err("the new server's document is longer than 1 MiB".into());
                }
                _ => {}
            }
        }
    }

    fn how_it_ended(&mut self) -> String {
        match self.ended() {
            Some(status) => format!("the new server said nothing and ended: {status}"),
            None => "the new server closed its standard output without a word".into(),
        }
    }

    /// Its status, if it ends by itself in a moment: it has said that it does.
    fn ended(&mut self) -> Option<ExitStatus> {
        if let Ok(Some(status)) = self.child.try_wait() {
            return Some(status);
        }
        let pid = rustix::process::Pid::from_child(&self.child);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()?;
        is_readable(&pidfd, Instant::now() + Duration::from_secs(2)).then(|| self.child.wait().ok())?
    }
}
