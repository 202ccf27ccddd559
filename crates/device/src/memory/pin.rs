//! Pins: ranges of guest memory by their addresses, for system calls or io_uring; and how an unmap waits for them.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use limosa_guest_memory::PinnedBytes;
use limosa_protocol::Errno;
use limosa_protocol::info::DmaMapFlags;

use super::table::{Memory, Space, Table};

/// How long an unmap waits for pins: much less than the 5 s for which QEMU waits for a reply with its big lock
/// held.
pub const UNMAP_WAIT: Duration = Duration::from_secs(1);

/// A pinned range of guest memory. It stays mapped until this is dropped.
///
/// Dropping a pin for writing marks its whole range dirty, or the part given to [`Pin::written`]. So drop a pin once
/// its data has arrived, and before the device reports that it has stopped.
#[derive(Debug)]
pub struct Pin {
    // In this order: an unmap that finds no pin may release the memory.
    parts: Vec<PinnedBytes>,
    /// The pages of this many bytes from here on are dirty when this is dropped.
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
            // Under the lock: an unmap that has not marked the mapping yet finds the pin.
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

    /// The range's parts, in order: one for each mapping. Their addresses and lengths are those of an `iovec`.
    pub fn parts(&self) -> &[PinnedBytes] {
        &self.parts
    }

    /// Whether all pages have been present since the range was pinned. EFAULT if one was missing, and data may have
    /// been lost.
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

    /// States that only the range's first `bytes` bytes were written. Only these go to the dirty log.
    pub fn written(&mut self, bytes: u64) {
        self.written = self.written.min(bytes);
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // Before the counts are decremented: an unmap that reports must find the marks.
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

/// The steps before an unmap.
#[derive(Default)]
pub(super) struct Leaving {
    /// One unmap at a time.
    turn: Mutex<()>,
    hooks: RwLock<Vec<Hook>>,
    /// An unmap is waiting for pins.
    is_waiting: AtomicBool,
    waiting: Mutex<()>,
    released: Condvar,
}

impl Leaving {
    /// A panic under these locks leaves nothing inconsistent.
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

    /// Waits until none of these is pinned, or the limit has passed.
    ///
    /// No wake-up is lost: `is_waiting` is set before the counts are read, and a pin decrements its count before it
    /// reads `is_waiting` (both sequentially consistent). So either the waiter sees the count, or the pin sees the
    /// waiter; the pin then takes the lock, which the waiter holds from its check to its sleep.
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
    /// Prevents new pins of these mappings, and returns the counts of those that are pinned.
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

    /// Allows pins of the mappings in a range again.
    pub(super) fn stay(&mut self, iova: u64, last: u64) {
        let range = self.touching(iova, last);
        self.mappings[range].iter_mut().for_each(|mapped| mapped.is_leaving = false);
    }
}
