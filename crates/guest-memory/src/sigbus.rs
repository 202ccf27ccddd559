//! Outliving a page that is not there.
//!
//! A process that maps a peer's file depends on the peer: a touch of a page that was truncated raises SIGBUS, whose default is
//! the end of the process. So does a page that cannot be had (no huge page is left, a disk is full) or whose memory failed
//! (a machine check). Three ways were weighed. System calls that fail instead of
//! faulting (`process_vm_readv` on oneself, `pread` and `pwrite`) cost each small access several times the access
//! itself. Memory sealed against shrinking (F_SEAL_SHRINK) cannot be asked for: QEMU does not seal. So there is a
//! handler for the signal, which costs nothing until it is needed:
//!
//! - Mapped ranges are kept in a table that the handler can read without a lock.
//! - On a fault in one of them, the handler notes the page in the range's list of *covers* and puts anonymous memory over it,
//!   in one `mmap`, a bare system call and so async-signal-safe. The access goes on, into nothing.
//! - Each range has an *epoch*, which every cover raises before its memory can be seen. An access compares the epoch before and
//!   after; nothing else is asked of it as long as nothing happens. Where it changed, the access fails if a cover lies in what
//!   it touched, also one that another thread's fault put there. Nobody takes a cover's zeros for the guest's memory.
//! - The thread that notices maps the file again where the covers are. Whether the page is there is the file's to say, at the
//!   next access: a file that was truncated fails again, one that was extended, or has its page now, works. So one bad page
//!   fails the accesses to it, and no other.
//! - The list is short. A cover that finds no room in it is put over the whole range, which fails all accesses that are under
//!   way there, and splits no mapping of the kernel's (of which there is a limit).
//! - A fault anywhere else, and a SIGBUS that somebody sent, goes to the handler that was there before, or to the
//!   default action.
//!
//! The list has a spin lock. Who holds it touches no guest memory, so a thread never faults while it holds it, and the handler
//! may wait for it.
//!
//! Threads that use guest memory must leave SIGBUS unblocked: the kernel ends a process that faults with it blocked.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::ptr::{null, null_mut};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

/// A mapped range in the table, from [`Slot::take`] to [`Slot::give_back`].
pub(super) struct Slot {
    /// Odd while the range is being changed.
    version: AtomicUsize,
    start: AtomicUsize,
    /// First address beyond; equal to `start` for a slot that is not taken.
    end: AtomicUsize,
    /// Bytes of a page of the mapping; more than the system's for huge pages.
    page_bytes: AtomicUsize,
    /// Odd while there are covers. Changed with the list locked.
    epoch: AtomicUsize,
    is_locked: AtomicBool,
    covers: UnsafeCell<Covers>,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

// SAFETY: the list of covers is only reached through [`Slot::lock`], by one thread at a time; all else is atomic.
unsafe impl Sync for Slot {}

/// Covers, the last ones in a ring.
struct Covers {
    ring: [Cover; COVERS],
    /// Where the next one goes.
    next: usize,
    /// The epoch of the last one that the ring has lost.
    lost: usize,
}

/// Anonymous memory that was put over a part of a range.
#[derive(Clone, Copy)]
pub(super) struct Cover {
    pub(super) start: usize,
    pub(super) end: usize,
    /// Of the range, with this cover.
    epoch: usize,
    /// It is still there.
    is_there: bool,
}

const COVERS: usize = 32;
const CHUNK_SLOTS: usize = 64;

/// The table is a list of chunks that only grows.
struct Chunk {
    slots: [Slot; CHUNK_SLOTS],
    next: *const Chunk,
}

static CHUNKS: AtomicPtr<Chunk> = AtomicPtr::new(null_mut());
static FREE: Mutex<Vec<&'static Slot>> = Mutex::new(Vec::new());
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

impl Slot {
    #[allow(clippy::declare_interior_mutable_const, reason = "what each slot of a new chunk starts as")]
    const EMPTY: Slot = Slot {
        version: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page_bytes: AtomicUsize::new(0),
        epoch: AtomicUsize::new(0),
        is_locked: AtomicBool::new(false),
        covers: UnsafeCell::new(Covers::NONE),
    };

    /// Puts a mapped range of whole pages of so many bytes into the table. The first one installs the handler; `Err` when the
    /// system refuses that.
    ///
    /// # Safety
    ///
    /// Until it is given back the range is mapped, belongs to the caller, and may be replaced by other memory.
    pub(super) unsafe fn take(
        start: usize,
        bytes: usize,
        page_bytes: usize,
    ) -> std::io::Result<&'static Slot> {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        install()?;
        if free.is_empty() {
            let next = CHUNKS.load(Acquire);
            let chunk = Box::leak(Box::new(Chunk { slots: [Slot::EMPTY; CHUNK_SLOTS], next }));
            CHUNKS.store(chunk, Release);
            free.extend(chunk.slots.iter());
        }
        let slot = free.pop().expect("a chunk has slots");
        slot.set(start, start + bytes, page_bytes);
        Ok(slot)
    }

