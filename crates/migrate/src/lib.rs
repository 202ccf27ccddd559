//! The engine that moves live VFIO devices, with guest memory where there is any: [`Source`] and
//! [`Destination`], two scripts over `client::Device` that speak the migration stream
//! (`docs/stream.md`, [`stream`]) over a [`link`]; the same stream saved to a file or another
//! place and loaded from it; [`inspect`] and [`verify`], which look into one; [`Report`], the timeline of a move.
//!
//! It never asks which transport is below a device.
//!
//! ```
//! use limosa_client::Device;
//! use limosa_migrate::link::{Address, connect};
//! use limosa_migrate::{Memory, MovedDevice, Nobody, Options, Outcome, Source};
//!
//! /// Moves a device to whoever receives at the address; whether it runs there now.
//! fn send(device: &dyn Device, to: &Address) -> Result<bool, Box<dyn std::error::Error>> {
//!     let options = Options::default();
//!     let mut link = connect(to, options.silence_max)?;
//!     let mut source = Source {
//!         devices: &[MovedDevice::new(device)],
//!         memory: Memory::none(),
//!         vmm: &Nobody,
//!         observer: &Nobody,
//!         options: &options,
//!         cancel: None,
//!     };
//!     match source.send(&link) {
//!         Outcome::Moved(report) => {
//!             println!("{report}");
//!             Ok(true)
//!         }
//!         // It runs here, as before.
//!         Outcome::Undone { why, .. } => Err(why.into()),
//!         // It runs nowhere until the destination has been asked.
//!         Outcome::InDoubt(doubt) => {
//!             let mut link = connect(to, options.silence_max)?;
//!             Ok(matches!(source.resolve(doubt, &link), Outcome::Moved(_)))
//!         }
//!     }
//! }
//! ```
//!
//! # What holds under any failure
//!
//! - Until the commit, a failure on any side or in between leaves the source running, its dirty log
//!   complete, and the destination's devices reset.
//! - After the commit only the destination may run. A source that does not know whether it came to that
//!   stays stopped ([`Outcome::InDoubt`]) until [`Source::resolve`] has asked.
//! - Every wait has a limit ([`Options`]), and can be ended by [`Cancel`] until the commit.
//!
//! # What it takes
//!
//! Beside the guest's memory and bitmaps (of each region a bit for each page, a few times), a move takes at the source a
//! frame (1 MiB) for each link and half of one for each device, and as much as a frame for each of both where payloads are
//! compressed. At the destination it takes a frame and a half for each link, one more where payloads are compressed, and
//! what of devices' data has come and is not loaded yet: 32 MiB of all of them together ([`Options::windows_bytes`]), in
//! buffers that are up to a quarter larger, with up to 8 MiB of emptied ones. With four links that is under 64 MiB,
//! whatever the size of the guest; [`Report::buffer_bytes_max`] says how much it was.
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
mod protocol;
mod report;
mod snapshot;
mod source;
mod transfer;
mod vmm;
mod wire;

pub use acceptor::{Acceptor, Incoming, PENDING_MAX};
pub use cancel::Cancel;
pub use destination::{AfterLoad, Destination, Received};
pub use devices::MovedDevice;
pub use error::{Changed, Difference, Error, Misbehaviour, Obstacle, Result};
pub use ledger::{Decision, Ledger};
pub use limosa_stream::{AbortCode, Compression, Damage, MigrationId, Totals};
pub use local::move_local;
pub use memory::{
    DirtyLog, FilePages, FingerprintKey, FingerprintLog, Fingerprinted, GuestPages, Memory, MemoryRegion,
    PAGE_BYTES,
};
pub use options::{Convergence, Options, WhenStalled};
pub use protocol::Round;
pub use report::{
    Act, DeviceReport, End, Estimate, LimitsReport, LinkReport, Loss, Observer, Phase, PhaseReport, Report,
    RoundReport, Side, SpanReport, Throughput, Unrecovered,
};
pub use snapshot::{
    DamageReport, Durability, FrameCount, InspectedSection, Inspection, Publication, SnapshotFile,
    SnapshotReader, SnapshotSource, SnapshotTarget, SnapshotWriter, Verified, inspect, inspect_file,
    inspect_snapshot, published, verify,
};
pub use source::{AfterSave, InDoubt, Outcome, Source};
pub use vmm::{Nobody, Vmm};
