//! The kernel's own signal on an eventfd, by way of its asynchronous I/O (`io_submit(2): IOCB_FLAG_RESFD`).
//!
//! A `write` to an eventfd waits while the counter is full, unless the descriptor is non-blocking; any process that
//! shares the descriptor may change that flag and the counter at any time, and `pwritev2` with RWF_NOWAIT is refused
//! with EOPNOTSUPP. The kernel itself adds to an eventfd without waiting, whatever its flag says, when an I/O request
//! that names the eventfd completes. So a request that is complete at once, a poll of a file that is always ready,
//! signals the eventfd within `io_submit`, on the caller's thread.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::thread::yield_now;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};

/// `struct iocb` (`linux/aio_abi.h`).
#[derive(Default)]
#[repr(C)]
struct Request {
    data: u64,
    /// The key, which the kernel writes, and flags of reads and writes, in an order that depends on the byte order.
    key_and_rw_flags: [u32; 2],
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

/// `struct io_event`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Completion {
    _fields: [u64; 4],
}

const POLL: u16 = 5;
const RESFD: u32 = 1;
const POLLIN: u64 = 1;

/// Completions that the kernel has room for.
const ROOM: usize = 256;
/// They are taken when about so many have come.
const TAKEN_AT: u32 = 64;

/// A context of the kernel's asynchronous I/O. It lives as long as the process.
pub(crate) struct Aio {
    context: usize,
    /// A file that can always be read.
    ready: OwnedFd,
    /// Requests so far.
    submitted: AtomicU32,
}

impl Aio {
    /// `None` where the kernel has none, has no room for another context, or a sandbox keeps it away.
    pub(crate) fn new() -> Option<Aio> {
        let ready = memfd_create("limosa-ready", MemfdFlags::CLOEXEC).ok()?;
        let mut context = 0_usize;
        // SAFETY: the kernel writes one word, the context's address, to `context`, which outlives the call.
        if unsafe { libc::syscall(libc::SYS_io_setup, ROOM, &raw mut context) } != 0 {
            return None;
        }
        let aio = Aio { context, ready, submitted: AtomicU32::new(0) };
        aio.works().then_some(aio)
    }

    /// Whether a request really signals before it returns.
    fn works(&self) -> bool {
        let Ok(event) = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK) else { return false };
        let mut count = [0; 8];
        self.signal(event.as_fd()).is_ok()
            && rustix::io::read(&event, &mut count).is_ok()
            && count == 1_u64.to_ne_bytes()
    }

    /// Adds 1 to an eventfd, or leaves it as it is when its counter is full. EINVAL for another file.
    pub(crate) fn signal(&self, event: BorrowedFd<'_>) -> Result<(), rustix::io::Errno> {
        let mut request = Request {
            opcode: POLL,
            fd: self.ready.as_raw_fd().unsigned_abs(),
            buffer: POLLIN,
            flags: RESFD,
            event_fd: event.as_raw_fd().unsigned_abs(),
            ..Request::default()
        };
        if self.submitted.fetch_add(1, Relaxed) % TAKEN_AT == TAKEN_AT - 1 {
            self.take();
        }
        loop {
            let mut requests = [&raw mut request];
            // SAFETY: `requests` is an array of one pointer to a request, and both outlive the call. The kernel copies the
            // request, and writes its key to it. The request names no memory: for a poll `buffer` is a set of events.
            let done = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1, requests.as_mut_ptr()) };
            if done == 1 {
                return Ok(());
            }
            match rustix::io::Errno::from_io_error(&std::io::Error::last_os_error()) {
                // No room for its completion: others signal at the same time.
                Some(rustix::io::Errno::AGAIN) => {
                    self.take();
                    yield_now();
                }
                Some(rustix::io::Errno::INTR) => {}
                other => return Err(other.unwrap_or(rustix::io::Errno::IO)),
            }
        }
    }

    /// Takes the completions that are there. They say nothing.
    fn take(&self) {
        let mut completions = [Completion::default(); ROOM];
        let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let (least, most) = (0_usize, ROOM);
        // SAFETY: the kernel writes at most `most` completions to `completions`, which is that long, and reads `at_once`;
        // both outlive the call. Being asked for at least 0 of them it does not wait.
        unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                least,
                most,
                completions.as_mut_ptr(),
                &raw const at_once,
            )
        };
    }
}
