//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use limosa_protocol::State;

use crate::exit;

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
    /// Print one JSON document instead of text.
    #[arg(long, global = true)]
    pub json: bool,

    /// Say more: once for what is done, twice for every message.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// Seconds to wait for the answer to one request of vfio-user; the kernel takes the time that it takes.
    #[arg(long, global = true, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub timeout: Duration,

    /// Which of the kernel's doors to open devices through.
    #[arg(long, global = true, value_name = "DOOR")]
    pub door: Option<Door>,

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

fn with_notes(command: clap::Command) -> clap::Command {
    let own = command.get_after_help().map(ToString::to_string);
    let takes_devices = command.get_name() == "limosa"
        || command.get_arguments().any(|argument| argument.get_long().is_none() && is_device(argument));
    let devices = takes_devices.then(|| DEVICES.to_owned());
    let notes: Vec<_> = own.into_iter().chain(devices).chain([exit::HELP.to_owned()]).collect();
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
    /// Say what a device is and whether it can migrate; without one, list the kernel's VFIO devices.
    ///
    /// For the list, each device that nobody has open is opened for a moment.
    Probe(Probe),
    /// Read or drive a device's migration state.
    State(StateArgs),
    /// Stop a device, save its state to a file, and let it run again.
    Save(Save),
    /// Load a saved state into a device.
    Load(Load),
    /// Say what is in a saved stream, and whether it is whole.
    Inspect(Inspect),
    /// Move a device's state to another device on this machine.
    Migrate(Migrate),
    /// Move a device to a receiver.
    Send(Send),
    /// Take a device from a sender.
    Receive(Receive),
    /// Ask what became of a move in doubt, and act on it; without a device, list the moves in doubt.
    Resolve(Resolve),
    /// Answer sources in doubt for a receiver that has ended.
    Answer(Answer),
    /// Print the migration state machine.
    Fsm(Fsm),
    /// Measure a device: region accesses, data streams, dirty reports, each beside the floor.
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

    /// An option of the model, NAME=VALUE; many times.
    #[arg(short = 'o', long = "option", value_name = "NAME=VALUE")]
    pub options: Vec<String>,

    /// End when the process that started this one ends.
    #[arg(long, hide = true)]
    pub with_parent: bool,
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
pub struct Save {
    /// The device.
    #[arg(value_name = "DEVICE")]
    pub device: String,

    /// The file; appears when it is whole.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// Leave the device stopped.
    #[arg(long)]
    pub stop: bool,

    #[command(flatten)]
    pub hold: Hold,
}

#[derive(Debug, Args)]
pub struct Load {
    /// A file that `limosa save` wrote.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// The device.
    #[arg(value_name = "DEVICE")]
    pub device: String,

    /// Leave the device stopped.
    #[arg(long)]
    pub stop: bool,

    #[command(flatten)]
    pub hold: Hold,
}

#[derive(Debug, Args)]
pub struct Inspect {
    /// A file that `limosa save` wrote.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct Moving {
    /// Skip pre-copy: stop the device first, then copy all of its state.
    #[arg(long)]
    pub no_precopy: bool,

    /// Milliseconds for which nothing may run: pre-copy goes on until a stop is predicted to take no longer, and the
    /// move is called off if that does not come about (--when-stalled). Without it, 300 ms are aimed for.
    #[arg(long, value_name = "MS", conflicts_with = "no_precopy", value_parser = milliseconds)]
    pub downtime_limit: Option<Duration>,

    /// What to do when what changes is not moved fast enough: keep trying, switch over all the same, or abort. By
    /// default abort with --downtime-limit, else switch over.
    #[arg(long, value_name = "CHOICE")]
    pub when_stalled: Option<WhenStalled>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WhenStalled {
    /// Keep trying until the move is interrupted or the device becomes quieter.
    KeepTrying,
    /// Stop the device, however long the rest takes.
    SwitchOver,
    /// Call the move off.
    Abort,
}

#[derive(Debug, Args)]
pub struct Migrate {
    /// The device to move from.
    #[arg(value_name = "SRC")]
    pub source: String,

    /// The device to move to.
    #[arg(value_name = "DST")]
    pub destination: String,

    #[command(flatten)]
    pub moving: Moving,

    #[command(flatten)]
    pub hold: Hold,
}

#[derive(Debug, Args)]
pub struct Send {
    /// The device.
    #[arg(value_name = "DEVICE")]
    pub device: String,

    /// Where the receiver listens: unix:PATH or tcp:HOST:PORT.
    #[arg(long, value_name = "ADDR")]
    pub to: String,

    #[command(flatten)]
    pub moving: Moving,

    /// Send no more than this each second.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub bandwidth: Option<u64>,

    #[command(flatten)]
    pub link: Link,

    #[command(flatten)]
    pub hold: Hold,
}

#[derive(Debug, Args)]
pub struct Link {
    /// Seconds that the other side may say nothing before the link counts as lost; so long a source in doubt asks,
    /// and twice as long a destination stays to be asked.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub silence: Duration,

    #[command(flatten)]
    pub moves: Moves,

    #[command(flatten)]
    pub tls: Tls,
}

/// TLS 1.3 with both sides authenticated: all three files, on both sides.
#[derive(Debug, Args)]
#[command(next_help_heading = "TLS")]
pub struct Tls {
    /// The authorities that the other side's certificate may come from, PEM.
    #[arg(long, value_name = "FILE", requires_all = ["tls_cert", "tls_key"])]
    pub tls_ca: Option<PathBuf>,

    /// This side's certificate, followed by those between it and its authority, PEM.
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_key"])]
    pub tls_cert: Option<PathBuf>,

    /// The key of this side's certificate, PEM.
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_cert"])]
    pub tls_key: Option<PathBuf>,

    /// The name that the other side's certificate must have. Without it, send expects the host that it connects to,
    /// and receive accepts every name.
    #[arg(long, value_name = "NAME", requires_all = ["tls_ca", "tls_cert", "tls_key"])]
    pub tls_name: Option<String>,
}

#[derive(Debug, Args)]
pub struct Receive {
    /// The device.
    #[arg(value_name = "DEVICE")]
    pub device: String,

    /// Where to listen: unix:PATH or tcp:HOST:PORT (port 0 for any).
    #[arg(long, value_name = "ADDR")]
    pub listen: String,

    /// Seconds to wait for a sender.
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds)]
    pub wait: Duration,

    #[command(flatten)]
    pub link: Link,

    #[command(flatten)]
    pub hold: Hold,
}

