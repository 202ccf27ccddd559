//! A snapshot that is being saved, as a [`Link`] that can only be written to. It collects written data in pieces and
//! hashes them.

use std::io::IoSlice;
use std::sync::Mutex;

use limosa_clockwork::catch;

use super::{Durability, Limits, PIECE_BYTES, Publication, SnapshotTarget, SnapshotWriter, failed, os_error};
use crate::error::guard;
use crate::link::{Link, LinkError, Wait};
use crate::{Error, Options, Result};
use limosa_stream::Seal;

/// How [`Writing::publish`] ended.
pub(crate) enum Published {
    /// The snapshot is there. A note says if it may not survive a power failure.
    Yes { note: Option<String> },
    /// It is not there, and cannot appear later.
    No(Error),
    /// It may be there, or appear later.
    Unknown(Error),
}

/// A snapshot that is being saved.
pub(crate) struct Writing {
    name: String,
    inner: Mutex<Inner>,
}

struct Inner {
    /// Until it is published.
    writer: Option<Box<dyn SnapshotWriter>>,
    /// Bytes that were written and not passed on yet; never more than [`PIECE_BYTES`].
    piece: Vec<u8>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Inner {
    /// Passes the piece on. After an error the snapshot cannot be completed.
    fn flush(&mut self, wait: Wait<'_>) -> Result<(), LinkError> {
        let mut rest = &self.piece[..];
        self.hasher.update(rest);
        while !rest.is_empty() {
            let writer = self.writer.as_mut().ok_or(LinkError::Closed)?;
            let taken = writer.write(rest, wait)?;
            rest = &rest[taken..];
        }
        self.piece.clear();
        Ok(())
    }
}

impl Writing {
    /// Begins a snapshot.
    pub(crate) fn create(to: &dyn SnapshotTarget, limits: Limits<'_>) -> Result<Writing> {
        let name = to.name();
        let writer = (to.create(limits.wait()))
            .map_err(|error| failed(&name, "creating it", limits.silence_max, error))?;
        let inner = Inner {
            writer: Some(writer),
            piece: Vec::with_capacity(PIECE_BYTES),
            hasher: blake3::Hasher::new(),
            bytes: 0,
        };
        Ok(Writing { name, inner: Mutex::new(inner) })
    }

    /// The SEAL over everything that was written before it. It follows the SUM (`docs/stream.md`).
    pub(crate) fn seal(&self, limits: Limits<'_>) -> Result<Seal> {
        let mut inner = crate::lock::lock(&self.inner);
        let flushed = inner.flush(limits.wait());
        flushed.map_err(|error| failed(&self.name, "writing it", limits.silence_max, error))?;
        Ok(Seal { bytes: inner.bytes, blake3: *inner.hasher.finalize().as_bytes() })
    }

    /// Publishes the complete snapshot. Takes [`Options::load_max`] at most, in addition to the time for data that is still
    /// to be written.
    pub(crate) fn publish(&self, options: &Options, limits: Limits<'_>) -> Published {
        let (name, limit) = (self.name.clone(), options.load_max);
        let mut inner = crate::lock::lock(&self.inner);
        let flushed = guard("writing the snapshot", || {
            let flushed = inner.flush(limits.wait());
            flushed.map_err(|error| failed(&name, "writing it", limits.silence_max, error))
        });
        if let Err(why) = flushed {
            return Published::No(why);
        }
        let Some(writer) = inner.writer.take() else {
            return Published::No(failed(&name, "publishing it", limit, LinkError::Closed));
        };
        let publication = match catch(|| writer.publish(Wait::within(limit, limits.cancel))) {
            Ok(publication) => publication,
            // It may have published it before.
            Err(panic) => return Published::Unknown(Error::panicked("publishing the snapshot", &panic)),
        };
        match publication {
            Publication::Published { durability: Durability::Durable } => Published::Yes { note: None },
            Publication::Published { durability: Durability::Unknown(error) } => {
                let note = format!("{name}: it was saved, and may not survive a power failure: {error}");
                Published::Yes { note: Some(note) }
            }
            Publication::NotPublished(error) => Published::No(failed(&name, "publishing it", limit, error)),
            Publication::Unknown(error) => {
                Published::Unknown(Error::PublicationUnknown { name, error: os_error(limit, error) })
            }
        }
    }
}

impl Link for Writing {
    fn write(&self, slices: &[IoSlice<'_>], wait: Wait<'_>) -> Result<usize, LinkError> {
        if wait.cancel.is_some_and(crate::Cancel::is_cancelled) {
            return Err(LinkError::Cancelled);
        }
        let mut inner = crate::lock::lock(&self.inner);
        let mut taken = 0;
        for slice in slices {
            if inner.piece.len() == PIECE_BYTES {
                inner.flush(wait)?;
            }
            let room = PIECE_BYTES - inner.piece.len();
            let some = &slice[..slice.len().min(room)];
            inner.piece.extend_from_slice(some);
            inner.bytes += some.len() as u64;
            taken += some.len();
            if some.len() < slice.len() {
                break;
            }
        }
        Ok(taken)
    }

    fn read(&self, _: &mut [u8], _: Wait<'_>) -> Result<usize, LinkError> {
        Err(LinkError::Closed)
    }

    fn finish(&self) {}

    fn peer(&self) -> &str {
        &self.name
    }

    fn has_peer(&self) -> bool {
        false
    }
}
