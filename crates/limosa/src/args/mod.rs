//! The command line.

mod bench;
mod check;
mod devices;
mod doctor;
mod guest;
mod link;
mod model_options;
mod moving;
mod region;
mod resolving;
mod serving;
mod snapshots;
mod trace;
mod values;

use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, ValueHint};
use limosa_host::User;

use crate::exit;
pub use bench::{Bench, BenchAction};
pub use check::{Check, Format};
pub use devices::{KeepOpen, Probe, StateAction, StateArgs};
pub use doctor::Doctor;
pub use guest::{Memory, Starting, Stopping};
pub use link::{Link, Names, Tls};
pub use model_options::{ModelOption, words as model_option_words};
pub use moving::{Migrate, Moving, Receive, Reporting, Send, WhenStalled};
pub use region::{BYTES_MAX as REGION_BYTES_MAX, Bytes as RegionBytes, Region, RegionAction};
pub use resolving::{Answer, Decided, Resolve};
pub use serving::{Model, Serve, SwitchOver};
pub use snapshots::{Inspect, Load, Save, Verify};
pub use trace::Trace;
pub use values::mode;
use values::seconds;
pub use values::{Rate, bytes};

/// Naming of object stores: a part of the help of every command that takes one.
pub const STORES: &str = "\
s3://BUCKET/KEY is an object in an S3-compatible store. AWS_ENDPOINT_URL is the store's address (by default Amazon's), \
AWS_REGION its region (us-east-1), and AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN) are the credentials; \
an http:// address needs AWS_ALLOW_HTTP=true.";

/// Naming of devices: a part of the help of every command that takes one.
const DEVICES: &str = "\
Devices are named by
  PATH                     a vfio-user socket
  0000:65:00.1, 65:00.1    a PCI device's address
  UUID                     a mediated device
  /dev/vfio/devices/vfioN  a device's own node, the cdev
  /dev/vfio/N, or N        a group with only one device
  /proc/PID/fd/N           a device that a process has open: a VMM, or limosa with --hold
Kernel devices are opened through the cdev if there is one, else through the group; --door selects one. \
When the last process that has a PCI device open closes it, the kernel resets it; other drivers may keep the \
state. So the state that a command leaves in a device is kept for the next command only if a process keeps it open: --hold.";

/// Live migration of VFIO devices.
///
/// Moves, saves, loads, checks and serves kernel VFIO devices and vfio-user devices with the VFIO device migration
/// protocol v2.
#[derive(Debug, Parser)]
#[command(name = "limosa", version, max_term_width = 110)]
pub struct Cli {
    /// Print one JSON document instead of text; `answer` and `trace` print one document a line for each answer or
    /// request.
    #[arg(long, global = true, help_heading = "Global")]
    pub json: bool,

    /// Log more: once for actions, twice for every message.
    #[arg(short, long, global = true, help_heading = "Global", action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// Write each log line as a JSON document, for a log collector. RUST_LOG selects the lines.
    #[arg(long, global = true, help_heading = "Global")]
    pub log_json: bool,

    /// Seconds to wait for the answer to a vfio-user request, except for changes of the migration state and resets,
    /// which have --state-timeout. Requests to the kernel have no limit. A move makes many requests, and repeats some
    /// of them if it is undone.
    #[arg(
        long,
        global = true,
        help_heading = "Global",
        value_name = "SECONDS",
        default_value = "10",
        value_parser = seconds
    )]
    pub timeout: Duration,

    /// Seconds to wait for a vfio-user device to change its migration state, or to reset itself; of a new server, for its
    /// devices in each round of a switch-over.
    #[arg(
        long,
        global = true,
        help_heading = "Global",
        value_name = "SECONDS",
        default_value = "60",
        value_parser = seconds
    )]
    pub state_timeout: Duration,

    /// The kernel interface through which to open devices.
    #[arg(long, global = true, help_heading = "Global", value_name = "DOOR")]
    pub door: Option<Door>,

    /// Trust servers behind UNIX sockets that run as this user, a name or a number; may be repeated. Servers of
    /// root and of the user who runs limosa are always trusted.
    #[arg(long = "server-uid", global = true, help_heading = "Global", value_name = "UID|NAME")]
    pub server_users: Vec<User>,

    #[command(subcommand)]
    pub command: Command,
}

