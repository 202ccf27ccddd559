//! Pins: ranges of guest memory by their addresses, for data that a system call or io_uring moves; and how an unmap waits
//! for them.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use limosa_guest_memory::PinnedBytes;
use limosa_protocol::Errno;
use limosa_protocol::info::DmaMapFlags;

use super::table::{Memory, Space, Table};

/// How long an unmap waits for pins: much less than what QEMU waits for an answer, 5 s, with its big lock held.
pub const UNMAP_WAIT: Duration = Duration::from_secs(1);

/// A range of guest memory that is pinned: it stays mapped, and is not unmapped, until this is dropped.
///
/// What was pinned for writing goes to the dirty log when this is dropped, all of it unless [`Pin::written`] said less. So
/// a pin is dropped once its data has arrived, and before the device says that it has stopped.
#[derive(Debug)]
pub struct Pin {
    // In this order: an unmap that finds no pin may let the memory go.
    parts: Vec<PinnedBytes>,
    /// Pages of so many bytes from here on are dirty when this is dropped.
    iova: u64,
    written: u64,
    is_for_writing: bool,
    counts: Counts,
}

/// The mappings that are pinned.
struct Counts {
    space: Arc<Space>,
    pins: Vec<Arc<AtomicUsize>>,
}

impl Pin {
    pub(super) fn new(space: &Arc<Space>, iova: u64, bytes: u64, access: DmaMapFlags) -> Result<Pin, Errno> {
        let both = DmaMapFlags::READ | DmaMapFlags::WRITE;
        if bytes == 0 || access.is_empty() || !both.contains(access) {
            return Err(Errno::EINVAL);
        }
        let last = iova.checked_add(bytes - 1).ok_or(Errno::EFAULT)?;
        let mut parts = Vec::with_capacity(1);
        let mut counts = Counts { space: Arc::clone(space), pins: Vec::with_capacity(1) };
        let (read, write) = (access.contains(DmaMapFlags::READ), access.contains(DmaMapFlags::WRITE));
        let table = space.read_lock();
        let mut at = iova;
        loop {
            let mapped = table.find(at, access)?;
            if mapped.is_leaving {
                return Err(Errno::EBUSY);
            }
            let Memory::File(file) = &mapped.memory else { return Err(Errno::ENOTSUP) };
            let end = mapped.last.min(last);
            let bytes = usize::try_from(end - at + 1).map_err(|_| Errno::EINVAL)?;
            parts.push(file.pin(at - mapped.iova, bytes, read, write)?);
            // Under the lock: an unmap that has not marked the mapping yet finds it.
            mapped.pins.fetch_add(1, SeqCst);
            counts.pins.push(Arc::clone(&mapped.pins));
            if end == last {
                break;
            }
            at = end + 1;
        }
        drop(table);
        Ok(Pin { parts, iova, written: bytes, is_for_writing: write, counts })
    }

    /// The range's parts, in order: one for each mapping that it lies in. Their addresses and lengths are what an `iovec` has.
    pub fn parts(&self) -> &[PinnedBytes] {
        &self.parts
    }

    /// Whether all pages were there since the range was pinned: EFAULT when one was not, and data may have gone nowhere.
    pub fn check(&self) -> Result<(), Errno> {
        self.parts.iter().try_for_each(PinnedBytes::check)
    }

    /// Reads from a file, from `offset` on, into the range, as preadv(2) does: it may be less than the range holds. Errors as for
    /// [`PinnedBytes::read_from`].
    pub fn read_from(&self, file: impl AsFd, offset: u64) -> Result<usize, Errno> {
        PinnedBytes::read_from(&self.parts, file, offset)
    }

    /// Writes the range to a file, from `offset` on, as pwritev(2) does. Errors as for [`PinnedBytes::write_to`].
    pub fn write_to(&self, file: impl AsFd, offset: u64) -> Result<usize, Errno> {
        PinnedBytes::write_to(&self.parts, file, offset)
    }

    /// Says that no more than the range's first `bytes` bytes were written. Only these go to the dirty log.
    pub fn written(&mut self, bytes: u64) {
        self.written = self.written.min(bytes);
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // Before the counts are lowered: an unmap that reports must find the marks.
        if self.is_for_writing && self.written > 0 {
            let bytes = usize::try_from(self.written).unwrap_or(usize::MAX);
            self.counts.space.read_lock().mark(self.iova, bytes);
        }
        self.parts.clear();
    }
}

impl Drop for Counts {
    fn drop(&mut self) {
        let mut is_last = false;
        for pins in &self.pins {
            is_last |= pins.fetch_sub(1, SeqCst) == 1;
        }
        if is_last {
            self.space.leaving.let_go();
        }
    }
}

impl std::fmt::Debug for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.pins).finish()
    }
}

type Hook = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// What an unmap does before it.
#[derive(Default)]
pub(super) struct Leaving {
    /// One unmap at a time.
    turn: Mutex<()>,
    hooks: RwLock<Vec<Hook>>,
    /// An unmap waits for pins.
    is_waiting: AtomicBool,
    waiting: Mutex<()>,
    released: Condvar,
}

impl Leaving {
    /// Nothing is half done under these locks when their holder panics.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add_hook(&self, hook: Hook) {
        self.hooks.write().unwrap_or_else(PoisonError::into_inner).push(hook);
    }

    /// Tells the device.
    pub(super) fn announce(&self, iova: u64, size: u64) {
        let hooks = self.hooks.read().unwrap_or_else(PoisonError::into_inner).clone();
        hooks.iter().for_each(|hook| hook(iova, size));
    }

    /// Waits until none of these is pinned, or the limit is over.
    ///
    /// No wake-up is lost: `is_waiting` is set before the counts are looked at, and a pin lowers its count before it looks at
    /// `is_waiting` (both sequentially consistent). So either the waiter sees the count, or the pin sees the waiter; and then
    /// it takes the lock, which the waiter holds from its look to its sleep.
    pub(super) fn wait(&self, pins: &[Arc<AtomicUsize>], limit: Duration) {
        let until = Instant::now() + limit;
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_waiting.store(true, SeqCst);
        while pins.iter().any(|pins| pins.load(SeqCst) > 0) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            waiting = self.released.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        self.is_waiting.store(false, SeqCst);
    }

    fn let_go(&self) {
        if self.is_waiting.load(SeqCst) {
            drop(self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
            self.released.notify_all();
        }
    }
}

impl Table {
    /// Lets nobody pin these mappings any more, and returns the counts of those that are pinned.
    pub(super) fn leave(&mut self, range: std::ops::Range<usize>) -> Vec<Arc<AtomicUsize>> {
        let mut pinned = Vec::new();
        for mapped in &mut self.mappings[range] {
            mapped.is_leaving = true;
            if mapped.pins.load(SeqCst) > 0 {
                pinned.push(Arc::clone(&mapped.pins));
            }
        }
        pinned
    }

    /// Whether one of these is pinned.
    pub(super) fn is_pinned(&self, range: std::ops::Range<usize>) -> bool {
        self.mappings[range].iter().any(|mapped| mapped.pins.load(SeqCst) > 0)
    }

    /// Lets the mappings in a range be pinned again.
    pub(super) fn stay(&mut self, iova: u64, last: u64) {
        let range = self.touching(iova, last);
        self.mappings[range].iter_mut().for_each(|mapped| mapped.is_leaving = false);
    }
}
