//! `limosa trace`: what a VMM asks of its devices, as it happens.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::Context;
use limosa_host::SocketAccess;
use limosa_trace::proxy::{self, Proxy};
use limosa_trace::recorder::{Failure, Recorder, Sink};
use limosa_trace::sink::{Json, Lines, Pcapng, Statistics, StatisticsHandle};

use crate::args;
use crate::exit::{self, Code};
use crate::open::Opening;
use crate::output::Output;
use crate::signals;

pub fn run(args: &args::Trace, opening: Opening, out: &Output) -> anyhow::Result<()> {
    let trace = Trace::begin(args, out)?;
    let [front, back] = &args.proxy[..] else { unreachable!("the parser wants two") };
    let options = proxy::Options {
        access: SocketAccess { mode: args.mode, group: args.group },
        connect_limit: opening.limit,
        servers: opening.servers.to_vec(),
    };
    let proxy = Proxy::bind(front, back, options, trace.recorder.handle())
        .map_err(|error| cannot_stand_between(front, back, &error))?;
    let stop = proxy.stop_handle();
    signals::on_end(move || stop.stop())?;
    out.say(&format!("listening on {}", front.display()));
    let served = proxy.serve().context("cannot serve");
    let ended = trace.end(out);
    served.and(ended)
}

/// Where a trace goes, and what failed of that.
struct Trace {
    recorder: Recorder,
    statistics: Option<StatisticsHandle>,
}

impl Trace {
    fn begin(args: &args::Trace, out: &Output) -> anyhow::Result<Trace> {
        let mut sinks: Vec<Box<dyn Sink>> = Vec::new();
        match &args.output {
            Some(path) => sinks.push(text(out, path.display().to_string(), create(path)?)),
            None if !args.count => sinks.push(text(out, "standard output".into(), io::stdout())),
            None => {}
        }
        if let Some(path) = &args.pcap {
            let name = path.display().to_string();
            let pcap = Pcapng::new(name.clone(), create(path)?).with_context(|| name)?;
            sinks.push(Box::new(pcap));
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
        Ok(Trace { recorder: recorder.context("no thread to write the trace on")?, statistics })
    }

    /// Writes what is left, and prints the statistics.
    fn end(self, out: &Output) -> anyhow::Result<()> {
        let failures = self.recorder.finish();
        let failures: Vec<_> =
            failures.iter().filter(|failure| !is_enough(failure)).map(ToString::to_string).collect();
        if let Some(statistics) = self.statistics {
            let table = statistics.table();
            out.line(&table, |to| to.write_all(table.text().as_bytes()))?;
        }
        if failures.is_empty() { Ok(()) } else { Err(exit::but("traced", &failures)) }
    }
}

/// Whether whoever read the trace has enough of it.
fn is_enough(failure: &Failure) -> bool {
    failure.error.kind() == io::ErrorKind::BrokenPipe
}

fn text(out: &Output, name: String, to: impl Write + Send + 'static) -> Box<dyn Sink> {
    if out.json { Box::new(Json::new(name, to)) } else { Box::new(Lines::new(name, to)) }
}

/// A file that only its owner reads: parts of a guest may be in it.
fn create(path: &Path) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path).map_err(|error| exit::error(Code::Failed, format!("{}: {error}", path.display())))
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
