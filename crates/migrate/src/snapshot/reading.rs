//! A snapshot that is being loaded, as a [`Link`] that can only be read from. It returns its last bytes only if
//! everything that it returned is identical to the verified data.

use std::io::{self, IoSlice};
use std::sync::Mutex;

use super::{Limits, PIECE_BYTES, SnapshotReader, SnapshotSource, failed};
use crate::link::{Link, LinkError, Wait};
use crate::snapshot::inspect::{Verified, verify_reader};
use crate::{Cancel, Result};

/// A snapshot that was verified and is read for the second time.
pub(crate) struct Reading {
    name: String,
    inner: Mutex<Inner>,
}

struct Inner {
    reader: Box<dyn SnapshotReader>,
    verified: Verified,
    piece: Vec<u8>,
    /// Bytes of the piece that were returned already.
    used: usize,
    hasher: blake3::Hasher,
    /// Bytes of the stream that were read, up to the end of the piece.
    bytes: u64,
}

impl Reading {
    /// Verifies a snapshot to its end and goes back to its start.
    pub(crate) fn open(from: &dyn SnapshotSource, limits: Limits<'_>) -> Result<Reading> {
        let name = from.name();
        let mut reader = limits.open(from)?;
        let verified = verify_reader(&name, &mut *reader, limits)?;
        let rewound = reader.rewind(limits.wait());
        rewound.map_err(|error| failed(&name, "reading it again", limits.silence_max, error))?;
        let (hasher, piece) = (blake3::Hasher::new(), Vec::new());
        Ok(Reading { name, inner: Mutex::new(Inner { reader, verified, piece, used: 0, hasher, bytes: 0 }) })
    }
}

impl Inner {
    /// Reads the next piece; an empty one at the end of what the SEAL covers.
    fn fill(&mut self, wait: Wait<'_>) -> Result<(), LinkError> {
        let left = self.verified.covered_bytes - self.bytes;
        let size = usize::try_from(left).unwrap_or(usize::MAX).min(PIECE_BYTES);
        self.piece.resize(size, 0);
        self.used = size;
        if size == 0 {
            return Ok(());
        }
        let read = self.reader.read(&mut self.piece, wait)?;
        self.piece.truncate(read);
        self.hasher.update(&self.piece);
        self.bytes += read as u64;
        let last = self.bytes == self.verified.covered_bytes;
        if read == 0 || last && *self.hasher.finalize().as_bytes() != self.verified.blake3 {
            let what = "it was altered while it was being loaded, and is discarded; load it again";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what).into());
        }
        self.used = 0;
        Ok(())
    }
}

impl Link for Reading {
    fn write(&self, _: &[IoSlice<'_>], _: Wait<'_>) -> Result<usize, LinkError> {
        Err(LinkError::Closed)
    }

    fn read(&self, into: &mut [u8], wait: Wait<'_>) -> Result<usize, LinkError> {
        if wait.cancel.is_some_and(Cancel::is_cancelled) {
            return Err(LinkError::Cancelled);
        }
        let mut inner = crate::lock::lock(&self.inner);
        if inner.used == inner.piece.len() {
            inner.fill(wait)?;
        }
        let rest = &inner.piece[inner.used..];
        let given = rest.len().min(into.len());
        if given == 0 && !into.is_empty() {
            return Err(LinkError::Closed);
        }
        into[..given].copy_from_slice(&rest[..given]);
        inner.used += given;
        Ok(given)
    }

    fn finish(&self) {}

    fn peer(&self) -> &str {
        &self.name
    }

    fn has_peer(&self) -> bool {
        false
    }
}
