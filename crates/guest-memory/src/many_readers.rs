//! [`ManyReaders`]: a read-write lock for readers on many cores and rare writers.
//!
//! A reader writes a counter of its own thread and nothing that other readers write, so readers scale with the cores. It makes
//! no atomic read-modify-write and no fence: the writer pays for both sides with membarrier(2). That no reader and writer are
//! ever inside together is Dekker's argument:
//!
//! - A reader raises its counter (R1), then looks whether a writer has closed the lock (R2). If so it lowers the counter again and
//!   waits. The compiler keeps R1 before R2; the processor need not.
//! - A writer closes the lock (W1), calls membarrier (M), then looks at the counters (W2) until all are zero.
//! - M makes each thread of the process execute a full fence at some point while the writer is in M (a thread that does not run has
//!   had one when it was switched away, and gets one before it runs again). If R2 is before that point, so is R1, and W2, after
//!   M, sees the counter. If R2 is after it, R2 sees W1. So the writer waits for the reader, or the reader for the writer, or both see
//!   each other and the reader gives way.
//!
//! A reader lowers its counter with release, and W2 acquires it: what the reader read and wrote is done before the writer begins. The
//! writer opens the lock with release, and R2 acquires that: the reader sees all of the writer's changes. If R2 reads a value of
//! before an earlier writer's W1, that writer's W2 has seen the counter by the same argument, and has waited until it was lowered.
//!
//! No wake-up is lost: a reader that leaves lowers its counter and then looks whether the lock is closed, which is Dekker again;
//! sleepers look and fall asleep under `gate`, and who wakes them takes it first.
//!
//! Where the system has no membarrier, both sides use sequentially consistent fences.

use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicUsize, compiler_fence, fence};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// A read-write lock whose readers do not write to shared memory.
///
/// A reading thread must not lock for reading again: that panics, since it could wait for a writer that waits for this
/// thread. It must not lock for writing either, which would be a deadlock. A panic while the lock is held does not
/// poison it.
pub struct ManyReaders<T> {
    counters: [Counter; OWN_COUNTERS + 1],
    gate: Gate,
    value: UnsafeCell<T>,
}

// SAFETY: writers have the value alone and readers share it, as the module's argument shows.
unsafe impl<T: Send + Sync> Sync for ManyReaders<T> {}

/// What readers only read, apart from what they write.
#[repr(align(128))]
struct Gate {
    /// A writer is inside, or waits until the readers have left.
    is_closed: AtomicBool,
    has_membarrier: bool,
    /// Held by the writer.
    writer: Mutex<()>,
    /// The number of sleepers: readers until the lock is open, the writer until readers leave. Each counts itself before it lets go of
    /// the lock, so that a wake-up is needed only where the count is not 0.
    sleepers: Mutex<usize>,
    changed: Condvar,
}

/// A thread's part. Two cache lines, as processors fetch them in pairs.
#[repr(align(128))]
#[derive(Default)]
struct Counter {
    readers: AtomicUsize,
    hints: [AtomicUsize; 2],
}

/// Threads with a counter of their own; those beyond share one more. One less than a power of two.
const OWN_COUNTERS: usize = 63;

impl<T> ManyReaders<T> {
    /// A lock that is open.
    pub fn new(value: T) -> ManyReaders<T> {
        ManyReaders::with(value, *HAS_MEMBARRIER)
    }

    pub(crate) fn with(value: T, has_membarrier: bool) -> ManyReaders<T> {
        let gate = Gate {
            is_closed: AtomicBool::new(false),
            has_membarrier,
            writer: Mutex::default(),
            sleepers: Mutex::default(),
            changed: Condvar::default(),
        };
        let counters = std::array::from_fn(|_| Counter::default());
        ManyReaders { counters, gate, value: UnsafeCell::new(value) }
    }

