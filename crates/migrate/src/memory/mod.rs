//! Guest memory in a move: where it is, and who tells which pages are dirty.

mod dirty;
mod file_pages;
mod fingerprint;

use std::io;
use std::ops::Range;

pub(crate) use dirty::DirtyLogs;
pub use file_pages::FilePages;
pub use fingerprint::{FingerprintKey, FingerprintLog, Fingerprinted};
use limosa_client::DirtySource;
use limosa_protocol::bitmap::DirtyBitmap;

use crate::Error;
use limosa_stream::MemoryFacts;

/// Bytes of a page, as the engine counts them. Guest memory is made of whole ones.
pub const PAGE_BYTES: u64 = 4096;

/// Reads and writes pages of guest memory. Offsets are within the region.
pub trait GuestPages: Sync {
    /// Reads all of `into`.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes all of `from`.
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()>;

    /// The first bytes within the range that may hold anything but zeroes: a part of it, or `None` when all of it is
    /// known for zeroes. What is not among them is not read, so that memory that was never touched stays so. Unless
    /// this is written, all of it may.
    ///
    /// It is asked before the range is read, when the marks of what was dirty there have been taken: what is written
    /// meanwhile is dirty again. What lies before the data, or all of the range, is then sent as zeroes.
    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok((!range.is_empty()).then_some(range))
    }

    /// Makes the range zero. Pages that are zero already are left alone, so that memory which was never
    /// touched takes no room.
    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        const PIECE_BYTES: u64 = 256 << 10;
        let zeroes = [0; PAGE_BYTES as usize];
        let end = offset.saturating_add(bytes);
        let mut found = Vec::new();
        let mut from = offset;
        while let Some(data) = self.data(from..end)? {
            for at in (data.start..data.end).step_by(PIECE_BYTES as usize) {
                found.resize(PIECE_BYTES.min(data.end - at) as usize, 0);
                self.read(at, &mut found)?;
                for (page, at) in found.chunks(zeroes.len()).zip((at..).step_by(zeroes.len())) {
                    if !is_zero(page) {
                        self.write(at, &zeroes[..page.len()])?;
                    }
                }
            }
            from = data.end;
        }
        Ok(())
    }
}

/// A region of guest memory.
#[derive(Clone, Copy)]
pub struct MemoryRegion<'a> {
    /// Names it on both sides.
    pub id: u32,
    /// Its first address, as devices see it (IOVA): page-aligned. It should be mapped to the devices
    /// as one piece or several, but not together with another region.
    pub iova: u64,
    /// Bytes; whole pages.
    pub size: u64,
    /// Its pages.
    pub pages: &'a dyn GuestPages,
}

impl std::fmt::Debug for MemoryRegion<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MemoryRegion {} ({:#x} bytes at {:#x})", self.id, self.size, self.iova)
    }
}

impl MemoryRegion<'_> {
    pub(crate) fn facts(&self) -> MemoryFacts {
        MemoryFacts { id: self.id, address: self.iova, bytes: self.size, page_bytes: PAGE_BYTES }
    }

    /// The first whole pages of a range of whole pages that may hold anything but zeroes.
    pub(crate) fn data(&self, range: Range<u64>) -> Result<Option<Range<u64>>, Error> {
        let found = self.pages.data(range.clone()).map_err(|error| self.failed(range.start, error))?;
        // Whoever implements it may err.
        let found = found.map(|data| {
            let start = data.start / PAGE_BYTES * PAGE_BYTES;
            let end = data.end.min(range.end).next_multiple_of(PAGE_BYTES);
            start.max(range.start)..end.min(range.end)
        });
        Ok(found.filter(|data| !data.is_empty()))
    }

    pub(crate) fn failed(&self, offset: u64, error: io::Error) -> Error {
        Error::Memory { address: self.iova.saturating_add(offset), error }
    }
}

/// The caller's own log of dirty pages: what vCPUs write. What devices log themselves, the engine asks
/// them for; other logs of what devices write are [`Memory::sources`].
///
/// Bit *n* of a bitmap stands for page *n* of the region, of [`PAGE_BYTES`].
pub trait DirtyLog: Send {
    /// Logs from now on, all clean.
    fn start(&mut self) -> io::Result<()>;

    /// Moves the marks of a region (by its place among the regions) to `dirty`. When this fails, all
    /// of the region is taken as dirty.
    fn harvest(&mut self, region: usize, dirty: &DirtyBitmap) -> io::Result<()>;

    /// The move was undone: here are all the pages that were harvested in it, from this log, from the
    /// devices' and from the other sources, so that whoever else lives by the log misses nothing.
    fn give_back(&mut self, region: usize, dirty: &DirtyBitmap) {
        let _ = (region, dirty);
    }

    /// The move is over, one way or the other.
    fn stop(&mut self);

    /// Whether anybody else lives by this log, so that [`DirtyLog::give_back`] means something.
    fn has_other_readers(&self) -> bool {
        true
    }

    /// Whether it sees what devices write as well, so that devices without DMA logging are covered.
    fn covers_devices(&self) -> bool {
        false
    }
}

/// The guest memory of a move.
#[derive(Default)]
pub struct Memory<'a> {
    /// The regions; none where only devices move.
    pub regions: Vec<MemoryRegion<'a>>,
    /// Who tells what vCPUs write. Without it only what devices write is seen.
    pub log: Option<&'a mut dyn DirtyLog>,
    /// Who tells what devices write, besides the devices themselves: an IOMMU, a container. All of them are
    /// used. A device without a log of its own that none of them sees ([`DirtySource::sees`]) makes all memory
    /// move after the stop. For devices that log themselves they are not needed, and such logs can be coarser.
    pub sources: Vec<&'a dyn DirtySource>,
}

impl std::fmt::Debug for Memory<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sources: Vec<_> = self.sources.iter().map(|source| source.name()).collect();
        f.debug_struct("Memory")
            .field("regions", &self.regions)
            .field("log", &self.log.is_some())
            .field("sources", &sources)
            .finish()
    }
}

/// Whether all bytes are zero; whole words at a time.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    blocks.iter().all(|block| block.iter().fold(0, |or, byte| or | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_makes_a_page_not_zero() {
        for at in [0, 63, 64, 4095] {
            let mut page = [0; 4096];
            assert!(is_zero(&page));
            page[at] = 1;
            assert!(!is_zero(&page));
        }
        assert!(!is_zero(&[0; 65].map(|byte: u8| byte | 1)[64..]));
    }
}
