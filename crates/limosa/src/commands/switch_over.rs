//! `limosa switch-over`: starts the process that replaces a server, and reports the result.
//!
//! The new server reports it in the document that `limosa serve --json` prints on its standard output: what it took over, or
//! why it did not. A new server that gives up or dies does not report the state of the old one, so the old one is asked. Another
//! implementation of a server prints no such document: it serves if the old one has ended, and it listens at the same path.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use limosa_switch_over::{Answer, Peer, ask};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use super::serve::Listening;
use crate::args;
use crate::exit::{self, Code};
use crate::new_file;
use crate::output::{Output, plain};
use crate::wrong_socket;

/// To connect to the old server.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// The old server says whether it serves within this time: more than a freeze and its end take together.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
/// A server that took the place of the old one listens within this time.
const OTHER_LIMIT: Duration = Duration::from_secs(5);
/// A new server prints its document within this time of the old one's end.
const DOCUMENT_LIMIT: Duration = Duration::from_secs(20);
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

/// A server that prints no document has taken the place of the old one.
#[derive(Serialize)]
struct Replaced {
    old_pid: i32,
    new_pid: u32,
}

/// The new server serves, whatever failed behind that.
fn serves_but(printed: anyhow::Result<()>, cannot: Option<String>) -> anyhow::Result<()> {
    let failures: Vec<_> =
        printed.err().map(|error| exit::message(&error)).into_iter().chain(cannot).collect();
    if failures.is_empty() { Ok(()) } else { Err(exit::but("the new server serves", &failures)) }
}

