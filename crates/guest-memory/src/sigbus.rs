//! Outliving a file that is cut short under its mapping.
//!
//! Whoever maps a peer's file is at the peer's mercy: when the file is truncated, a touch of what is gone raises
//! SIGBUS, whose default is the end of the process. Three ways were weighed. System calls that fail instead of
//! faulting (`process_vm_readv` on oneself, `pread` and `pwrite`) cost each small access several times the access
//! itself. Memory sealed against shrinking (F_SEAL_SHRINK) cannot be asked for: QEMU does not seal. So there is a
//! handler for the signal, which costs nothing until it is needed:
//!
//! - Mapped ranges are kept in a table that the handler can read without a lock.
//! - On a fault in one of them, the handler marks the range as torn and then puts anonymous memory over all of it, in
//!   one `mmap`, a bare system call and so async-signal-safe. Where the system does not promise so much memory
//!   (`vm.overcommit_memory` 2) a page must do, and the next page faults again. The access goes on, into nothing.
//! - Each access looks at the mark afterwards and fails when it is set; later ones fail at once. The mark is set before
//!   the anonymous memory can be seen, so nobody takes zeros for the guest's memory.
//! - A fault anywhere else, and a SIGBUS that somebody sent, goes to the handler that was there before, or to the
//!   default action.
//!
//! Threads that use guest memory must leave SIGBUS unblocked: the kernel ends a process that faults with it blocked.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

/// A mapped range in the table, from [`Slot::take`] to [`Slot::give_back`].
#[derive(Debug)]
pub(super) struct Slot {
    /// Odd while the range is being changed.
    version: AtomicUsize,
    start: AtomicUsize,
    /// First address beyond; equal to `start` for a slot that is not taken.
    end: AtomicUsize,
    torn: AtomicBool,
}

const CHUNK_SLOTS: usize = 64;

/// The table is a list of chunks that only grows.
struct Chunk {
    slots: [Slot; CHUNK_SLOTS],
    next: *const Chunk,
}

static CHUNKS: AtomicPtr<Chunk> = AtomicPtr::new(null_mut());
static FREE: Mutex<Vec<&'static Slot>> = Mutex::new(Vec::new());
/// Known before the handler runs, which must not ask for it.
static PAGE_BYTES: AtomicUsize = AtomicUsize::new(4096);
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

impl Slot {
    #[allow(clippy::declare_interior_mutable_const, reason = "what each slot of a new chunk starts as")]
    const EMPTY: Slot = Slot {
        version: AtomicUsize::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        torn: AtomicBool::new(false),
    };

    /// Puts a mapped range into the table. The first one installs the handler; `Err` when the system refuses that.
    ///
    /// # Safety
    ///
    /// Until it is given back the range is mapped, belongs to the caller, and may be replaced by other memory.
    pub(super) unsafe fn take(start: usize, bytes: usize) -> std::io::Result<&'static Slot> {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        install()?;
        if free.is_empty() {
            let next = CHUNKS.load(Acquire);
            let chunk = Box::leak(Box::new(Chunk { slots: [Slot::EMPTY; CHUNK_SLOTS], next }));
            CHUNKS.store(chunk, Release);
            free.extend(chunk.slots.iter());
        }
        let slot = free.pop().expect("a chunk has slots");
        slot.set(start, start + bytes);
        Ok(slot)
    }

    /// Takes the range out of the table. To be called before it is unmapped.
    pub(super) fn give_back(&'static self) {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        self.set(0, 0);
        free.push(self);
    }

    /// Whether the memory is gone. To be asked after an access: if not, all of it was to the memory that was mapped.
    pub(super) fn is_torn(&self) -> bool {
        // The loads of the access come before the load of the mark.
        fence(Acquire);
        self.torn.load(Relaxed)
    }

    /// Only called with [`FREE`] locked.
    fn set(&self, start: usize, end: usize) {
        let version = self.version.load(Relaxed);
        self.version.store(version.wrapping_add(1), Relaxed);
        fence(Release);
        self.start.store(start, Relaxed);
        self.end.store(end, Relaxed);
        self.torn.store(false, Relaxed);
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
    PAGE_BYTES.store(rustix::param::page_size(), Relaxed);
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
fn tear(address: usize) -> bool {
    let mut chunk: *const Chunk = CHUNKS.load(Acquire);
    // SAFETY: the pointers are null or to chunks that were leaked, complete before they were linked.
    while let Some(Chunk { slots, next }) = unsafe { chunk.as_ref() } {
        for slot in slots {
            if let Some((start, end)) = slot.range_with(address) {
                slot.torn.store(true, SeqCst);
                let page_bytes = PAGE_BYTES.load(Relaxed);
                return cover(start, end - start) || cover(address & !(page_bytes - 1), page_bytes);
            }
        }
        chunk = *next;
    }
    false
}

fn cover(start: usize, bytes: usize) -> bool {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: points to this thread's errno, which the interrupted code may be about to read.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let saved = unsafe { *errno };
    // SAFETY: the range is in the table or a page of one that is, so by the contract of `Slot::take` it is mapped and may
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
