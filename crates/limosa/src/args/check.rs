//! The arguments of `limosa check`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use limosa_check::Family;

use super::values::seconds;

#[derive(Debug, Args)]
pub struct Check {
    /// The device.
    #[arg(value_name = "DEVICE", required_unless_present_any = ["list", "clauses"])]
    pub device: Option<String>,

    /// A second device of the same kind, for round trips.
    #[arg(long, value_name = "DEVICE")]
    pub peer: Option<String>,

    /// Run these checks too: resets, bad data, data of its own loaded back. The device loses its state where that cannot be
    /// saved.
    #[arg(long)]
    pub destructive: bool,

    /// Only checks of this family; many times.
    #[arg(long = "family", value_name = "FAMILY")]
    pub families: Vec<Family>,

    /// Only the check with this id, or those whose ids begin with it if it ends with a dot; many times.
    #[arg(long, value_name = "ID")]
    pub only: Vec<String>,

    /// What the device claims, a JSON file. Exit code 0 only if it keeps that.
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,

    /// A command that brings the device into ERROR, for the checks of that state. Run by /bin/sh.
    #[arg(long, value_name = "COMMAND")]
    pub break_with: Option<String>,

    /// The form of the report.
    #[arg(long, value_name = "FORMAT", default_value = "table", conflicts_with = "json")]
    pub format: Format,

    /// In the table a line for each check, not only for those that failed.
    #[arg(long)]
    pub all: bool,

    /// Seconds that one check may take.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub limit: Duration,

    /// List the checks that these options select, and run none.
    #[arg(long)]
    pub list: bool,

    /// Print the clauses that the checks come from, as Markdown, and run none.
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
