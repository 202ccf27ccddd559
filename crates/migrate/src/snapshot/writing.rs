//! The way to a snapshot's place as a link that only goes one way: what passes is gathered to pieces and hashed.

use std::io::IoSlice;
use std::sync::Mutex;

use super::{Limits, PIECE_BYTES, SnapshotTarget, SnapshotWriter, failed};
use crate::link::{Link, LinkError, Wait};
use crate::wire::{Connection, Frame};
use crate::{Options, Result};
use limosa_stream::{Kind, Seal};

/// A snapshot that is being written.
pub(crate) struct Writing {
    name: String,
    inner: Mutex<Inner>,
}

struct Inner {
    /// Until it is published.
    writer: Option<Box<dyn SnapshotWriter>>,
    /// What has come and was not passed on yet; never longer than a piece.
    piece: Vec<u8>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Inner {
    /// Passes on what was gathered. What an error leaves is lost, and the snapshot with it.
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
        let inner =
            Inner { writer: Some(writer), piece: Vec::with_capacity(PIECE_BYTES), hasher: blake3::Hasher::new(), bytes: 0 };
        Ok(Writing { name, inner: Mutex::new(inner) })
    }

    /// After the SUM: the SEAL, over everything that came before it.
    pub(crate) fn seal(&self, connection: &Connection<'_>, limits: Limits<'_>) -> Result<()> {
        let seal = {
            let mut inner = crate::lock::lock(&self.inner);
            let flushed = inner.flush(limits.wait());
            flushed.map_err(|error| failed(&self.name, "writing it", limits.silence_max, error))?;
            Seal { bytes: inner.bytes, blake3: *inner.hasher.finalize().as_bytes() }
        };
        connection.send(&Frame::new(Kind::SEAL, &seal.encode()), limits.cancel)
    }

    /// All is there: publishes it. Takes `load_max` at most, beside what is still to be passed on.
    pub(crate) fn publish(&self, options: &Options, limits: Limits<'_>) -> Result<()> {
        let mut inner = crate::lock::lock(&self.inner);
        let flushed = inner.flush(limits.wait());
        flushed.map_err(|error| failed(&self.name, "writing it", limits.silence_max, error))?;
        let Some(writer) = inner.writer.take() else { return Ok(()) };
        let published = writer.publish(Wait::within(options.load_max, limits.cancel));
        published.map_err(|error| failed(&self.name, "publishing it", options.load_max, error))
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
