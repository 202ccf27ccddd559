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

/// What `--config` takes.
const CONFIG: &str = "\
A file for --config has [[device]] for each device, with socket, and as wanted model, options (a list of
NAME=VALUE), control, mode, group and any-file. [defaults] has all of these but the sockets, for devices
that say nothing else:
  [defaults]
  model = \"synthetic\"
  [[device]]
  socket = \"/run/limosa/first.sock\"
  options = [\"state=64M\"]";

/// What `--option` and `--config` take.
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

    /// Where to listen.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// Serve the devices that this file describes, in TOML, in place of MODEL and its options.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = ["model", "socket", "mode", "group", "control", "options", "any_file"]
    )]
    pub config: Option<PathBuf>,

    /// The socket's mode, whatever the umask. A user with write permission may connect.
    #[arg(long, value_name = "OCTAL", default_value = "600", value_parser = mode)]
    pub mode: u32,

    /// The socket's group, a name or a number; with a --mode that lets it in, such as 660.
    #[arg(long, value_name = "GROUP")]
    pub group: Option<Group>,

    /// Listen here as well, for clients that move the device beside its VMM and run as another user than the VMM. The
    /// socket is this user's alone, mode 600. On --socket, root and this user may move the device beside its VMM.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// An option of the model, NAME=VALUE; many times. `help` lists them, and serves nothing.
    #[arg(short = 'o', long = "option", value_name = "NAME=VALUE")]
    pub options: Vec<String>,

    /// Let a client map any regular file as the guest's memory, for VMMs whose memory is a file on a disk. Without it,
    /// only memfds and files on tmpfs or hugetlbfs are mapped. An access to another file waits for its file system: a
    /// client that can choose one whose server or daemon does not answer hangs this process for good.
    #[arg(long)]
    pub any_file: bool,

    /// Let another process take over while clients are served: listen here, at a socket that is this user's alone, for
    /// `limosa serve` with --take-from and this path. When it serves, this process ends with code 0. At SIGUSR2 this process starts
    /// the other one itself, by its own command line.
    #[arg(long, value_name = "PATH")]
    pub takeover: Option<PathBuf>,

    /// Take over from the server that was started with --takeover and this path. Devices, sockets and options have to be those
    /// of the old server; a file may have devices that it did not have, and may lack those that no client uses. When the old
    /// server has ended, listen at --takeover, which may be the same path.
    #[arg(long, value_name = "PATH")]
    pub take_from: Option<PathBuf>,

    /// Answer at this address with metrics of the devices, as OpenMetrics text over HTTP: HOST:PORT (port 0 for any), or unix:PATH
    /// for a socket that is this user's alone. Whoever can connect can read them. After a switch-over the new server answers there.
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

/// What `switch-over` does to the command that it starts.
const NEW_COMMAND: &str = "\
NEW COMMAND is that of the old server, `limosa serve ...`, of the new version. `--take-from PATH` and `--json` are added to its end, \
unless they are there. It goes on when this command has ended, with the standard error of this command or --log. SIGINT and SIGTERM end this \
command alone: a switch-over under way goes on, and the log of the new server says how it went.

Exit codes of switch-over:
  0  the new server serves
  1  the old server serves as before; the message says why
  3  another switch-over came first: the server that it started serves, and that of this command does not
  4  there is no server that can be replaced now; nothing was started
  5  it is not known that one of them serves; the message says what is known
  8  the new server serves, and no other one can take over from it";

#[derive(Debug, Args)]
#[command(after_help = NEW_COMMAND)]
pub struct SwitchOver {
    /// Where the old server listens for new ones: its --takeover.
    #[arg(value_name = "PATH")]
    pub path: PathBuf,

    /// Seconds to wait for the new server to serve or to give up. It has limits of its own, which end before this one.
    #[arg(long, value_name = "SECONDS", default_value = "240", value_parser = seconds)]
    pub limit: Duration,

    /// Append the log of the new server, which is its standard error, to this file. Without it the new server keeps the standard
    /// error of this command open as long as it serves, so that what reads that from a pipe does not see its end.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,

    /// What starts the new server.
    #[arg(last = true, required = true, value_name = "NEW COMMAND")]
    pub command: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Model {
    /// A PCI 16550A serial port.
    Uart,
    /// A device for tests and measurements: state, pre-copy, DMA and faults as asked for.
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
