//! The commands that inspect and drive devices: `probe`, `state`.

use std::path::PathBuf;

use super::values::device;
use clap::{Args, Subcommand};
use limosa_protocol::State;

use super::values::{pid, state};

#[derive(Debug, Args)]
pub struct Probe {
    /// The device; without it, the kernel's VFIO devices are listed.
    ///
    /// The path of a vfio-user socket, or for a kernel device a PCI address (0000:65:00.1), an mdev UUID,
    /// /dev/vfio/devices/vfioN, a group with one device (/dev/vfio/N), or the descriptor of a process that has it open:
    /// /proc/PID/fd/N. All commands take these names.
    #[arg(value_name = "DEVICE", value_parser = device)]
    pub device: Option<String>,

    /// Also list PCI devices that are bound to other drivers, and how to bind them to VFIO.
    #[arg(long, conflicts_with = "device")]
    pub all: bool,
}

#[derive(Clone, Copy, Debug, Args)]
pub struct KeepOpen {
    /// When done, keep the device open until SIGINT or SIGTERM, so that the kernel does not reset it. Other
    /// commands can use it by the name that is printed. Global for `state DEVICE set STATE --hold`.
    #[arg(long = "hold", global = true)]
    pub keep_open: bool,
}

#[derive(Debug, Args)]
pub struct StateArgs {
    /// The device.
    #[arg(value_name = "DEVICE", value_parser = device)]
    pub device: String,

    #[command(subcommand)]
    pub action: Option<StateAction>,

    /// Set a device running, or reset it, although its move is in doubt: you have checked that its guest does not
    /// run at the other side.
    #[arg(long, global = true)]
    pub force: bool,

    /// The folder in which moves are remembered, as for the command that moved the device; by default limosa/moves below
    /// $XDG_STATE_HOME, ~/.local/state or, without either, /var/lib.
    #[arg(long, value_name = "FOLDER", global = true)]
    pub moves: Option<PathBuf>,

    #[command(flatten)]
    pub keep_open: KeepOpen,
}

#[derive(Debug, Subcommand)]
pub enum StateAction {
    /// Print the state (also without an action).
    Get,
    /// Drive the device to a state, through all intermediate states.
    Set {
        /// The state, in upper or lower case.
        #[arg(value_name = "STATE", value_parser = state(), ignore_case = true)]
        state: State,
    },
    /// Reset the device from any state, including ERROR, to RUNNING.
    Reset,
    /// Name the process whose VMM takes over the device when the current VMM goes; without a process, print which
    /// one is named.
    ///
    /// For a VMM that is replaced on the same host. The new one connects to the device's socket while the old one has
    /// the device, as the same user, and prepares. The device's vfio-user server needs the feature NEXT.
    Next {
        /// The PID, in the PID namespace of the device's server.
        #[arg(value_name = "PID", conflicts_with = "nobody", value_parser = pid)]
        pid: Option<i32>,

        /// Withdraw the name; a VMM of that process that has already connected is disconnected.
        #[arg(long)]
        nobody: bool,
    },
}
