//! What commands that move devices take.

use std::ffi::{OsStr, OsString};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use limosa_migrate::{Compression, Options};

use super::Hold;
use super::guest::{DestinationMemory, MemoryPairs, SourceMemory, Starting, Stopping};
use super::values::{LinkCount, bytes, link_count, links, milliseconds, seconds};
use crate::reports::{ReportFile, report_file};

/// The devices of one side.
#[derive(Debug, Args)]
pub struct Devices {
    /// The device; others are named with --device.
    #[arg(value_name = "DEVICE", required_unless_present_any = ["more", "memory"])]
    pub device: Option<String>,

    /// A further device; many times. All of them move as one, and the first here becomes the first there, the
    /// second the second.
    #[arg(long = "device", id = "more", value_name = "DEVICE")]
    pub more: Vec<String>,
}

impl Devices {
    /// All of them, in their order.
    pub fn names(&self) -> Vec<&str> {
        self.device.iter().chain(&self.more).map(String::as_str).collect()
    }
}

/// The devices of a save, and where they are saved.
///
/// The two names without an option are one argument for clap: of an argument that may be left out and one that may not, it
/// finds the second only where no option stands between them.
#[derive(Debug, Args)]
pub struct SaveNames {
    /// The device, where --device or --memory does not name all there is, and a file or s3://BUCKET/KEY, which appears when
    /// it is whole.
    #[arg(value_names = ["DEVICE", "FILE"], num_args = 1..=2, required = true)]
    names: Vec<OsString>,

    /// A further device; many times. All of them move as one, and the first here becomes the first there, the
    /// second the second.
    #[arg(long = "device", id = "more", value_name = "DEVICE")]
    more: Vec<String>,
}

impl Save {
    /// What clap cannot check: that there is something to save, and that a device's name is text.
    pub(super) fn check(&self) -> Result<(), String> {
        let device = self.names.names.split_last().and_then(|(_, device)| device.first());
        if device.is_none() && self.names.more.is_empty() && self.memory.memory.is_empty() {
            let file = self.names.file().display();
            return Err(format!(
                "{file} is where to save; what to save is missing: DEVICE, --device or --memory"
            ));
        }
        match device {
            Some(device) if device.to_str().is_none() => {
                Err(format!("{}: expected a device's name in UTF-8", device.display()))
            }
            _ => Ok(()),
        }
    }
}

impl SaveNames {
    /// All devices, in their order.
    pub fn devices(&self) -> Vec<&str> {
        let first = self.names.split_last().map_or(&[][..], |(_, device)| device);
        let first = first.iter().filter_map(|name| name.to_str());
        first.chain(self.more.iter().map(String::as_str)).collect()
    }

    /// Where they are saved.
    pub fn file(&self) -> &Path {
        Path::new(self.names.last().map_or(OsStr::new(""), OsString::as_os_str))
    }
}

/// Where the report goes, besides standard output.
#[derive(Debug, Args)]
pub struct Reporting {
    /// Write the report to this file too, also when the move fails: .html with a picture of the timeline, .json or
    /// .txt; many times. A file that is there is replaced.
    #[arg(long, value_name = "FILE", value_parser = report_file)]
    pub report: Vec<ReportFile>,
}

#[derive(Debug, Args)]
#[command(override_usage = "limosa save [OPTIONS] [DEVICE] <FILE>", after_help = super::STORES)]
pub struct Save {
    #[command(flatten)]
    pub names: SaveNames,

    /// Replace a snapshot that is there already, when the new one is whole.
    #[arg(long)]
    pub replace: bool,

    /// Compress memory and devices' data with zstd, or with lz4, which takes less time and saves less.
    #[arg(long, value_name = "METHOD")]
    pub compress: Option<Compression>,

    /// Leave the devices stopped.
    #[arg(long)]
    pub stop: bool,

    #[command(flatten)]
    pub stop_limits: StopLimits,

    #[command(flatten)]
    pub reporting: Reporting,

    #[command(flatten)]
    pub hold: Hold,

    #[command(flatten)]
    pub memory: SourceMemory,

    #[command(flatten)]
    pub stopping: Stopping,

    #[command(flatten)]
    pub moves: Moves,
}

#[derive(Debug, Args)]
#[command(after_help = super::STORES)]
pub struct Load {
    /// What `limosa save` wrote: a file, or s3://BUCKET/KEY.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    #[command(flatten)]
    pub devices: Devices,

