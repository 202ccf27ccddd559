//! [`Regions`]: the regions of a `GuestMemoryMmap` as the engine's memory.

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use limosa_guest_memory::PinnedBytes;
use limosa_migrate::{DataRun, FilePages, GuestPages, MemoryRegion, PAGE_BYTES};
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Address, Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion,
};

/// The regions of a guest's memory, in the order of their addresses. Both sides of a move number them alike if their guests have the
/// same memory.
pub struct Regions<'m, B: Bitmap = ()> {
    pages: Vec<RegionPages<'m, B>>,
}

/// A region whose address or size is not a multiple of the engine's page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the memory region of {bytes:#x} bytes at {address:#x} is not made of whole pages of {PAGE_BYTES} bytes"
)]
pub struct NotPages {
    /// The region's first guest address.
    pub address: u64,
    /// Its size in bytes.
    pub bytes: u64,
}

impl<'m, B: Bitmap + Send + Sync + 'static> Regions<'m, B> {
    /// The regions of this memory.
    ///
    /// # Errors
    ///
    /// [`NotPages`] names the first region that does not consist of whole pages.
    pub fn new(memory: &'m GuestMemoryMmap<B>) -> Result<Regions<'m, B>, NotPages> {
        let pages = memory.iter().map(|region| {
            let (address, bytes) = (region.start_addr().raw_value(), region.len());
            match address.is_multiple_of(PAGE_BYTES) && bytes.is_multiple_of(PAGE_BYTES) {
                true => Ok(RegionPages::new(region)),
                false => Err(NotPages { address, bytes }),
            }
        });
        Ok(Regions { pages: pages.collect::<Result<_, _>>()? })
    }

    /// As the engine takes them. Their ids are their numbers in the order of addresses, from 0 on.
    pub fn for_engine(&self) -> Vec<MemoryRegion<'_>> {
        let region = |(id, pages): (u32, _)| {
            let pages: &RegionPages<'m, B> = pages;
            let (iova, size) = (pages.region.start_addr().raw_value(), pages.region.len());
            MemoryRegion { id, iova, size, pages }
        };
        (0..).zip(&self.pages).map(region).collect()
    }
}

/// The pages of one region. Writes mark the region's bitmap, if it has one.
///
/// Where the region is a shared mapping of a file, holes of the file count as zeroes and are not read. Pages are sent and received
/// where they lie.
pub struct RegionPages<'m, B: Bitmap = ()> {
    region: &'m GuestRegionMmap<B>,
    holes: Option<FilePages>,
}

impl<'m, B: Bitmap> RegionPages<'m, B> {
    fn new(region: &'m GuestRegionMmap<B>) -> RegionPages<'m, B> {
        // A private mapping has pages that the file does not have.
        let is_shared = MapFlags::from_bits_retain(region.flags().cast_unsigned()).contains(MapFlags::SHARED);
        let file = region.file_offset().filter(|_| is_shared);
        // Without another descriptor for the file all of it counts as data.
        let holes = file.and_then(|at| Some(FilePages::new(at.file().try_clone().ok()?, at.start())));
        RegionPages { region, holes }
    }
}

impl<B: Bitmap + Send + Sync + 'static> GuestPages for RegionPages<'_, B> {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match &self.holes {
            // Reading a hole through the mapping would fill it.
            Some(holes) => holes.read(offset, into),
            None => self.read_data(offset, into),
        }
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.region.write_slice(from, MemoryRegionAddress(offset)).map_err(io::Error::other)
    }

    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        match &self.holes {
            Some(holes) => holes.data(range),
            None => Ok((!range.is_empty()).then_some(range)),
        }
    }

    fn data_runs(&self, range: Range<u64>, found: &mut Vec<DataRun>) -> io::Result<()> {
        match &self.holes {
            Some(holes) => holes.data_runs(range, found)?,
            None if range.is_empty() => {}
            None => found.push(DataRun { range, has_holes: false }),
        }
        Ok(())
    }

    fn read_data(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.region.read_slice(into, MemoryRegionAddress(offset)).map_err(io::Error::other)
    }

    fn pin(&self, range: Range<u64>, to_write: bool) -> Option<PinnedBytes> {
        let bytes = usize::try_from(range.end.checked_sub(range.start)?).ok()?;
        let protection = ProtFlags::from_bits_retain(self.region.prot().cast_unsigned());
        if range.end > self.region.len() || !protection.contains(ProtFlags::READ | ProtFlags::WRITE) {
            return None;
        }
        let (mapping, offset) = (self.region.get_mmap(), range.start as usize);
        let start = NonNull::new(mapping.as_ptr().wrapping_add(offset))?;
        let owner: Arc<dyn Send + Sync> = match to_write {
            true => Arc::new(Written { mapping, offset, bytes }),
            false => mapping,
        };
        // SAFETY: the range lies within the region, all of which is mapped to be read and written. It stays mapped as long as the owner
        // lives: each kind of owner has the mapping. To vm-memory it is volatile memory, to which nobody has references.
        Some(unsafe { PinnedBytes::new(start, bytes, true, to_write, owner) })
    }
}

/// Marks a range in the bitmap of its mapping when it is dropped, which is after the last write.
struct Written<B: Bitmap> {
    mapping: Arc<MmapRegion<B>>,
    offset: usize,
    bytes: usize,
}

impl<B: Bitmap> Drop for Written<B> {
    fn drop(&mut self) {
        self.mapping.bitmap().mark_dirty(self.offset, self.bytes);
    }
}

impl<B: Bitmap> std::fmt::Debug for Regions<'_, B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.pages).finish()
    }
}

impl<B: Bitmap> std::fmt::Debug for RegionPages<'_, B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (address, bytes) = (self.region.start_addr().raw_value(), self.region.len());
        write!(f, "RegionPages({bytes:#x} bytes at {address:#x}, holes: {})", self.holes.is_some())
    }
}
