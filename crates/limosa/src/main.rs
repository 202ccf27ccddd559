//! The command `limosa`: parse, call, print.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod exit;
mod open;
mod output;
mod progress;
mod signals;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::FromArgMatches;
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};
use output::Output;

fn main() -> ExitCode {
    match limosa_bench::run_if_child() {
        Ok(false) => {}
        Ok(true) => return ExitCode::SUCCESS,
        Err(error) => return failed(&error),
    }
    let cli = Cli::from_arg_matches(&args::command().get_matches()).unwrap_or_else(|error| error.exit());
    log(cli.verbose);
    let out = Output { json: cli.json };
    match run(&cli, &out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    let code = exit::code(error);
    tracing::debug!(?code, ?error, "failed");
    eprintln!("limosa: {}", exit::message(error));
    ExitCode::from(code as u8)
}

fn run(cli: &Cli, out: &Output) -> anyhow::Result<()> {
    let open = |device: &str| open::device(device, cli.timeout);
    match &cli.command {
        Command::Probe(args) => commands::probe::run(&*open(&args.device)?, out),
        Command::State(args) => {
            let action = args.action.as_ref().unwrap_or(&args::StateAction::Get);
            commands::state::run(&*open(&args.device)?, action, out)
        }
        Command::Fsm(args) => commands::fsm::run(args, out),
        Command::Completions { shell } => commands::generate::completions(*shell, out),
        Command::Man { folder } => commands::generate::man(folder, out),
        Command::Demo(args) => commands::demo::run(args, cli.timeout, out),
        Command::Serve(args) => commands::serve::run(args, out),
        Command::Save(args) => commands::moving::save(&*open(&args.device)?, args, out),
        Command::Load(args) => commands::moving::load(&*open(&args.device)?, args, out),
        Command::Inspect(args) => commands::inspect::run(args, out),
        Command::Migrate(args) => {
            open::different(&args.source, &args.destination)?;
            let (source, destination) = (open(&args.source)?, open(&args.destination)?);
            commands::moving::migrate(&*source, &*destination, args, out)
        }
        Command::Send(args) => commands::moving::send(&*open(&args.device)?, args, out),
        Command::Receive(args) => commands::moving::receive(&*open(&args.device)?, args, out),
        Command::Bench(args) => commands::bench::run(args, cli.timeout, out),
    }
}

/// Logs go to standard error: warnings, more with `-v`, anything with RUST_LOG.
fn log(verbose: u8) {
    let default = ["warn", "info", "debug", "trace"][usize::from(verbose.min(3))];
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}
