//! [`FingerprintLog`]: a dirty log for memory whose writers are not logged, such as another process, a KVM guest whose
//! log has another reader, or a device without DMA logging. Each page that is read in order to be sent leaves a
//! fingerprint. A harvest reads all of the memory and compares.
//!
//! # Why no page is lost
//!
//! The fingerprint is that of the bytes that were sent, not of the page a moment earlier or later. So the source knows
//! what the destination has, and a page with other content, once its writers have stopped, has another fingerprint.
//!
//! A fingerprint is two sums of NH, the hash of UMAC (Black, Halevi, Krawczyk, Krovetz, Rogaway: *UMAC: Fast and Secure
//! Message Authentication*, CRYPTO 1999), under two independent random keys that are new for each move. For any two
//! different pages the probability that one sum is equal is at most 2^-32 (theorem 1 there), and that both are equal is
//! at most 2^-64, whatever the pages contain. A guest does not know the keys, so it cannot write pages that are mistaken
//! for equal.
//!
//! # What it costs
//!
//! 16 bytes for each page, which is 4 MiB for each GiB of memory, and a bit for a page of zeroes. Each harvest, including the
//! one after the stop, takes the time to read all of the memory, which is a fraction of the time to send it. Holes
//! ([`GuestPages::data`]) are not read.

mod compare;
mod key;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;

use limosa_protocol::bitmap::DirtyBitmap;

pub use key::FingerprintKey;

use crate::memory::prints::Prints;
use crate::memory::{DirtyLog, GuestPages, PAGE_BYTES, whole_pages};

/// Pages of a region, with a fingerprint of each from when it was last read. The engine reads pages only in order to
/// send them.
pub struct Fingerprinted<P> {
    pages: P,
    bytes: u64,
    key: FingerprintKey,
    prints: Prints,
}

impl<P: GuestPages> Fingerprinted<P> {
    /// Wraps the pages of a region of `bytes` bytes. Fails when that is not a multiple of [`PAGE_BYTES`], and when there
    /// is no memory for the fingerprints.
    pub fn new(pages: P, bytes: u64, key: &FingerprintKey) -> io::Result<Fingerprinted<P>> {
        if !bytes.is_multiple_of(PAGE_BYTES) {
            let what = format!("{bytes} bytes of memory, expected whole pages of {PAGE_BYTES} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let prints = Prints::new(bytes / PAGE_BYTES)?;
        Ok(Fingerprinted { pages, bytes, key: key.clone(), prints })
    }
}

impl<P> std::fmt::Debug for Fingerprinted<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fingerprinted").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl<P: GuestPages> GuestPages for Fingerprinted<P> {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if !offset.is_multiple_of(PAGE_BYTES) || !into.len().is_multiple_of(PAGE_BYTES as usize) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "expected a read of whole pages"));
        }
        self.pages.read(offset, into)?;
        for (page, bytes) in (offset / PAGE_BYTES..).zip(into.chunks_exact(PAGE_BYTES as usize)) {
            self.prints.set(page, self.key.print(bytes))?;
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.pages.write(offset, from)
    }

    fn data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        let data = self.pages.data(range.clone())?;
        // The pages before the data are sent as zeroes.
        let first = whole_pages(data.clone(), &range).map_or(range.end, |data| data.start);
        self.prints.set_zero(range.start.div_ceil(PAGE_BYTES)..first / PAGE_BYTES);
        Ok(data)
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.pages.zero(offset, bytes)
    }
}

/// The log of all regions of a move. From the start of the last harvest to the end of the move the memory must not be
/// written: stop its writers in [`Vmm::stop`](crate::Vmm::stop).
#[derive(Debug)]
pub struct FingerprintLog<'a, P> {
    /// The pages of the regions, in their order in the move.
    pub regions: Vec<&'a Fingerprinted<P>>,
}

impl<P: GuestPages + Send> DirtyLog for FingerprintLog<'_, P> {
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn harvest(&mut self, region: usize, dirty: &DirtyBitmap) -> io::Result<()> {
        self.regions.get(region).ok_or(io::ErrorKind::NotFound)?.compare(dirty)
    }

    fn stop(&mut self) {}

    /// The fingerprints belong to this log alone.
    fn has_other_readers(&self) -> bool {
        false
    }

    /// Pages differ no matter what wrote them.
    fn covers_devices(&self) -> bool {
        true
    }
}