pub fn run(args: &args::SwitchOver, out: &Output) -> anyhow::Result<()> {
    let old = Old::find(&args.path)?;
    let mut new = New::start(args)?;
    let said = new.listen(&old, Instant::now() + args.limit);
    let why = match said {
        Ok(Said::Serves(listening)) => match &listening.took_over {
            Some(took_over) => {
                let printed = out.result(&listening, |to| took_over.print(to));
                let cannot = took_over
                    .takeover_failed
                    .as_ref()
                    .map(|error| format!("no other can replace it: {}", plain(error)));
                return serves_but(printed, cannot);
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
    // The process that took its place.
    let other = if serves == Some(false) { old.replaced_by() } else { None };
    let (old, new) = (known.old_pid, known.new_pid);
    if new_ended.is_none() && other.is_some_and(|pid| pid.unsigned_abs() == new) {
        let printed = out.result(&Replaced { old_pid: old, new_pid: new }, |to| {
            writeln!(to, "process {new} serves in place of process {old}, which has ended")
        });
        return serves_but(printed, None);
    }
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
            Answer::NoDoor(peer) => match wrong_socket::not_a_take_over(path) {
                Some(what) => {
                    let what = format!("{}: {what}; nothing was started", path.display());
                    Err(exit::error(Code::Unreachable, what))
                }
                None => refused(
                    peer,
                    "lets nobody take over here; expected the --takeover path of a server of this user",
                ),
            },
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

    /// The process that serves in place of the ended one. It listens here once it has noticed that end.
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

fn is_readable(fd: impl AsFd, until: Instant) -> bool {
    any_ready(&mut [PollFd::new(&fd, PollFlags::IN)], until)
}

fn any_ready(fds: &mut [PollFd<'_>], until: Instant) -> bool {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or_default();
        match poll(fds, Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            ready => return ready.is_ok_and(|ready| ready > 0),
        }
    }
}

/// An event while the new server takes over.
#[derive(Clone, Copy)]
enum Event {
    /// It prints something, or closes its output.
    Word,
    NewEnded,
    OldEnded,
}

/// The output of the new server so far.
#[derive(Default)]
struct Heard {
    bytes: Vec<u8>,
    /// Why the output is not a document, and cannot become one.
    foreign: Option<String>,
    /// The end was reached.
    is_over: bool,
}

impl Heard {
    /// Adds the next piece, or the end. Returns the document once it is complete.
    fn add(&mut self, piece: &[u8]) -> Option<Said> {
        self.is_over = piece.is_empty();
        if self.foreign.is_some() || piece.is_empty() {
            return None;
        }
        self.bytes.extend_from_slice(piece);
        match serde_json::Deserializer::from_slice(&self.bytes).into_iter().next() {
            Some(Ok(said)) => return Some(said),
            Some(Err(error)) if !error.is_eof() => {
                let start: String = String::from_utf8_lossy(&self.bytes).chars().take(80).collect();
                let what = "expected the document of limosa serve --json on standard output";
                self.foreign = Some(format!("{what}, found `{}`", plain(&start)));
            }
            _ if self.bytes.len() > DOCUMENT_BYTES_MAX => {
                self.foreign = Some("the new server's document is longer than 1 MiB".into());
            }
            _ => {}
        }
        None
    }

    /// Whether no document can come any more.
    fn is_done(&self) -> bool {
        self.is_over || self.foreign.is_some()
    }

    /// The reason for a missing document: the output that is not one, else `nothing`.
    fn why(&self, nothing: &str) -> String {
        self.foreign.clone().unwrap_or_else(|| nothing.to_owned())
    }
}

/// The process that is to replace it. It outlives this one.
struct New {
    child: Child,
    /// Readable once it has ended.
    ends: OwnedFd,
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
            let mut options = File::options();
            options.append(true).create(true);
            let opened = new_file::open(log, &mut options, OFlags::empty()).map_err(|error| {
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
        let ends = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
            .context("the new server's process cannot be waited for")?;
        Ok(New { child, ends, stdout })
    }

    /// The new server's document, or the reason that there is none. Other output is ignored until one of both servers has ended.
    fn listen(&mut self, old: &Old<'_>, until: Instant) -> Result<Said, String> {
        let mut heard = Heard::default();
        let (mut limit, mut lives, mut old_lives) = (until, true, true);
        loop {
            // A program that starts the new server and ends may leave its standard output to it.
            if heard.is_done() && !lives {
                return Err(heard.why(&self.how_it_ended()));
            }
            if heard.is_done() && !old_lives {
                return Err(heard.why("the new server closed its standard output without a word"));
            }
            let mut fds = Vec::new();
            let mut of = Vec::new();
            let mut watch = |fd, is_watched: bool, what| {
                if is_watched {
                    fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
                    of.push(what);
                }
            };
            watch(self.stdout.as_fd(), !heard.is_over, Event::Word);
            watch(self.ends.as_fd(), lives, Event::NewEnded);
            watch(old.peer.as_fd(), old_lives, Event::OldEnded);
            if !any_ready(&mut fds, limit) {
                return Err(heard.why("the new server has said nothing within --limit"));
            }
            let first = fds.iter().position(|fd| !fd.revents().is_empty());
            match first.map(|at| of[at]) {
                Some(Event::Word) => {
                    let mut piece = [0; 4096];
                    let count = self.stdout.read(&mut piece).unwrap_or(0);
                    if let Some(said) = heard.add(&piece[..count]) {
                        return Ok(said);
                    }
                }
                Some(Event::NewEnded) => lives = false,
                Some(Event::OldEnded) => {
                    old_lives = false;
                    limit = until.min(Instant::now() + DOCUMENT_LIMIT);
                }
                None => {}
            }
        }
    }

    fn how_it_ended(&mut self) -> String {
        let status = self.ended().map_or_else(String::new, |status| format!(": {status}"));
        format!("the new server said nothing and ended{status}")
    }

    /// Its status, if it ends by itself within a moment, as it has announced.
    fn ended(&mut self) -> Option<ExitStatus> {
        if let Ok(Some(status)) = self.child.try_wait() {
            return Some(status);
        }
        is_readable(&self.ends, Instant::now() + Duration::from_secs(2)).then(|| self.child.wait().ok())?
    }
}
