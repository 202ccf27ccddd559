//! The arguments of `limosa trace`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgGroup, Args};
use limosa_host::Group;

use super::values::{mode, pid};

/// The format of the output, and signals.
const NOTES: &str = "\
A line is TIME [pid PID] DEVICE REQUEST ARGUMENTS -> ANSWER <DURATION>, with the time in UTC; `***` marks remarks about the trace \
itself. See docs/trace.md for the lines, the JSON documents and the capture file.

With COMMAND, limosa ends as the command does: with its exit code, or by its signal. It forwards SIGINT, SIGTERM, SIGHUP and SIGQUIT \
to the command. A process named by --pid continues when limosa ends. The connections of a proxy end with it.";

#[derive(Debug, Args)]
#[command(after_help = NOTES)]
#[command(group = ArgGroup::new("source").required(true).args(["command", "pid", "proxy"]))]
pub struct Trace {
    /// Trace this process and those that it starts.
    #[arg(long, value_name = "PID", value_parser = pid)]
    pub pid: Option<i32>,

    /// Listen at FRONT for clients of the server at BACK, and forward everything unchanged in both directions.
    #[arg(long, num_args = 2, value_names = ["FRONT", "BACK"])]
    pub proxy: Vec<PathBuf>,

    /// Write the trace to this file; by default it goes to standard output, or with COMMAND to standard error.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Print statistics at the end instead of lines: calls, refusals, time and bytes, by request and by arc. With
    /// --output,
    /// lines are also written to that file.
    #[arg(short, long)]
    pub count: bool,

    /// Also write a capture file for Wireshark (pcapng), with the dissector contrib/wireshark/vfio-user.lua. With -
    /// it goes to standard output, and lines only to --output.
    #[arg(long, value_name = "FILE")]
    pub pcap: Option<PathBuf>,

    /// The mode of FRONT, whatever the umask. Users with write permission may connect.
    #[arg(long, value_name = "OCTAL", default_value = "600", value_parser = mode, requires = "proxy",
          conflicts_with_all = ["pid", "command"])]
    pub mode: u32,

    /// The group of FRONT, a name or a number; needs a --mode that admits the group, such as 660.
    #[arg(long, value_name = "GROUP", requires = "proxy", conflicts_with_all = ["pid", "command"])]
    pub group: Option<Group>,

    /// Trace this command and the processes that it starts.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}
