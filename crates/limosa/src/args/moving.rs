//! Options of the commands that move devices, and when the guest stops.

use std::num::NonZeroU32;
use std::time::Duration;

use clap::{ArgGroup, Args, ValueEnum};
use limosa_migrate::{Compression, MigrationId, Options};

use super::KeepOpen;
use super::guest::{DestinationMemory, MemoryPairs, SourceMemory, Starting, Stopping};
use super::link::{Checksums, Link, Names};
use super::resolving::Moves;
use super::values::{LinkCount, bytes, compression, device, link_count, links, milliseconds, seconds};
use crate::metrics;
use crate::reports::{ReportFile, report_file};

/// The devices of one side.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("a_device").args(["device", "more"]).multiple(true))]
pub struct Devices {
    /// The device; name further devices with --device.
    #[arg(value_name = "DEVICE", value_parser = device, required_unless_present_any = ["more", "memory"])]
    pub device: Option<String>,

    /// A further device; may be repeated. All of them move together: the first here becomes the first there, the
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
    /// Also write the report to this file, even if the move fails: .html with a picture of the timeline, .json or
    /// .txt; may be repeated. An existing file is replaced.
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

    /// Limit for the predicted downtime in milliseconds: pre-copy continues until a stop is predicted to take no
    /// longer, and the move is cancelled if that is never the case (--when-stalled). Without it, the goal is 300 ms.
    #[arg(long, value_name = "MS", conflicts_with = "no_precopy", value_parser = milliseconds)]
    pub downtime_limit: Option<Duration>,

    /// What to do if the guest changes memory and state faster than they are moved: keep trying, switch over
    /// anyway, or abort. By default abort with --downtime-limit, else switch over.
    #[arg(long, value_name = "CHOICE")]
    pub when_stalled: Option<WhenStalled>,

    #[command(flatten)]
    pub stop_limits: StopLimits,
}

/// When the guest stops, and for how long at most.
#[derive(Debug, Args)]
#[command(next_help_heading = "Downtime")]
pub struct StopLimits {
    /// Seconds for which devices' initial data may delay the stop: nothing stops while a device still has initial
    /// data to send or load.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    initial_limit: Duration,

    /// Longest time in seconds for which the guest is stopped, until everything has arrived. After that the move or
    /// save is undone, and the guest runs again here. If the stop is predicted to take longer, the guest is not stopped
    /// at all.
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
    /// Limit for one device's data in bytes, including pre-copy. Without it, the limit applies to data sent during
    /// the stop: four times the size that the device reports, but at least 1G. A device with more data ends the move.
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
    /// Keep trying until the move is cancelled or the device becomes quieter.
    KeepTrying,
    /// Stop the device, however long the rest takes.
    SwitchOver,
    /// Cancel the move.
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

    /// A further device and its destination; may be repeated. All devices move together.
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
    pub checksums: Checksums,

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

    /// Compress memory and device data with zstd, or with lz4, which is faster and compresses less. Useful on links
    /// that are slower than compression. Data that would not become shorter is sent uncompressed.
    #[arg(long, value_name = "METHOD", value_parser = compression(), help_heading = "Link")]
    pub compress: Option<Compression>,

    /// Bandwidth limit in bytes per second.
    #[arg(long, value_name = "BYTES", value_parser = bytes, help_heading = "Link")]
    pub bandwidth: Option<u64>,

    /// Number of links to use at once: 1 to 16, or auto: up to four, as long as each makes the move faster. The
    /// receiver may accept fewer.
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

    /// Accept one move after the other, for vfio-user devices. A failed move does not end the command. SIGTERM ends
    /// it after the current move; other signals cancel that move. After a committed move, the next one is accepted once
    /// the guest has moved on from here. The names of --report files get the move's id.
    #[arg(long, conflicts_with_all = ["wait", "keep_open"], requires = "a_device")]
    pub forever: bool,

    /// Serve metrics of the moves at this address, as OpenMetrics text over HTTP: HOST:PORT (port 0 for any), or
    /// unix:PATH for a socket with mode 600. Anybody who can connect can read them.
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<metrics::Address>,

    #[command(flatten)]
    pub reporting: Reporting,

    #[command(flatten)]
    pub keep_open: KeepOpen,

    /// Accept at most this number of links from a sender: 1 to 16.
    #[arg(long, value_name = "COUNT", default_value = "16", value_parser = links, help_heading = "Link")]
    pub links: NonZeroU32,

    /// Longest time in seconds for which the sender may send only keep-alives; by default four times --silence.
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
