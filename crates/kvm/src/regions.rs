//! [`Regions`]: the regions of a `GuestMemoryMmap` as the engine's memory.

use std::io;
use std::ops::Range;

use limosa_migrate::{FilePages, GuestPages, MemoryRegion, PAGE_BYTES};
use rustix::mm::MapFlags;
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Address, Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
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

impl<'m, B: Bitmap + Send + Sync> Regions<'m, B> {
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
/// Where the region is a shared mapping of a file, holes of the file count as zeroes and are not read.
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

impl<B: Bitmap + Send + Sync> GuestPages for RegionPages<'_, B> {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.region.read_slice(into, MemoryRegionAddress(offset)).map_err(io::Error::other)
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
