//! [`Ring`]: the dirty ring of a vCPU (`api.rst: KVM_CAP_DIRTY_LOG_RING`), in memory that it shares with KVM.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// `KVM_DIRTY_LOG_PAGE_OFFSET`: where the ring is in a vCPU's file, in pages.
const PAGE_OFFSET: u64 = if cfg!(target_arch = "aarch64") || cfg!(target_arch = "x86_64") { 64 } else { 0 };
const SYSTEM_PAGE_BYTES: u64 = 4096;

/// `KVM_DIRTY_GFN_F_DIRTY`: KVM has filled the entry.
const DIRTY: u32 = 1;
/// `KVM_DIRTY_GFN_F_RESET`: the entry was taken, and KVM may protect the page and use the entry again.
const RESET: u32 = 2;

/// `struct kvm_dirty_gfn`: a page that a vCPU has written.
#[repr(C)]
#[derive(Debug, Default)]
pub(crate) struct Entry {
    flags: AtomicU32,
    /// The slot, with the address space in the upper 16 bits.
    slot: AtomicU32,
    /// The page's number in the slot.
    offset: [AtomicU32; 2],
}

/// Takes the entries that KVM has filled, from `next` on, and says for each the slot and the page in it. Returns how many there were.
pub(crate) fn take(entries: &[Entry], next: &mut usize, mut page: impl FnMut(u32, u64)) -> usize {
    let mut taken = 0;
    while taken < entries.len() {
        let entry = &entries[*next];
        // Acquires what KVM has written before the flag.
        if entry.flags.load(Acquire) & DIRTY == 0 {
            break;
        }
        let [low, high] = &entry.offset;
        page(entry.slot.load(Relaxed), u64::from(low.load(Relaxed)) | u64::from(high.load(Relaxed)) << 32);
        entry.flags.store(RESET, Release);
        *next = (*next + 1) % entries.len();
        taken += 1;
    }
    taken
}

/// The ring of one vCPU.
#[derive(Debug)]
pub(crate) struct Ring {
    entries: *const Entry,
    count: usize,
    next: usize,
}

// SAFETY: the mapping belongs to this value alone, and is not tied to a thread. All accesses are atomic.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of a vCPU, whose size in bytes is that with which the VM's capability was enabled.
    pub(crate) fn map(vcpu: &impl AsFd, bytes: usize) -> io::Result<Ring> {
        let count = bytes / size_of::<Entry>();
        if count == 0 || !bytes.is_multiple_of(SYSTEM_PAGE_BYTES as usize) {
            let why = format!("a dirty ring of {bytes} bytes; whole pages are expected");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address that the kernel chooses. A vCPU's file has the ring there, or mmap fails.
        let at = unsafe {
            mmap(std::ptr::null_mut(), bytes, access, flags, vcpu.as_fd(), PAGE_OFFSET * SYSTEM_PAGE_BYTES)
        }?;
        Ok(Ring { entries: at.cast(), count, next: 0 })
    }

    pub(crate) fn take(&mut self, page: impl FnMut(u32, u64)) -> usize {
        // SAFETY: the mapping has so many entries and lives as long as this value. Entries consist of atomics, which any bytes are
        // valid for and which KVM may write at any time.
        let entries = unsafe { std::slice::from_raw_parts(self.entries, self.count) };
        take(entries, &mut self.next, page)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length, and no reference into it outlives a call of `take`.
        let _ = unsafe { munmap(self.entries.cast_mut().cast(), self.count * size_of::<Entry>()) };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fill(entry: &Entry, slot: u32, page: u64) {
        assert_eq!(entry.flags.load(Acquire) & DIRTY, 0, "KVM fills no entry twice");
        entry.slot.store(slot, Relaxed);
        entry.offset[0].store(page as u32, Relaxed);
        entry.offset[1].store((page >> 32) as u32, Relaxed);
        entry.flags.store(DIRTY, Release);
    }

    #[test]
    fn an_entry_is_laid_out_as_linux_lays_it_out() {
        use kvm_bindings::kvm_dirty_gfn as Linux;
        assert_eq!(size_of::<Entry>(), size_of::<Linux>());
        assert_eq!(std::mem::offset_of!(Entry, flags), std::mem::offset_of!(Linux, flags));
        assert_eq!(std::mem::offset_of!(Entry, slot), std::mem::offset_of!(Linux, slot));
        assert_eq!(std::mem::offset_of!(Entry, offset), std::mem::offset_of!(Linux, offset));
        assert_eq!(DIRTY | RESET, kvm_bindings::KVM_DIRTY_GFN_F_MASK);
    }

    proptest! {
        #[test]
        fn every_entry_is_taken_once_and_in_order_whatever_the_ring_s_size(
            size in 1..9_usize,
            rounds in prop::collection::vec(prop::collection::vec((0..4_u32, any::<u64>()), 0..9), 1..20),
        ) {
            let entries: Vec<Entry> = (0..size).map(|_| Entry::default()).collect();
            let (mut next, mut filled) = (0, 0);
            for round in rounds {
                // KVM stops a vCPU whose ring is full.
                let round = &round[..round.len().min(size)];
                for (slot, page) in round {
                    fill(&entries[filled % size], *slot, *page);
                    filled += 1;
                }
                let mut found = Vec::new();
                let taken = take(&entries, &mut next, |slot, page| found.push((slot, page)));
                prop_assert_eq!(taken, round.len());
                prop_assert_eq!(found.as_slice(), round);
                prop_assert_eq!(take(&entries, &mut next, |_, _| {}), 0, "once");
            }
        }
    }
}
