//! Memory of this process for devices: it is promised that nothing else touches it, which takes `unsafe` code.

use std::fs::File;
use std::os::unix::fs::FileExt;

use limosa_client::HostAddress;
use rustix::mm::{MapFlags, ProtFlags};

/// Pages of this process. They stay mapped for as long as it runs.
pub struct HostMemory {
    address: usize,
    bytes: usize,
}

impl HostMemory {
    /// So many bytes of zeros.
    pub fn new(bytes: usize) -> HostMemory {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: a new mapping, where the kernel finds room for it.
        let mapped = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, access, flags) };
        HostMemory { address: mapped.expect("memory").expose_provenance(), bytes }
    }

    /// So many bytes, a power of two, that lie together in physical memory, at a multiple of their size.
    ///
    /// # Panics
    ///
    /// When there are none among the pages that the kernel gives. In a machine that has just been started, most are in
    /// order.
    pub fn contiguous(bytes: usize) -> HostAddress {
        let (page, memory) = (rustix::param::page_size(), HostMemory::new(16 << 20));
        let mut entries = vec![0; memory.bytes / page * 8];
        let map = File::open("/proc/self/pagemap")
            .expect("pagemap; does the kernel have CONFIG_PROC_PAGE_MONITOR?");
        map.read_exact_at(&mut entries, (memory.address / page * 8) as u64).expect("an entry for each page");
        // Where each page is: the low 55 bits of its entry.
        let (entries, _) = entries.as_chunks::<8>();
        let frames: Vec<u64> =
            entries.iter().map(|entry| u64::from_ne_bytes(*entry) & ((1 << 55) - 1)).collect();
        let count = bytes / page;
        let lie_together = |frames: &[u64]| {
            frames[0].is_multiple_of(count as u64) && frames.is_sorted_by(|one, next| one + 1 == *next)
        };
        let first = frames.windows(count).position(lie_together).expect("physical memory in order");
        // SAFETY: the pages stay mapped for ever, and nothing looks at them.
        unsafe { HostAddress::new(memory.address + first * page) }
    }

    /// For a device.
    pub fn address(&self) -> HostAddress {
        // SAFETY: the pages stay mapped for ever, and only `read` looks at them, through a raw pointer.
        unsafe { HostAddress::new(self.address) }
    }

    /// What is there now.
    pub fn read(&self) -> Vec<u8> {
        let at = std::ptr::with_exposed_provenance::<u8>(self.address);
        let byte = |offset| {
            // SAFETY: within the mapping.
            let at = unsafe { at.add(offset) };
            // SAFETY: mapped and readable; a device that writes meanwhile makes it one value or the other.
            unsafe { at.read_volatile() }
        };
        (0..self.bytes).map(byte).collect()
    }
}
