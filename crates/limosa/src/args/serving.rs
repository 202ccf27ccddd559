//! Servers of devices: `serve`, and `switch-over` to a new one.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use limosa_host::Group;
use serde::Deserialize;

use super::values::{mode, seconds};
use crate::metrics;

const USAGE: &str = "\
limosa serve [OPTIONS] --socket <PATH> <MODEL>
       limosa serve [OPTIONS] --config <FILE>";

/// The format of `--config`.
const CONFIG: &str = "\
A file for --config has a [[device]] for each device, with socket, and optionally model, options (a list of
NAME=VALUE), control, mode, group and any-file. [defaults] sets all of these except the sockets, for devices
that do not set them:
  [defaults]
  model = \"synthetic\"
  [[device]]
  socket = \"/run/limosa/first.sock\"
  options = [\"state=64M\"]";

/// The options of models, and the format of `--config`.
fn notes() -> String {
    let models = Model::ALL.map(|model| model.describe(100));
    format!("{}\n{CONFIG}", models.join(""))
}

#[derive(Debug, Args)]
#[command(after_help = notes(), override_usage = USAGE)]
pub struct Serve {
    /// The device to serve.
    #[arg(value_name = "MODEL")]
    pub model: Option<Model>,

    /// The path to listen at.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// Serve the devices in this TOML file, instead of MODEL and its options.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["model", "socket", "mode", "group", "control", "options", "any_file"]
    )]
    pub config: Option<PathBuf>,

    /// The socket's mode, whatever the umask. Users with write permission may connect.
    #[arg(long, value_name = "OCTAL", default_value = "600", value_parser = mode)]
    pub mode: u32,

    /// The socket's group, a name or a number; needs a --mode that admits the group, such as 660.
    #[arg(long, value_name = "GROUP")]
    pub group: Option<Group>,

    /// Also listen here, for control clients: clients that move the device while its VMM is connected. The socket
    /// has mode 600. On --socket, only root and this user may be control clients.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// An option of the model, NAME=VALUE; may be repeated. `help` lists them, and serves nothing.
    #[arg(short = 'o', long = "option", value_name = "NAME=VALUE")]
    pub options: Vec<String>,

    /// Let a client map any regular file as guest memory, for VMMs whose memory is a file on a disk. Without it,
    /// only memfds and files on tmpfs or hugetlbfs are mapped. An access to another file waits for its file system: a
    /// client can then hang this process for good with a file whose file server or daemon does not answer.
    #[arg(long)]
    pub any_file: bool,

    /// Let another process take over while clients are connected: listen here, at a socket with mode 600, for
    /// `limosa serve` with --take-from and this path. When that process serves, this one ends with code 0. On SIGUSR2
    /// this process starts the other one itself, with its own command line.
    #[arg(long, value_name = "PATH")]
    pub takeover: Option<PathBuf>,

    /// Take over from the server that was started with --takeover and this path. Devices, sockets and options have
    /// to be the same as in the old server; a file may add devices, and may drop devices without a client. When the old
    /// server has ended, listen at --takeover, which may be the same path.
    #[arg(long, value_name = "PATH")]
    pub take_from: Option<PathBuf>,

    /// Serve metrics of the devices at this address, as OpenMetrics text over HTTP: HOST:PORT (port 0 for any), or
    /// unix:PATH for a socket with mode 600. Anybody who can connect can read them. After a switch-over the new server
    /// answers there.
    #[arg(long, value_name = "ADDR")]
    pub metrics: Option<metrics::Address>,

    /// End when the process that started this one ends.
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

impl Serve {
    /// Whether the options of models are asked for.
    pub fn asks_for_options(&self) -> bool {
        self.options.iter().flat_map(|option| option.split(',')).any(|option| option == "help")
    }

    /// Checks what clap cannot express: there is a device to serve, or its options are asked for.
    pub(super) fn check(&self) -> Result<(), String> {
        match (self.model, &self.socket) {
            _ if self.config.is_some() || self.asks_for_options() => Ok(()),
            (None, _) => {
                Err("what to serve is missing: MODEL (uart or synthetic) and --socket, or --config".into())
            }
            (Some(_), None) => Err("where to listen is missing: --socket PATH".into()),
            (Some(_), Some(_)) => Ok(()),
        }
    }
}

/// The command that `switch-over` starts, and its exit codes.
const NEW_COMMAND: &str = "\
NEW COMMAND is the command line of the new server, usually that of the old one, `limosa serve ...`. `--take-from PATH` and `--json` are appended \
unless it has them. The new server outlives this command, with the standard error of this command or --log. SIGINT and SIGTERM end only this \
command: a switch-over in progress continues, and the log of the new server has the result.

Exit codes of switch-over:
  0  the new server serves
  1  the old server serves as before; the message says why
  3  another switch-over came first: its server serves, and not the one started here
  4  there is no replaceable server; nothing was started
  5  it is unknown whether one of them serves; the message says what is known
  8  the new server serves, but another one cannot take over from it";

#[derive(Debug, Args)]
#[command(after_help = NEW_COMMAND)]
pub struct SwitchOver {
    /// The path of the old server's --takeover.
    #[arg(value_name = "PATH")]
    pub path: PathBuf,

    /// Seconds to wait for the new server to serve or to give up. The new server has its own, shorter limits.
    #[arg(long, value_name = "SECONDS", default_value = "240", value_parser = seconds)]
    pub limit: Duration,

    /// Append the log of the new server (its standard error) to this file. Without it the new server keeps the
    /// standard error of this command open as long as it serves, so a reader of a pipe does not see the end of file.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,

    /// The command that starts the new server.
    #[arg(last = true, required = true, value_name = "NEW COMMAND")]
    pub command: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Model {
    /// A PCI 16550A serial port.
    Uart,
    /// A device for tests and measurements, with configurable state, pre-copy, DMA and faults.
    Synthetic,
}

impl Model {
    /// Its name, as the command line and configuration files have it.
    pub fn name(self) -> &'static str {
        match self {
            Model::Uart => "uart",
            Model::Synthetic => "synthetic",
        }
    }
}
