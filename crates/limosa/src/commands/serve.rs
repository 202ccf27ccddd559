//! `limosa serve`: a ready device behind a socket.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use limosa_device::{Machine, SimpleModel};
use limosa_host::{Named, SocketAccess};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_models::uart::{Line, Mtty, Uart};
use limosa_vfio_user::server::{Options, Server};
use rustix::fs::{FileType, OFlags};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit};
use serde::Serialize;

use crate::args;
use crate::exit::{self, Code};
use crate::output::Output;
use crate::signals;

#[derive(Serialize)]
struct Listening {
    listening: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    control: Option<String>,
}

pub fn run(args: &args::Serve, limit: Duration, out: &Output) -> anyhow::Result<()> {
    if args.with_parent {
        // SIGTERM, so that the socket is removed.
        set_parent_process_death_signal(Some(Signal::TERM)).context("cannot follow the parent process")?;
    }
    more_fds();
    let machine = Machine::simple(model(args, limit)?);
    let socket = args.socket.display();
    let options = Options {
        socket: SocketAccess { mode: args.mode, group: args.group },
        any_file: args.any_file,
        ..Options::default()
    };
    let mut server =
        Server::bind(&args.socket, machine, options).map_err(|error| cannot_listen(&args.socket, &error))?;
    if let Some(control) = &args.control {
        let own = SocketAccess::default();
        server = server.with_control(control, &own).map_err(|error| cannot_listen(control, &error))?;
    }
    let shutdown = server.shutdown_handle();
    signals::on_end(move || shutdown.shut_down())?;
    let control = args.control.as_ref().map(|path| path.display().to_string());
    out.result(&Listening { listening: socket.to_string(), control: control.clone() }, |to| {
        if let Some(control) = control {
            writeln!(to, "control clients: {control}")?;
        }
        writeln!(to, "listening on {socket}")
    })?;
    server.serve().with_context(|| format!("cannot serve on {socket}"))
}

fn cannot_listen(path: &Path, error: &std::io::Error) -> anyhow::Error {
    let hint = match error.kind() {
        std::io::ErrorKind::AddrInUse => "a server listens there already; end it or choose another path",
        std::io::ErrorKind::AlreadyExists => "something that is no socket is there; choose another path",
        std::io::ErrorKind::NotFound => "make its folder first",
        std::io::ErrorKind::PermissionDenied => "choose a folder that you may write to",
        _ => "choose another path",
    };
    exit::error(Code::Unreachable, format!("cannot listen on {}: {error}; {hint}", path.display()))
}

/// Allows as many open files as the system does: a client may wire thousands of interrupts, each with an eventfd.
fn more_fds() {
    let limit = getrlimit(Resource::Nofile);
    // If it is refused, fewer interrupts can be wired.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

fn model(args: &args::Serve, limit: Duration) -> anyhow::Result<Box<dyn SimpleModel>> {
    let options = args.options.join(",");
    let usage = |error: &dyn std::fmt::Display| exit::error(Code::Usage, format!("--option: {error}"));
    Ok(match args.model {
        args::Model::Uart => {
            let (persona, lines): (Vec<_>, Vec<_>) =
                args.options.iter().partition(|option| option.as_str() == "as=mtty");
            let lines =
                lines.into_iter().map(|option| line(option, limit)).collect::<anyhow::Result<Vec<_>>>()?;
            let lines = if lines.is_empty() { vec![Line::Echo] } else { lines };
            if persona.is_empty() {
                Box::new(Uart::new(lines).map_err(|error| usage(&error))?)
            } else if lines.iter().all(|line| matches!(line, Line::Echo)) {
                Box::new(Mtty::new(lines.len()).map_err(|error| usage(&error))?)
            } else {
                return Err(usage(&"as=mtty: its ports have nothing but line=echo at the other end"));
            }
        }
        args::Model::Synthetic => {
            let config: SyntheticConfig = options.parse().map_err(|error| usage(&error))?;
            Box::new(Synthetic::new(config)?)
        }
    })
}

/// What is at the other end of a serial port: `line=echo`, or a path.
fn line(option: &str, limit: Duration) -> anyhow::Result<Line> {
    let path = match option.split_once('=') {
        Some(("line", "echo")) => return Ok(Line::Echo),
        Some(("line", path)) if !path.is_empty() => path,
        _ => {
            return Err(exit::error(
                Code::Usage,
                format!("--option {option}: expected line=echo or line=PATH for each port, or as=mtty"),
            ));
        }
    };
    let failed = |error: std::io::Error| {
        let what = "expected a terminal, or a UNIX socket that somebody listens on";
        exit::error(Code::Unreachable, format!("--option {option}: {error}; {what}"))
    };
    let input = match limosa_host::resolve(Path::new(path)).map_err(failed)? {
        Named::Descriptor(descriptor) => {
            let borrowed = descriptor.borrow().map_err(failed)?;
            if !borrowed.readable || !borrowed.writable {
                return Err(failed(std::io::Error::other(
                    "its process does not hold it for reading and writing",
                )));
            }
            OwnedFd::from(borrowed)
        }
        Named::Entry(entry) => {
            let kind = FileType::from_raw_mode(entry.stat().map_err(failed)?.st_mode);
            match kind {
                FileType::Socket => match limosa_host::connect(Path::new(path), limit) {
                    Ok(socket) => socket.into_inner().into(),
                    Err(rustix::io::Errno::AGAIN) => {
                        let what = format!("its server has taken no connection within {limit:?}");
                        return Err(failed(std::io::Error::other(what)));
                    }
                    Err(error) => return Err(failed(error.into())),
                },
                // A terminal must not become this process's own, and its carrier is not waited for.
                _ => entry.open(OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK).map_err(failed)?.into(),
            }
        }
    };
    let output = input.try_clone().map_err(failed)?;
    Ok(Line::Fds { input, output })
}