    /// Waits until there is no writer, and keeps writers out.
    #[inline]
    pub fn read(&self) -> ReadGuard<'_, T> {
        match self.read_if_open() {
            Some(guard) => guard,
            None => self.read_later(),
        }
    }

    #[inline(always)]
    fn read_if_open(&self) -> Option<ReadGuard<'_, T>> {
        let at = own_counter();
        let counter = &self.counters[at & OWN_COUNTERS];
        counter.enter(at);
        self.gate.light_fence();
        if self.gate.is_closed.load(Acquire) {
            counter.leave(at);
            return None;
        }
        Some(ReadGuard { lock: self, counter, at, _stays: PhantomData })
    }

    #[cold]
    fn read_later(&self) -> ReadGuard<'_, T> {
        loop {
            self.wait_open();
            if let Some(guard) = self.read_if_open() {
                return guard;
            }
        }
    }

    /// Waits until there is no reader and no other writer, and keeps all out.
    pub fn write(&self) -> WriteGuard<'_, T> {
        let writer = self.gate.writer.lock().unwrap_or_else(PoisonError::into_inner);
        self.gate.is_closed.store(true, SeqCst);
        self.gate.heavy_fence();
        let mut sleepers = self.gate.sleepers();
        while self.counters.iter().any(|counter| counter.readers.load(Acquire) != 0) {
            sleepers = self.gate.sleep(sleepers);
        }
        drop(sleepers);
        WriteGuard { lock: self, _writer: writer }
    }

    /// The same; `None` when readers have not left by `until`. Waits for another writer all the same.
    pub fn write_until(&self, until: Instant) -> Option<WriteGuard<'_, T>> {
        let writer = self.gate.writer.lock().unwrap_or_else(PoisonError::into_inner);
        self.gate.is_closed.store(true, SeqCst);
        self.gate.heavy_fence();
        let mut sleepers = self.gate.sleepers();
        while self.counters.iter().any(|counter| counter.readers.load(Acquire) != 0) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.gate.is_closed.store(false, Release);
                self.gate.changed.notify_all();
                return None;
            }
            *sleepers += 1;
            let waited = self.gate.changed.wait_timeout(sleepers, left);
            sleepers = waited.unwrap_or_else(PoisonError::into_inner).0;
            *sleepers -= 1;
        }
        drop(sleepers);
        Some(WriteGuard { lock: self, _writer: writer })
    }

    fn wait_open(&self) {
        let mut sleepers = self.gate.sleepers();
        // The counter was raised for a moment, which the writer may have seen.
        self.gate.changed.notify_all();
        while self.gate.is_closed.load(Acquire) {
            sleepers = self.gate.sleep(sleepers);
        }
    }
}

impl Gate {
    fn sleepers(&self) -> MutexGuard<'_, usize> {
        self.sleepers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sleep<'s>(&self, mut sleepers: MutexGuard<'s, usize>) -> MutexGuard<'s, usize> {
        *sleepers += 1;
        let mut sleepers = self.changed.wait(sleepers).unwrap_or_else(PoisonError::into_inner);
        *sleepers -= 1;
        sleepers
    }

    #[cold]
    fn wake(&self) {
        let sleepers = *self.sleepers();
        if sleepers > 0 {
            self.changed.notify_all();
        }
    }

    #[inline]
    fn light_fence(&self) {
        if self.has_membarrier { compiler_fence(SeqCst) } else { fence(SeqCst) }
    }

    fn heavy_fence(&self) {
        fence(SeqCst);
        if self.has_membarrier {
            membarrier::all_threads();
        }
    }
}

impl Counter {
    /// The thread's own counter is written by no other, and is 0 or 1.
    #[inline]
    fn enter(&self, at: usize) {
        if at < OWN_COUNTERS {
            assert!(self.readers.load(Relaxed) == 0, "a thread reads twice at once");
            self.readers.store(1, Relaxed);
        } else {
            self.readers.fetch_add(1, Relaxed);
        }
    }

    #[inline]
    fn leave(&self, at: usize) {
        if at < OWN_COUNTERS {
            self.readers.store(0, Release);
        } else {
            self.readers.fetch_sub(1, Release);
        }
    }
}

