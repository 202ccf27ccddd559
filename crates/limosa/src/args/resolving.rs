//! Options of the commands that find out how a move ended, and where moves are remembered.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::link::{Names, Tls};
use super::values::{device, seconds};

#[derive(Debug, Args)]
pub struct Moves {
    /// The folder in which moves are remembered, which has to be your own; by default limosa/moves below $XDG_STATE_HOME,
    /// ~/.local/state or, without either, /var/lib. Nothing is moved before it can be remembered there.
    #[arg(long = "moves", value_name = "FOLDER")]
    pub folder: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("which").args(["device", "id"]).multiple(true))]
pub struct Resolve {
    /// The device that was sent or saved; without it and --id, the moves in doubt are listed, and the guests that a process
    /// of limosa has left stopped.
    #[arg(value_name = "DEVICE", value_parser = device)]
    pub device: Option<String>,

    /// Where its destination is to be asked: unix:PATH or tcp:HOST:PORT; by default where it was sent to.
    #[arg(long, value_name = "ADDR", requires = "which")]
    pub to: Option<String>,

    /// The move, if another one than the device's last, or one of memory alone.
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,

    /// Ask nobody: you have looked, and know what became of the move.
    #[arg(long, value_name = "OUTCOME", requires = "which", conflicts_with = "to")]
    pub decide: Option<Decided>,

    /// Drop the note and do nothing else: ask nobody, change no device, let no process go on.
    #[arg(long, requires = "which", conflicts_with_all = ["to", "decide", "on_resume"])]
    pub forget: bool,

    /// Run this by the shell to let the guest go on if the move was undone, where --on-stop has stopped it. Processes
    /// that --stop-with has stopped go on by themselves then.
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
    /// The destination runs it, or did, or the snapshot was published: the device stops for good.
    Moved,
    /// The destination does not run it and never will, or there is no snapshot and never will be: the device runs again.
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
