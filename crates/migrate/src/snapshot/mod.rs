//! Streams at rest: the places that a snapshot is saved to and loaded from (`docs/snapshots.md`). A file is one
//! ([`SnapshotFile`]); an object in an S3-compatible store, in the crate `limosa-store`, is another.

mod file;
mod folder;
mod inspect;
mod inspection;
mod publication;
mod reading;
mod writing;

use std::io;
use std::time::Duration;

pub use file::SnapshotFile;
pub use inspect::{Verified, inspect, inspect_file, inspect_snapshot, verify};
pub use inspection::{DamageReport, FrameCount, InspectedSection, Inspection};
pub use publication::{Durability, Publication, published};
pub(crate) use reading::Reading;
pub(crate) use writing::{Published, Writing};

use crate::link::{LinkError, Wait};
use crate::{Cancel, Error};
use limosa_stream::MigrationId;

/// Bytes that are read, written and hashed at once.
pub(crate) const PIECE_BYTES: usize = 256 << 10;

/// A place that a snapshot can be saved to.
pub trait SnapshotTarget: Sync {
    /// The place's name, for messages. `limosa verify` takes the same name.
    fn name(&self) -> String;

    /// Begins a snapshot, before any device or memory is touched. Nothing of it is visible under the place's name until
    /// it is published.
    ///
    /// Fails if it is already known that the snapshot cannot be published, with an error that says what to do.
    fn create(&self, wait: Wait<'_>) -> Result<Box<dyn SnapshotWriter>, LinkError>;
}

/// A snapshot that is being written. Dropped before [`SnapshotWriter::publish`], it leaves nothing that could be loaded.
pub trait SnapshotWriter: Send {
    /// Takes at least one of these bytes and returns how many. Waits while the place cannot take more.
    fn write(&mut self, bytes: &[u8], wait: Wait<'_>) -> Result<usize, LinkError>;

    /// Makes the snapshot durable and gives the complete snapshot its name in one step.
    ///
    /// The caller acts on the answer: it may let a guest run again after [`Publication::NotPublished`], so an
    /// implementation returns that only if the snapshot does not exist and cannot appear later. A cancel is observed
    /// until the request that publishes the snapshot is made, and not after.
    fn publish(self: Box<Self>, wait: Wait<'_>) -> Publication;
}

/// A place that a snapshot can be loaded from.
pub trait SnapshotSource: Sync {
    /// The place's name, for messages.
    fn name(&self) -> String;

    /// Opens the place's present contents at their start. The error is [`io::ErrorKind::NotFound`] if there are none.
    fn open(&self, wait: Wait<'_>) -> Result<Box<dyn SnapshotReader>, LinkError>;

    /// After a [`Publication::Unknown`] of this move's snapshot, which is not under the place's name now: makes sure that
    /// it cannot appear there later. Returns `true` only if that is certain and the snapshot was never there, and does so
    /// again when it is asked again.
    ///
    /// The default cannot tell and returns `false`.
    fn withdraw(&self, id: MigrationId, wait: Wait<'_>) -> Result<bool, LinkError> {
        let _ = (id, wait);
        Ok(false)
    }
}

/// A snapshot that is being read. Every byte belongs to the contents that were opened, also after
/// [`SnapshotReader::rewind`]: if the place receives other contents meanwhile, a read returns the old ones or fails.
pub trait SnapshotReader: Send {
    /// Reads at least one byte and returns how many; 0 at the end.
    fn read(&mut self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError>;

    /// Goes back to the start.
    fn rewind(&mut self, wait: Wait<'_>) -> Result<(), LinkError>;
}

/// An error of a snapshot's place, as one of the move.
pub(crate) fn failed(name: &str, doing: &'static str, limit: Duration, error: LinkError) -> Error {
    match error {
        LinkError::Cancelled => Error::Cancelled,
        error => Error::Snapshot { name: name.into(), doing, error: os_error(limit, error) },
    }
}

fn os_error(limit: Duration, error: LinkError) -> io::Error {
    match error {
        LinkError::TimedOut => {
            io::Error::new(io::ErrorKind::TimedOut, format!("no progress within {limit:?}; is it reachable?"))
        }
        LinkError::Io(error) => error,
        LinkError::Closed => io::ErrorKind::UnexpectedEof.into(),
        other => io::Error::other(other),
    }
}

/// An error of the link to a snapshot's place, as one of the place.
pub(crate) fn of_place(why: Error, doing: &'static str) -> Error {
    match why {
        Error::Link { peer, error, .. } => failed(&peer, doing, Duration::ZERO, error),
        Error::TimedOut { peer, limit, .. } => failed(&peer, doing, limit, LinkError::TimedOut),
        why => why,
    }
}

/// How long one call to a place may make no progress, and what cancels it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits<'a> {
    pub(crate) silence_max: Duration,
    pub(crate) cancel: Option<&'a Cancel>,
}

impl<'a> Limits<'a> {
    pub(crate) fn wait(&self) -> Wait<'a> {
        Wait::within(self.silence_max, self.cancel)
    }

    pub(crate) fn open(&self, from: &dyn SnapshotSource) -> crate::Result<Box<dyn SnapshotReader>> {
        from.open(self.wait()).map_err(|error| failed(&from.name(), "opening it", self.silence_max, error))
    }
}
