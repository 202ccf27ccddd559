//! The arguments of `limosa check`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use limosa_check::Family;

use super::values::{count, device, seconds};

#[derive(Debug, Args)]
pub struct Check {
    /// The device.
    #[arg(value_name = "DEVICE", value_parser = device, required_unless_present_any = ["list", "clauses"])]
    pub device: Option<String>,

    /// A second device of the same kind, for round trips.
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    pub peer: Option<String>,

    /// Also run destructive checks: resets, invalid data, loading the device's own data. The device loses its state
    /// if it cannot be saved.
    #[arg(long)]
    pub destructive: bool,

    /// Run only checks of this family; may be repeated.
    #[arg(long = "family", value_name = "FAMILY")]
    pub families: Vec<Family>,

    /// Run only the check with this id, or, if it ends with a dot, all checks whose ids begin with it; may be
    /// repeated.
    #[arg(long, value_name = "ID")]
    pub only: Vec<String>,

    /// A JSON file with the claims of the device. The exit code is 0 only if the device fulfils them.
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,

    /// A command that brings the device into ERROR, for the checks of that state. Run by /bin/sh.
    #[arg(long, value_name = "COMMAND")]
    pub break_with: Option<String>,

    /// The form of the report.
    #[arg(long, value_name = "FORMAT", default_value = "table", conflicts_with = "json")]
    pub format: Format,

    /// List every check in the table, not only failed ones.
    #[arg(long)]
    pub all: bool,

    /// Time limit for one check, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub limit: Duration,

    /// Instead of the checks, play this number of random sequences of requests, legal and illegal, against a model
    /// of the standard.
    #[arg(long, value_name = "SEQUENCES", requires = "destructive", conflicts_with_all = ["families", "only", "profile", "peer"], value_parser = count)]
    pub fuzz: Option<u64>,

    /// The seed of the sequences: the same ones for the same seed.
    #[arg(long, value_name = "SEED", default_value = "0", requires = "fuzz")]
    pub seed: u64,

    /// Threads that play a sequence, at most 16: the first drives the device, the others query it.
    #[arg(long, value_name = "THREADS", default_value = "1", requires = "fuzz", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub threads: u8,

    /// Known differences, one a line, which are not reported again. New ones are added to the file.
    #[arg(long, value_name = "FILE", requires = "fuzz")]
    pub known: Option<PathBuf>,

    /// Play the requests of a file, one a line, in the form in which differences are reported.
    #[arg(long, value_name = "FILE", requires = "destructive", conflicts_with = "fuzz")]
    pub replay: Option<PathBuf>,

    /// List the checks that these options select, and run none.
    #[arg(long)]
    pub list: bool,

    /// Print the clauses of the checks, as Markdown, and run none.
    #[arg(long, conflicts_with_all = ["list", "device"])]
    pub clauses: bool,
}

/// The form of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// The form of the kernel's selftests, KTAP.
    Tap,
    /// JUnit's XML, for build servers.
    Junit,
    /// For a mailing list.
    Markdown,
}
