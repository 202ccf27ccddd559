//! The commands that inspect and drive devices: `probe`, `state`.

use std::path::PathBuf;

use super::values::device;
use clap::{Args, Subcommand};
use limosa_protocol::State;

use super::values::state;

#[derive(Debug, Args)]
pub struct Probe {
    /// The device; without it, the kernel's VFIO devices are listed.
    ///
    /// The path of a vfio-user socket, or for a device of the kernel's a PCI address (0000:65:00.1), an mdev UUID,
    /// /dev/vfio/devices/vfioN, a group with one device (/dev/vfio/N), or what a process has open: /proc/PID/fd/N. All commands take
    /// these names.
    #[arg(value_name = "DEVICE", value_parser = device)]
    pub device: Option<String>,

    /// List PCI devices that other drivers have as well, and what to do for VFIO to have them.
    #[arg(long, conflicts_with = "device")]
    pub all: bool,
}

#[derive(Clone, Copy, Debug, Args)]
pub struct KeepOpen {
    /// When done, keep the device open until SIGINT or SIGTERM, so that the kernel does not reset it. Other commands
    /// reach it by the name that is printed.
    // Global for `state DEVICE set STATE --hold`.
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

    /// Let a device run, or reset it, whose move is in doubt: you have seen that its guest does not run at the other side.
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
    /// Drive the device to a state, over every state between.
    Set {
        /// The state, in capital or small letters.
        #[arg(value_name = "STATE", value_parser = state(), ignore_case = true)]
        state: State,
    },
    /// Reset the device: from any state, ERROR too, to RUNNING.
    Reset,
    /// Name the process whose VMM takes the device over when the VMM that has it goes; without a process, say which is named.
    ///
    /// For a VMM that is replaced on the same host. The new one connects to the device's socket while the old one has the device,
    /// as the same user, and prepares. For vfio-user devices of a server that has the feature NEXT.
    Next {
        /// The number of the process, as the device's server sees it.
        #[arg(value_name = "PID", conflicts_with = "nobody", value_parser = clap::value_parser!(i32).range(1..))]
        pid: Option<i32>,

        /// Take the name back; a VMM of that process that has connected by now is disconnected.
        #[arg(long)]
        nobody: bool,
    },
}
