//! Options of `limosa save`, `load`, `inspect` and `verify`.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::Args;
use limosa_migrate::Compression;

use super::KeepOpen;
use super::STORES;
use super::guest::{DestinationMemory, SourceMemory, Starting, Stopping};
use super::moving::{Devices, Reporting, StateMax, StopLimits};
use super::resolving::Moves;
use super::values::{blake3, compression, device};

/// The devices of a save, and where they are saved.
///
/// The two names without an option are one argument for clap: of an argument that may be left out and one that may not, it
/// finds the second only where no option stands between them.
#[derive(Debug, Args)]
pub struct SaveNames {
    /// The device, unless --device or --memory names everything to save, and a file or s3://BUCKET/KEY, which
    /// appears when it is complete.
    #[arg(value_names = ["DEVICE", "FILE"], num_args = 1..=2, required = true)]
    names: Vec<OsString>,

    /// A further device; may be repeated. All of them are saved together, in this order.
    #[arg(long = "device", id = "more", value_name = "DEVICE", value_parser = device)]
    more: Vec<String>,
}

impl Save {
    /// Checks that clap cannot express: there is something to save, and a device's name is text.
    pub(super) fn check(&self) -> Result<(), String> {
        let device = self.names.names.split_last().and_then(|(_, device)| device.first());
        if device.is_none() && self.names.more.is_empty() && self.memory.memory.is_empty() {
            let file = self.names.file().display();
            return Err(format!(
                "{file} is the file to save to; what to save is missing: DEVICE, --device or --memory"
            ));
        }
        match device {
            Some(device) if device.to_str().is_none() => {
                Err(format!("{}: expected a device's name in UTF-8", device.display()))
            }
            _ => Ok(()),
        }
    }
}

impl SaveNames {
    /// All devices, in their order.
    pub fn devices(&self) -> Vec<&str> {
        let first = self.names.split_last().map_or(&[][..], |(_, device)| device);
        let first = first.iter().filter_map(|name| name.to_str());
        first.chain(self.more.iter().map(String::as_str)).collect()
    }

    /// Where they are saved.
    pub fn file(&self) -> &Path {
        Path::new(self.names.last().map_or(OsStr::new(""), OsString::as_os_str))
    }
}

#[derive(Debug, Args)]
#[command(override_usage = "limosa save [OPTIONS] [DEVICE] <FILE>", after_help = super::STORES)]
pub struct Save {
    #[command(flatten)]
    pub names: SaveNames,

    /// Replace an existing snapshot once the new one is complete.
    #[arg(long)]
    pub replace: bool,

    /// Compress memory and device data with zstd, or with lz4, which is faster and compresses less.
    #[arg(long, value_name = "METHOD", value_parser = compression())]
    pub compress: Option<Compression>,

    /// Leave the devices stopped.
    #[arg(long)]
    pub stop: bool,

    #[command(flatten)]
    pub stop_limits: StopLimits,

    #[command(flatten)]
    pub reporting: Reporting,

    #[command(flatten)]
    pub keep_open: KeepOpen,

    #[command(flatten)]
    pub memory: SourceMemory,

    #[command(flatten)]
    pub stopping: Stopping,

    #[command(flatten)]
    pub moves: Moves,
}

#[derive(Debug, Args)]
#[command(after_help = super::STORES)]
pub struct Load {
    /// The output of `limosa save`: a file, or s3://BUCKET/KEY.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    #[command(flatten)]
    pub devices: Devices,

    /// Leave the devices stopped.
    #[arg(long, conflicts_with = "run")]
    pub stop: bool,

    #[command(flatten)]
    pub reporting: Reporting,

    #[command(flatten)]
    pub keep_open: KeepOpen,

    #[command(flatten)]
    pub state: StateMax,

    #[command(flatten)]
    pub memory: DestinationMemory,

    #[command(flatten)]
    pub starting: Starting,
}

#[derive(Debug, Args)]
#[command(after_help = STORES)]
pub struct Inspect {
    /// The output of `limosa save`: a file, or s3://BUCKET/KEY.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = STORES)]
pub struct Verify {
    /// The output of `limosa save`: a file, or s3://BUCKET/KEY.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// Check that the snapshot has this hash, as `limosa verify` printed it earlier.
    #[arg(long, value_name = "HEX", value_parser = blake3)]
    pub blake3: Option<String>,
}
