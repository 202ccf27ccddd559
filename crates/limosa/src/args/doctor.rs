//! The arguments of `limosa doctor`.

use std::path::PathBuf;

use clap::Args;

use super::values::{Rate, device, rate};

/// Its effects on a device, and its exit codes.
const NOTES: &str = "\
Nothing is changed without --measure: a device's states are left alone, and a device of the kernel's that nobody has open is \
opened for a moment.

Exit codes of doctor:
  0   ready
  9   ready, with warnings
  10  not ready: a finding stands in the way
Others are those of the command, when it could not look.";

#[derive(Debug, Args)]
#[command(after_help = NOTES)]
pub struct Doctor {
    /// The device; without one, only the machine is looked at.
    #[arg(value_name = "DEVICE", value_parser = device)]
    pub device: Option<String>,

    /// Where its state is to go: a second device, with which it is compared.
    #[arg(value_name = "DEVICE", value_parser = device)]
    pub destination: Option<String>,

    /// Measure the arcs of a stop: stops DEVICE for at most 3 s, and lets it run again.
    #[arg(long, requires = "device")]
    pub measure: bool,

    /// Measure a device that a guest is using, too: the guest waits for it as long as it is stopped.
    #[arg(long, requires = "measure")]
    pub in_use: bool,

    /// The speed of a link for which the downtime is estimated, in bytes a second (1250M) or bits (10Gbit); many times. By
    /// default 1, 10, 25 and 100 Gbit.
    #[arg(long, value_name = "RATE", requires = "device", value_parser = rate)]
    pub bandwidth: Vec<Rate>,

    /// The folder in which moves are remembered, as for the command that moved the device; by default limosa/moves below
    /// $XDG_STATE_HOME, ~/.local/state or, without either, /var/lib.
    #[arg(long, value_name = "FOLDER", requires = "device")]
    pub moves: Option<PathBuf>,

    /// Look at the machine whose /proc, /sys, /dev, /boot and /lib are in this folder: the host of a container.
    #[arg(long, value_name = "FOLDER", default_value = "/", conflicts_with = "device")]
    pub root: PathBuf,

    /// Print the list of findings as Markdown, and look at nothing.
    #[arg(long, conflicts_with_all = ["device", "root"])]
    pub findings: bool,
}