#[derive(Debug, Args)]
pub struct Moves {
    /// The folder in which moves are remembered; by default limosa/moves below $XDG_STATE_HOME or ~/.local/state.
    #[arg(long = "moves", value_name = "FOLDER")]
    pub folder: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Resolve {
    /// The device that was sent; without it, the moves in doubt are listed.
    #[arg(value_name = "DEVICE")]
    pub device: Option<String>,

    /// Where its destination is to be asked: unix:PATH or tcp:HOST:PORT; by default where it was sent to.
    #[arg(long, value_name = "ADDR", requires = "device")]
    pub to: Option<String>,

    /// The move, if another one than the device's last.
    #[arg(long, value_name = "ID", requires = "device")]
    pub id: Option<String>,

    /// Ask nobody: you have looked, and know what became of the move.
    #[arg(long, value_name = "OUTCOME", requires = "device", conflicts_with = "to")]
    pub decide: Option<Decided>,

    #[command(flatten)]
    pub moves: Moves,

    #[command(flatten)]
    pub tls: Tls,
}

/// What became of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Decided {
    /// The destination runs it, or did: the device stops for good.
    Moved,
    /// The destination does not run it and never will: the device runs again.
    Undone,
}

#[derive(Debug, Args)]
pub struct Answer {
    /// Where to listen: unix:PATH or tcp:HOST:PORT (port 0 for any).
    #[arg(long, value_name = "ADDR")]
    pub listen: String,

    /// Seconds to stay.
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds)]
    pub wait: Duration,

    #[command(flatten)]
    pub moves: Moves,

    #[command(flatten)]
    pub tls: Tls,
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

#[derive(Debug, Args)]
pub struct Bench {
    /// The device.
    #[arg(value_name = "DEVICE")]
    pub device: String,

    /// Seconds for each figure.
    #[arg(long, value_name = "SECONDS", default_value = "0.5", value_parser = seconds)]
    pub seconds: Duration,

    /// Keep this process and the floor's other end on one core; start the server with
    /// `taskset -c 0` for figures on one core.
    #[arg(long)]
    pub one_core: bool,
}

/// A positive number of milliseconds, fractions allowed.
fn milliseconds(text: &str) -> Result<Duration, String> {
    let milliseconds: f64 =
        text.parse().map_err(|_| "expected a number of milliseconds, such as 300 or 0.5".to_owned())?;
    if !(milliseconds > 0.0 && milliseconds <= 3_600_000.0) {
        return Err("expected more than 0 and at most 3600000 milliseconds".into());
    }
    Ok(Duration::from_secs_f64(milliseconds / 1000.0))
}

/// A positive number of seconds, fractions allowed.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 =
        text.parse().map_err(|_| "expected a number of seconds, such as 10 or 0.5".to_owned())?;
    // Not a number is in no range.
    if !(seconds > 0.0 && seconds <= 86_400.0) {
        return Err("expected more than 0 and at most 86400 seconds".into());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// A number of bytes with an optional K, M, G or T (powers of 1024).
pub fn bytes(text: &str) -> Result<u64, String> {
    let expected = || format!("`{text}` is not a size: expected a number with K, M, G or T, such as 64M");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift =
        match text[digits.len()..].trim_end_matches("iB").trim_end_matches('B').to_ascii_uppercase().as_str()
        {
            "" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(expected()),
        };
    let number: u64 = digits.parse().map_err(|_| expected())?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("`{text}` is more than 2^64 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn sizes_and_seconds() {
        assert_eq!(bytes("64M"), Ok(64 << 20));
        assert_eq!(bytes("1GiB"), Ok(1 << 30));
        assert_eq!(bytes("17"), Ok(17));
        assert!(bytes("16777216T").unwrap_err().contains("2^64"));
        assert!(bytes("M").is_err() && bytes("-1").is_err() && bytes("5X").is_err());
        assert!(seconds("0").is_err() && seconds("x").is_err() && seconds("NaN").is_err());
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
    }
}
