//! `limosa serve`: ready devices behind sockets. Another process of the command may take its place while it has clients
//! (`docs/switch-over.md`).

mod child;
mod config;
mod give;
mod model;
mod requests;
mod take;

use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use limosa_device::Machine;
use limosa_host::SocketAccess;
use limosa_switch_over::{OldServer, TakeOver};
use limosa_vfio_user::server::{Options, Server};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit};
use serde::{Deserialize, Serialize};

use crate::args;
use crate::exit::{self, Code};
use crate::metrics::{Exposition, Listener as MetricsListener, Served};
use crate::output::Output;
use crate::service;
use crate::signals;
use crate::terminal;
use config::Device;
use requests::Requests;
pub use take::TookOver;

/// This program, for the other side of a switch-over.
const NAME: &str = concat!("limosa ", env!("CARGO_PKG_VERSION"));

/// The document that is printed once the devices are served.
#[derive(Serialize, Deserialize)]
pub struct Listening {
    #[serde(flatten)]
    devices: Listeners,
    /// Where metrics are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    metrics: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub took_over: Option<TookOver>,
}

/// The device that the command line describes, or those of a file.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Listeners {
    One(Listener),
    Many { devices: Vec<Listener> },
}

/// Where a device is served.
#[derive(Serialize, Deserialize)]
struct Listener {
    listening: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    control: Option<String>,
}

impl Listening {
    fn new(
        args: &args::Serve,
        devices: &[Device],
        metrics: Option<&Exposition>,
        took_over: Option<TookOver>,
    ) -> Listening {
        let listener = |device: &Device| Listener {
            listening: device.socket.display().to_string(),
            control: device.control.as_ref().map(|path| path.display().to_string()),
        };
        let mut listeners: Vec<_> = devices.iter().map(listener).collect();
        let devices = match listeners.pop() {
            Some(one) if args.config.is_none() => Listeners::One(one),
            last => {
                listeners.extend(last);
                Listeners::Many { devices: listeners }
            }
        };
        Listening { devices, metrics: metrics.map(|metrics| metrics.address().into()), took_over }
    }

    fn listeners(&self) -> &[Listener] {
        match &self.devices {
            Listeners::One(one) => std::slice::from_ref(one),
            Listeners::Many { devices } => devices,
        }
    }

    /// For people.
    pub fn print(&self, to: &mut dyn Write) -> io::Result<()> {
        if let Some(metrics) = &self.metrics {
            writeln!(to, "metrics on {metrics}")?;
        }
        for Listener { listening, control } in self.listeners() {
            if let Some(control) = control {
                writeln!(to, "control clients: {control}")?;
            }
            writeln!(to, "listening on {listening}")?;
        }
        self.took_over.as_ref().map_or(Ok(()), |took_over| took_over.print(to))
    }
}

/// What `-o help` prints.
#[derive(Serialize)]
struct ModelOptions {
    models: Vec<OfModel>,
}

#[derive(Serialize)]
struct OfModel {
    model: &'static str,
    options: &'static [args::ModelOption],
}

/// Lists the options of a model, or of all.
fn print_options(model: Option<args::Model>, out: &Output) -> anyhow::Result<()> {
    let models = model.map_or(args::Model::ALL.to_vec(), |model| vec![model]);
    let of = |model: &args::Model| OfModel { model: model.name(), options: model.options() };
    let all = ModelOptions { models: models.iter().map(of).collect() };
    out.result(&all, |to| {
        let columns = terminal::output_columns().unwrap_or(80);
        models.iter().try_for_each(|model| to.write_all(model.describe(columns).as_bytes()))
    })
}

/// `state_limit` is how long new devices may take in a round of a switch-over.
pub fn run(args: &args::Serve, limit: Duration, state_limit: Duration, out: &Output) -> anyhow::Result<()> {
    if args.asks_for_options() {
        return print_options(args.model, out);
    }
    let requests = Requests::new(args.takeover.is_some())?;
    let old = take::old_server(args)?;
    // A server that starts the one in its place ends before it.
    if args.with_parent && !matches!(old, Some((OldServer::Parent(_), _))) {
        // SIGTERM, so that the socket is removed.
        set_parent_process_death_signal(Some(Signal::TERM)).context("cannot follow the parent process")?;
    }
    more_fds();
    let devices = config::devices(args)?;
    let waits = old.is_some();
    let machine = |device: &Device| Ok(Machine::simple(model::model(device, waits, limit)?));
    let machines = devices.iter().map(machine).collect::<anyhow::Result<Vec<_>>>()?;
    let options = |device: &Device| Options {
        socket: device.access,
        any_file: device.any_file,
        model: Some(device.model.name().to_owned()),
        interruptible: args.takeover.is_some(),
        ..Options::default()
    };
    let machines = devices.iter().zip(machines).map(|(device, machine)| (machine, options(device)));
    if let Some(old) = old {
        return take::run(old, machines, &devices, args, state_limit, requests, out);
    }
    let sockets: Vec<_> = devices.iter().map(|device| &*device.socket).collect();
    let listeners = service::listeners(&sockets)?;
    let bind = |((device, (machine, options)), listener): ((&Device, _), Option<_>)| {
        let socket = &device.socket;
        let server = match listener {
            Some(listener) => Server::from_listener(listener, machine, options),
            None => Server::bind(socket, machine, options),
        };
        let server = server.map_err(|error| cannot_listen(socket, &error))?;
        match &device.control {
            Some(control) => server
                .with_control(control, &SocketAccess::default())
                .map_err(|error| cannot_listen(control, &error)),
            None => Ok(server),
        }
    };
    let servers = devices.iter().zip(machines).zip(listeners).map(bind);
    let servers = servers.collect::<anyhow::Result<Vec<_>>>()?;
    let metrics = args.metrics.as_ref().map(MetricsListener::bind).transpose()?;
    let metrics = metrics.map(|listener| Served::new(&servers).answer_at(listener)).transpose()?;
    let door = args.takeover.as_deref().map(listen_for_takers).transpose()?;
    let on_end = requests.stop.clone();
    signals::on_end(move || {
        service::stopping();
        on_end.shut_down();
    })?;
    serve(&servers, &requests, || {
        let listening = Listening::new(args, &devices, metrics.as_ref(), None);
        out.result(&listening, |to| listening.print(to))?;
        if out.json {
            listening.listeners().iter().for_each(|listener| out.listening(&listener.listening));
        }
        service::ready();
        Ok((door, metrics))
    })
}

