//! `limosa trace`: the requests of a VMM to its devices, live.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use anyhow::Context;
use limosa_host::SocketAccess;
use limosa_trace::proxy::{self, Proxy, StopHandle};
use limosa_trace::ptrace::{self, Control, Ended, Target};
use limosa_trace::recorder::{Failure, Recorder, Sink};
use limosa_trace::sink::{Json, Lines, Pcapng, Statistics, StatisticsHandle};
use rustix::fs::OFlags;

use crate::args;
use crate::commands::serve;
use crate::exit::{self, Code};
use crate::new_file;
use crate::open::Opening;
use crate::output::Output;
use crate::signals;

pub fn run(args: &args::Trace, opening: Opening, out: &Output) -> anyhow::Result<()> {
    let trace = Trace::begin(args, out)?;
    match (&args.proxy[..], args.pid) {
        ([front, back], _) => between(front, back, args, opening, trace, out),
        (_, Some(pid)) => process(pid, trace, out),
        (_, None) => command(&args.command, trace, out),
    }
}

/// A proxy.
fn between(
    front: &Path,
    back: &Path,
    args: &args::Trace,
    opening: Opening,
    trace: Trace,
    out: &Output,
) -> anyhow::Result<()> {
    serve::more_fds();
    let options = proxy::Options {
        access: SocketAccess { mode: args.mode, group: args.group },
        connect_limit: opening.limit,
        servers: opening.servers.to_vec(),
    };
    // A signal that comes while the socket is made waits for it, and removes it.
    let stop = Arc::new(OnceLock::<StopHandle>::new());
    let at_signal = Arc::clone(&stop);
    signals::on_end(move || at_signal.wait().stop())?;
    let proxy = Proxy::bind(front, back, options, trace.recorder.handle())
        .map_err(|error| cannot_stand_between(front, back, &error))?;
    stop.get_or_init(|| proxy.stop_handle());
    let listening = format!("listening on {}", front.display());
    match trace.has_stdout {
        true => out.say_aside(&listening),
        false => out.say(&listening),
    }
    let served = proxy.serve().context("cannot serve");
    let ended = trace.end(out);
    served.and(ended)
}

/// A running process, which continues after the end of this one.
fn process(pid: i32, trace: Trace, out: &Output) -> anyhow::Result<()> {
    let control = Control::default();
    let stop = control.clone();
    signals::on_end(move || stop.stop())?;
    let traced = ptrace::trace(&Target::Process(pid), &trace.recorder.handle(), &control);
    let ended = trace.end(out);
    traced.map_err(cannot_trace)?;
    ended
}

/// A program; this process ends as the program ends.
fn command(words: &[OsString], trace: Trace, out: &Output) -> anyhow::Result<()> {
    let control = Control::default();
    let at_signal = control.clone();
    signals::pass_on(move |signal| {
        // If it has ended, processes that it started are left.
        if !at_signal.signal(signal) {
            at_signal.stop();
        }
    })?;
    let traced = ptrace::trace(&Target::Command(words.to_vec()), &trace.recorder.handle(), &control);
    let written = trace.end(out);
    let ended = traced.map_err(cannot_trace)?;
    written?;
    match ended {
        Ended::Exited(0) => Ok(()),
        ended => signals::end_as(ended),
    }
}

fn cannot_trace(error: ptrace::Error) -> anyhow::Error {
    let code = match error {
        ptrace::Error::Itself(_) => Code::Usage,
        ptrace::Error::NoProcess(_)
        | ptrace::Error::Ended(_)
        | ptrace::Error::Traced { .. }
        | ptrace::Error::NotPermitted(_)
        | ptrace::Error::NoProgram(_) => Code::Unreachable,
        ptrace::Error::NotStarted { errno, .. } => {
            exit::of_file(&io::Error::from_raw_os_error(errno.raw().cast_signed()))
        }
        _ => Code::Failed,
    };
    exit::error(code, error.to_string())
}

/// The outputs of a trace, and their failures.
struct Trace {
    recorder: Recorder,
    statistics: Option<StatisticsHandle>,
    /// Standard output is the traced command's, or the capture's.
    has_stdout: bool,
}

impl Trace {
    fn begin(args: &args::Trace, out: &Output) -> anyhow::Result<Trace> {
        let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
        let is_command = !args.command.is_empty();
        let is_piped = args.pcap.as_deref() == Some(Path::new("-"));
        if is_piped {
            refuse_stdout(is_command)?;
        }
        let pcap = if is_piped { &None } else { &args.pcap };
        let [output, pcap] = create([&args.output, pcap])?;
        match output {
            Some((name, file)) => sinks.push(text(out, name, file)),
            None if args.count || is_piped => {}
            // Standard output is the command's.
            None if is_command => sinks.push(text(out, "standard error".into(), io::stderr())),
            None => sinks.push(text(out, "standard output".into(), io::stdout())),
        }
        if let Some((name, file)) = pcap {
            let pcap = Pcapng::new(name.clone(), file).with_context(|| name)?;
            sinks.push(Box::new(pcap));
        }
        if is_piped {
            let name = "standard output";
            sinks.push(Box::new(Pcapng::new(name, io::stdout()).context(name)?));
        }
        let statistics = args.count.then(|| {
            let (sink, handle) = Statistics::new();
            sinks.push(Box::new(sink));
            handle
        });
        let recorder = Recorder::start(sinks, |failure| {
            if !is_enough(failure) {
                tracing::warn!("{failure}; the trace goes on without it");
            }
        });
        let recorder = recorder.context("no thread to write the trace on")?;
        Ok(Trace { recorder, statistics, has_stdout: is_command || is_piped })
    }

