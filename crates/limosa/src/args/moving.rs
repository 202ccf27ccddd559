//! Options of the commands that move devices, and when the guest stops.

use std::num::NonZeroU32;
use std::time::Duration;

use clap::{ArgGroup, Args, ValueEnum};
use limosa_migrate::{Compression, MigrationId, Options};

use super::KeepOpen;
use super::guest::{DestinationMemory, MemoryPairs, SourceMemory, Starting, Stopping};
use super::link::{Link, Names};
use super::resolving::Moves;
use super::values::{LinkCount, bytes, compression, device, link_count, links, milliseconds, seconds};
use crate::metrics;
use crate::reports::{ReportFile, report_file};

/// The devices of one side.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("a_device").args(["device", "more"]).multiple(true))]
pub struct Devices {
    /// The device; others are named with --device.
    #[arg(value_name = "DEVICE", value_parser = device, required_unless_present_any = ["more", "memory"])]
    pub device: Option<String>,

    /// A further device; many times. All of them move as one, and the first here becomes the first there, the
    /// second the second.
    #[arg(long = "device", id = "more", value_name = "DEVICE", value_parser = device)]
    pub more: Vec<String>,
}

impl Devices {
    /// All of them, in their order.
    pub fn names(&self) -> Vec<&str> {
        self.device.iter().chain(&self.more).map(String::as_str).collect()
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

impl Reporting {
    /// The same for one of many moves, with the id of the move in the name of each file.
    pub fn of_move(&self, id: MigrationId) -> Reporting {
        Reporting { report: self.report.iter().map(|file| file.of_move(id)).collect() }
    }
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

    /// What to do when the guest changes memory and state faster than they are moved: keep trying, switch over all
    /// the same, or abort. By default abort with --downtime-limit, else switch over.
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
    #[arg(value_name = "SRC", value_parser = device, required_unless_present_any = ["more", "memory"], requires = "destination")]
    pub source: Option<String>,

    /// The device to move to.
    #[arg(value_name = "DST", value_parser = device)]
    pub destination: Option<String>,

    /// A further device, and its destination device; many times. All devices move together.
    #[arg(long = "device", id = "more", num_args = 2, value_names = ["SRC", "DST"], value_parser = device)]
    pub more: Vec<String>,

    #[command(flatten)]
    pub reporting: Reporting,

    #[command(flatten)]
    pub keep_open: KeepOpen,

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
    pub keep_open: KeepOpen,

    #[command(flatten)]
    pub moving: Moving,

    /// Compress memory and devices' data with zstd, or with lz4, which takes less time and saves less. Worth it on links
    /// that are slower than a processor compresses. Data that would not become shorter is sent uncompressed.
    #[arg(long, value_name = "METHOD", value_parser = compression(), help_heading = "Link")]
    pub compress: Option<Compression>,

    /// Send no more than this each second.
    #[arg(long, value_name = "BYTES", value_parser = bytes, help_heading = "Link")]
    pub bandwidth: Option<u64>,

    /// Send over this number of links at once: 1 to 16, or auto: up to four, as long as each makes it faster.
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
pub struct Receive {
    #[command(flatten)]
    pub devices: Devices,

    /// Where to listen: unix:PATH or tcp:HOST:PORT (port 0 for any).
    #[arg(long, value_name = "ADDR")]
    pub listen: String,

    /// Seconds to wait for a sender.
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds)]
    pub wait: Duration,

    /// Take one move after the other, for devices behind sockets. A move that fails does not end the command: SIGTERM does, after
    /// the move under way, and other signals call that off. After a move that was committed, the next one is taken once the guest
    /// has moved on from here. The files of --report get the move's id into their names.
    #[arg(long, conflicts_with_all = ["wait", "keep_open"], requires = "a_device")]
    pub forever: bool,

    /// Answer at this address with metrics of the moves, as OpenMetrics text over HTTP: HOST:PORT (port 0 for any), or unix:PATH for
    /// a socket that is this user's alone. Whoever can connect can read them.
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<metrics::Address>,

    #[command(flatten)]
    pub reporting: Reporting,

    #[command(flatten)]
    pub keep_open: KeepOpen,

    /// Accept at most this number of links from a sender: 1 to 16.
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
