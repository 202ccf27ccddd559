//! The command line.

mod bench;
mod check;
mod doctor;
mod guest;
mod link;
mod moving;
mod resolving;
mod snapshots;
mod values;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use limosa_host::{Group, User};
use limosa_protocol::State;

use crate::exit;
pub use bench::{Bench, BenchAction};
pub use check::{Check, Format};
pub use doctor::Doctor;
pub use guest::{Memory, Starting, Stopping};
pub use link::{Link, Names, Tls};
pub use moving::{Migrate, Moving, Receive, Reporting, Send, WhenStalled};
pub use resolving::{Answer, Decided, Resolve};
pub use snapshots::{Load, Save};
pub use values::{Rate, bytes};
use values::{mode, seconds};

/// What `--option` takes.
const MODEL_OPTIONS: &str = "\
Options of uart:
  line=echo|PATH         what is at the other end: what is sent comes back (echo), or a terminal or
                         UNIX socket at this path; twice for two ports
  as=mtty                it is the card that Linux' mtty makes, and moves to and from that; echo only
Options of synthetic (sizes take K, M and G):
  state=BYTES            its state, a multiple of block (16M)
  block=BYTES            how much of it changes at once (64K)
  precopy=PERCENT        how much of it is saved in pre-copy (100)
  dirty-rate=BYTES       how much of it changes each second (0)
  p2p=on|off             whether it has the P2P states (on)
  pre-copy=on|off        whether it has the pre-copy states (on)
  dma-pattern=PATTERN    sequential, random or one-page (sequential)
  dma-rate=BYTES         bytes written to guest memory each second, 0 for all it can (64M)
  seed=NUMBER            what its contents derive from (1)
  verify=on|off          whether every block is checked as it is loaded (on)
  fault=FAULT            what goes wrong; many times: fail:ARC[:TIMES], error:ARC, truncate:BYTES,
                         stall:ARC:MS, corrupt:OFFSET, with ARC like PRE_COPY_P2P>STOP_COPY";

/// How an object store is named. Part of the help of every command that takes one.
pub const STORES: &str = "\
s3://BUCKET/KEY is an object in an S3-compatible store. AWS_ENDPOINT_URL says where (Amazon's, when it is not set), \
AWS_REGION in which region (us-east-1), AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (with AWS_SESSION_TOKEN) whose; \
an http:// address needs AWS_ALLOW_HTTP=true.";

/// How a device is named. Part of the help of every command that takes one.
const DEVICES: &str = "\
Devices are named by
  PATH                     a vfio-user socket
  0000:65:00.1, 65:00.1    a PCI device's address
  UUID                     a mediated device
  /dev/vfio/devices/vfioN  a device's own node, the cdev
  /dev/vfio/N, or N        a group with only one device
  /proc/PID/fd/N           a device that a process holds open: a VMM, or limosa with --hold
The kernel's are opened through the cdev where there is one, else through the group; --door says which. \
When the last who has a device open closes it, the kernel resets it if it is a PCI device; other drivers may keep its \
state. So what a command leaves in a device is there for the next one only if somebody holds it: --hold.";

/// Live migration of VFIO devices.
///
/// Moves, saves, loads, checks and serves devices that speak the VFIO device migration protocol v2, the kernel's
/// and those behind vfio-user sockets.
#[derive(Debug, Parser)]
#[command(name = "limosa", version, max_term_width = 110)]
pub struct Cli {
    /// Print one JSON document instead of text; `answer` prints one in a line for each answer.
    #[arg(long, global = true, help_heading = "Global")]
    pub json: bool,

    /// Say more: once for what is done, twice for every message.
    #[arg(short, long, global = true, help_heading = "Global", action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// Seconds to wait for the answer to one request of vfio-user, but a change of the migration state or a reset, which
    /// have --state-timeout. The kernel takes the time that it takes. A move makes many requests, and some of them again
    /// when it is undone.
    #[arg(
        long,
        global = true,
        help_heading = "Global",
        value_name = "SECONDS",
        default_value = "10",
        value_parser = seconds
    )]
    pub timeout: Duration,

    /// Seconds to wait for a device behind vfio-user to change its migration state, or to reset itself.
    #[arg(
        long,
        global = true,
        help_heading = "Global",
        value_name = "SECONDS",
        default_value = "60",
        value_parser = seconds
    )]
    pub state_timeout: Duration,

    /// Which of the kernel's doors to open devices through.
    #[arg(long, global = true, help_heading = "Global", value_name = "DOOR")]
    pub door: Option<Door>,

    /// Trust servers behind UNIX sockets that this user runs, a name or a number; many times. Those of root and of the user
    /// who runs limosa are trusted anyway.
    #[arg(long = "server-uid", global = true, help_heading = "Global", value_name = "UID|NAME")]
    pub server_users: Vec<User>,

    #[command(subcommand)]
    pub command: Command,
}