    /// Writes what is left, and prints the statistics.
    fn end(self, out: &Output) -> anyhow::Result<()> {
        let failures = self.recorder.finish();
        let mut failures: Vec<_> =
            failures.iter().filter(|failure| !is_enough(failure)).map(ToString::to_string).collect();
        if let Some(statistics) = self.statistics {
            let table = statistics.table();
            if self.has_stdout {
                let text = if out.json { serde_json::to_string(&table)? + "\n" } else { table.text() };
                let written = io::stderr().write_all(text.as_bytes());
                let failed = written.err().filter(|error| error.kind() != io::ErrorKind::BrokenPipe);
                failures.extend(failed.map(|error| format!("standard error: {error}")));
            } else {
                let written = out.line(&table, |to| to.write_all(table.text().as_bytes()));
                failures.extend(written.err().map(|error| exit::message(&error)));
            }
        }
        if failures.is_empty() { Ok(()) } else { Err(exit::but("traced", &failures)) }
    }
}

/// A capture is for a program that reads it, and has standard output for itself.
fn refuse_stdout(is_command: bool) -> anyhow::Result<()> {
    let why = match (is_command, io::stdout().is_terminal()) {
        (true, _) => "standard output is the command's",
        (_, true) => "standard output is a terminal",
        (false, false) => return Ok(()),
    };
    Err(exit::error(Code::Usage, format!("--pcap -: {why}; name a file")))
}

/// Whether the reader of the trace has closed its end.
fn is_enough(failure: &Failure) -> bool {
    failure.error.kind() == io::ErrorKind::BrokenPipe
}

fn text(out: &Output, name: String, to: impl Write + Send + 'static) -> Box<dyn Sink> {
    if out.json { Box::new(Json::new(name, to)) } else { Box::new(Lines::new(name, to)) }
}

/// The files of --output and --pcap with their names, truncated. One file for both is refused.
fn create(paths: [&Option<PathBuf>; 2]) -> anyhow::Result<[Option<(String, File)>; 2]> {
    let mut files = [None, None];
    let mut known = Vec::new();
    for (file, path) in files.iter_mut().zip(paths) {
        let Some(path) = path else { continue };
        let name = path.display().to_string();
        let opened = open(path)?;
        let found = opened.metadata().with_context(|| name.clone())?;
        let is_same = known.contains(&(found.dev(), found.ino()));
        if found.is_file() && is_same {
            let what = format!("{name} is the file of --output already; --pcap takes another one");
            return Err(exit::error(Code::Usage, what));
        }
        known.push((found.dev(), found.ino()));
        *file = Some((name, opened));
    }
    for (name, file) in files.iter().flatten() {
        if file.metadata().with_context(|| name.clone())?.is_file() {
            file.set_len(0).with_context(|| name.clone())?;
        }
    }
    Ok(files)
}

/// A file that only its owner reads: parts of a guest may be in it. Its contents stay until it is truncated.
fn open(path: &Path) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    let failed = |error: io::Error| {
        let hint = match path.is_symlink() {
            true => "; it is a symbolic link, through which no trace is written",
            false => "",
        };
        let code = match error.kind() {
            io::ErrorKind::InvalidInput => Code::Unreachable,
            _ => exit::of_file(&error),
        };
        exit::error(code, format!("{}: {error}{hint}", path.display()))
    };
    // Not through a link of another user.
    let file = new_file::open(path, &mut options, OFlags::NOFOLLOW).map_err(failed)?;
    if file.metadata().map_err(failed)?.is_file() {
        // An existing file may have another mode.
        file.set_permissions(Permissions::from_mode(0o600)).map_err(failed)?;
    }
    Ok(file)
}

fn cannot_stand_between(front: &Path, back: &Path, error: &io::Error) -> anyhow::Error {
    let (path, hint) = match error.kind() {
        io::ErrorKind::AddrInUse => (front, "a server listens there already; choose another path for FRONT"),
        io::ErrorKind::AlreadyExists => {
            (front, "something that is no socket is there; choose another path for FRONT")
        }
        io::ErrorKind::InvalidInput => (back, "BACK is the socket at which the server listens"),
        _ if !back.exists() => (back, "start the server first; BACK is the socket at which it listens"),
        _ => (front, "choose another path for FRONT"),
    };
    exit::error(Code::Unreachable, format!("{}: {error}; {hint}", path.display()))
}
