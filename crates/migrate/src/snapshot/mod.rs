//! Streams at rest: where a snapshot goes to and comes from, whatever keeps it. A file is one such place
//! ([`SnapshotFile`]); the crate `limosa-store` has another, an object store.

mod file;
mod inspect;
mod reading;
mod writing;

use std::io;
use std::time::Duration;

pub use file::SnapshotFile;
pub use inspect::{
    DamageReport, FrameCount, InspectedSection, Inspection, Verified, inspect, inspect_file,
    inspect_snapshot, verify,
};
pub(crate) use reading::Reading;
pub(crate) use writing::Writing;

use crate::link::{LinkError, Wait};
use crate::{Cancel, Error};

/// Bytes that are read, written and hashed at once.
pub(crate) const PIECE_BYTES: usize = 256 << 10;

/// A place where a snapshot can be put.
pub trait SnapshotTarget: Sync {
    /// The place, for messages.
    fn name(&self) -> String;

    /// Begins a snapshot there, before anything is touched that is to be saved. Until it is published nothing of it can
    /// be seen, or be taken for a snapshot, under the place's name.
    ///
    /// Fails when it is known already that it cannot be published, with a reason that says what to do.
    fn create(&self, wait: Wait<'_>) -> Result<Box<dyn SnapshotWriter>, LinkError>;
}

/// A snapshot that is being written. Dropped before [`SnapshotWriter::publish`], it leaves nothing that could be loaded.
pub trait SnapshotWriter: Send {
    /// Takes at least one of these bytes, and says how many. Waits while no more can be kept in memory.
    fn write(&mut self, bytes: &[u8], wait: Wait<'_>) -> Result<usize, LinkError>;

    /// All is written: makes it last, and gives it its name, at once and whole. When this fails there is nothing of it
    /// under the name, or the error says that this is not known.
    fn publish(self: Box<Self>, wait: Wait<'_>) -> Result<(), LinkError>;
}

/// A place where a snapshot lies.
pub trait SnapshotSource: Sync {
    /// The place, for messages.
    fn name(&self) -> String;

    /// Opens what lies there now, at its start.
    fn open(&self, wait: Wait<'_>) -> Result<Box<dyn SnapshotReader>, LinkError>;
}

/// A snapshot that is being read. All that it gives is of what was opened, also after [`SnapshotReader::rewind`]: when
/// something else is put in its place it gives the old one still, or an error.
pub trait SnapshotReader: Send {
    /// Reads at least one byte and says how many; 0 at the end.
    fn read(&mut self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError>;

    /// Back to the start.
    fn rewind(&mut self, wait: Wait<'_>) -> Result<(), LinkError>;
}

/// What went wrong with a snapshot's place.
pub(crate) fn failed(name: &str, doing: &'static str, limit: Duration, error: LinkError) -> Error {
    let error = match error {
        LinkError::Cancelled => return Error::Cancelled,
        LinkError::TimedOut => {
            io::Error::new(io::ErrorKind::TimedOut, format!("no progress within {limit:?}; is it reachable?"))
        }
        LinkError::Io(error) => error,
        LinkError::Closed => io::ErrorKind::UnexpectedEof.into(),
        other => io::Error::other(other),
    };
    Error::Snapshot { name: name.into(), doing, error }
}

/// What went wrong on the link that leads to such a place, in the words of the place.
pub(crate) fn of_place(why: Error, doing: &'static str) -> Error {
    match why {
        Error::Link { peer, error, .. } => failed(&peer, doing, Duration::ZERO, error),
        Error::TimedOut { peer, limit, .. } => failed(&peer, doing, limit, LinkError::TimedOut),
        why => why,
    }
}

/// How long one step with a place may take, and who may end it.
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