/// The kernel's two ways to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Door {
    /// The device's own node, with iommufd.
    Cdev,
    /// The node of its IOMMU group, with a container.
    Group,
}

/// The whole command line. Every command's help documents the exit codes, and how devices are named where it takes
/// some.
pub fn command() -> clap::Command {
    with_notes(Cli::command())
}

/// The command line that was typed.
pub fn parse() -> Result<Cli, clap::Error> {
    let cli = command().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches))?;
    if let Command::Save(save) = &cli.command {
        save.check().map_err(|message| {
            let mut whole = command();
            let save = whole.find_subcommand_mut("save").expect("it was just parsed");
            save.error(ErrorKind::MissingRequiredArgument, message)
        })?;
    }
    Ok(cli)
}

fn with_notes(command: clap::Command) -> clap::Command {
    let own = command.get_after_help().map(ToString::to_string);
    let takes_devices = command.get_name() == "limosa"
        || command.get_arguments().any(|argument| argument.get_long().is_none() && is_device(argument));
    let devices = takes_devices.then(|| DEVICES.to_owned());
    let takes_memory = command.get_arguments().any(|argument| argument.get_id() == "memory");
    let memory = (takes_memory && command.get_name() != "demo").then(|| guest::MEMORY.to_owned());
    let notes: Vec<_> = own.into_iter().chain(devices).chain(memory).chain([exit::HELP.to_owned()]).collect();
    command.after_help(notes.join("\n\n")).mut_subcommands(with_notes)
}

