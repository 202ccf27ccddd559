//! How the publication of a snapshot ends, and how to find out when its answer was lost.

use std::io;
use std::time::Duration;

use super::inspect::verify_reader;
use super::{Limits, SnapshotSource, failed};
use crate::link::LinkError;
use crate::{Cancel, Decision, Error, Result};
use limosa_stream::MigrationId;

/// How an attempt to publish a snapshot ended.
#[derive(Debug)]
#[must_use = "a guest that was saved may run only where its snapshot is not, or may not be"]
#[non_exhaustive]
pub enum Publication {
    /// The complete snapshot is there under its name.
    Published {
        /// Whether it survives a power failure.
        durability: Durability,
    },
    /// The snapshot does not exist under its name, and cannot appear there later.
    NotPublished(LinkError),
    /// The snapshot may be there under its name, or may appear there later: the answer was lost, and asking did not
    /// help. [`published`] asks again.
    Unknown(LinkError),
}

/// Whether a snapshot that was published survives a power failure.
#[derive(Debug)]
#[non_exhaustive]
pub enum Durability {
    /// It does, or its file system has nothing that could be synchronized.
    Durable,
    /// The file system reported an error when it was asked to make the new name durable.
    Unknown(io::Error),
}

/// Finds out whether the snapshot of a move was published, after a [`Publication::Unknown`]: how an
/// [`InDoubt`](crate::InDoubt) of [`Source::save`](crate::Source::save) is settled with
/// [`Source::decide`](crate::Source::decide).
///
/// - [`Decision::Committed`]: the complete snapshot of this move is there. It was read to its end.
/// - [`Decision::NotCommitted`]: it is not there, and cannot appear later ([`SnapshotSource::withdraw`]).
/// - [`Decision::Unknown`]: neither is certain, for instance because something else is there now.
///
/// `silence_max` is how long the place may make no progress. An error means that the place could not be queried; the
/// outcome is unknown then as well.
pub fn published(
    from: &dyn SnapshotSource,
    id: MigrationId,
    silence_max: Duration,
    cancel: Option<&Cancel>,
) -> Result<Decision> {
    let limits = Limits { silence_max, cancel };
    if holds(from, id, limits)? {
        return Ok(Decision::Committed);
    }
    let withdrawn = from.withdraw(id, limits.wait());
    if !withdrawn.map_err(|error| failed(&from.name(), "withdrawing it", silence_max, error))? {
        return Ok(Decision::Unknown);
    }
    // It may have appeared between the look and the withdrawal.
    match holds(from, id, limits)? {
        true => Ok(Decision::Committed),
        false => Ok(Decision::NotCommitted),
    }
}

/// Whether the complete snapshot of this move is there.
fn holds(from: &dyn SnapshotSource, id: MigrationId, limits: Limits<'_>) -> Result<bool> {
    let mut reader = match from.open(limits.wait()) {
        Err(LinkError::Io(error)) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => opened.map_err(|error| failed(&from.name(), "opening it", limits.silence_max, error))?,
    };
    match verify_reader(&from.name(), &mut *reader, limits) {
        Ok(verified) => Ok(verified.id == id),
        Err(Error::Stream { .. }) => Ok(false),
        Err(why) => Err(why),
    }
}