    /// Leave the devices stopped.
    #[arg(long, conflicts_with = "run")]
    pub stop: bool,

    #[command(flatten)]
    pub reporting: Reporting,

    #[command(flatten)]
    pub hold: Hold,

    #[command(flatten)]
    pub state: StateMax,

    #[command(flatten)]
    pub memory: DestinationMemory,

    #[command(flatten)]
    pub starting: Starting,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Downtime")]
pub struct Moving {
    /// Skip pre-copy of devices: stop them first, then copy all of their state.
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

    #[command(flatten)]
    pub stop_limits: StopLimits,
}

/// When the guest stops, and for how long at most.
#[derive(Debug, Args)]
#[command(next_help_heading = "Downtime")]
pub struct StopLimits {
    /// Seconds for which devices' initial data holds the stop back: while a device has some to give or to load, nothing
    /// stops.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    initial_limit: Duration,

    /// Longest time in seconds that the guest stands still, from its stop until everything is there. After that it runs
    /// on here, and nothing is moved or saved. A move that is predicted to take longer does not stop it at all.
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    standstill: Duration,

    #[command(flatten)]
    state: StateMax,
}

impl StopLimits {
    /// These options with the limits.
    pub fn limit(&self, mut options: Options) -> Options {
        options.convergence.initial_max = self.initial_limit;
        self.state.limit(options.with_standstill_max(self.standstill))
    }
}

/// How much data a device may have.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub struct StateMax {
    /// The most bytes of one device's data, with all that is sent before the stop. Without it, four times what the
    /// device says, and at least 1G, for what is left to the stop. A device with more ends the move.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    state_max: Option<u64>,
}

impl StateMax {
    /// These options with the limit.
    pub fn limit(&self, options: Options) -> Options {
        options.with_state_max(self.state_max)
    }
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
    #[arg(value_name = "SRC", required_unless_present_any = ["more", "memory"], requires = "destination")]
    pub source: Option<String>,

    /// The device to move to.
    #[arg(value_name = "DST")]
    pub destination: Option<String>,

    /// A further device, and the one that it is moved to; many times. All of them move as one.
    #[arg(long = "device", id = "more", num_args = 2, value_names = ["SRC", "DST"])]
    pub more: Vec<String>,

    #[command(flatten)]
    pub reporting: Reporting,

    #[command(flatten)]
    pub hold: Hold,

    #[command(flatten)]
    pub moving: Moving,

    #[command(flatten)]
    pub memory: MemoryPairs,

    #[command(flatten)]
    pub stopping: Stopping,

    #[command(flatten)]
    pub starting: Starting,

    #[command(flatten)]
    pub moves: Moves,
}

impl Migrate {
    /// The devices to move from, in their order.
    pub fn sources(&self) -> Vec<&str> {
        self.source.iter().chain(self.more.iter().step_by(2)).map(String::as_str).collect()
    }

    /// The devices to move to, in the same order.
    pub fn destinations(&self) -> Vec<&str> {
        self.destination.iter().chain(self.more.iter().skip(1).step_by(2)).map(String::as_str).collect()
    }
}

#[derive(Debug, Args)]
pub struct Send {
    #[command(flatten)]
    pub devices: Devices,

    /// Where the receiver listens: unix:PATH or tcp:HOST:PORT.
    #[arg(long, value_name = "ADDR")]
    pub to: String,

    #[command(flatten)]
    pub reporting: Reporting,

    #[command(flatten)]
    pub hold: Hold,

    #[command(flatten)]
    pub moving: Moving,

    /// Compress memory and devices' data with zstd, or with lz4, which takes less time and saves less. Worth it on links
    /// that are slower than a processor compresses; what would not become shorter goes as it is.
    #[arg(long, value_name = "METHOD", help_heading = "Link")]
    pub compress: Option<Compression>,

    /// Send no more than this each second.
    #[arg(long, value_name = "BYTES", value_parser = bytes, help_heading = "Link")]
    pub bandwidth: Option<u64>,

    /// Send over so many links at once: 1 to 16, or auto: up to four, as many as make it faster.
    /// The receiver may take fewer.
    #[arg(long, value_name = "COUNT", default_value = "1", value_parser = link_count, help_heading = "Link")]
    pub links: LinkCount,

    #[command(flatten)]
    pub memory: SourceMemory,