fn is_device(argument: &clap::Arg) -> bool {
    let names = argument.get_value_names().unwrap_or_default();
    names.iter().any(|name| ["DEVICE", "SRC", "DST"].contains(&name.as_str()))
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Migrate two live devices between processes, verify every byte, print a timeline.
    Demo(Demo),
    /// Serve a ready device on a vfio-user socket.
    Serve(Serve),
    /// Replace the process of a server while its clients go on: start another one, and say how it went.
    ///
    /// The new server takes over connections, guest memory, interrupts and the device's state. Its clients and the guest are not
    /// told. Whatever fails before it serves, the old server goes on.
    SwitchOver(SwitchOver),
    /// Say what a device is and whether it can migrate; without one, list the kernel's VFIO devices.
    ///
    /// For the list, each device that nobody has open is opened for a moment.
    Probe(Probe),
    /// Say what this machine and a device can do, what stands in the way of a move, and what to do about it.
    ///
    /// With two devices, also whether the state of the first can go to the second.
    Doctor(Doctor),
    /// Read or drive a device's migration state.
    State(StateArgs),
    /// Stop devices, save their state to a file or an object store, and let them run again.
    Save(Save),
    /// Load a saved state into devices.
    Load(Load),
    /// Say what is in a saved stream, and whether it is whole.
    Inspect(Inspect),
    /// Say whether a saved stream is whole and unaltered: exit code 0, or 6 with where and what is wrong.
    ///
    /// Reads all of it once, and stops at the first thing that is wrong.
    Verify(Verify),
    /// Move devices' state to others on this machine.
    Migrate(Migrate),
    /// Move devices to a receiver.
    Send(Send),
    /// Take devices from a sender.
    Receive(Receive),
    /// Ask what became of a move in doubt, and act on it; let a guest go on that a process of limosa has left stopped.
    /// Without a device, list both.
    Resolve(Resolve),
    /// Answer sources in doubt for a receiver that has ended.
    Answer(Answer),
    /// Say whether a driver or a server keeps the standard: named checks, each with the clause that it comes from.
    ///
    /// Stops the device again and again; with --destructive also resets it and loads states into it, good and bad ones.
    /// In the end the device runs, with the state that it had. Exit code 0: no check failed.
    Check(Check),
    /// Print the migration state machine.
    Fsm(Fsm),
    /// Measure a device: arcs, data streams, dirty reports, accesses, whole moves; and compare two runs.
    Bench(Bench),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the manual pages.
    Man {
        /// The folder to write them to; made when it is not there.
        #[arg(value_name = "FOLDER")]
        folder: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct Probe {
    /// The device; without it, the kernel's VFIO devices are listed.
    #[arg(value_name = "DEVICE")]
    pub device: Option<String>,

    /// List PCI devices that other drivers have as well, and what to do for VFIO to have them.
    #[arg(long, conflicts_with = "device")]
    pub all: bool,
}

#[derive(Clone, Copy, Debug, Args)]
pub struct Hold {
    /// When done, keep the device open until SIGINT or SIGTERM, so that the kernel does not reset it. Other commands
    /// reach it by the name that is printed.
    // Global for `state DEVICE set STATE --hold`.
    #[arg(long, global = true)]
    pub hold: bool,
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
#[command(after_help = MODEL_OPTIONS)]
pub struct Serve {
    /// The device to serve.
    #[arg(value_name = "MODEL")]
    pub model: Model,

    /// Where to listen.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,

    /// The socket's mode, whatever the umask: who may connect, which is who may write to it.
    #[arg(long, value_name = "OCTAL", default_value = "600", value_parser = mode)]
    pub mode: u32,

    /// The socket's group, a name or a number; with a --mode that lets it in, such as 660.
    #[arg(long, value_name = "GROUP")]
    pub group: Option<Group>,

    /// Listen here as well, for clients that move the device beside its VMM: where that and whoever moves it are different
    /// users. The socket is this user's alone, mode 600. On --socket, root and this user may move the device beside its VMM.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// An option of the model, NAME=VALUE; many times.
    #[arg(short = 'o', long = "option", value_name = "NAME=VALUE")]
    pub options: Vec<String>,

    /// Let a client map any regular file as the guest's memory, for VMMs whose memory is a file on a disk. Without it,
    /// only memfds and files on tmpfs or hugetlbfs are mapped. An access to another file waits for its file system: a
    /// client that can choose one whose server or daemon does not answer hangs this process for good.
    #[arg(long)]
    pub any_file: bool,

    /// Let another process take over while clients are served: listen here, at a socket that is this user's alone, for
    /// `limosa serve` with --take-from and this path. When it serves, this process ends with code 0.
    #[arg(long, value_name = "PATH")]
    pub takeover: Option<PathBuf>,

    /// Take over from the server that was started with --takeover and this path. MODEL, --socket and the options have to be
    /// those of the old server. When that one has ended, listen at --takeover, which may be the same path.
    #[arg(long, value_name = "PATH")]
    pub take_from: Option<PathBuf>,

    /// End when the process that started this one ends.
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

/// What `switch-over` does to the command that it starts.
const NEW_COMMAND: &str = "\
NEW COMMAND is that of the old server, `limosa serve ...`, of the new version. `--take-from PATH` and `--json` are added to its end, \
unless they are there. It goes on when this command has ended, with the standard error of this command.

Exit codes of switch-over:
  0  the new server serves
  1  the old server serves as before; the message says why
  4  there is no server that can be replaced; nothing was started
  5  it is not known that one of them serves; the message says what is known
  8  the new server serves, and no other one can take over from it";

#[derive(Debug, Args)]
#[command(after_help = NEW_COMMAND)]
pub struct SwitchOver {
    /// Where the old server listens for new ones: its --takeover.
    #[arg(value_name = "PATH")]
    pub path: PathBuf,

    /// Seconds to wait for the new server to serve or to give up. It has limits of its own, which end before this one.
    #[arg(long, value_name = "SECONDS", default_value = "240", value_parser = seconds)]
    pub limit: Duration,

    /// What starts the new server.
    #[arg(last = true, required = true, value_name = "NEW COMMAND")]
    pub command: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Model {
    /// A PCI 16550A serial port.
    Uart,
    /// A device for tests and measurements: state, pre-copy, DMA and faults as asked for.
    Synthetic,
}

#[derive(Debug, Args)]
pub struct StateArgs {
    /// The device.
    #[arg(value_name = "DEVICE")]
    pub device: String,

    #[command(subcommand)]
    pub action: Option<StateAction>,

    #[command(flatten)]
    pub hold: Hold,
}

#[derive(Debug, Subcommand)]
pub enum StateAction {
    /// Print the state (also without an action).
    Get,
    /// Drive the device to a state, over every state between.
    Set {
        /// STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY or PRE_COPY_P2P.
        #[arg(value_name = "STATE")]
        state: State,
    },
    /// Reset the device: from any state, ERROR too, to RUNNING.
    Reset,
}

#[derive(Debug, Args)]
#[command(after_help = STORES)]
pub struct Inspect {
    /// What `limosa save` wrote: a file, or s3://BUCKET/KEY.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = STORES)]
pub struct Verify {
    /// What `limosa save` wrote: a file, or s3://BUCKET/KEY.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// It has to be the snapshot that has this hash, as `limosa verify` once printed it.
    #[arg(long, value_name = "HEX")]
    pub blake3: Option<String>,
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
