//! `limosa serve`: a ready device behind a socket.

use anyhow::Context;
use limosa_device::{Machine, Model};
use limosa_models::synthetic::{Synthetic, SyntheticConfig};
use limosa_vfio_user::server::{Options, Server};
use rustix::process::{Signal, set_parent_process_death_signal};
use serde::Serialize;

use crate::args;
use crate::exit::{self, Code};
use crate::output::Output;
use crate::signals;

#[derive(Serialize)]
struct Listening {
    listening: String,
}

pub fn run(args: &args::Serve, out: &Output) -> anyhow::Result<()> {
    if args.with_parent {
        // SIGTERM, so that the socket is removed.
        set_parent_process_death_signal(Some(Signal::TERM)).context("cannot follow the parent process")?;
    }
    let machine = Machine::new(model(args)?);
    let socket = args.socket.display();
    let server = Server::bind(&args.socket, machine, Options::default()).map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::AddrInUse => "a server listens there already; end it or choose another path",
            std::io::ErrorKind::AlreadyExists => "something that is no socket is there; choose another path",
            std::io::ErrorKind::NotFound => "make its folder first",
            std::io::ErrorKind::PermissionDenied => "choose a folder that you may write to",
            _ => "choose another path",
        };
        exit::error(Code::Unreachable, format!("cannot listen on {socket}: {error}; {hint}"))
    })?;
    let shutdown = server.shutdown_handle();
    signals::on_end(move || shutdown.shut_down())?;
    out.result(&Listening { listening: socket.to_string() }, |to| writeln!(to, "listening on {socket}"))?;
    server.serve().with_context(|| format!("cannot serve on {socket}"))
}

fn model(args: &args::Serve) -> anyhow::Result<Box<dyn Model>> {
    let options = args.options.join(",");
    let usage = |error: &dyn std::fmt::Display| exit::error(Code::Usage, format!("--option: {error}"));
    Ok(match args.model {
        args::Model::Synthetic => {
            let config: SyntheticConfig = options.parse().map_err(|error| usage(&error))?;
            Box::new(Synthetic::new(config)?)
        }
    })
}
