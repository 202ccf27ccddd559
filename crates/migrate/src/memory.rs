//! Guest memory in a move: where it is, and who tells which pages are dirty.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use limosa_client::DirtySource;
use limosa_protocol::bitmap::DirtyBitmap;

use crate::Error;
use crate::stream::MemoryFacts;

/// Bytes of a page, as the engine counts them. Guest memory is made of whole ones.
pub const PAGE_BYTES: u64 = 4096;

/// Reads and writes pages of guest memory. Offsets are within the region.
pub trait GuestPages: Sync {
    /// Reads all of `into`.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes all of `from`.
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()>;

    /// Makes the range zero. Pages that are zero already are left alone, so that memory which was never
    /// touched takes no room.
    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let zeroes = [0; PAGE_BYTES as usize];
        let mut found = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX).min(1 << 18)];
        let mut at = offset;
        while at < offset + bytes {
            let piece = (offset + bytes - at).min(found.len() as u64) as usize;
            self.read(at, &mut found[..piece])?;
            for page in found[..piece].chunks(zeroes.len()) {
                if !is_zero(page) {
                    self.write(at, &zeroes[..page.len()])?;
                }
                at += page.len() as u64;
            }
        }
        Ok(())
    }
}

/// Guest memory in a file: a memfd, hugetlbfs, any other.
#[derive(Debug)]
pub struct FilePages {
    file: File,
    offset: u64,
}

impl FilePages {
    /// Memory that starts at this offset of the file.
    pub fn new(file: File, offset: u64) -> FilePages {
        FilePages { file, offset }
    }
}

impl GuestPages for FilePages {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, self.offset + offset)
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.file.write_all_at(from, self.offset + offset)
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

    #[test]
    fn zeroes_that_come_to_memory_never_touched_take_no_room() {
        use std::os::unix::fs::MetadataExt;
        let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(1 << 20).unwrap();
        let pages = FilePages::new(file.try_clone().unwrap(), 0);
        pages.write(300_000, &[7; 5]).unwrap();
        let before = file.metadata().unwrap().blocks();
        pages.zero(0, 1 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), before, "the page that was written");
        let mut all = vec![1; 1 << 20];
        pages.read(0, &mut all).unwrap();
        assert!(is_zero(&all));
    }
}