/// Serves until told to stop, or until another process has taken over. `ready` is called meanwhile, and gives the socket for such
/// processes, and what answers with metrics.
fn serve(
    servers: &[Server],
    requests: &Requests,
    ready: impl FnOnce() -> anyhow::Result<(Option<TakeOver>, Option<Exposition>)>,
) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let start = |server| {
            let serve = move || {
                let served = Server::serve(server);
                // A failed server ends the command.
                requests.stop.shut_down();
                served
            };
            std::thread::Builder::new().name("serve".into()).spawn_scoped(scope, serve)
        };
        let threads: Vec<_> = servers.iter().map(start).collect();
        let door = ready();
        match &door {
            Ok((door, _)) => give::until_given(door.as_ref(), servers, requests),
            Err(_) => give::shut_down(servers),
        }
        // Before the servers are waited for: a new process listens at the same places.
        drop(door?);
        for thread in threads {
            let served = thread.context("no thread to serve on")?.join();
            served.map_err(|_| anyhow::anyhow!("the server panicked"))?.context("cannot serve")?;
        }
        Ok(())
    })
}

fn cannot_listen(socket: &Path, error: &std::io::Error) -> anyhow::Error {
    use rustix::io::Errno;
    use std::io::ErrorKind;
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    let (code, hint) = match (error.kind(), errno) {
        (_, Some(Errno::MFILE)) => (Code::Failed, "raise the limit of open files (ulimit -n)"),
        (_, Some(Errno::NFILE)) => (Code::Failed, "raise the system's limit of open files (fs.file-max)"),
        (_, Some(Errno::NOSPC | Errno::DQUOT)) => (Code::Failed, "make room on its file system"),
        (_, Some(Errno::NAMETOOLONG)) => (
            Code::Usage,
            "a socket's path has 107 bytes at most; choose a shorter one, such as a relative one",
        ),
        (_, Some(Errno::ROFS)) => (Code::Failed, "choose a folder on a file system that can be written to"),
        (_, Some(Errno::NOTDIR)) => (Code::Unreachable, "choose a path through folders"),
        (ErrorKind::AddrInUse, _) => (Code::Unreachable, "end it, or choose another path"),
        // A file or a link.
        (ErrorKind::AlreadyExists, _) => (Code::Refused, "choose another path, or remove it"),
        (ErrorKind::NotFound, _) => (Code::Unreachable, "make its folder first"),
        (ErrorKind::Unsupported, _) => (Code::Unreachable, "mount /proc"),
        (ErrorKind::PermissionDenied, _) => (Code::Unreachable, "choose a folder that you may write to"),
        _ => (Code::Unreachable, "choose another path"),
    };
    exit::error(code, format!("cannot listen on {}: {error}; {hint}", socket.display()))
}

/// The socket for processes that are to take over.
fn listen_for_takers(path: &Path) -> anyhow::Result<TakeOver> {
    TakeOver::listen(path).map_err(|error| cannot_listen(path, &error).context("--takeover"))
}

/// Allows as many open files as the system does: a client may wire thousands of interrupts, each with an eventfd.
pub fn more_fds() {
    let limit = getrlimit(Resource::Nofile);
    // If it is refused, fewer interrupts can be wired.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    /// Each of them said to choose another path.
    #[test]
    fn a_socket_that_cannot_be_made_has_the_remedy_of_its_cause() {
        for (errno, code, remedy) in [
            (Errno::MFILE, Code::Failed, "ulimit -n"),
            (Errno::NFILE, Code::Failed, "fs.file-max"),
            (Errno::NOSPC, Code::Failed, "make room"),
            (Errno::DQUOT, Code::Failed, "make room"),
            (Errno::NAMETOOLONG, Code::Usage, "107 bytes"),
            (Errno::ROFS, Code::Failed, "can be written to"),
            (Errno::ACCESS, Code::Unreachable, "you may write to"),
            (Errno::NOENT, Code::Unreachable, "make its folder"),
        ] {
            let error = cannot_listen(Path::new("the/socket"), &std::io::Error::from(errno));
            let message = exit::message(&error);
            assert!(message.contains("the/socket") && message.contains(remedy), "{message}");
            assert!(!message.contains("choose another path"), "{message}");
            assert_eq!(exit::code(&error), code, "{message}");
        }
    }
}