/// The kernel's two interfaces to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Door {
    /// The device's own node, with iommufd.
    Cdev,
    /// The node of its IOMMU group, with a container.
    Group,
}

/// The whole command line. Every command's help documents the exit codes, and the naming of devices if it takes
/// some.
pub fn command() -> clap::Command {
    with_notes(Cli::command())
}

/// The parsed command line of this process.
pub fn parse() -> Result<Cli, clap::Error> {
    let cli = command().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches))?;
    let checked = match &cli.command {
        Command::Save(save) => save.check(),
        Command::Serve(serve) => serve.check(),
        _ => Ok(()),
    };
    checked.map_err(|message| {
        let mut command = command();
        let parsed = command.find_subcommand_mut(cli.command.name()).expect("it was just parsed");
        parsed.error(ErrorKind::MissingRequiredArgument, message)
    })?;
    Ok(cli)
}

/// The command that is named on a command line which cannot be parsed.
pub fn named() -> Option<&'static str> {
    let all = Cli::command();
    let mut words = std::env::args_os().skip(1).take_while(|word| word != "--");
    let named =
        words.find_map(|word| all.get_subcommands().map(clap::Command::get_name).find(|name| word == *name));
    // The process is about to end.
    named.map(|name| &*name.to_owned().leak())
}

fn with_notes(command: clap::Command) -> clap::Command {
    let own = command.get_after_help().map(ToString::to_string);
    let takes_devices = command.get_name() == "limosa"
        || command.get_arguments().any(|argument| argument.get_long().is_none() && is_device(argument));
    let devices = takes_devices.then(|| DEVICES.to_owned());
    let takes_memory = command.get_arguments().any(|argument| argument.get_id() == "memory");
    let memory = (takes_memory && command.get_name() != "demo").then(|| guest::MEMORY.to_owned());
    let notes: Vec<_> = own.into_iter().chain(devices).chain(memory).chain([exit::help()]).collect();
    command.after_help(notes.join("\n\n")).mut_args(with_hint).mut_subcommands(with_notes)
}

/// For shell completions: the kind of value of a text argument.
fn with_hint(argument: clap::Arg) -> clap::Arg {
    let names = argument.get_value_names().unwrap_or_default();
    let is_one_of = |of: &[&str]| names.iter().any(|name| of.contains(&name.as_str()));
    let hint = match () {
        // Sockets, nodes, snapshots, memory.
        () if is_device(&argument) || is_one_of(&["FILE", "PATH"]) => ValueHint::AnyPath,
        () if is_one_of(&["FOLDER"]) => ValueHint::DirPath,
        () if is_one_of(&["COMMAND"]) => ValueHint::CommandString,
        () if is_one_of(&["UID|NAME", "USER"]) => ValueHint::Username,
        () => return argument,
    };
    argument.value_hint(hint)
}