    /// Takes the range out of the table. To be called before it is unmapped.
    pub(super) fn give_back(&'static self) {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        self.set(0, 0, 0);
        free.push(self);
    }

    /// What an access compares before and after it. Odd while there are covers.
    #[inline]
    pub(super) fn epoch(&self) -> usize {
        self.epoch.load(Acquire)
    }

    /// Whether nothing was covered since an epoch. To be asked after an access: then all of it was to the memory that is mapped.
    #[inline]
    pub(super) fn is_undisturbed(&self, since: usize) -> bool {
        // The loads of the access come before the load of the epoch.
        fence(Acquire);
        since.is_multiple_of(2) && self.epoch.load(Relaxed) == since
    }

    /// Whether a cover lies, or since an epoch has lain, in a range of addresses; also when that is not known any more.
    pub(super) fn was_covered(&self, since: usize, start: usize, end: usize) -> bool {
        let covers = self.lock();
        let is_later = |epoch: usize| epoch.wrapping_sub(since).cast_signed() > 0;
        let hit = |cover: &Cover| {
            (cover.is_there || is_later(cover.epoch)) && cover.start < end && start < cover.end
        };
        is_later(covers.lost) || covers.ring.iter().any(hit)
    }

    /// Calls `uncover` for each cover, which maps the file there again and says whether it did. Returns the epoch after that,
    /// odd when covers are left.
    pub(super) fn settle(&self, mut uncover: impl FnMut(&Cover) -> bool) -> usize {
        let mut covers = self.lock();
        let mut is_left = false;
        for cover in covers.ring.iter_mut().filter(|cover| cover.is_there) {
            cover.is_there = !uncover(cover);
            is_left |= cover.is_there;
        }
        let epoch = self.epoch.load(Relaxed);
        if is_left || epoch.is_multiple_of(2) {
            return epoch;
        }
        self.epoch.store(epoch.wrapping_add(1), SeqCst);
        epoch.wrapping_add(1)
    }

    /// Puts memory over the page with an address. `false` when the system gives none.
    fn cover(&self, address: usize, start: usize, end: usize) -> bool {
        let page_bytes = self.page_bytes.load(Relaxed);
        let page = start + (address - start) / page_bytes * page_bytes;
        let mut covers = self.lock();
        let before = self.epoch.load(Relaxed);
        let epoch = before.wrapping_add(1 + (before & 1));
        // Before the memory can be seen.
        self.epoch.store(epoch, SeqCst);
        fence(SeqCst);
        if covers.ring.iter().any(|cover| cover.is_there && (cover.start..cover.end).contains(&page)) {
            // Another thread came first, and the access will find its cover.
            return true;
        }
        let has_room = covers.has_room(page);
        if has_room && put_over(page, page_bytes) {
            covers.add(page, page + page_bytes, epoch);
            return true;
        }
        // One that covers all needs no further mapping of the kernel's.
        covers.ring.iter_mut().for_each(|cover| cover.is_there = false);
        covers.add(start, end, epoch);
        put_over(start, end - start)
    }

    /// Only called with [`FREE`] locked.
    fn set(&self, start: usize, end: usize, page_bytes: usize) {
        let version = self.version.load(Relaxed);
        self.version.store(version.wrapping_add(1), Relaxed);
        fence(Release);
        self.start.store(start, Relaxed);
        self.end.store(end, Relaxed);
        self.page_bytes.store(page_bytes, Relaxed);
        *self.lock() = Covers::NONE;
        self.epoch.store(0, Relaxed);
        self.version.store(version.wrapping_add(2), Release);
    }

    /// The range, if an address lies in it. A slot that changes meanwhile is not the one that is looked for: that one
    /// is in use by the thread that faulted.
    fn range_with(&self, address: usize) -> Option<(usize, usize)> {
        let version = self.version.load(Acquire);
        let (start, end) = (self.start.load(Relaxed), self.end.load(Relaxed));
        fence(Acquire);
        let whole = version.is_multiple_of(2) && self.version.load(Relaxed) == version;
        (whole && (start..end).contains(&address)).then_some((start, end))
    }

    fn lock(&self) -> CoversGuard<'_> {
        while self.is_locked.compare_exchange_weak(false, true, Acquire, Relaxed).is_err() {
            // SAFETY: a bare system call, async-signal-safe in practice: it takes nothing and changes nothing but who runs.
            unsafe { libc::sched_yield() };
        }
        CoversGuard(self)
    }
}

/// The list of covers, locked.
struct CoversGuard<'a>(&'a Slot);

impl Deref for CoversGuard<'_> {
    type Target = Covers;

    fn deref(&self) -> &Covers {
        // SAFETY: the guard is the only one, and lends what is in it no longer than itself.
        unsafe { &*self.0.covers.get() }
    }
}