    #[command(flatten)]
    pub stopping: Stopping,

    #[command(flatten)]
    pub link: Link,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Link")]
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

    /// The name that the other side's certificate must have. Without it, send and resolve expect the host that they
    /// connect to; receive and answer need it, or --tls-any-name.
    #[arg(long, value_name = "NAME", requires_all = ["tls_ca", "tls_cert", "tls_key"])]
    pub tls_name: Option<String>,

    /// Peers need not be authenticated. Without TLS, use TCP beyond this host: anyone on the path can then read and alter
    /// guest memory and device state, and take the devices over. And believe peers that prove nothing: those of older
    /// versions, and the other end of a move of which no secret was noted.
    #[arg(long)]
    pub insecure: bool,
}

/// The certificates that a listening side accepts.
#[derive(Debug, Args)]
#[command(next_help_heading = "TLS")]
pub struct Names {
    /// Accept every certificate of the authorities, whatever its name: whoever has one can send, or ask.
    #[arg(long, requires_all = ["tls_ca", "tls_cert", "tls_key"], conflicts_with = "tls_name")]
    pub tls_any_name: bool,
}

#[derive(Debug, Args)]
pub struct Receive {
    #[command(flatten)]
    pub devices: Devices,

    /// Where to listen: unix:PATH or tcp:HOST:PORT (port 0 for any).
    #[arg(long, value_name = "ADDR")]
    pub listen: String,

    /// Seconds to wait for a sender.
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds)]
    pub wait: Duration,

    #[command(flatten)]
    pub reporting: Reporting,

    #[command(flatten)]
    pub hold: Hold,

    /// Take no more than so many links from a sender: 1 to 16.
    #[arg(long, value_name = "COUNT", default_value = "16", value_parser = links, help_heading = "Link")]
    pub links: NonZeroU32,

    /// Longest time in seconds for which the sender may send nothing but keep-alives; by default four times --silence.
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "Link")]
    pub idle: Option<Duration>,

    /// Longest time in seconds from the sender's offer until everything has arrived.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value = "86400",
        value_parser = seconds,
        help_heading = "Link"
    )]
    pub move_limit: Duration,

    #[command(flatten)]
    pub state: StateMax,

    #[command(flatten)]
    pub memory: DestinationMemory,

    #[command(flatten)]
    pub starting: Starting,

    #[command(flatten)]
    pub link: Link,

    #[command(flatten)]
    pub names: Names,
}

#[derive(Debug, Args)]
pub struct Moves {
    /// The folder in which moves are remembered, which has to be your own; by default limosa/moves below $XDG_STATE_HOME,
    /// ~/.local/state or, without either, /var/lib. What cannot be remembered there is not moved.
    #[arg(long = "moves", value_name = "FOLDER")]
    pub folder: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("which").args(["device", "id"]).multiple(true))]
pub struct Resolve {
    /// The device that was sent or saved; without it and --id, the moves in doubt are listed, and the guests that a process
    /// of limosa has left stopped.
    #[arg(value_name = "DEVICE")]
    pub device: Option<String>,

    /// Where its destination is to be asked: unix:PATH or tcp:HOST:PORT; by default where it was sent to.
    #[arg(long, value_name = "ADDR", requires = "which")]
    pub to: Option<String>,

    /// The move, if another one than the device's last, or one of memory alone.
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,

    /// Ask nobody: you have looked, and know what became of the move.
    #[arg(long, value_name = "OUTCOME", requires = "which", conflicts_with = "to")]
    pub decide: Option<Decided>,

    /// Drop the note and do nothing else: ask nobody, change no device, let no process go on.
    #[arg(long, requires = "which", conflicts_with_all = ["to", "decide", "on_resume"])]
    pub forget: bool,

    /// Run this by the shell to let the guest go on if the move was undone, where --on-stop has stopped it. Processes
    /// that --stop-with has stopped go on by themselves then.
    #[arg(long, value_name = "COMMAND", requires = "which")]
    pub on_resume: Option<String>,

    #[command(flatten)]
    pub moves: Moves,

    #[command(flatten)]
    pub tls: Tls,
}

/// What became of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Decided {
    /// The destination runs it, or did, or the snapshot was published: the device stops for good.
    Moved,
    /// The destination does not run it and never will, or there is no snapshot and never will be: the device runs again.
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

    #[command(flatten)]
    pub names: Names,
}
