//! A harvest: all of the memory is read and compared, by several threads.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use limosa_protocol::bitmap::DirtyBitmap;

use super::Fingerprinted;
use crate::memory::{GuestPages, PAGE_BYTES, whole_pages};

/// Bytes that are read and compared at once; they fit in a processor's cache.
const PIECE_BYTES: u64 = 256 << 10;
/// Bytes that a thread takes at once. One system call for these finds a hole.
pub(super) const SHARE_BYTES: u64 = 64 * PIECE_BYTES;
/// The most threads that compare at once.
const THREADS_MAX: usize = 8;

impl<P: GuestPages> Fingerprinted<P> {
    /// Marks every page whose content differs from what was read of it last.
    pub(super) fn compare(&self, dirty: &DirtyBitmap) -> io::Result<()> {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
        let shares = usize::try_from(self.bytes.div_ceil(SHARE_BYTES)).unwrap_or(usize::MAX);
        self.compare_on(threads.min(shares), thread::Builder::new, dirty)
    }

    /// Compares on this many threads, the calling one included, or on as many as the system starts. A panic in one of
    /// them is passed on to the caller.
    pub(super) fn compare_on(
        &self,
        threads: usize,
        thread: impl Fn() -> thread::Builder,
        dirty: &DirtyBitmap,
    ) -> io::Result<()> {
        let next = AtomicU64::new(0);
        thread::scope(|scope| {
            let work = || {
                // Ends the other threads early when this one fails or panics.
                let mut end = EndAll { next: &next, armed: true };
                let compared = self.compare_shares(&next, dirty);
                end.armed = compared.is_err();
                compared
            };
            let others: Vec<_> = (1..threads)
                .map_while(|_| thread().name("limosa: compare".into()).spawn_scoped(scope, work).ok())
                .collect();
            let own = work();
            // All threads are joined before the first failure is passed on.
            let joined: Vec<_> = others.into_iter().map(|other| other.join()).collect();
            joined
                .into_iter()
                .map(|other| other.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .fold(own, io::Result::and)
        })
    }

    /// Compares shares that no other thread has taken, until all are taken.
    fn compare_shares(&self, next: &AtomicU64, dirty: &DirtyBitmap) -> io::Result<()> {
        let mut buffer = vec![0; PIECE_BYTES.min(self.bytes) as usize];
        loop {
            let at = next.fetch_add(SHARE_BYTES, Ordering::Relaxed);
            if at >= self.bytes {
                return Ok(());
            }
            self.compare_share(at..at.saturating_add(SHARE_BYTES).min(self.bytes), &mut buffer, dirty)?;
        }
    }

    fn compare_share(&self, share: Range<u64>, buffer: &mut [u8], dirty: &DirtyBitmap) -> io::Result<()> {
        let mut at = share.start;
        while at < share.end {
            let rest = at..share.end;
            let data = whole_pages(self.pages.data(rest.clone())?, &rest).unwrap_or(share.end..share.end);
            self.prints.mark_others(at / PAGE_BYTES..data.start / PAGE_BYTES, dirty);
            at = data.start;
            while at < data.end {
                let bytes = &mut buffer[..PIECE_BYTES.min(data.end - at) as usize];
                self.pages.read(at, bytes)?;
                for (page, bytes) in (at / PAGE_BYTES..).zip(bytes.chunks_exact(PAGE_BYTES as usize)) {
                    if !self.prints.is(page, self.key.print(bytes)) {
                        dirty.set(page);
                    }
                }
                at += bytes.len() as u64;
            }
        }
        Ok(())
    }
}

/// Leaves nothing for the other threads when it is dropped armed.
struct EndAll<'a> {
    next: &'a AtomicU64,
    armed: bool,
}

impl Drop for EndAll<'_> {
    fn drop(&mut self) {
        if self.armed {
            // Beyond all shares, and far from where the counter wraps.
            self.next.store(u64::MAX / 2, Ordering::Relaxed);
        }
    }
}
