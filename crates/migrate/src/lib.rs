//! The engine that moves live VFIO devices, with guest memory if there is any. [`Source`] and [`Destination`] are two
//! scripts over `client::Device` that exchange the migration stream (`docs/stream.md`, the crate `limosa-stream`) over a
//! [`link`]. A source can also save the stream to a file or another place, and a destination load it from there.
//! [`inspect`] and [`verify`] read a saved stream. A [`Report`] is the timeline of a move.
//!
//! The engine never asks which transport is below a device.
//!
//! ```
//! use limosa_client::Device;
//! use limosa_migrate::link::{Address, connect};
//! use limosa_migrate::{MovedDevice, Options, Outcome, Source};
//!
//! /// Moves a device to the destination at this address. Returns whether the device runs there now.
//! fn send(device: &dyn Device, to: &Address) -> Result<bool, Box<dyn std::error::Error>> {
//!     let options = Options::default();
//!     let devices = [MovedDevice::new(device)];
//!     let link = connect(to, options.silence_max)?;
//!     match Source::new(&devices, &options).send(&link) {
//!         Outcome::Moved(report) => {
//!             println!("{report}");
//!             Ok(true)
//!         }
//!         // The device runs here, as before.
//!         Outcome::Undone { why, .. } => Err(why.into()),
//!         // The device stays stopped until the destination has been asked.
//!         Outcome::InDoubt(doubt) => {
//!             let link = connect(to, options.silence_max)?;
//!             let outcome = Source::new(&devices, &options).resolve(doubt, &link);
//!             Ok(matches!(outcome, Outcome::Moved(_)))
//!         }
//!     }
//! }
//! ```
//!
//! # What holds under any failure
//!
//! - Until the commit, a failure on either side or between them leaves the source running, its dirty log complete, and
//!   the destination's devices reset.
//! - After the commit only the destination may run. A source that does not know whether the commit took place stays
//!   stopped ([`Outcome::InDoubt`]) until [`Source::resolve`] has asked.
//! - Every wait has a limit ([`Options`]), and until the commit [`Cancel`] ends it. A guest that stands still has a limit
//!   that nothing renews ([`Options::standstill_max`]).
//! - A panic of a device, a hook or the engine is an error ([`Error::Panicked`]).
//!
//! `docs/failure.md` is the complete contract.
//!
//! # Memory use
//!
//! In addition to the guest's memory and its dirty bitmaps (several, with a bit for each page), a move needs at the source
//! a frame (1 MiB) for each link and half a frame for each device, and, if payloads are compressed, another frame for each
//! link and device. At the destination it needs a frame and a half for each link, one more if payloads are compressed,
//! and buffers for device data that has arrived and is not loaded yet: 32 MiB for all devices together
//! ([`Options::windows_bytes`]), in buffers that are up to a quarter larger, and up to 8 MiB of empty ones. With four links
//! that is less than 64 MiB, whatever the size of the guest. Where many devices have more data than that, or the latency is high and
//! devices are fast, windows are larger ([`Options::windows_bytes_max`]), and there are up to 32 MiB of empty buffers.
//! [`Report::buffer_bytes_max`] is the maximum that a move used.
#![forbid(unsafe_code)]

mod acceptor;
mod cancel;
mod context;
mod destination;
mod devices;
mod error;
mod ledger;
pub mod link;
mod local;
mod lock;
mod memory;
mod options;
mod private_folder;
mod protocol;
mod report;
mod snapshot;
mod source;
mod transfer;
mod vmm;
mod wire;

pub use acceptor::{Acceptor, Incoming, OfferedMove, PENDING_MAX};
pub use cancel::Cancel;
pub use destination::{AfterLoad, Destination, Received};
pub use devices::{MovedDevice, compare, way_out_of};
pub use error::{
    Changed, Difference, Error, Misbehaviour, Mismatch, MismatchKind, Mistrust, NoMove, Obstacle, Remaining,
    Result,
};
pub use ledger::{Decision, Ledger, Recorded, recorded};
pub use limosa_stream::{AbortCode, Compression, Damage, MigrationId, Secret, Totals};
pub use local::move_local;
pub use memory::{
    DataRun, DirtyLog, FilePages, FingerprintKey, FingerprintLog, Fingerprinted, GuestPages, Memory,
    MemoryRegion, PAGE_BYTES,
};
pub use options::{Convergence, MemoryChecksums, Options, WhenStalled};
pub use private_folder::PrivateFolder;
pub use protocol::Round;
pub use report::html;
pub use report::{
    Act, DeviceReport, End, Estimate, LimitsReport, LinkReport, Loss, Made, Observer, Phase, PhaseReport,
    Report, RoundReport, Side, SpanReport, Throughput, Unrecovered, Work,
};
pub use snapshot::{
    DamageReport, Durability, FrameCount, InspectedSection, Inspection, Publication, SnapshotFile,
    SnapshotReader, SnapshotSource, SnapshotTarget, SnapshotWriter, Verified, inspect, inspect_file,
    inspect_snapshot, published, verify,
};
pub use source::{AfterSave, CommitNote, InDoubt, Outcome, Source};
pub use vmm::{Nobody, Vmm};
