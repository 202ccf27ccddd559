//! [`RingLog`]: the dirty rings of all vCPUs (`api.rst: KVM_CAP_DIRTY_LOG_RING`).

use std::io;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use limosa_migrate::DirtyLog;
use limosa_protocol::Errno;
use limosa_protocol::bitmap::{DirtyBitmap, words_for};

use crate::ioctl;
use crate::ring::Ring;
use crate::slots::{Slot, Slots};

/// The log of vCPU writes, with a ring for each vCPU. Its cost depends on the number of pages written, not on the
/// size of the guest.
///
/// A VMM enables `KVM_CAP_DIRTY_LOG_RING` (`KVM_CAP_DIRTY_LOG_RING_ACQ_REL` on other machines than x86) with the size of a ring in bytes
/// before it makes vCPUs. A vCPU whose ring is full returns from `KVM_RUN` with `KVM_EXIT_DIRTY_RING_FULL`: its thread calls
/// [`RingLog::collect`] and runs it again. The engine takes a reference to the log as its [`DirtyLog`].
///
/// KVM may buffer pages of a running vCPU until it leaves `KVM_RUN`. They are in a later harvest, at the latest in the
/// one after [`Vmm::stop`](limosa_migrate::Vmm::stop), which makes every vCPU leave.
#[derive(Debug)]
pub struct RingLog {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    slots: Slots,
    rings: Vec<Ring>,
    /// What was taken from the rings and not harvested, by slot.
    pages: Vec<DirtyBitmap>,
    is_on: bool,
}

impl RingLog {
    /// The log of these slots and vCPUs, which is off. `vm` and `vcpus` are their descriptors, `ring_bytes` the size of a ring.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a slot or a ring that is not made of whole pages; of mmap, where the VM has no rings of this size;
    /// `Unsupported` on a host whose pages do not have 4 KiB.
    ///
    /// # Safety
    ///
    /// The VM has each of these slots with this number, guest address, host address and size, and keeps it until the log is
    /// dropped.
    pub unsafe fn new<'v, V: AsFd + 'v>(
        vm: &impl AsFd,
        vcpus: impl IntoIterator<Item = &'v V>,
        ring_bytes: usize,
        slots: Vec<Slot>,
    ) -> io::Result<RingLog> {
        let bitmap = |slot: &Slot| DirtyBitmap::new(slot.pages()).map_err(no_memory);
        let pages = slots.iter().map(bitmap).collect::<io::Result<_>>()?;
        let rings = vcpus.into_iter().map(|vcpu| Ring::map(vcpu, ring_bytes)).collect::<io::Result<_>>()?;
        // SAFETY: as this function's.
        let slots = unsafe { Slots::new(vm, slots) }?;
        Ok(RingLog { state: Mutex::new(State { slots, rings, pages, is_on: false }) })
    }

    /// Empties the rings. A vCPU's thread calls it when the vCPU's ring is full.
    ///
    /// # Errors
    ///
    /// Of `KVM_RESET_DIRTY_RINGS`.
    pub fn collect(&self) -> io::Result<()> {
        self.state().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn collect(&mut self) -> io::Result<()> {
        let mut taken = 0;
        for ring in &mut self.rings {
            taken += ring.take(|number, page| {
                // A slot that is not of this move, such as a ROM.
                let Some(at) = self.slots.slots.iter().position(|slot| slot.number == number) else { return };
                if self.is_on && page < self.pages[at].pages() {
                    self.pages[at].set(page);
                }
            });
        }
        // The caller reads the pages after this: what was written until here is in them, and what comes later is logged again.
        if taken > 0 {
            ioctl::reset_rings(self.slots.vm.as_fd())?;
        }
        Ok(())
    }
}

impl DirtyLog for &RingLog {
    fn start(&mut self) -> io::Result<()> {
        let mut state = self.state();
        state.collect()?;
        state.pages.iter().for_each(DirtyBitmap::clear);
        state.is_on = true;
        state.slots.start()
    }

    fn harvest(&mut self, region: usize, dirty: &DirtyBitmap) -> io::Result<()> {
        let mut state = self.state();
        state.collect()?;
        let State { slots, pages, .. } = &mut *state;
        for (slot, pages) in slots.slots.iter().zip(pages).filter(|(slot, _)| slot.region == region) {
            let mut words = vec![0; words_for(slot.pages())];
            pages.harvest_exclusive(0, slot.pages(), &mut words);
            dirty.or_words(slot.first_page(), &words, slot.pages());
        }
        Ok(())
    }

    fn has_other_readers(&self) -> bool {
        false
    }

    fn stop(&mut self) {
        let mut state = self.state();
        state.slots.stop();
        // So that no vCPU waits for a ring that nobody empties. The trait has no error.
        let _ = state.collect();
        state.is_on = false;
    }
}

fn no_memory(errno: Errno) -> io::Error {
    io::Error::new(io::ErrorKind::OutOfMemory, format!("a bitmap of a slot: {errno}"))
}
