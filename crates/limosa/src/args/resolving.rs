//! Options of the commands that find out how a move ended, and where moves are remembered.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::link::{Names, Tls};
use super::values::{device, seconds};

#[derive(Debug, Args)]
pub struct Moves {
    /// The folder with the records of moves, which has to be your own; by default limosa/moves in $XDG_STATE_HOME,
    /// in ~/.local/state or, without either, in /var/lib. Nothing moves unless it can be recorded there.
    #[arg(long = "moves", value_name = "FOLDER")]
    pub folder: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("which").args(["device", "id"]).multiple(true))]
pub struct Resolve {
    /// The device that was sent or saved; without it and --id, list moves in doubt, and guests that a killed limosa
    /// has left stopped.
    #[arg(value_name = "DEVICE", value_parser = device)]
    pub device: Option<String>,

    /// The address at which to ask the destination: unix:PATH or tcp:HOST:PORT; by default the one to which the
    /// device was sent.
    #[arg(long, value_name = "ADDR", requires = "which")]
    pub to: Option<String>,

    /// The move, if it is not the device's last one, or if it was a move of memory alone.
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,

    /// Do not ask: you have checked the outcome of the move yourself.
    #[arg(long, value_name = "OUTCOME", requires = "which", conflicts_with = "to")]
    pub decide: Option<Decided>,

    /// Only delete the note: do not ask, change no device, resume no process.
    #[arg(long, requires = "which", conflicts_with_all = ["to", "decide", "on_resume"])]
    pub forget: bool,

    /// Run this shell command to resume the guest if the move was undone and --on-stop has stopped the guest.
    /// Processes that --stop-with has stopped are resumed without it.
    #[arg(long, value_name = "COMMAND", requires = "which")]
    pub on_resume: Option<String>,

    #[command(flatten)]
    pub moves: Moves,

    #[command(flatten)]
    pub tls: Tls,
}

/// How a move ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Decided {
    /// The destination runs it, or did, or the snapshot was published: the device stays stopped.
    Moved,
    /// The destination does not run it and never will, or there is no snapshot and never will be: the device runs
    /// again.
    Undone,
}

#[derive(Debug, Args)]
pub struct Answer {
    /// Where to listen: unix:PATH or tcp:HOST:PORT (port 0 for any).
    #[arg(long, value_name = "ADDR")]
    pub listen: String,

    /// Seconds to stay.
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds)]
    pub wait: Duration,

    #[command(flatten)]
    pub moves: Moves,

    #[command(flatten)]
    pub tls: Tls,

    #[command(flatten)]
    pub names: Names,
}
