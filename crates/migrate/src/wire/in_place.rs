//! Payloads of guest memory that are received into that memory (`docs/stream.md: Pages before they are checked`).

use limosa_guest_memory::PinnedBytes;
use limosa_stream::buffer::Buffer;
use limosa_stream::{Header, RunningCrc};

use crate::link::{Link, LinkError, Wait};
use crate::memory::cut_short;
use crate::{Error, Result};

/// The checksum of a payload is computed over copies of such pieces: guest memory may change at any time, so nothing computes on it
/// where it lies.
const PIECE_BYTES: usize = 16 << 10;

/// The guest memory into which the payload of a MEMORY_DATA is received.
pub(crate) struct MemoryTarget {
    pub(crate) memory: PinnedBytes,
    /// Its address, as devices see it.
    pub(crate) address: u64,
}

/// Finds the guest memory for the payload of a frame, if the payload may be received there. A frame that is out of order is refused.
pub(crate) type FindTarget<'f> = &'f dyn Fn(&Header) -> Result<Option<MemoryTarget>>;

/// A payload that is being received into guest memory.
pub(super) struct InPlace {
    target: MemoryTarget,
    crc: RunningCrc,
}

/// The reason for which a payload was not received.
pub(super) enum NotReceived {
    Link(LinkError),
    Other(Error),
}

impl InPlace {
    pub(super) fn new(target: MemoryTarget) -> InPlace {
        InPlace { target, crc: RunningCrc::new() }
    }

    /// Reads once: into the memory from its byte `from` on, and behind its end into `behind`. Returns the number of bytes. `piece` is the
    /// buffer for checksums.
    pub(super) fn read(
        &mut self,
        link: &dyn Link,
        header: &Header,
        from: usize,
        behind: &mut [u8],
        piece: &mut Buffer,
        wait: Wait<'_>,
    ) -> Result<usize, NotReceived> {
        let bytes = match link.read_to_memory(&self.target.memory, from, behind, wait) {
            Err(LinkError::Memory(error)) => return Err(self.lost(from, error)),
            read => read.map_err(NotReceived::Link)?,
        };
        let end = (from + bytes).min(header.length as usize);
        if !header.unchecked {
            // While it is in a cache.
            piece.grow(PIECE_BYTES);
            for at in (from..end).step_by(PIECE_BYTES) {
                let piece = &mut piece[..PIECE_BYTES.min(end - at)];
                self.target.memory.read(at, piece).map_err(|_| self.lost(at, cut_short()))?;
                self.crc.add(piece);
            }
        }
        Ok(bytes)
    }

    /// The crc32c of a payload that is complete, and all of which is in the memory.
    pub(super) fn crc(&self) -> Result<u32, NotReceived> {
        self.target.memory.check().map_err(|_| self.lost(0, cut_short()))?;
        Ok(self.crc.value())
    }

    fn lost(&self, at: usize, error: std::io::Error) -> NotReceived {
        let address = self.target.address.saturating_add(at as u64);
        NotReceived::Other(Error::Memory { address, error })
    }
}
