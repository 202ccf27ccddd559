//! [`Slot`]: a memory slot of a VM, and the flag that turns its log on.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use limosa_migrate::PAGE_BYTES;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::ioctl::{UserMemoryRegion, set_memory};

/// `KVM_MEM_LOG_DIRTY_PAGES`.
const LOG_DIRTY_PAGES: u32 = 1;

/// A memory slot of the VM (`KVM_SET_USER_MEMORY_REGION`), and the pages of the move in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its number, with the address space in the upper 16 bits.
    pub number: u32,
    /// Its flags, without `KVM_MEM_LOG_DIRTY_PAGES`.
    pub flags: u32,
    /// Its first guest address.
    pub guest_address: u64,
    /// Its address in this process.
    pub host_address: u64,
    /// Its size in bytes, a multiple of [`PAGE_BYTES`].
    pub bytes: u64,
    /// The index of the move's region that it lies in.
    pub region: usize,
    /// The offset in bytes of its first page in that region, a multiple of [`PAGE_BYTES`].
    pub offset: u64,
}

impl Slot {
    /// The slots of a VMM that has one for each region of its memory, numbered from 0 in the order of addresses, without flags.
    pub fn of<B: Bitmap>(memory: &GuestMemoryMmap<B>) -> Vec<Slot> {
        let slot = |(at, region): (usize, &vm_memory::GuestRegionMmap<B>)| Slot {
            number: at as u32,
            flags: 0,
            guest_address: region.start_addr().raw_value(),
            host_address: region.as_ptr().expose_provenance() as u64,
            bytes: region.len(),
            region: at,
            offset: 0,
        };
        memory.iter().enumerate().map(slot).collect()
    }

    pub(crate) fn pages(&self) -> u64 {
        self.bytes / PAGE_BYTES
    }

    /// The number of its first page in the region.
    pub(crate) fn first_page(&self) -> u64 {
        self.offset / PAGE_BYTES
    }
}

/// The slots of a VM, and how many of them are logged.
#[derive(Debug)]
pub(crate) struct Slots {
    pub(crate) vm: OwnedFd,
    pub(crate) slots: Vec<Slot>,
    logged: usize,
}

impl Slots {
    /// # Safety
    ///
    /// As [`BitmapLog::new`](crate::BitmapLog::new).
    pub(crate) unsafe fn new(vm: &impl AsFd, slots: Vec<Slot>) -> io::Result<Slots> {
        // KVM logs pages of the host's size.
        let host_bytes = rustix::param::page_size() as u64;
        if host_bytes != PAGE_BYTES {
            let why = format!("KVM logs pages of {host_bytes} bytes here, {PAGE_BYTES} are expected");
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        if let Some(slot) = slots.iter().find(|slot| !(slot.bytes | slot.offset).is_multiple_of(PAGE_BYTES)) {
            let why = format!("{slot:x?} is not made of whole pages of {PAGE_BYTES} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let vm = vm.as_fd().try_clone_to_owned()?;
        Ok(Slots { vm, slots, logged: 0 })
    }

    /// Turns the log of each slot on. After an error [`Slots::stop`] turns those off that were turned on.
    pub(crate) fn start(&mut self) -> io::Result<()> {
        while let Some(slot) = self.slots.get(self.logged) {
            self.set(slot, slot.flags | LOG_DIRTY_PAGES)?;
            self.logged += 1;
        }
        Ok(())
    }

    /// Turns the logs off. A slot of a VM that is gone has none.
    pub(crate) fn stop(&mut self) {
        for slot in &self.slots[..std::mem::take(&mut self.logged)] {
            // The trait has no error: a log that stays on costs the guest time, and nothing else.
            let _ = self.set(slot, slot.flags);
        }
    }

    fn set(&self, slot: &Slot, flags: u32) -> io::Result<()> {
        let region = UserMemoryRegion {
            slot: slot.number,
            flags,
            guest_phys_addr: slot.guest_address,
            memory_size: slot.bytes,
            userspace_addr: slot.host_address,
        };
        // SAFETY: the caller of `Slots::new` has promised that the VM has this slot already: only its flags change.
        unsafe { set_memory(self.vm.as_fd(), region) }
    }
}
