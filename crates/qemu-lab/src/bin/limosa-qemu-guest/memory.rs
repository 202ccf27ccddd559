//! Memory that devices reach: its address on the bus, where no IOMMU stands between, is the one in the machine.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::os::{HUGE_BYTES, Shared};

const PAGE_BYTES: u64 = 4096;
/// In an entry of `/proc/PID/pagemap`, the bits with the page's number.
const NUMBER: u64 = (1 << 55) - 1;

/// A huge page.
pub(crate) struct Memory {
    pub(crate) page: Shared,
    iova: u64,
}

impl Memory {
    pub(crate) fn new() -> Result<Memory, String> {
        let page = Shared::huge_page()?;
        let mut entry = [0; 8];
        let pagemap = File::open("/proc/self/pagemap").map_err(|error| error.to_string())?;
        let at = page.address() as u64 / PAGE_BYTES * entry.len() as u64;
        pagemap.read_exact_at(&mut entry, at).map_err(|error| format!("/proc/self/pagemap: {error}"))?;
        let iova = (u64::from_le_bytes(entry) & NUMBER) * PAGE_BYTES;
        if iova == 0 || !iova.is_multiple_of(HUGE_BYTES as u64) {
            return Err(format!("a huge page at {iova:#x} of the machine's memory"));
        }
        Ok(Memory { page, iova })
    }

    pub(crate) fn iova(&self, offset: usize) -> u64 {
        self.iova + offset as u64
    }
}
