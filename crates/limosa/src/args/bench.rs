//! The arguments of `limosa bench`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::moving::Reporting;
use super::values::{device, seconds};

/// Its effects on a device, and its exit codes.
const NOTES: &str = "\
The bench stops and resets the device many times, and restores its state at the end, unless the state is larger than 1 GiB. A device that a \
guest uses is refused without --in-use; with it, the device is stopped but not reset, and nothing is loaded into it.

A measure takes --seconds plus at most one operation. A request that hangs takes --timeout or --state-timeout, but at most 10 s. SIGINT \
ends the run, and the device is restored.

Exit codes of bench compare:
  0  no difference is beyond the spread of both runs
  9  some differences are, and are listed
  6  a file is not a document of the bench";

#[derive(Debug, Args)]
#[command(after_help = NOTES, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Bench {
    /// The device.
    #[arg(value_name = "DEVICE", value_parser = device, required = true)]
    pub device: Option<String>,

    /// A second device of the same kind, for complete moves to it and back. It loses its state.
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    pub peer: Option<String>,

    /// Seconds for each measure.
    #[arg(long, value_name = "SECONDS", default_value = "0.5", value_parser = seconds)]
    pub seconds: Duration,

    /// Measure a device that a guest is using. The guest waits while the device is stopped, for up to a second each
    /// time.
    #[arg(long, conflicts_with = "peer")]
    pub in_use: bool,

    /// Keep this process and the floor's other end on one core; start the server with
    /// `taskset -c 0` for figures on one core.
    #[arg(long)]
    pub one_core: bool,

    #[command(flatten)]
    pub reporting: Reporting,

    #[command(subcommand)]
    pub action: Option<BenchAction>,
}

#[derive(Debug, Subcommand)]
pub enum BenchAction {
    /// Compare two runs, and list the differences that are beyond the spread of both.
    Compare {
        /// The first run: the output of `limosa --json bench DEVICE`, or its --report FILE.json.
        #[arg(value_name = "FILE")]
        first: PathBuf,
        /// The second run.
        #[arg(value_name = "FILE")]
        second: PathBuf,
    },
}