/// The value, shared with other readers.
pub struct ReadGuard<'a, T> {
    lock: &'a ManyReaders<T>,
    counter: &'a Counter,
    at: usize,
    /// It lowers the counter of its own thread, so it does not go to another.
    _stays: PhantomData<*const ()>,
}

impl<T> ReadGuard<'_, T> {
    /// Two numbers of this thread, or nearly: a place to remember where in the value it looked last.
    #[inline]
    pub fn hints(&self) -> &[AtomicUsize; 2] {
        &self.counter.hints
    }
}

impl<T> Deref for ReadGuard<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the counter is raised and the lock was open, so no writer is inside until the guard is gone.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> Drop for ReadGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.counter.leave(self.at);
        self.lock.gate.light_fence();
        if self.lock.gate.is_closed.load(Relaxed) {
            self.lock.gate.wake();
        }
    }
}

/// The value, alone.
pub struct WriteGuard<'a, T> {
    lock: &'a ManyReaders<T>,
    _writer: MutexGuard<'a, ()>,
}

impl<T> Deref for WriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the lock is closed, and all readers have left.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for WriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above; and the guard is borrowed alone.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for WriteGuard<'_, T> {
    fn drop(&mut self) {
        self.lock.gate.is_closed.store(false, Release);
        self.lock.gate.wake();
    }
}

impl<T: Default> Default for ManyReaders<T> {
    fn default() -> ManyReaders<T> {
        ManyReaders::new(T::default())
    }
}

/// Counters that belong to no thread.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());
static HANDED_OUT: AtomicUsize = AtomicUsize::new(0);
const UNKNOWN: usize = usize::MAX;

thread_local! {
    /// Which counter is this thread's, in every lock. Apart from `OWNED`, which is slower to reach as it has a destructor.
    static OWN: Cell<usize> = const { Cell::new(UNKNOWN) };
    static OWNED: Owned = const { Owned };
}

/// Gives this thread's counter back when the thread ends. The next one to have it finds it at zero: guards do not outlive
/// their thread's last read.
struct Owned;

impl Drop for Owned {
    fn drop(&mut self) {
        // Destructors that run later may still read.
        let own = OWN.replace(OWN_COUNTERS);
        if own < OWN_COUNTERS {
            FREE.lock().unwrap_or_else(PoisonError::into_inner).push(own);
        }
    }
}

#[inline]
fn own_counter() -> usize {
    match OWN.get() {
        UNKNOWN => take_counter(),
        own => own,
    }
}

#[cold]
fn take_counter() -> usize {
    // Without a destructor to come it would never be given back.
    let own = if OWNED.try_with(|_| ()).is_err() {
        OWN_COUNTERS
    } else if let Some(free) = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop() {
        free
    } else {
        let next = |count: usize| (count < OWN_COUNTERS).then_some(count + 1);
        HANDED_OUT.fetch_update(Relaxed, Relaxed, next).unwrap_or(OWN_COUNTERS)
    };
    OWN.set(own);
    own
}

static HAS_MEMBARRIER: LazyLock<bool> = LazyLock::new(membarrier::register);

/// membarrier(2).
mod membarrier {
    const PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
    const REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

    fn call(command: libc::c_int) -> bool {
        // SAFETY: it takes no pointers, and does nothing but order memory.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
    }

    /// Whether this process may use it.
    pub(super) fn register() -> bool {
        call(REGISTER_PRIVATE_EXPEDITED) && call(PRIVATE_EXPEDITED)
    }

    /// A full fence on every thread of this process.
    pub(super) fn all_threads() {
        // Having registered, it fails only for want of memory for a moment, or when a filter for system calls came later; without
        // it nobody can tell whether readers are inside.
        while !call(PRIVATE_EXPEDITED) {
            let error = std::io::Error::last_os_error();
            assert_eq!(error.raw_os_error(), Some(libc::ENOMEM), "membarrier(2) worked before: {error}");
            std::thread::yield_now();
        }
    }
}
