//! Memory of this process for devices: it is promised that nothing else touches it, which takes `unsafe` code.

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
        // SAFETY: a new mapping, where the kernel finds room for it.
        let mapped =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE) };
        HostMemory { address: mapped.expect("memory").expose_provenance(), bytes }
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