fn is_device(argument: &clap::Arg) -> bool {
    let names = argument.get_value_names().unwrap_or_default();
    names.iter().any(|name| ["DEVICE", "SRC", "DST"].contains(&name.as_str()))
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Migrate two live devices between processes, verify every byte, print a timeline.
    Demo(Demo),
    /// Serve a built-in device on a vfio-user socket.
    Serve(Serve),
    /// Replace the process of a server under its clients: start a new one, and report the result.
    ///
    /// The new server takes over connections, guest memory, interrupts and the device's state, transparently for
    /// clients and the guest. If anything fails before it serves, the old server keeps serving.
    SwitchOver(SwitchOver),
    /// Describe a device and whether it can migrate; without a device, list the kernel's VFIO devices.
    ///
    /// For the list, each device that no process has open is opened for a moment.
    Probe(Probe),
    /// Describe this machine and a device, the obstacles to a move, and their remedies.
    ///
    /// With two devices, also say whether the state of the first can move to the second.
    Doctor(Doctor),
    /// Read or drive a device's migration state.
    State(StateArgs),
    /// Read or write bytes of a device's regions: registers, configuration space.
    ///
    /// A read or a write can have side effects in the device. While a VMM uses the device, its server refuses both.
    Region(Region),
    /// Stop devices, save their state to a file or an object store, and set them running again.
    Save(Save),
    /// Load a saved state into devices.
    Load(Load),
    /// Print the contents of a saved stream, and whether it is complete.
    Inspect(Inspect),
    /// Check that a saved stream is complete and unaltered: exit code 0, or 6 with the place and the cause.
    ///
    /// Reads all of it once, and stops at the first error.
    Verify(Verify),
    /// Move the state of devices to other devices on this machine.
    Migrate(Migrate),
    /// Move devices to a receiver.
    Send(Send),
    /// Receive devices from a sender.
    Receive(Receive),
    /// Ask for the outcome of a move in doubt, and act on it; resume a guest that a killed limosa has left stopped.
    /// Without a device, list both.
    Resolve(Resolve),
    /// Answer sources in doubt for a receiver that has ended.
    Answer(Answer),
    /// Check whether a driver or a server conforms to the standard: named checks, each with its clause.
    ///
    /// Stops the device many times; with --destructive also resets it and loads valid and invalid states into it. At
    /// the end the device runs, with its original state. Exit code 0: no check failed.
    Check(Check),
    /// Show the requests of a VMM to its devices live, each with its answer.
    ///
    /// Shows requests to kernel VFIO devices, iommufd and migration data fds, and vfio-user messages: of a process and
    /// its children, by ptrace, or between a client and a server.
    Trace(Trace),
    /// Print the migration state machine.
    Fsm(Fsm),
    /// Measure a device: arcs, data streams, dirty reports, accesses, complete moves; and compare two runs.
    Bench(Bench),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the manual pages.
    Man {
        /// The folder to write them to; created if it does not exist.
        #[arg(value_name = "FOLDER")]
        folder: PathBuf,
    },
}

impl Command {
    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Command::Demo(_) => "demo",
            Command::Serve(_) => "serve",
            Command::SwitchOver(_) => "switch-over",
            Command::Probe(_) => "probe",
            Command::Doctor(_) => "doctor",
            Command::State(_) => "state",
            Command::Region(_) => "region",
            Command::Save(_) => "save",
            Command::Load(_) => "load",
            Command::Inspect(_) => "inspect",
            Command::Verify(_) => "verify",
            Command::Migrate(_) => "migrate",
            Command::Send(_) => "send",
            Command::Receive(_) => "receive",
            Command::Resolve(_) => "resolve",
            Command::Answer(_) => "answer",
            Command::Check(_) => "check",
            Command::Trace(_) => "trace",
            Command::Fsm(_) => "fsm",
            Command::Bench(_) => "bench",
            Command::Completions { .. } => "completions",
            Command::Man { .. } => "man",
        }
    }
}

#[derive(Debug, Args)]
pub struct Demo {
    /// Bytes of internal state of the synthetic device.
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = bytes)]
    pub state_size: u64,

    /// Bytes of guest memory that the synthetic device writes to.
    #[arg(long, value_name = "BYTES", default_value = "64M", value_parser = bytes)]
    pub memory: u64,

    /// Keep the folder with sockets and logs.
    #[arg(long)]
    pub keep: bool,
}

#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct Fsm {
    /// The arcs as a Graphviz graph.
    #[arg(long)]
    pub dot: bool,

    /// The arcs as a Mermaid diagram.
    #[arg(long)]
    pub mermaid: bool,

    /// One line for each set of flags and each pair of states: the path, or EINVAL.
    #[arg(long)]
    pub paths: bool,
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_consistent() {
        super::command().debug_assert();
    }
}
