//! The command `limosa`: parse, call, print.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod endpoint;
mod exit;
mod found;
mod guest;
mod hook;
mod huge_pages;
mod keep_open;
mod links;
mod loaded;
mod log;
mod memory;
mod metrics;
mod moved;
mod moves;
mod named_once;
mod new_file;
mod noted_devices;
mod noting;
mod open;
mod open_elsewhere;
mod output;
mod process;
mod progress;
mod read_text;
mod reports;
mod service;
mod signals;
mod snapshot_location;
mod standard_error;
mod staying;
mod terminal;
mod text;
mod wrong_socket;

use std::ffi::OsStr;
use std::process::ExitCode;

use args::{Cli, Command};
use keep_open::Leaves;
use limosa_host::User;
use limosa_vfio_kernel::Door;
use limosa_vfio_user::client::Role;
use open::Opening;
use output::Output;

fn main() -> ExitCode {
    match limosa_bench::run_if_child() {
        Ok(false) => {}
        Ok(true) => return ExitCode::SUCCESS,
        Err(error) => return ExitCode::from(exit::tell(&error, &Output::new(false, None)) as u8),
    }
    let cli = match args::parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => {
            return ExitCode::from(
                exit::tell_usage(&error, &Output::new(json_is_asked_for(), args::named())) as u8,
            );
        }
        // The user asked for the help or the version.
        Err(error) => error.exit(),
    };
    standard_error::begin();
    log::begin(cli.verbose, cli.log_json);
    let out = Output::new(cli.json, Some(cli.command.name()));
    let code = match run(&cli, &out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(exit::tell(&error, &out) as u8),
    };
    standard_error::end();
    code
}

/// Whether a command line that cannot be understood asks for JSON.
fn json_is_asked_for() -> bool {
    std::env::args_os()
        .skip(1)
        .take_while(|arg| arg != OsStr::new("--"))
        .any(|arg| arg == OsStr::new("--json"))
}

fn run(cli: &Cli, out: &Output) -> anyhow::Result<()> {
    named_once::check(&cli.command)?;
    let door = cli.door.map(|door| match door {
        args::Door::Cdev => Door::Cdev,
        args::Door::Group => Door::Group,
    });
    let mut servers = vec![User::ROOT];
    for user in [&[User::current()], &cli.server_users[..]].concat() {
        if !servers.contains(&user) {
            servers.push(user);
        }
    }
    let (limit, state_limit, role) = (cli.timeout, cli.state_timeout, Role::Either);
    let opening = Opening { limit, state_limit, door, servers: &servers, role };
    let open = |device: &str| opening.open(device);
    match &cli.command {
        Command::Probe(args) => match &args.device {
            Some(device) => commands::probe::run(&open(device)?, out),
            None => commands::list::run(args.all, opening, out),
        },
        Command::Doctor(args) => commands::doctor::run(args, opening, out),
        Command::State(args) => {
            let action = args.action.as_ref().unwrap_or(&args::StateAction::Get);
            let leaves = match action {
                args::StateAction::Set { .. } => Leaves::State,
                _ => Leaves::Nothing,
            };
            let device = open(&args.device)?;
            let done = match action {
                args::StateAction::Next { pid, nobody } => commands::next::run(&device, *pid, *nobody, out),
                action => {
                    let moves = moves::Moves::new(args.moves.as_deref());
                    commands::state::run(&device, action, args.force, &moves, out)
                }
            };
            keep_open::end(done, std::slice::from_ref(&device), args.keep_open.keep_open, leaves, out)
        }
        Command::Region(args) => commands::region::run(&args.action, opening, out),
        Command::Check(args) => commands::check::run(args, opening, out),
        Command::Trace(args) => commands::trace::run(args, opening, out),
        Command::Fsm(args) => commands::fsm::run(args, out),
        Command::Completions { shell } => commands::generate::completions(*shell, out),
        Command::Man { folder } => commands::man::run(folder, out),
        Command::Demo(args) => commands::demo::run(args, cli.timeout, out),
        Command::Serve(args) => commands::serve::run(args, cli.timeout, cli.state_timeout, out),
        Command::SwitchOver(args) => commands::switch_over::run(args, out),
        Command::Save(args) => commands::moving::save(args, opening, out),
        Command::Load(args) => commands::moving::load(args, opening, out),
        Command::Inspect(args) => commands::inspect::run(args, out),
        Command::Verify(args) => commands::verify::run(args, out),
        Command::Migrate(args) => commands::moving::migrate(args, opening, out),
        Command::Send(args) => commands::moving::send(args, opening, out),
        Command::Receive(args) => commands::moving::receive(args, opening, out),
        Command::Resolve(args) => commands::settle::resolve(args, opening, out),
        Command::Answer(args) => commands::answer::answer(args, out),
        Command::Bench(args) => commands::bench::run(args, opening, out),
    }
}
