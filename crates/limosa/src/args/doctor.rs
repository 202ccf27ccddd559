//! The arguments of `limosa doctor`.

use std::path::PathBuf;

use clap::Args;

use super::values::{Rate, device, rate};

/// Its effects on a device, and its exit codes.
const NOTES: &str = "\
Without --measure the doctor changes no state. A kernel device that no process has open is opened for a moment.

Exit codes of doctor:
  0   ready
  9   ready, with warnings
  10  not ready: there is a blocker
Other codes are those of the command, if it failed.";

#[derive(Debug, Args)]
#[command(after_help = NOTES)]
pub struct Doctor {
    /// The device; without one, only the machine is examined.
    #[arg(value_name = "DEVICE", value_parser = device)]
    pub device: Option<String>,

    /// The destination: a second device, with which the first is compared.
    #[arg(value_name = "DEVICE", value_parser = device)]
    pub destination: Option<String>,

    /// Measure the arcs of a stop: stops DEVICE for at most 3 s, and sets it running again.
    #[arg(long, requires = "device")]
    pub measure: bool,

    /// Also measure a device that a guest is using: the guest waits while the device is stopped.
    #[arg(long, requires = "measure")]
    pub in_use: bool,

    /// Estimate the downtime for a link of this rate, in bytes per second (1250M) or bits (10Gbit); may be
    /// repeated. By default 1, 10, 25 and 100 Gbit.
    #[arg(long, value_name = "RATE", requires = "device", value_parser = rate)]
    pub bandwidth: Vec<Rate>,

    /// The folder with the records of moves, as for the command that moved the device; by default limosa/moves in
    /// $XDG_STATE_HOME, in ~/.local/state or, without either, in /var/lib.
    #[arg(long, value_name = "FOLDER", requires = "device")]
    pub moves: Option<PathBuf>,

    /// Examine the machine whose /proc, /sys, /dev, /boot and /lib are in this folder, for example the host of a
    /// container.
    #[arg(long, value_name = "FOLDER", default_value = "/", conflicts_with = "device")]
    pub root: PathBuf,

    /// Print the list of findings as Markdown, and examine nothing.
    #[arg(long, conflicts_with_all = ["device", "root"])]
    pub findings: bool,
}