impl DerefMut for CoversGuard<'_> {
    fn deref_mut(&mut self) -> &mut Covers {
        // SAFETY: as above.
        unsafe { &mut *self.0.covers.get() }
    }
}

impl Drop for CoversGuard<'_> {
    fn drop(&mut self) {
        self.0.is_locked.store(false, Release);
    }
}

impl Covers {
    const NONE: Covers =
        Covers { ring: [Cover { start: 0, end: 0, epoch: 0, is_there: false }; COVERS], next: 0, lost: 0 };

    /// The cover that ends at an address and is there: an access that goes on over pages that are gone extends it.
    fn ending_at(&mut self, start: usize) -> Option<&mut Cover> {
        let last = (self.next + COVERS - 1) % COVERS;
        Some(&mut self.ring[last]).filter(|cover| cover.is_there && cover.end == start)
    }

    fn has_room(&mut self, start: usize) -> bool {
        self.ending_at(start).is_some() || !self.ring[self.next].is_there
    }

    fn add(&mut self, start: usize, end: usize, epoch: usize) {
        if let Some(last) = self.ending_at(start) {
            (last.end, last.epoch) = (end, epoch);
            return;
        }
        let place = &mut self.ring[self.next];
        if place.epoch != 0 {
            self.lost = place.epoch;
        }
        *place = Cover { start, end, epoch, is_there: true };
        self.next = (self.next + 1) % COVERS;
    }
}

/// Installs the handler, once.
fn install() -> std::io::Result<()> {
    if BEFORE.get().is_some() {
        return Ok(());
    }
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: sigaction with no new action only writes the old one to where it is told; `before` has room for it.
    if unsafe { libc::sigaction(libc::SIGBUS, null(), before.as_mut_ptr()) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: sigaction succeeded and filled it; all zeros is a value of this plain structure anyway.
    let before = unsafe { before.assume_init() };
    // The handler must find it from its first run on.
    BEFORE.get_or_init(|| before);
    let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_sigbus;
    let action = libc::sigaction {
        sa_sigaction: handler as usize,
        // On the alternate stack where a thread has one: the handler before may be for stack overflows.
        sa_flags: libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART,
        ..before
    };
    // SAFETY: the action has a handler of the type that SA_SIGINFO asks for, which does only what is
    // async-signal-safe.
    if unsafe { libc::sigaction(libc::SIGBUS, &action, null_mut()) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands a handler with SA_SIGINFO a valid siginfo, which nobody else knows.
    let about = unsafe { &*info };
    let code = about.si_code;
    if matches!(code, libc::BUS_ADRERR | libc::BUS_OBJERR | libc::BUS_MCEERR_AR) {
        // SAFETY: with these codes the address is filled in.
        let address = unsafe { about.si_addr() };
        if tear(address as usize) {
            return;
        }
    }
    pass_on(signal, code, info, context);
}

/// Puts memory where a mapping lost it. `false` when the address is in none of them.
pub(super) fn tear(address: usize) -> bool {
    let mut chunk: *const Chunk = CHUNKS.load(Acquire);
    // SAFETY: the pointers are null or to chunks that were leaked, complete before they were linked.
    while let Some(Chunk { slots, next }) = unsafe { chunk.as_ref() } {
        for slot in slots {
            if let Some((start, end)) = slot.range_with(address) {
                return slot.cover(address, start, end);
            }
        }
        chunk = *next;
    }
    false
}

fn put_over(start: usize, bytes: usize) -> bool {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: points to this thread's errno, which the interrupted code may be about to read.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    // SAFETY: the range is in the table or whole pages of one that is, so by the contract of `Slot::take` it is mapped and may
    // be replaced; the thread that faulted keeps it from being given back. Accesses to it go through raw pointers and expect any bytes.
    let mapped = unsafe { libc::mmap(start as *mut c_void, bytes, protection, flags, -1, 0) };
    // SAFETY: as above.
    unsafe { *errno = saved };
    mapped != libc::MAP_FAILED
}

/// Does what would have been done without this handler.
fn pass_on(signal: c_int, code: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let sent = code <= 0;
    match BEFORE.get() {
        Some(before) if before.sa_sigaction == libc::SIG_IGN && sent => {}
        Some(before) if before.sa_sigaction != libc::SIG_DFL && before.sa_sigaction != libc::SIG_IGN => {
            if before.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: whoever installed it said by SA_SIGINFO that it is a function of this type.
                let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                    unsafe { std::mem::transmute(before.sa_sigaction) };
                handler(signal, info, context);
            } else {
                // SAFETY: likewise, without SA_SIGINFO of this one.
                let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(before.sa_sigaction) };
                handler(signal);
            }
        }
        _ => {
            // A fault happens again when this returns; a signal that was sent has to be sent again.
            // SAFETY: signal() is async-signal-safe, SIG_DFL a valid disposition.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
            if sent {
                // SAFETY: raise() is async-signal-safe; the signal is delivered when the handler returns.
                unsafe { libc::raise(signal) };
            }
        }
    }
}
