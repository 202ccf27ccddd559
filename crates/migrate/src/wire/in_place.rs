//! Payloads of guest memory without a checksum that are received into that memory (`docs/stream.md: Pages before a frame is complete`).

use limosa_guest_memory::PinnedBytes;
use limosa_stream::Header;

use crate::link::{Link, LinkError, Wait};
use crate::memory::cut_short;
use crate::{Error, Result};

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
}

/// The reason for which a payload was not received.
pub(super) enum NotReceived {
    Link(LinkError),
    Other(Error),
}

impl InPlace {
    pub(super) fn new(target: MemoryTarget) -> InPlace {
        InPlace { target }
    }

    /// Reads once: into the memory from its byte `from` on, and behind its end into `behind`. Returns the number of bytes.
    pub(super) fn read(
        &self,
        link: &dyn Link,
        from: usize,
        behind: &mut [u8],
        wait: Wait<'_>,
    ) -> Result<usize, NotReceived> {
        match link.read_to_memory(&self.target.memory, from, behind, wait) {
            Err(LinkError::Memory(error)) => Err(self.lost(from, error)),
            read => read.map_err(NotReceived::Link),
        }
    }

    /// Whether all of a payload that is complete is in the memory.
    pub(super) fn check(&self) -> Result<(), NotReceived> {
        self.target.memory.check().map_err(|_| self.lost(0, cut_short()))
    }

    fn lost(&self, at: usize, error: std::io::Error) -> NotReceived {
        let address = self.target.address.saturating_add(at as u64);
        NotReceived::Other(Error::Memory { address, error })
    }
}
